"""The effadam command: its output, its errors, and its measurements on real ranks."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import effadam_hook
from effadam_hook.cli import main
from effadam_hook.cli.interface import InterfaceCounter
from effadam_hook.cli.logfile import Log
from effadam_hook.cli.logfile import read_log as read_columns
from effadam_hook.cli.methods import prepare
from effadam_hook.cli.picture import axis_limits
from effadam_hook.cli.plan import _cluster
from effadam_hook.cli.ranks import Ranks
from effadam_hook.cli.rows import rows_of
from effadam_hook.errors import CommandError
from effadam_hook.exchange.probe import Probe, Timing
from effadam_hook.exchange.topology import NodeTable
from effadam_hook.planner.advice import advise, code_for
from effadam_hook.planner.measure_compute import measure_compute
from effadam_hook.planner.measure_link import measure_link
from effadam_hook.planner.measure_speed import measure_speed
from effadam_hook.planner.method import Method
from effadam_hook.planner.predict import Prediction, predict
from effadam_hook.planner.traffic import ParameterSize, payload_bytes
from effadam_hook.planner.workloads import UserModel, Workload, describe, parse_count, to_device
from effadam_hook.run_log import RunLog
from harness import run_ranks

TIMEOUT = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def on_rank(rank: int, world_size: int, port: int, argv: list[str]) -> tuple[int, str, str]:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return code, out.getvalue(), err.getvalue()


def on_ranks(world_size: int, *argv: str) -> list[tuple[int, str, str]]:
    return run_ranks(on_rank, world_size, free_port(), list(argv), timeout=TIMEOUT, backend=None)


def tiny_model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1))


def tiny_with_batch() -> tuple[nn.Module, torch.Tensor]:
    return tiny_model(), torch.randn(4, 64)


def tiny_with_loss() -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    x = torch.randn(4, 64)
    return tiny_model(), lambda model: model(x).square().mean()


def not_a_model() -> int:
    return 3


def frozen_model() -> nn.Module:
    return tiny_model().requires_grad_(False)


def model_that_raises() -> nn.Module:
    raise ValueError("there is no corpus here")


def loss_that_raises() -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    def loss(model: nn.Module) -> torch.Tensor:
        raise ValueError("labels are missing")

    return tiny_model(), loss


class Loud(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        print("backward")
        return grads[0]


def model_that_prints() -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    print("building")
    x = torch.randn(4, 64)

    def loss(model: nn.Module) -> torch.Tensor:
        print("loss")
        loud: torch.Tensor = Loud.apply(model(x))  # type: ignore[no-untyped-call]
        return loud.square().mean()

    return tiny_model(), loss


def test_plan_predicts_every_method_and_recommends_one() -> None:
    code, out, _ = on_ranks(
        2,
        *("plan", "--json", "--mlp", "2x128x4", "--bucket-mb", "1"),
        *("--methods", "fp32,bf16,powersgd2,{lloyd4,sign}/{sharded,rank0},update:ternary"),
    )[0]
    assert code == 0
    found = json.loads(out)
    assert (found["world_size"], found["backend"], found["parameters"]) == (2, "gloo", 33024)
    assert found["ranks_on_this_machine"] == 2
    names = [one["method"] for one in found["predictions"]]
    assert names[3:5] == ["lloyd4/sharded", "lloyd4/rank0"] and len(names) == 8
    assert {leg["name"] for leg in found["link"]["legs"]} == {
        *("all_reduce", "up/sharded", "down/sharded", "up/rank0", "down/rank0")
    }
    compute_s = sum(found["compute"].values())
    assert compute_s > 0
    for one in found["predictions"]:
        assert one["step_s"] >= compute_s * (1 - 1e-9)
        assert one["exchange_s"] > 0 and one["busiest_bytes"] > 0
        assert one["bucket_mb"] == (None if one["method"] == "powersgd2" else 1.0)
    assert all(speed["encode_s"] > 0 for speed in found["speeds"].values())
    assert found["recommended"]["reason"] and found["recommended"]["code"]


def test_plan_shows_people_a_table_on_rank_0_alone() -> None:
    (code, out, _), (other_code, other_out, _) = on_ranks(
        2, "plan", "--parameters", "0.1M", "--compute-ms", "50", "--methods", "fp32,lloyd4/sharded"
    )
    assert (code, other_code, other_out) == (0, 0, "")
    assert "off (fp32)" in out and "lloyd4/sharded" in out
    # 0.1 M parameters over loopback are nothing beside 50 ms of computing.
    assert "Compression does not pay here" in out and "nothing to add" in out


def test_plan_on_one_rank_says_that_there_is_nothing_to_exchange() -> None:
    code, _, err = on_ranks(1, "plan", "--parameters", "1M", "--json")[0]
    assert code == 2 and "There is only one rank" in err


def test_bench_trains_by_every_method_and_says_what_it_counted() -> None:
    code, out, _ = on_ranks(
        2,
        *("bench", "--json", "--model", "test_cli:tiny_with_loss", "--rounds", "1"),
        *("--steps", "2", "--warmup", "1", "--methods", "none,fp32,bf16,lloyd4/{sharded,rank0}@1"),
    )[0]
    assert code == 0
    found = json.loads(out)
    methods = ["none", "fp32", "bf16", "lloyd4/sharded@1", "lloyd4/rank0@1"]
    assert [row["method"] for row in found["methods"]] == methods
    by_name = {row["method"]: row for row in found["methods"]}
    assert by_name["fp32"]["ratio"] == 1.0
    assert all(row["median_ms"] > 0 for row in found["methods"])
    assert "loopback" in found["counted"]
    assert by_name["fp32"]["busiest_mb"] > 4 * 64 * 65 * 2 / 2 / 1e6
    cells = {cell["method"]: cell for cell in found["cells"]}
    assert "compiled C" in cells["lloyd4/rank0@1"]["kernels"] and cells["fp32"]["kernels"] == ""


def mean_by(rank: int, world_size: int, name: str) -> tuple[list[float], list[float]]:
    torch.manual_seed(0)
    prepared = prepare(Method.parse(name), nn.Linear(8, 8))
    torch.manual_seed(1 + rank)
    with prepared.scope():
        prepared.model(torch.randn(4, 8)).square().mean().backward()
    grad = prepared.model.module.weight.grad
    prepared.close()
    mean = grad.clone()
    torch.distributed.all_reduce(mean)
    return grad.flatten().tolist(), (mean / world_size).flatten().tolist()


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "lloyd4/rank0", "none"])
def test_a_method_averages_unless_it_is_none(name: str) -> None:
    (first, mean), (second, _) = run_ranks(mean_by, 2, name, timeout=TIMEOUT)
    assert any(first)
    if name == "none":
        assert first != second
    else:
        assert first == second == pytest.approx(mean)


@pytest.mark.parametrize("command", ["plan --parameters 1M", "bench"])
def test_without_a_launcher_the_command_line_that_would_is_shown(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main(command.split()) == 2
    assert "torchrun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("plan", "no model. Must be exactly one of --parameters"),
        ("plan --parameters 1M --mlp 1x1x1", "Given: --parameters, --mlp"),
        ("plan --parameters many", "Invalid number: 'many'"),
        ("plan --mlp 3x4", "Invalid --mlp: '3x4'"),
        ("plan --parameters 1M --methods lloyd5", "Invalid method: 'lloyd5'"),
        ("plan --parameters 1M --bucket-mb 0", "Invalid --bucket-mb: 0.0"),
        ("plan --parameters 1M --compute-ms -1", "Invalid --compute-ms: -1.0"),
        ("plan --model nowhere", "Must be module:function"),
        ("plan --model nowhere_at_all:f", "No module named 'nowhere_at_all'"),
        ("plan --model test_cli:missing", "no attribute 'missing'"),
        ("plan --model test_cli:not_a_model", "returned a int. It must return an nn.Module"),
        ("plan --model test_cli:frozen_model", "test_cli:frozen_model has no trainable parameters"),
        (
            "plan --parameters 1M --methods ,",
            "Invalid --methods: ','. Must name at least one method",
        ),
        (
            "plan --parameters 1M --methods lloyd4,lloyd4/auto",
            "lloyd4/auto is the same as lloyd4",
        ),
        ("plan --parameters 1M --methods fp32,off", "off is the same as fp32"),
        ("plan --parameters 1M --bucket-mb inf", "Invalid --bucket-mb: inf"),
        ("report no_such_file.jsonl", "There is no file 'no_such_file.jsonl'"),
    ],
)
def test_what_cannot_be_asked_ends_with_2_and_the_rule(
    command: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "world_size", "said"),
    [
        ("--methods ,", 2, "Invalid --methods: ','. Must name at least one method"),
        ("--methods fp32,fp16@5,fp16 --bucket-mb 5", 2, "fp16 is the same as fp16@5"),
        ("--bucket-mb 0", 2, "Invalid --bucket-mb: 0.0"),
        ("--model test_cli:frozen_model", 2, "has no trainable parameters"),
        ("", 1, "There is only one rank"),
    ],
)
def test_bench_refuses_what_it_cannot_compare(
    arguments: str,
    world_size: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    launched = {"RANK": "0", "WORLD_SIZE": str(world_size), "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert main(["bench", "--json", *arguments.split()]) == 2
    assert said in capsys.readouterr().err


def test_what_the_user_s_function_raises_is_shown_as_theirs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", "--model", "test_cli:model_that_raises"]) == 1
    err = capsys.readouterr().err
    assert "Your function test_cli:model_that_raises" in err
    assert "raised ValueError: there is no corpus here" in err
    assert "in model_that_raises\n" in err  # the traceback


@pytest.mark.parametrize("command", ["plan", "bench"])
def test_what_the_user_s_loss_raises_is_shown_as_theirs(command: str) -> None:
    model = ("--model", "test_cli:loss_that_raises")
    results = on_ranks(2, command, "--json", "--methods", "fp32", *model)
    for code, out, err in results:
        assert (code, out) == (1, "")
        assert "raised ValueError: labels are missing" in err and "in loss\n" in err


@pytest.mark.parametrize(
    "argv",
    [
        ("plan", "--methods", "fp32"),
        ("bench", "--methods", "fp32", "--rounds", "1", "--steps", "1", "--warmup", "1"),
    ],
)
def test_what_the_user_s_code_prints_goes_to_standard_error(argv: tuple[str, ...]) -> None:
    first, second = on_ranks(2, *argv, "--json", "--model", "test_cli:model_that_prints")
    assert first[0] == second[0] == 0
    assert json.loads(first[1]) and second[1] == ""
    for _, _, err in (first, second):
        assert {"building", "loss", "backward"} <= set(err.splitlines())


def test_bench_finds_dense_by_what_it_is_and_its_json_is_strict() -> None:
    quick = ("bench", "--json", "--model", "test_cli:tiny_with_loss", "--rounds", "1")
    quick += ("--steps", "1", "--warmup", "1")
    _, out, _ = on_ranks(2, *quick, "--methods", "off,fp16", "--bucket-mb", "5")[0]
    ratios = {row["method"]: row["ratio"] for row in json.loads(out)["methods"]}
    assert ratios["off@5"] == 1.0 and ratios["fp16@5"] > 0
    _, out, _ = on_ranks(2, *quick, "--methods", "fp16")[0]
    (row,) = json.loads(out, parse_constant=pytest.fail)["methods"]
    assert row["ratio"] is None


def test_a_table_without_dense_has_no_column_for_it_and_says_so() -> None:
    code, out, _ = on_ranks(
        2,
        *("bench", "--model", "test_cli:tiny_with_loss", "--rounds", "1", "--steps", "1"),
        *("--warmup", "1", "--methods", "fp16"),
    )[0]
    assert code == 0 and "x fp32" not in out and "nan" not in out
    assert "add fp32 to --methods" in out


def on_rank_with_its_own(
    rank: int, world_size: int, port: int, argvs: list[list[str]], with_gpu: int
) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        if rank == with_gpu:
            patch.setattr(torch.cuda, "device_count", lambda: world_size)
            patch.setattr(torch.cuda, "set_device", lambda device: None)
        return on_rank(rank, world_size, port, argvs[rank])


PLAN, BENCH = "plan --parameters 1k --methods", "bench --layers 1 --width 8 --methods"


@pytest.mark.parametrize(
    ("first", "second", "with_gpu", "said"),
    [
        (
            f"{PLAN} lloyd4",
            f"{PLAN} fp32",
            -1,
            'methods is "lloyd4" on rank 0 and "fp32" on rank 1',
        ),
        (f"{BENCH} fp32", f"{BENCH} fp16", -1, 'methods is "fp32" on rank 0 and "fp16" on rank 1'),
        (f"{PLAN} fp32", f"{BENCH} fp32", -1, 'command is "plan" on rank 0 and "bench" on rank 1'),
        (f"{PLAN} fp32", f"{PLAN} fp32", 1, 'device is "cpu" on rank 0 and "cuda" on rank 1'),
        (f"{BENCH} fp32", f"{BENCH} fp32", 0, 'backend is "nccl" on rank 0 and "gloo" on rank 1'),
    ],
)
def test_ranks_with_different_command_lines_all_report_the_difference(
    first: str, second: str, with_gpu: int, said: str
) -> None:
    argvs = [first.split(), second.split()]
    results = run_ranks(
        on_rank_with_its_own, 2, free_port(), argvs, with_gpu, timeout=30, backend=None
    )
    for code, out, err in results:
        assert (code, out) == (2, "")
        assert "The command lines of the ranks differ" in err and said in err


class MeetsInItsLoss(Workload):
    """Its loss is that of all ranks, as contrastive ones are; rank 1 is late with every gradient."""

    def loss(self, model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        loss = super().loss(model, batch)
        dist.all_reduce(torch.ones(1))
        return loss

    def backward(self, loss: torch.Tensor) -> None:
        super().backward(loss)
        time.sleep(0.025 * dist.get_rank())


def compute_of_a_step(rank: int, world_size: int) -> list[float]:
    assert dist.group.WORLD is not None
    probe = Probe(dist.group.WORLD, torch.device("cpu"))
    compute = measure_compute(probe, MeetsInItsLoss(3, 32, 4), None, torch.device("cpu"))
    return [compute.forward_s, compute.backward_s, compute.rest_s]


def test_computing_is_timed_also_where_ranks_meet_in_it() -> None:
    for _, backward_s, _ in run_ranks(compute_of_a_step, 2, timeout=30):
        assert backward_s >= 0.0125  # the mean of a rank that sleeps and one that does not


class LeavesPartsOut(nn.Module):
    """Another layer every time; one is frozen, and a buffer counts the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        out: torch.Tensor = self.layers[int(self.calls) % 3](self.frozen(x))
        return out


class KnowsItIsWrapped(Workload):
    """Its loss needs the wrapped model."""

    def model(self) -> nn.Module:
        return LeavesPartsOut()

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        assert isinstance(model.module, LeavesPartsOut)
        return super().loss(model, batch)


def compute_of_a_model_with_unused_parts(rank: int, world_size: int) -> float:
    assert dist.group.WORLD is not None
    probe = Probe(dist.group.WORLD, torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        workload = KnowsItIsWrapped(1, 8, 4)
        return measure_compute(probe, workload, 1.0, torch.device("cpu")).forward_s


def test_computing_is_timed_also_where_steps_leave_parameters_out() -> None:
    assert min(run_ranks(compute_of_a_model_with_unused_parts, 2, timeout=30)) > 0


def call_s_beside(rank: int, world_size: int, messages_s: float) -> float:
    assert dist.group.WORLD is not None
    device = torch.device("cpu")
    cpu_s = {"up/sharded": messages_s, "down/sharded": 0.0}
    probe = Probe(dist.group.WORLD, device)
    return measure_speed(probe, Method.parse("lloyd4/sharded"), device, cpu_s).call_s


def test_what_messages_take_of_the_processor_is_not_counted_with_the_kernels_again() -> None:
    assert min(run_ranks(call_s_beside, 2, 0.0, timeout=TIMEOUT)) > 0
    assert run_ranks(call_s_beside, 2, 3600.0, timeout=TIMEOUT) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("bench --bucket-bm 3", "unrecognized arguments: --bucket-bm 3. Did you mean --bucket-mb?"),
        ("report a --jsn", "unrecognized arguments: --jsn. Did you mean --json?"),
        ("env extra", "unrecognized arguments: extra\n"),
    ],
)
def test_an_unknown_option_gets_a_suggestion(
    command: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(command.split())
    assert said in capsys.readouterr().err


def test_env_as_json_says_which_kernels_run_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["kernels"]["cpu"]["kernels"] in ("cpu", "reference")
    assert found["kernels"]["cpu"]["reason"] and "gloo" in found["machine"]["backends"]


def test_env_reports_kernels_that_are_demanded_and_cannot_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EFFADAM_KERNELS", "fast")
    assert main(["env", "--json"]) == 1
    cpu = json.loads(capsys.readouterr().out)["kernels"]["cpu"]
    assert cpu["kernels"] == "error" and "Invalid EFFADAM_KERNELS: 'fast'" in cpu["reason"]


def test_env_without_rich_prints_the_same_tables_as_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec

    def without_rich(name: str, package: str | None = None) -> Any:
        return None if name == "rich" else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without_rich)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["torch", torch.__version__] in [line.split() for line in lines]
    assert ["device", "present", "kernels", "why"] in [line.split() for line in lines]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("triton", [True, False])
def test_env_advises_nothing_about_a_device_that_is_absent(
    triton: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> Any:
        return real(name, package) if triton or name != "triton" else None

    monkeypatch.setattr(importlib.util, "find_spec", find)
    assert main(["env", "--json"]) == 0
    cuda = json.loads(capsys.readouterr().out)["kernels"]["cuda"]
    assert (cuda["present"], cuda["kernels"], cuda["remedy"]) == (False, "none", "")
    assert cuda["reason"] == "torch finds no CUDA device"
    assert main(["env"]) == 0
    assert "Install it" not in capsys.readouterr().out


def test_a_report_as_json_needs_no_matplotlib_unless_a_picture_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    with RunLog(path) as log:
        log.write(1, 0.5, **STATS)
    real = importlib.util.find_spec

    def torch_alone(name: str, package: str | None = None) -> Any:
        return None if name in ("rich", "matplotlib") else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", torch_alone)
    assert main(["report", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["png"] is None
    assert main(["report", str(path), "--json", "--png", str(tmp_path / "a.png")]) == 2
    assert "'matplotlib' is not installed" in (error := capsys.readouterr().err)
    assert error.endswith("Run pip install matplotlib.\n")


def prediction(name: str, step_s: float) -> Prediction:
    return Prediction(Method.parse(name), step_s, step_s, step_s / 2, 0.0, 0.0)


def test_dense_is_kept_unless_a_step_gets_a_tenth_shorter() -> None:
    dense = prediction("fp32", 1.0)
    assert not advise([dense, prediction("lloyd4/sharded", 0.91)], dense).pays
    advice = advise([dense, prediction("lloyd4/sharded", 0.89)], dense)
    assert advice.pays and advice.best.method.name == "lloyd4/sharded"


def test_fewer_bits_must_be_worth_it_and_other_trainings_are_never_recommended() -> None:
    dense, four = prediction("fp32", 1.0), prediction("lloyd4/sharded", 0.5)
    others = [prediction("powersgd4", 0.1), prediction("update:lloyd2", 0.1)]
    near, far = prediction("lloyd2/sharded", 0.44), prediction("lloyd2/sharded", 0.42)
    assert advise([dense, four, near, *others], dense).best is four
    assert advise([dense, four, far, *others], dense).best is far


def run_pasted(rank: int, world_size: int, code: str) -> None:
    model = nn.Linear(4, 4)
    names = {
        "effadam_hook": effadam_hook,
        "torch": torch,
        "model": model,
        "DistributedDataParallel": DistributedDataParallel,
        "ddp_model": DistributedDataParallel(model),
    }
    exec(code, names)
    names["ddp_model"](torch.ones(1, 4)).sum().backward()  # type: ignore[operator]


@pytest.mark.parametrize("name", ["fp32", "fp16@4", "bf16", "lloyd4/sharded", "lloyd2/rank0@4"])
def test_the_lines_to_paste_train_a_model(name: str) -> None:
    run_ranks(run_pasted, 2, code_for(Method.parse(name)))


def test_the_lines_to_paste_say_momentum_and_buckets() -> None:
    assert code_for(Method.parse("lloyd2/rank0@4")).splitlines() == [
        'betas = effadam_hook.reduced_betas((0.9, 0.999), "lloyd2")',
        "ddp_model = DistributedDataParallel(model, bucket_cap_mb=4)",
        'state = effadam_hook.attach(ddp_model, quantizer="lloyd2", topology="rank0")',
    ]


def read_log(path: Path) -> Log:
    return read_columns(path, ["loss", "ratio", "worker_residual_norm", "exchange_s"])


STATS = {"ratio": 7.5, "worker_residual_norm": 1.0, "server_residual_norm": 0.5, "exchange_s": 0.25}


def test_report_makes_a_table_and_a_picture_of_a_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs" / "a.jsonl"
    with RunLog(path) as log:
        for step in range(1, 41):
            log.write(step, 1 / step, **STATS)
    assert main(["report", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["lines"], found["median_exchange_s"]) == (40, 0.25)
    assert found["last"]["loss"] == 1 / 40 and found["last"]["ratio"] == 7.5
    assert Path(found["png"]).read_bytes().startswith(b"\x89PNG")
    assert main(["report", str(path), "--no-png"]) == 0
    assert "x fewer bytes" in capsys.readouterr().out


def test_a_report_of_several_runs_compares_their_last_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, scale in (("_a$b", 1.0), ("dense", 2.0)):
        with RunLog(f"{name}.jsonl") as log:
            for step in range(1, 4):
                values = {"uplink_bytes": 1e6 * step, "downlink_bytes": 1e6 * step}
                log.write(step, scale / step, exchange_s=0.01 * step * scale, **values)
    assert main(["report", "_a$b.jsonl", "dense.jsonl"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.split()[:1] in (["_a$b"], ["dense"])]
    assert rows == [["_a$b", "3", "0.3333", "20.0", "6.0"], ["dense", "3", "0.6667", "40.0", "6.0"]]
    assert Path("_a$b.png").read_bytes().startswith(b"\x89PNG")
    assert main(["report", "_a$b.jsonl", "dense.jsonl", "--json", "--no-png"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["median_exchange_s"] for run in runs] == [0.02, 0.04]
    assert main(["report", "dense.jsonl", "dense.jsonl"]) == 2
    assert "Must be different files" in capsys.readouterr().err


@pytest.mark.parametrize("from_zero", [True, False])
def test_a_constant_with_rounding_is_no_cliff_in_the_figure(from_zero: bool) -> None:
    low, high = axis_limits([7.7300, 7.7304, 7.7301], from_zero)
    assert 0.0004 / (high - low) < 0.001
    assert low < 7.73 < 7.7304 < high
    assert low == 0.0 or not from_zero


@pytest.mark.parametrize("values", [[0.0], [-2.0, 1.0], [5.0], [1e100, -1e100], [1.0, 1e-9]])
def test_every_value_is_on_the_axis(values: list[float]) -> None:
    for from_zero in (True, False):
        low, high = axis_limits(values, from_zero)
        assert low <= min(values) <= max(values) < high


def test_a_log_of_a_killed_and_resumed_run_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with RunLog(path) as log:
        log.write(1, math.nan, **STATS)
    with RunLog(path, append=True) as log:
        log.write(2, 0.5, **STATS)
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    log = read_log(path)
    assert "loss" not in log.row(0) and log.row(1)["loss"] == 0.5
    assert (len(log.steps), log.skipped) == (2, 0)
    assert "NaN" not in path.read_text()
    with RunLog(path, append=True) as resumed:
        resumed.write(3, 0.25, **STATS)
    log = read_log(path)
    assert (list(log.steps), log.skipped) == ([1, 2, 3], 1)
    assert f"Line 3 of {str(path)!r} is no JSON" in log.first_skipped


def test_a_log_that_is_left_to_another_rank_writes_nothing(tmp_path: Path) -> None:
    with RunLog(tmp_path / "a.jsonl", enabled=False) as log:
        log.write(1, 0.5)
    assert not list(tmp_path.iterdir())


def test_lightning_s_metrics_are_read_and_the_lines_of_a_step_joined(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(
        "effadam/ratio,effadam/exchange_s,epoch,step,train_loss\n"
        "7.5,0.25,0,9,\n,,0,9,1.25\n7.6,0.5,0,19,nan\n"
    )
    log = read_log(path)
    first, second = log.row(0), log.row(1)
    assert (first["ratio"], first["loss"], first["exchange_s"]) == (7.5, 1.25, 0.25)
    assert second["step"] == 19 and "loss" not in second


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", "not json\n{}\n", "Line 1 of .* is no JSON"),
        ("a.jsonl", '{"step": 1, "accuracy": 2}\n', "has no line with a step"),
        ("a.csv", "step,accuracy\n1,2\n", "has no line with a step"),
    ],
)
def test_what_is_no_log_is_refused(name: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(CommandError, match=said):
        read_log(tmp_path / name)


GOOD = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n'

HOSTILE: dict[str, str | bytes] = {
    "deep.jsonl": "[" * 200_000 + "]" * 200_000 + "\n" + '{"a":' * 90_000 + "\n" + GOOD,
    "integers.jsonl": '{"step": 1, "loss": 1' + "0" * 400 + "}\n"
    '{"step": 3, "ratio": 1' + "0" * 9000 + "}\n" + GOOD,
    "not_finite.jsonl": '{"step": NaN, "loss": NaN}\n{"step": Infinity, "loss": 1}\n' + GOOD,
    "huge.jsonl": '{"step": 1e300, "loss": 1e308}\n{"step": -1e300, "loss": -1e308}\n' + GOOD,
    "truth.jsonl": '{"step": true, "loss": true}\n' + GOOD,
    "bytes.jsonl": b'{"step": 3, "loss": 1, "x": "\xff\xfe\x00"}\n\x00\x00\n' + GOOD.encode(),
    "separators.jsonl": '{"step": 3, "loss": 1, "note": "a\u2028b\x85c"}\n' + GOOD,
    "values.jsonl": '[1, 2]\n3\nnull\n"x"\n{"step": {"a": 1}, "loss": [1]}\n' + GOOD,
    "keys.jsonl": '{"step": 3, "loss": 1, "\\u001b[31m[/b]:smile:\\u202e": 5}\n' + GOOD,
    "long.jsonl": '{"step": 3, "loss": 1, "note": "' + "x" * 3_000_000 + '"}\n' + GOOD,
    "cells.csv": 'step,loss\n1,2,3,4\n,5\n2,x\n3\n4,"' + "a" * 200_000 + '"\n5,1\n',
    "open.csv": 'step,loss\n1,2\n"never closed,4\n' + "5,6\n" * 9,
    "nul.csv": b"step,loss\n1,2\x00\n\x00\n2,1\n",
    "mark.csv": b"\xef\xbb\xbfstep,loss\n1,2\n",
    "name\x1b]0;x\x07\x9b31m[/b][red]\u202e:smile:.jsonl": GOOD,
    "name\udcff.jsonl": GOOD,
}


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_whatever_a_log_holds_its_numbers_are_shown_and_nothing_reaches_the_terminal(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = HOSTILE[name]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["report", str(tmp_path / name)]) == 0
    out, err = capsys.readouterr()
    assert all(char.isprintable() or char == "\n" for char in out + err)
    assert max(map(len, out.splitlines())) < 300
    assert "1.0000" in out or "2.0000" in out
    if name.startswith("name"):
        assert repr(name.split("[", maxsplit=1)[0])[1:-1] in out.replace("\n", "")
        assert ":smile:" in out or ":smile:" not in name
    assert main(["report", str(tmp_path / name), "--json", "--no-png"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["lines"] >= 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (".", "'.' to read: it is not a regular file"),
        ("/dev/zero", "'/dev/zero' to read: it is not a regular file"),
        ("good.jsonl --png /proc/no/x.png", "cannot be written: No such file"),
        ("good.jsonl --png folder.png", "cannot be written: Is a directory"),
        ("good.jsonl --png /dev/full", "cannot be written: No space left on device"),
        ("good.jsonl --png x.notapng", "Its suffix must be one of"),
        ("good.jsonl --png good.jsonl", "Must be another file than the log"),
        ("good.png", "Must be another file than the log"),
        ("empty.jsonl", "has no line with a step"),
        ("no\x1b[31m", r"There is no file 'no\x1b[31m'"),
    ],
)
def test_a_report_that_cannot_be_made_ends_with_2_and_one_line(
    arguments: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in {"good.jsonl": GOOD, "good.png": GOOD, "empty.jsonl": ""}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "folder.png").mkdir()
    assert main(["report", *arguments.split(" ")]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and "\x1b" not in err
    assert (tmp_path / "good.jsonl").read_text() == GOOD
    assert (tmp_path / "good.png").read_text() == GOOD


def test_an_argument_s_escape_sequences_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["report", "a", "--no\x1b[31m"])
    assert "\x1b" not in capsys.readouterr().err
    assert main(["plan", "--parameters", "1M", "--methods", "\x1b[31m"]) == 2
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize(("to", "code"), [("closed pipe", 1), ("/dev/full", 2)])
def test_output_that_cannot_be_written_makes_no_traceback(
    to: str, code: int, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD)
    command = [sys.executable, "-m", "effadam_hook", "report", str(tmp_path / "a.jsonl")]
    if to == "closed pipe":
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open(to, os.O_WRONLY)
    done = subprocess.run(
        [*command, "--no-png"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=100,
        check=False,
    )
    os.close(write)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False)


def test_a_log_takes_the_scalars_that_training_has_and_no_bare_nan(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    path = tmp_path / "a.jsonl"
    values = {
        "tensor": torch.tensor(0.5, dtype=torch.bfloat16),
        "flag": numpy.bool_(True),
        "truth": True,
        "float32": numpy.float32(0.25),
        "int64": numpy.int64(7),
        "nan": numpy.float64("nan"),
        "infinite": torch.tensor(float("inf")),
        "nested": {"a": [1, float("-inf"), (torch.tensor([1, 2]), None)], 3: numpy.ones(2)},
        "huge": 10**400,
        "text": "\ud800\n",
    }
    with RunLog(path) as log:
        log.write(torch.tensor(3), torch.tensor(1.5, requires_grad=True), **values)
        with pytest.raises(
            TypeError, match=r"Invalid value of 'what': object\. Must be None, a number"
        ):
            log.write(4, 1.0, what=object())
        with pytest.raises(TypeError, match=r"Invalid step: nan\. Must be a finite number"):
            log.write(math.nan, 1.0)
        circle: list[Any] = []
        circle.append(circle)
        with pytest.raises(ValueError, match="Invalid value of 'circle': nested more than"):
            log.write(4, 1.0, circle=circle)
    (text,) = path.read_text().splitlines()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 3,
        "loss": 1.5,
        "tensor": 0.5,
        "flag": True,
        "truth": True,
        "float32": 0.25,
        "int64": 7,
        "nan": None,
        "infinite": None,
        "nested": {"a": [1, None, [[1, 2], None]], "3": [1, 1]},
        "huge": None,
        "text": "\ud800\n",
    }
    assert read_log(path).row(0)["loss"] == 1.5


@pytest.mark.parametrize(
    ("text", "count"), [("6.3M", 6_300_000), ("1.5B", 1_500_000_000), ("2k", 2000), ("12", 12)]
)
def test_numbers_are_read_as_people_write_them(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "M", "1.2.3M", "-3", "0", "6T"])
def test_other_numbers_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="Invalid number"):
        parse_count(text)


@pytest.mark.parametrize("function", ["tiny_with_batch", "tiny_with_loss"])
def test_a_user_s_function_brings_the_model_and_what_makes_its_loss(function: str) -> None:
    user = UserModel(f"test_cli:{function}")
    model = user.model()
    assert describe(model) == [
        *(ParameterSize(64 * 64, 64), ParameterSize(64), ParameterSize(64, 1), ParameterSize(1))
    ]
    assert user.can_step and user.loss(model, user.batch(0)).ndim == 0


def test_a_model_alone_can_be_described_and_not_stepped() -> None:
    user = UserModel("test_cli:tiny_model")
    assert len(describe(user.model())) == 4 and not user.can_step


def test_batches_are_moved_however_nested() -> None:
    batch = {"x": [torch.ones(1), (torch.ones(2), "name")]}
    moved = to_device(batch, torch.device("meta"))
    assert moved["x"][0].device.type == moved["x"][1][0].device.type == "meta"
    assert moved["x"][1][1] == "name"


def test_an_interface_that_no_one_knows_counts_nothing_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "no.such.host.invalid")
    assert "not counted" in InterfaceCounter().description
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert "loopback" in InterfaceCounter().description
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    assert "'eth9'" in InterfaceCounter().description


def test_methods_that_were_not_compared_with_dense_have_no_ratio() -> None:
    cell: Any = {"round": 0, "method": "fp16", "kernels": "", "step_s": [1.0], "cpu_s": 0.1}
    (row,) = rows_of([{**cell, "sent_bytes": [2e6, 1e6], "received_bytes": [1e6, 2e6]}])
    assert math.isnan(row.ratio) and (row.busiest_mb, row.total_mb) == (2.0, 3.0)


def test_plan_times_the_dense_all_reduce_also_where_only_ours_is_asked_for() -> None:
    code, out, _ = on_ranks(
        2, "plan", "--json", "--parameters", "0.1M", "--methods", "lloyd4/sharded@1"
    )[0]
    assert code == 0
    found = json.loads(out)
    (all_reduce,) = [leg for leg in found["link"]["legs"] if leg["name"] == "all_reduce"]
    assert all_reduce["seconds"] > 0
    assert [(one["method"], one["bucket_mb"]) for one in found["dense"]] == [("fp32", 1.0)]
    # One message after another: what was measured, and not what latency alone would make of it.
    assert found["dense"][0]["exchange_s"] >= all_reduce["overhead_s"]


def test_a_method_is_compared_with_dense_of_its_own_buckets_and_must_beat_the_fastest() -> None:
    dense, small = prediction("fp32", 1.0), prediction("fp32@5", 2.0)
    ours = prediction("lloyd4/sharded@5", 0.8)
    advice = advise([dense, ours], dense, small)
    assert advice.best is ours and advice.dense is small
    slow = prediction("lloyd4/sharded@5", 1.5)
    assert advise([dense, slow], dense, small).best is dense


class FakeProbe:
    """Stands for four ranks; remembers the sizes and the rings that were timed."""

    rank, world_size = 0, 4
    nodes: NodeTable | None = None

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}

    def time_link(
        self, size: int, repeats: int, depth: int = 1, ring: Sequence[int] = ()
    ) -> Timing:
        return Timing(1.0, size / 1e12, 0.0)

    def time_leg(self, name: str, size: int, repeats: int, depth: int = 1) -> Timing:
        self.sizes[name] = size
        return Timing(1.0, 1.0, 0.0)


class FarProbe(FakeProbe):
    """Transfers that arrive some time after they left, and take a rank 1 ms and 2 ns a byte."""

    def __init__(self, bytes_s: float = 1e6, delay_s: float = 0.04) -> None:
        super().__init__()
        self.bytes_s, self.delay_s = bytes_s, delay_s

    def time_link(
        self, size: int, repeats: int, depth: int = 1, ring: Sequence[int] = ()
    ) -> Timing:
        took = size / self.bytes_s + self.delay_s / depth
        return Timing(took, took, 1e-3 + 2e-9 * size)

    def time_leg(self, name: str, size: int, repeats: int, depth: int = 1) -> Timing:
        return self.time_link(size * 3 // 4, repeats, depth)


def time_a_late_transfer(rank: int, world_size: int) -> float:
    start = dist.batch_isend_irecv

    def late(transfers: list[dist.P2POp]) -> list[dist.Work]:
        if rank == 1:
            time.sleep(1.2)
        return start(transfers)

    assert dist.group.WORLD is not None
    probe = Probe(dist.group.WORLD, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "batch_isend_irecv", late)
        return probe.time_link(1 << 20, 2, depth=2).best_s


def test_the_link_is_timed_although_a_rank_is_late() -> None:
    first, *others = run_ranks(time_a_late_transfer, 3, timeout=60)
    assert first > 0.5
    assert others == [first, first]


@pytest.mark.parametrize(("bytes_s", "delay_s"), [(1e6, 0.04), (25e6, 0.2), (1e8, 0.1)])
def test_a_delay_is_not_taken_for_a_slow_link_nor_messages_for_bytes(
    bytes_s: float, delay_s: float
) -> None:
    probe: Any = FarProbe(bytes_s, delay_s)
    model = [ParameterSize(1 << 18, 512)]
    found = measure_link(probe, [Method.parse("lloyd4/sharded")], model, lambda part: None)
    assert found.payload_bytes_s == pytest.approx(bytes_s, rel=0.01)
    alone, shared = found.as_link(), found.as_link(cpu_weight=3.0)
    for leg in found.legs:
        assert leg.slowdown == pytest.approx(1.0, abs=0.02)
        assert alone.overhead_s[leg.name] == pytest.approx(delay_s, rel=0.01)
        assert alone.cpu_s[leg.name] == pytest.approx(1e-3, rel=0.01)
        assert alone.cpu_s_per_byte[leg.name] == pytest.approx(2e-9, rel=0.01)
        assert shared.cpu_s[leg.name] == 3 * alone.cpu_s[leg.name]
        assert shared.cpu_s_per_byte[leg.name] == 3 * alone.cpu_s_per_byte[leg.name]
        assert shared.overhead_s == alone.overhead_s


@pytest.mark.parametrize(("device", "cores", "share"), [("cpu", 0.5, 2.0), ("cuda", 0.5, 0.0)])
def test_messages_take_processor_time_from_computing_on_the_processor_alone(
    device: str, cores: float, share: float
) -> None:
    probe: Any = FarProbe()
    found = measure_link(
        probe, [Method.parse("fp32")], [ParameterSize(1 << 18, 512)], lambda _: None
    )
    link = _cluster(Ranks(probe, torch.device(device), "gloo", 4, cores), found).link
    (leg,) = found.legs
    assert link.cpu_s[leg.name] == share * leg.cpu_s
    assert link.cpu_s_per_byte[leg.name] == share * leg.cpu_s_per_byte


@pytest.mark.parametrize(("backend", "parts", "sends"), [("gloo", 4, 2), ("nccl", 1, 1)])
def test_the_backend_decides_alike_what_is_measured_and_what_is_predicted(
    backend: str, parts: int, sends: int
) -> None:
    method, model = Method.parse("lloyd4/rank0@64"), [ParameterSize(1 << 20, 1024)] * 4
    probe: Any = FakeProbe()
    ranks = Ranks(probe, torch.device("cpu"), backend, 1, 2.0)
    found = measure_link(probe, [method], model, lambda part: None, ranks.on_nccl)
    payload = payload_bytes(model[: 4 // parts], "lloyd4", servers=1)
    assert probe.sizes == {"up/rank0": payload, "down/rank0": payload}
    down = next(leg for leg in found.legs if leg.name == "down/rank0")
    assert down.busiest_bytes == sends * payload
    predicted = predict(method, model, _cluster(ranks, found))
    assert predicted.busiest_bytes == max(3, sends) * payload * parts


def test_a_method_is_compared_with_dense_of_its_own_buckets_if_there_are_several() -> None:
    def cell(method: str, seconds: float) -> Any:
        sizes = {"sent_bytes": [1.0], "received_bytes": [1.0]}
        timed = {"step_s": [seconds], "cpu_s": 0.1}
        return {"round": 0, "method": method, "kernels": "", **timed, **sizes}

    cells = [cell("fp32", 1.0), cell("fp32@5", 2.0), cell("fp16@5", 1.0), cell("fp16@9", 1.0)]
    assert [row.ratio for row in rows_of(cells)] == [1.0, 1.0, 0.5, 1.0]
