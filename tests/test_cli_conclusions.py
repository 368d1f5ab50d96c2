"""Test the conclusions of plan and bench: unknowns, noise, quality, and the next command."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from effadam_hook import reduced_betas
from effadam_hook.cli import main, plan
from effadam_hook.cli.conclusion import conclusion_of
from effadam_hook.cli.ranks import overload
from effadam_hook.cli.rows import Row
from effadam_hook.exchange.node_description import HOST_VARIABLE
from effadam_hook.planner.method import Method
from effadam_hook.planner.quality import DENSE_LOSS, LOSSES, REDUCED_LOSSES, describe_quality
from harness import run_ranks
from test_cli import free_port, on_rank, on_ranks

ALGORITHM = Path(__file__).parent.parent / "docs" / "algorithm.md"
BENCHMARKS = ALGORITHM.with_name("benchmarks.md")
DESCRIBED = ("plan", "--parameters", "0.2M", "--methods", "fp32,lloyd4", "--nodes", "2")


def row(method: str, *ratios: float, ms: float = 100.0, **values: Any) -> Row:
    """A row of a method whose rounds had these ratios to a dense step of 100 ms."""
    middle = sorted(ratios)[len(ratios) // 2]
    given = {"slowest_round_ms": ms * 1.02, "fastest_round_ms": ms, "rounds": len(ratios), **values}
    step_ms = ms * middle
    return Row(
        method, step_ms, step_ms, step_ms, middle, min(ratios), max(ratios), 1, 1, 1, **given
    )


DENSE = row("fp32", 1.0, 1.0, 1.0)


def without_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_a_described_cluster_is_calculated_without_a_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_launcher(monkeypatch)
    more = ("--ranks-per-node", "4", "--gbit", "0.1", "--compute-ms", "5")
    assert main([*DESCRIBED, *more, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["world_size"], found["nodes"], found["ranks_per_node"]) == (8, 2, 4)
    assert [one["topology"] for one in found["predictions"]] == ["", "hierarchical"]
    assert found["link"] is None and "described, not measured" in found["conclusion"][0]
    recommended = found["recommended"]
    assert recommended["compression_pays"] and 'topology="hierarchical"' in recommended["code"]
    assert any("+0.0023 nats" in line for line in found["conclusion"])
    assert found["conclusion"][-1].startswith("Next: train")


def test_kernels_of_described_gpus_are_calculated_and_not_those_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_launcher(monkeypatch)
    monkeypatch.setattr(plan, "measure_speed", None)
    monkeypatch.setattr(plan, "measure_compute", None)
    monkeypatch.setattr(os, "getloadavg", lambda: (1e3, 0.0, 0.0))
    methods = ("plan", "--mlp", "3x64x2", "--methods", "fp32,fp16,powersgd2,lloyd4,update:sign")
    given = (*methods, "--nodes", "2", "--ranks-per-node", "4", "--gbit", "0.1", "--json")
    found = []
    for rate in ("1000", "500"):
        assert main([*given, "--copy-gbyte", rate, "--compute-ms", "5"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert (found[0]["device"], found[0]["backend"]) == ("cuda", "nccl")
    assert "copies 1000 GB/s" in found[0]["kernels"]
    assert not any("busy" in line for line in found[0]["conclusion"])
    assert any("moves every byte once" in line for line in found[0]["conclusion"])
    fast, slow = (one["speeds"] for one in found)
    # Gradient and residual are read, residual and 4 bits are written: 12.5 bytes an element.
    assert fast["lloyd4"]["encode_s"] == pytest.approx(12.5e-12)
    assert fast["update:sign"]["encode_s"] == pytest.approx((28 + 1 / 8) * 1e-12)
    for name, speed in fast.items():
        for part in ("encode_s", "decode_s"):
            assert slow[name][part] == pytest.approx(2 * speed[part]) and speed[part] > 0
    # Nor is the computation measured here, and "cuda" needs no GPU here.
    assert main([*given, "--copy-gbyte", "1000", "--device", "cuda"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["compute"]["backward_s"] == 0
    assert found["conclusion"][-1].startswith("Next: add --compute-ms")
    assert "--model" not in found["conclusion"][-1]


def test_the_fastest_dense_decides_up_to_which_compute_time_a_method_pays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_launcher(monkeypatch)
    given = ("plan", "--parameters", "124M", "--nodes", "4", "--ranks-per-node", "8", "--json")
    more = ("--gbit", "100", "--copy-gbyte", "2000", "--methods", "fp32,lloyd4@1")
    assert main([*given, *more]) == 0
    (line,) = (
        one
        for one in json.loads(capsys.readouterr().out)["conclusion"]
        if one.startswith("No recommendation")
    )
    limit_ms = float(re.search(r"less than about (\d+) ms", line)[1])  # type: ignore[index]
    for share, pays in ((0.9, True), (1.1, False)):
        assert main([*given, *more, "--compute-ms", str(share * limit_ms)]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["recommended"]["compression_pays"] is pays
    assert main([*given, *more[:-1], "fp32,lloyd4", "--bucket-mb", "5", "--compute-ms", "50"]) == 0
    assert '--methods "fp32@5,lloyd4@5"' in json.loads(capsys.readouterr().out)["conclusion"][-1]


@pytest.mark.parametrize(("load", "is_busy"), [(0.5, False), (1.5, True)])
def test_plan_on_a_busy_machine_says_so(
    load: float,
    is_busy: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    without_launcher(monkeypatch)
    monkeypatch.setattr(os, "getloadavg", lambda: (load * (os.cpu_count() or 1), 0.0, 0.0))
    more = ("--gbit", "0.1", "--compute-ms", "5", "--device", "cpu")
    assert main([*DESCRIBED, *more, "--json"]) == 0
    conclusion = json.loads(capsys.readouterr().out)["conclusion"]
    assert any("Repeat on idle machines" in line for line in conclusion) is is_busy


def test_a_system_without_a_load_is_not_called_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "getloadavg", raising=False)
    assert overload() is None


def test_without_a_compute_time_plan_says_up_to_which_one_it_pays_and_recommends_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_launcher(monkeypatch)
    assert main([*DESCRIBED, "--gbit", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "No recommendation: the compute time of a step is unknown." in out
    assert re.search(r"if a step computes for less than about \d", out)
    assert "Next: add --compute-ms" in out and "attach(" not in out


@pytest.mark.parametrize(
    ("arguments", "launched", "said"),
    [
        (("--gbit", "1"), True, "Given under a launcher: --nodes, --gbit"),
        ((), False, "Given: --nodes. Without a launcher --nodes and --gbit must both be given"),
        (("--gbit", "0"), False, "Invalid --gbit: 0.0. Must be above 0"),
        (("--copy-gbyte", "5"), True, "Given under a launcher: --nodes, --copy-gbyte"),
        (
            ("--gbit", "1", "--copy-gbyte", "nan"),
            False,
            "Invalid --copy-gbyte: nan. Must be above 0",
        ),
        (("--gbit", "1", "--ranks-per-node", "0"), False, "Must be at least 2 and 1"),
    ],
)
def test_a_cluster_that_is_described_by_halves_is_refused(
    arguments: tuple[str, ...],
    launched: bool,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    without_launcher(monkeypatch)
    if launched:
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(name, "2")
    assert main([*DESCRIBED, *arguments]) == 2
    assert said in capsys.readouterr().err


def test_plan_on_one_machine_says_that_it_measured_loopback() -> None:
    arguments = ("--parameters", "0.1M", "--methods", "fp32,lloyd4", "--compute-ms", "50")
    code, out, _ = on_ranks(2, "plan", *arguments)[0]
    assert code == 0
    assert "All 2 ranks are on one machine" in out and "not a network" in out


def on_rank_of_two_hosts(rank: int, world_size: int, port: int, argv: list[str]) -> Any:
    os.environ[HOST_VARIABLE] = f"host{rank // 2}"
    return on_rank(rank, world_size, port, argv)


def test_plan_measures_inside_and_between_nodes() -> None:
    argv = "plan --json --parameters 0.1M --compute-ms 5 --methods fp32,lloyd4,lloyd4/sharded"
    results = run_ranks(
        on_rank_of_two_hosts, 4, free_port(), argv.split(), timeout=120.0, backend=None
    )
    code, out, err = results[0]
    assert code == 0, err
    found = json.loads(out)
    assert (found["nodes"], found["ranks_per_node"], found["on_one_machine"]) == (2, 2, False)
    assert found["link"]["inside_bytes_s"] > 0 and found["link"]["payload_bytes_s"] > 0
    legs = {leg["name"]: leg for leg in found["link"]["legs"]}
    stages = ("mean", "up", "down", "gather")
    assert legs.keys() == {
        *("all_reduce", "up/sharded", "down/sharded"),
        *(f"{stage}/hierarchical" for stage in stages),
    }
    for stage in ("mean", "gather"):
        assert legs[f"{stage}/hierarchical"]["busiest_bytes"] == 0
        assert legs[f"{stage}/hierarchical"]["overhead_s"] > 0
    assert legs["gather/hierarchical"]["inside_bytes"] > 0
    assert found["speeds"]["lloyd4"]["pack_s"] > 0 and found["speeds"]["lloyd4"]["mean_s"] > 0


def test_bench_ends_with_the_best_method_its_quality_and_the_line_of_code() -> None:
    lines = conclusion_of(
        [DENSE, row("lloyd4", 0.50, 0.52, 0.51), row("sign", 0.9, 0.5, 1.2)], False
    )
    assert lines[0].startswith(
        "lloyd4: 0.51 of fp32, faster (rounds 0.50 to 0.52; fp32 itself varies"
    )
    assert "sign: 0.90 of fp32, no difference beyond the noise" in lines[1]
    assert lines[-2].startswith(
        "Best of these: lloyd4. Quality: on the text example lloyd4 ends +0.0023"
    )
    assert lines[-1].startswith('Next: state = effadam_hook.attach(ddp_model, quantizer="lloyd4"')


def test_bench_keeps_dense_where_nothing_is_faster_beyond_the_noise() -> None:
    lines = conclusion_of(
        [DENSE, row("lloyd4", 0.95, 1.01, 0.99), row("fp16", 1.3, 1.2, 1.4)], False
    )
    assert "lloyd4: 0.99 of fp32, no difference" in lines[0]
    assert "fp16: 1.30 of fp32, SLOWER" in lines[1]
    assert lines[-1].startswith("Keep DDP's own all-reduce")


def test_a_difference_smaller_than_the_swing_of_dense_is_noise() -> None:
    swinging = row("fp32", 1.0, 1.0, 1.0, slowest_round_ms=160.0)
    lines = conclusion_of([swinging, row("lloyd4", 0.70, 0.72, 0.71)], False)
    assert "no difference beyond the noise" in lines[0] and "varies by 60%" in lines[0]
    assert lines[-1].startswith("Keep DDP's own all-reduce")


def test_bench_says_what_it_cannot_know() -> None:
    lines = conclusion_of([row("fp32", 1.0), row("lloyd4", 0.5)], True)
    assert "nothing passed through a network" in lines[0]
    assert any("1 round can hide the noise" in line and "--rounds 3" in line for line in lines)
    (no_dense,) = conclusion_of([row("lloyd4", float("nan"))], False)
    assert "add fp32 to --methods" in no_dense


def test_the_quality_that_is_quoted_is_the_measured_one() -> None:
    tables = ALGORITHM.read_text().split("With β₁ = .9 in all cells")
    cells = [
        {
            line.split("|")[1].strip(" `"): [cell.strip(" *") for cell in line.split("|")[2:-1]]
            for line in text.splitlines()
            if line.startswith("| `")
        }
        for text in tables
    ]
    assert f"mean\n{DENSE_LOSS['update']}" in tables[0]
    assert f"dense {DENSE_LOSS['gradient']}" in tables[1]
    for quantizer, loss in LOSSES["gradient"].items():
        assert cells[1][quantizer][0] == f"{loss:.4f}"
    for quantizer, loss in REDUCED_LOSSES["gradient"].items():
        beta1, _ = reduced_betas((0.9, 0.999), quantizer)
        label = f"`{quantizer}`, β₁ {beta1:g}".replace("0.", ".")
        assert f"| {label} | {loss:.4f} |" in BENCHMARKS.read_text()
    for quantizer, loss in LOSSES["update"].items():
        assert cells[0][quantizer][3].replace("*", "").startswith(f"{loss:.4f} ")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fp32", ""),
        ("lloyd4", "less than the seed changes"),
        ("lloyd3", "about as much as another seed"),
        ("lloyd2/sharded", "a clear loss"),
        (
            "lloyd2/sharded",
            "With effadam_hook.reduced_betas it ends -0.0406 from dense",
        ),
        ("update:lloyd2", "measured with tuned rates and momentum"),
        ("log3", "has no measured loss"),
        ("fp16", "not measured"),
    ],
)
def test_quality_is_described_by_the_spread_of_dense_seeds(name: str, said: str) -> None:
    assert said in describe_quality(Method.parse(name))
