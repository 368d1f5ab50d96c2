"""Hugging Face's Trainer and Accelerate, and loggers: attach, resume, accumulate, log."""

from __future__ import annotations

import json
import re
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effadam_hook import EffAdamError, EfficientAdam, attach
from effadam_hook.integrations.metrics import exchange_line, log_exchange
from harness import run_ranks
from lightning_training import pose_as_torchrun
from training import ddp

pytest.importorskip("accelerate", reason="needs the extra accelerate")
transformers = pytest.importorskip("transformers", reason="needs the extra transformers")
if not transformers.utils.is_torch_available():
    pytest.skip("transformers refuses this version of torch", allow_module_level=True)

TIMEOUT = 150.0
NAMES = {
    *("effadam/ratio", "effadam/uplink_bytes", "effadam/downlink_bytes", "effadam/exchange_s"),
    *("effadam/worker_residual_norm", "effadam/server_residual_norm"),
    "effadam/quantization_error",
}


def tokens() -> list[dict[str, list[int]]]:
    random = torch.Generator().manual_seed(0)
    rows = torch.randint(2, 60, (64, 12), generator=random).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


def train(
    rank: int,
    world_size: int,
    folder: str,
    steps: int,
    resume: str | bool | None = None,
    hook_options: dict[str, Any] | None = None,
    loss_scale: float = 0.0,
    **arguments: Any,
) -> dict[str, Any]:
    """Train a tiny GPT-2; return weights, residuals, logs and warnings."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    from effadam_hook.integrations.transformers import EfficientAdamCallback

    if world_size > 1:
        pose_as_torchrun(rank, world_size)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config)
    arguments = {"max_grad_norm": 1.0, **arguments}
    optimizer = arguments.pop("optimizer", None)
    callback = EfficientAdamCallback(**{"quantizer": "lloyd3", **(hook_options or {})})
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            per_device_train_batch_size=2,
            max_steps=steps,
            logging_steps=1,
            save_steps=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to=[],
            disable_tqdm=True,
            ddp_backend="gloo",
            **arguments,
        ),
        train_dataset=tokens(),
        callbacks=[callback],
        **({"optimizers": (optimizer(model.parameters()), None)} if optimizer else {}),
    )
    if loss_scale:  # fp16=True has no scaler on a CPU: this is the one that it has on a GPU
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=resume)
    state = callback.exchange
    return {
        "weights": [p.detach().clone() for p in model.parameters()],
        "residuals": {} if state is None else state.state_dict()["worker"],
        "steps": 0 if state is None else state.steps,
        "mode": "" if state is None else state.session.mode.name,
        "logs": trainer.state.log_history,
        "warnings": [str(one.message) for one in caught],
    }


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def train_on_ranks(*arguments: Any, world_size: int = 2) -> list[dict[str, Any]]:
    return run_ranks(call, world_size, *arguments, timeout=TIMEOUT)


def call(rank: int, world_size: int, folder: str, steps: int, more: dict[str, Any]) -> Any:
    return train(rank, world_size, folder, steps, **more)


@pytest.mark.slow
def test_a_resumed_trainer_continues_to_the_bit(tmp_path: Path) -> None:
    whole = train_on_ranks(str(tmp_path / "a"), 4, {})
    train_on_ranks(str(tmp_path / "b"), 2, {})
    resumed = train_on_ranks(str(tmp_path / "b"), 4, {"resume": True})
    for expected, got in zip(whole, resumed, strict=True):
        assert equal(expected["weights"], got["weights"])
        assert equal(list(expected["residuals"].values()), list(got["residuals"].values()))
        assert got["steps"] == 4
    first, second = whole
    assert equal(first["weights"], second["weights"])
    assert not equal(list(first["residuals"].values()), list(second["residuals"].values()))
    logged = [row for row in first["logs"] if "loss" in row]
    assert len(logged) == 4 and all(row.keys() >= NAMES for row in logged)
    assert logged[-1]["effadam/ratio"] > 4 and 0.01 < logged[-1]["effadam/quantization_error"] < 2


def train_both(rank: int, world_size: int, folder: str, more: dict[str, Any]) -> list[Any]:
    return [
        train(rank, world_size, folder, 3, hook_options=options, save_strategy="no", **more)
        for options in ({"quantizer": "none"}, {"enabled": False})
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"gradient_accumulation_steps": 2, "bf16": True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=["accumulation and bf16", "compiled"],
)
def test_identity_quantizers_train_as_the_trainer_alone(
    more: dict[str, Any], tmp_path: Path
) -> None:
    for identity, dense in run_ranks(train_both, 2, str(tmp_path), more, timeout=TIMEOUT):
        for a, b in zip(identity["weights"], dense["weights"], strict=True):
            assert torch.allclose(a, b, rtol=0, atol=3e-5)
        assert identity["steps"] == dense["steps"] == 3
        assert identity["residuals"] and not dense["residuals"]


def train_scaled(rank: int, world_size: int, folder: str) -> list[Any]:
    return [
        train(
            *(rank, world_size, folder, 3),
            loss_scale=scale,
            max_grad_norm=0.0,  # Accelerate unscales before it clips on GPUs only
            save_strategy="no",
        )
        for scale in (0.0, 1024.0)
    ]


@pytest.mark.slow
def test_logged_residuals_are_in_units_of_the_trainers_unscaled_loss(tmp_path: Path) -> None:
    name = "effadam/worker_residual_norm"
    runs, _ = run_ranks(train_scaled, 2, str(tmp_path), timeout=TIMEOUT)  # rank 0 logs
    plain, scaled = ([row[name] for row in run["logs"] if name in row] for run in runs)
    assert len(plain) == 3
    assert scaled == pytest.approx(plain, rel=1e-2)


def resume_elsewhere(rank: int, world_size: int, folder: str) -> list[str]:
    checkpoint = f"{folder}/two/checkpoint-2"
    if world_size == 1:  # nothing to exchange: residuals are dropped, with a warning
        run = train(rank, 1, f"{folder}/two", 3, resume=checkpoint, save_strategy="no")
        new = [row for row in run["logs"] if row["step"] > 2]  # the checkpoint has its own rows
        assert run["steps"] == 0 and new and not any("effadam/ratio" in row for row in new)
        return [one for one in run["warnings"] if "residuals" in one]
    # The folder of this run has a file of another checkpoint of this step.
    with pytest.raises(EffAdamError, match="set TrainingArguments") as caught:
        train(rank, world_size, f"{folder}/other", 3, resume=checkpoint, save_strategy="no")
    run = train(
        *(rank, world_size, f"{folder}/other", 3, checkpoint),
        resume_from_checkpoint=checkpoint,
        save_strategy="no",
    )
    assert run["steps"] == 3
    # A checkpoint without residuals starts at zero, with a warning.
    state = Path(checkpoint, "trainer_state.json")
    if rank == 0:
        text = json.loads(state.read_text())
        del text["stateful_callbacks"]["EfficientAdamCallback"]
        state.write_text(json.dumps(text))
    torch.distributed.barrier()
    run = train(rank, world_size, f"{folder}/two", 3, checkpoint, save_strategy="no")
    assert run["steps"] == 1
    return [str(caught.value), *(one for one in run["warnings"] if "residuals" in one)]


@pytest.mark.slow
def test_a_checkpoint_resumes_with_its_own_residuals_or_says_why_not(tmp_path: Path) -> None:
    for name in ("two", "other"):
        train_on_ranks(str(tmp_path / name), 2, {})
    (dropped,) = run_ranks(resume_elsewhere, 1, str(tmp_path), timeout=TIMEOUT)
    assert dropped and "one process exchanges nothing" in dropped[0]
    for error, warning in run_ranks(resume_elsewhere, 2, str(tmp_path), timeout=TIMEOUT):
        assert "effadam_hook.pt is not in" in error
        assert "holds no state of the compressed exchange" in warning


def exchange_updates(rank: int, world_size: int, folder: str) -> str:
    with pytest.raises(EffAdamError, match="clips gradients after the exchange") as caught:
        train(rank, world_size, folder, 2, optimizer=EfficientAdam)
    run = train(rank, world_size, folder, 2, optimizer=EfficientAdam, max_grad_norm=0.0)
    assert run["mode"] == "update" and run["steps"] == 2
    return str(caught.value)


def test_an_efficient_adam_in_the_trainer_exchanges_updates(tmp_path: Path) -> None:
    for error in run_ranks(exchange_updates, 2, str(tmp_path), timeout=TIMEOUT):
        assert "Set max_grad_norm=0, and clip with EfficientAdam(max_grad_norm=...)" in error


def test_options_of_the_callback_get_suggestions_when_it_is_made() -> None:
    from effadam_hook.integrations.transformers import EfficientAdamCallback

    with pytest.raises(TypeError, match="Did you mean 'quantizer'"):
        EfficientAdamCallback(quantiser="lloyd4")
    with pytest.raises(ValueError, match="Invalid quantizer: 'lloyd5'"):
        EfficientAdamCallback(quantizer="lloyd5")
    with pytest.raises(EffAdamError, match="No Trainer that trains has this callback"):
        EfficientAdamCallback().on_train_begin(None, None, None)


def accelerate_run(rank: int, world_size: int, folder: str, steps: int, resume: bool) -> Any:
    from accelerate import Accelerator

    from effadam_hook.integrations.accelerate import AcceleratedExchange

    if world_size > 1:
        pose_as_torchrun(rank, world_size)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    exchange = AcceleratedExchange(accelerator, model, quantizer="lloyd3")
    if resume:
        accelerator.load_state(folder)
    first = exchange.state.steps if exchange.state is not None else 0
    for step in range(first, steps):
        for part in range(2):
            data = torch.Generator().manual_seed(100 * step + 10 * part + accelerator.process_index)
            with accelerator.accumulate(model):
                x = torch.randn(8, 20, generator=data)
                loss = (model(x) - x[:, :3].abs()).square().mean()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    accelerator.save_state(folder)
    state = exchange.state
    return [p.detach().clone() for p in model.parameters()], None if state is None else state.steps


def test_accelerate_saves_and_resumes_the_exchange_to_the_bit(tmp_path: Path) -> None:
    whole = run_ranks(accelerate_run, 2, str(tmp_path / "a"), 6, False, timeout=TIMEOUT)
    run_ranks(accelerate_run, 2, str(tmp_path / "b"), 3, False, timeout=TIMEOUT)
    resumed = run_ranks(accelerate_run, 2, str(tmp_path / "b"), 6, True, timeout=TIMEOUT)
    for (expected, steps), (got, steps_too) in zip(whole, resumed, strict=True):
        assert equal(expected, got) and steps == steps_too == 6
    ((_, none),) = run_ranks(accelerate_run, 1, str(tmp_path / "c"), 1, False, timeout=TIMEOUT)
    assert none is None


def log_to_both(rank: int, world_size: int, folder: str) -> dict[str, float]:
    model = ddp(nn.Linear(50, 50))
    state = attach(model)
    writers: list[Any] = []
    from torch.utils.tensorboard import SummaryWriter

    writers.append(SummaryWriter(folder))
    if has_wandb():
        import wandb

        writers.append(wandb.init(mode="offline", dir=folder, project="tests"))
    values: dict[str, float] = {}
    for step in range(1, 4):
        model(torch.randn(4, 50)).square().mean().backward()
        for writer in writers:
            values = log_exchange(writer, state, step)
    for writer in writers:
        writer.finish() if hasattr(writer, "finish") else writer.close()
    with pytest.raises(TypeError, match=r"Invalid writer: list\. Must have add_scalar"):
        log_exchange([], state, 1)
    return values


def has_wandb() -> bool:
    import importlib.util

    return importlib.util.find_spec("wandb") is not None


def test_tensorboard_and_wandb_get_the_values(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (values,) = run_ranks(log_to_both, 1, str(tmp_path), timeout=TIMEOUT)
    assert values.keys() == NAMES
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == NAMES
    ratio = events.Scalars("effadam/ratio")
    assert [one.step for one in ratio] == [1, 2, 3]
    assert ratio[-1].value == pytest.approx(values["effadam/ratio"])
    assert not has_wandb() or list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def describe_late_ranks(rank: int, world_size: int) -> list[str]:
    model = ddp(nn.Linear(50, 50))
    state = attach(model, topology="sharded")
    lines = []
    for late in (1, 2):
        for _ in range(3):  # the first exchange also connects
            time.sleep(0.3 if rank == late else 0.0)
            model(torch.randn(4, 50)).square().mean().backward()
        lines.append(exchange_line(state))
    return lines


def test_the_line_for_progress_bars_names_the_rank_that_is_late() -> None:
    first, *others = run_ranks(describe_late_ranks, 3)
    assert all(lines == first for lines in others)
    for late, line in zip((1, 2), first, strict=True):
        assert re.fullmatch(
            rf"\d\.\d\dx fewer bytes, exchange \d+\.\d ms, of which \d+\.\d ms waiting for rank {late}",
            line,
        )
        assert float(line.split("of which ")[1].split()[0]) > 150
