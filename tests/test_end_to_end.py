"""The end-to-end benchmark: what it refuses to report, and how cells become a table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from end_to_end import table
from lab_run import LabRun
from netlab import Link

from effadam_hook.cli.benchmark_run import Cell
from effadam_hook.cli.environment import kernel_build
from effadam_hook.cli.kernel_check import KernelsError, KernelsUsed, check_kernels
from effadam_hook.kernels import cpu
from effadam_hook.planner.method import Method, expand_names
from effadam_hook.planner.workloads import Workload

FUSED = KernelsUsed("cpu", "abc", "abc")


def test_one_build_of_the_fused_kernels_on_all_ranks_is_recorded() -> None:
    assert check_kernels("lloyd4", [FUSED] * 4) == "cpu abc"


def test_the_reference_kernels_are_not_reported_even_on_a_single_rank() -> None:
    slow = KernelsUsed("reference", "abc", "abc")
    with pytest.raises(KernelsError, match=r"lloyd4 ran on the reference.*cpu, reference, cpu, by"):
        check_kernels("lloyd4", [FUSED, slow, FUSED])


@pytest.mark.parametrize(
    "other",
    [
        KernelsUsed("cpu", "abc", "def"),
        KernelsUsed("cpu", "def", "def"),
        KernelsUsed("cpu", "none", "abc"),
        KernelsUsed("triton", "abc", "abc"),
    ],
)
def test_kernels_that_change_or_differ_between_ranks_are_not_reported(other: KernelsUsed) -> None:
    with pytest.raises(KernelsError, match="did not run on one build"):
        check_kernels("lloyd4", [FUSED, other])


def test_a_rebuilt_library_is_another_build(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "kernels" / "cpu.py"))
    assert kernel_build() == "none"
    library = tmp_path / "kernels" / "_cpu.abi.so"
    library.parent.mkdir()
    library.write_bytes(b"one")
    first = kernel_build()
    library.write_bytes(b"two")
    assert len({"none", first, kernel_build()}) == 3


def cell(number: int, method: str, step_s: list[float], sent: float = 0.0) -> Cell:
    return Cell(
        round=number,
        method=method,
        kernels="",
        step_s=step_s,
        cpu_s=0.1,
        sent_bytes=[sent, 0.0],
        received_bytes=[0.0, sent],
    )


def test_a_ratio_compares_within_a_round_and_a_floor_is_the_busiest_link_s() -> None:
    cells = [
        cell(0, "fp32", [1.0, 1.0, 9.0], 25e6),
        cell(0, "lloyd4/sharded", [0.5, 0.5, 0.5], 2.5e6),
        cell(1, "lloyd4/sharded", [1.0, 1.0, 1.0], 2.5e6),
        cell(1, "fp32", [2.0, 2.0, 2.0], 25e6),
    ]
    dense, ours = table(cells, Link(200e6))
    assert (dense.method, ours.method) == ("fp32", "lloyd4/sharded")
    assert (dense.ratio, ours.ratio) == (1.0, 0.5)
    assert (dense.floor_ms, ours.floor_ms) == (1000.0, 100.0)
    assert (ours.median_ms, ours.slowest_round_ms, ours.cpu_ms) == (750.0, 1000.0, 100.0)


def test_every_round_measures_every_method_and_starts_with_another_one() -> None:
    run = LabRun(("a", "b", "c"), rounds=3, warmup=1, steps=1, workload=Workload())
    cells = run.cells()
    assert len(set(cells)) == 9
    assert [cells[i][1] for i in (0, 3, 6)] == ["a", "b", "c"]
    assert LabRun.from_json(run.to_json()) == run


def test_names_with_braces_stand_for_each_of_them() -> None:
    text = "fp32,{lloyd4,sign}/{sharded,rank0}@1, update:lloyd2/sharded"
    assert list(expand_names(text)) == [
        "fp32",
        "lloyd4/sharded@1",
        "lloyd4/rank0@1",
        "sign/sharded@1",
        "sign/rank0@1",
        "update:lloyd2/sharded",
    ]


def test_a_name_says_the_method_and_its_buckets() -> None:
    ours = Method.parse("update:lloyd2/rank0@5")
    assert (ours.kind, ours.quantizer, ours.topology, ours.bucket_mb) == (
        "update",
        "lloyd2",
        "rank0",
        5.0,
    )
    assert Method.parse("fp32").bucket_mb is None
    assert Method.parse("powersgd4").rank == 4
