"""Experiment: one or several modes of the same training, and a report."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from . import checkpoint, report
from .launch import Worker, launch
from .options import Options
from .training import Run, Task, Training

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def start(
    parser: argparse.ArgumentParser,
    options: Options,
    task_type: Callable[[Any], Task],
    task_options: DataclassInstance,
) -> None:
    """Check the checkpoint of `--resume`, then run the experiment on every worker.

    Args:
        parser: Parser that reports errors of the command line.
        options: Shared options.
        task_type: Function that makes the task from `task_options`, once per worker.
        task_options: Options of the task, a dataclass.
    """
    settings = checkpoint.fingerprint(options, **asdict(task_options))
    if options.resume:
        mismatch = checkpoint.mismatch(options.resume, settings)
        if mismatch:
            parser.error(mismatch)
    launch(_experiment, options.workers, options.device, task_type, task_options, options, settings)


def _experiment(
    worker: Worker,
    task_type: Callable[[Any], Task],
    task_options: DataclassInstance,
    options: Options,
    settings: str,
) -> None:
    task = task_type(task_options)
    if worker.is_main:
        parameters = sum(parameter.numel() for parameter in task.build_model().parameters())
        print(
            f"{task.description}\n"
            f"{parameters:,} parameters, {worker.world_size} workers on {worker.device.type},"
            f" {options.batch_size} x {task.units_per_sample} {task.unit} per worker and step,"
            f" {options.optimizer}, learning rate {options.lr:g}",
            flush=True,
        )
    runs = []
    for mode in options.modes:
        training = Training(task, mode, options, worker, settings)
        runs.append(training.run())
        if worker.is_main and training.state is not None:
            print(training.state.summary(), flush=True)
    if worker.is_main:
        _report(runs, task, options)


def _report(runs: list[Run], task: Task, options: Options) -> None:
    print(f"\n{report.table(runs, task)}")
    print("MB: gradients of one worker, the whole run; fp32 is 4 bytes a parameter each way.")
    if options.plot:
        report.plot(options.plot, runs, task)
    if options.json:
        report.write_json(options.json, runs, task, options)
    if options.csv:
        report.write_csv(options.csv, runs)
    for path in filter(None, (options.plot, options.json, options.csv, options.checkpoint)):
        print(f"Wrote {path}")
