"""Counterexample: Adam diverges with a constant second-moment weight and converges with a schedule.

    python examples/counterexample.py

Minimize E[g] x over x in [-1, 1], where the gradient g is 1010 with probability .01 and -10 with
probability .99. Its mean is +0.2, so the optimum is -1. The rare large gradient also increases the
second moment by which it is divided, in proportion to 1 - theta. With a constant theta the frequent
small gradients therefore dominate, and x ends at +1. With theta_t = 1 - theta/t this effect vanishes,
and x converges to -1.

For each schedule the program prints which of the convergence conditions hold (see
`effadam_hook.optim.schedules`) and the final x for several random seeds. It plots the paths in
`outputs/counterexample.png`.

Source: the counterexample of "Towards Practical Adam", arXiv 2101.05471.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np

from effadam_hook.optim.schedules import PowerSchedule, Schedule, check_convergence

LARGE, SMALL, PROBABILITY = 1010.0, -10.0, 0.01
OPTIMUM = -1.0
POINTS = 400  # per path in the plot


def run(schedule: Schedule, steps: int, seed: int, eps: float = 1e-8) -> np.ndarray:
    """Run Generic Adam without momentum on the counterexample.

    Args:
        schedule: Schedule of alpha_t and theta_t.
        steps: Number of steps.
        seed: Random seed of the gradients.
        eps: Initial second moment.

    Returns:
        x after every step, starting from 0.
    """
    gradients = np.where(np.random.default_rng(seed).random(steps) < PROBABILITY, LARGE, SMALL)
    path = np.empty(steps)
    x, v = 0.0, eps
    for step, gradient in enumerate(gradients.tolist(), start=1):
        theta = schedule.theta(step)
        v = theta * v + (1 - theta) * gradient * gradient
        x = min(1.0, max(-1.0, x - schedule.alpha(step) * gradient / math.sqrt(v)))
        path[step - 1] = x
    return path


def plot(paths: dict[str, list[np.ndarray]], path: Path) -> None:
    """Plot the paths of every schedule."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for index, (label, runs) in enumerate(paths.items()):
        for number, x in enumerate(runs):
            steps = np.unique(np.linspace(0, len(x) - 1, POINTS).astype(int))
            axes.plot(
                steps + 1, x[steps], color=f"C{index}", alpha=0.7, label=None if number else label
            )
    axes.axhline(OPTIMUM, color="gray", linestyle=":", label="optimum")
    axes.set(xlabel="step", ylabel="x", title="1010 with p = .01, -10 with p = .99")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Run all schedules, print the results and plot the paths."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1_000_000, help="default %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--plot", type=Path, default=Path("outputs/counterexample.png"))
    options = parser.parse_args()
    if options.steps < 16 or options.seeds < 1:
        parser.error("--steps must be at least 16 and --seeds at least 1")
    schedules = {
        "alpha/sqrt(t), theta = .9": PowerSchedule(1.0, 0.5, 0.1, 0.0),
        "alpha/sqrt(t), theta = .99": PowerSchedule(1.0, 0.5, 0.01, 0.0),
        "alpha/sqrt(t), theta = 1 - .9/t": PowerSchedule(1.0, 0.5, 0.9, 1.0),
    }
    paths: dict[str, list[np.ndarray]] = {}
    for label, schedule in schedules.items():
        paths[label] = [run(schedule, options.steps, seed) for seed in range(options.seeds)]
        ends = ", ".join(f"{x[-1]:+.3f}" for x in paths[label])
        print(f"{label}: x ends at {ends}; the optimum is {OPTIMUM:+.0f}")
        print(f"{check_convergence(schedule, options.steps, beta=0.0)}\n")
    plot(paths, options.plot)
    print(f"Wrote {options.plot}")


if __name__ == "__main__":
    main()
