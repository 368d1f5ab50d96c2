"""The strategy in real training runs of several ranks: loops, precisions, optimizers, launchers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effadam_hook import EfficientAdam
from harness import run_ranks
from lightning_training import (
    BATCH,
    FAMILIES,
    SAMPLES,
    load_family,
    loader,
    make_module,
    make_trainer,
    network,
    pose_as_torchrun,
    same,
    weights,
)

pytest.importorskip("lightning")
BUCKETS = {"bucket_cap_mb": 0.004}
STEPS = SAMPLES // BATCH // 2  # of one epoch on two ranks
PARAMETERS = sum(p.numel() for p in network().parameters())


def strategy(**options: Any) -> Any:
    from lightning_plugin import EfficientAdamStrategy

    return EfficientAdamStrategy(**{**BUCKETS, **options})


def everything(rank: int, world_size: int, name: str, folder: str) -> dict[str, Any]:
    """Fit with most of a Trainer's features, then evaluate."""
    pose_as_torchrun(rank, world_size)
    family = load_family(name)
    seen: dict[str, Any] = {}

    class Look(family.Callback):  # type: ignore[misc]
        def on_train_start(self, trainer: Any, module: Any) -> None:
            assert isinstance(trainer.strategy.model, nn.parallel.DistributedDataParallel)

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            seen["norms"] = [p.grad.norm().item() for p in module.parameters()]

        def on_train_end(self, trainer: Any, module: Any) -> None:
            seen["logged"] = {
                name.removeprefix("effadam/"): float(value)
                for name, value in trainer.callback_metrics.items()
                if name.startswith("effadam/")
            }
            seen["hook"] = trainer.strategy.model._get_ddp_logging_data()["comm_hook"]

        def on_test_start(self, trainer: Any, module: Any) -> None:
            assert trainer.strategy.model is module

    from lightning_plugin import CompressionMonitor

    stopper = family.callbacks.EarlyStopping("val_loss", patience=1, stopping_threshold=1e9)
    trainer = make_trainer(
        family,
        strategy(topology="sharded"),
        folder,
        max_epochs=5,
        accumulate_grad_batches=3,
        gradient_clip_val=1e-3,
        profiler="simple",
        callbacks=[stopper, Look(), CompressionMonitor()],
        logger=family.loggers.CSVLogger(folder),
        log_every_n_steps=2,
    )
    module = make_module(family)
    before = trainer.validate(module, loader(), verbose=False)[0]["val_loss"]
    trainer.fit(module, loader(), loader())
    after = trainer.test(module, loader(), verbose=False)[0]["val_loss"]
    assert len(trainer.predict(module, loader())) == STEPS
    assert after < before
    return {
        **seen,
        "steps": trainer.global_step,
        "epochs": trainer.current_epoch,
        "stats": trainer.strategy.hook_state.stats(),
        "weights": weights(module),
        "class": type(trainer.strategy).__module__,
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_a_trainer_with_all_its_features(name: str, tmp_path: Path) -> None:
    first, second = run_ranks(everything, 2, name, str(tmp_path))
    assert same(first["weights"], second["weights"])
    assert not second["logged"]
    stats = first["stats"]
    logged = first["logged"]
    for key in ("ratio", "uplink_bytes", "downlink_bytes", "worker_residual_norm"):
        assert logged[key] == pytest.approx(stats[key])
    assert 0 < logged["exchange_s"] < 10
    assert 0.01 < logged["quantization_error"] < 1
    (table,) = tmp_path.rglob("metrics.csv")
    assert "effadam/ratio" in table.read_text()
    for result in (first, second):
        assert result["hook"] == "efficient_adam_hook"
        assert result["class"].endswith(name.partition(".")[0])
        assert result["epochs"] == 1  # stopped early
        assert result["steps"] == STEPS // 3
        # One exchange for each optimizer step, whatever is accumulated.
        assert result["stats"]["steps"] == STEPS // 3
        assert result["stats"]["dense_bytes"] == 2 * 4 * PARAMETERS * (STEPS // 3)
        assert sum(n**2 for n in result["norms"]) ** 0.5 == pytest.approx(1e-3, rel=1e-3)


def fit_twice(rank: int, world_size: int) -> list[list[Tensor]]:
    """Two fits of one Trainer, one fit as long as both, and two fits of different models."""
    pose_as_torchrun(rank, world_size)
    family = load_family(FAMILIES[0])

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1)

    results = []
    for epochs in ((1, 2), (2,)):
        module = make_module(family, sgd)
        trainer = make_trainer(family, strategy(quantizer="lloyd2"), ".")
        for last in epochs:
            trainer.fit_loop.max_epochs = last
            trainer.fit(module, loader())
        results.append(weights(module))
        assert trainer.strategy.hook_state.steps == 2 * STEPS
    trainer.fit_loop.max_epochs = 3
    trainer.fit(make_module(family, sgd), loader())
    assert trainer.strategy.hook_state.steps == STEPS
    return results


def test_a_second_fit_goes_on_with_the_residuals_of_the_first() -> None:
    for twice, once in run_ranks(fit_twice, 2):
        assert same(twice, once)


def switched_off(rank: int, world_size: int) -> list[list[Tensor]]:
    pose_as_torchrun(rank, world_size)
    family = load_family(FAMILIES[1])
    results = []
    for one in ("ddp", strategy(enabled=False), strategy(warmup_steps=STEPS), strategy()):
        module = make_module(family)
        make_trainer(family, one, ".").fit(module, loader())
        results.append(weights(module))
    return results


def test_switched_off_it_is_plain_ddp_to_the_bit() -> None:
    for plain, off, warming_up, on in run_ranks(switched_off, 2):
        assert same(off, plain)
        assert same(warming_up, plain)
        assert not same(on, plain)


def updates(rank: int, world_size: int) -> list[list[Tensor]]:
    """Update mode with what a Trainer adds to it, and the modes that need to know the optimizer."""
    pose_as_torchrun(rank, world_size)
    family = load_family(FAMILIES[1])
    results = []

    def fit(make: Any, one: Any, **options: Any) -> Any:
        module = make_module(family, make)
        trainer = make_trainer(family, one, ".", **options)
        trainer.fit(module, loader())
        results.append(weights(module))
        return trainer

    # Clipping is the optimizer's, because it must come before the exchange.
    made = []

    def make(parameters: Any) -> EfficientAdam:
        made.append(EfficientAdam(parameters, lr=3e-3))
        return made[-1]

    trainer = fit(make, strategy(quantizer="lloyd2"), gradient_clip_val=0.5)
    assert made[0].max_grad_norm == 0.5
    assert trainer.gradient_clip_val == 0.5  # given back
    state = trainer.strategy.hook_state
    assert "exchanges    update" in state.summary()
    held = state.state_dict()["worker"]
    assert any(bool(residual.any()) for residual in held.values())

    # A second fit has new moments, and the old residuals.
    trainer.fit_loop.max_epochs = 2

    class Look(family.Callback):  # type: ignore[misc]
        def on_train_start(self, trainer: Any, module: Any) -> None:
            saved = trainer.strategy.hook_state.state_dict()
            assert same(list(saved["worker"].values()), list(held.values()))
            assert saved["moments"] == {} and saved["counters"]["steps"] == 0

    trainer.callbacks.append(Look())
    trainer.fit(trainer.lightning_module, loader())
    assert trainer.strategy.hook_state.steps == STEPS

    fit(EfficientAdam, strategy(), accumulate_grad_batches=3, precision="bf16-mixed")
    fit(EfficientAdam, strategy(quantize_weights=True, server_quantizer="uniform8"))
    fit(torch.optim.AdamW, strategy(precondition=True, quantizer="lloyd3"))

    from pytorch_lightning.plugins import MixedPrecision

    def bounded(parameters: Any) -> EfficientAdam:
        return EfficientAdam(parameters, max_grad_norm=1.0)

    clip = {"gradient_clip_val": 0.5}
    for make_bad, one, options, message in (
        (EfficientAdam, strategy(), {**clip, "gradient_clip_algorithm": "value"}, "by 'value'"),
        (bounded, strategy(), clip, "Set only one of them"),
        (EfficientAdam, strategy(), {"plugins": [MixedPrecision("16-mixed", "cpu")]}, "bf16-mixed"),
        (torch.optim.SGD, strategy(precondition=True), {}, "Must be a torch.optim.Adam"),
        (torch.optim.Adam, strategy(quantize_weights=True), {}, "Must be an EfficientAdam"),
    ):
        with pytest.raises((RuntimeError, TypeError), match=message):
            fit(make_bad, one, **options)

    def several() -> list[torch.optim.Optimizer]:
        body = module.body
        return [EfficientAdam(body[0].parameters()), torch.optim.Adam(body[2].parameters())]

    module = make_module(family)
    module.automatic_optimization = False
    module.configure_optimizers = several
    with pytest.raises(RuntimeError, match="The model has 2 optimizers"):
        make_trainer(family, strategy(), ".").fit(module, loader())
    return results


def test_update_mode_and_others_that_know_the_optimizer() -> None:
    first, second = run_ranks(updates, 2)
    assert len(first) == len(second) == 4
    for one, other in zip(first, second, strict=True):
        assert same(one, other)
        assert all(bool(w.isfinite().all()) for w in one)


def by_measurement(rank: int, world_size: int) -> tuple[list[Tensor], str]:
    pose_as_torchrun(rank, world_size)
    family = load_family(FAMILIES[0])
    module = make_module(family)
    trainer = make_trainer(family, strategy(topology="auto", auto=True), ".", max_epochs=20)
    trainer.fit(module, loader())
    trainer.fit_loop.max_epochs = 40
    trainer.fit(module, loader())  # has a auto_compress of its own
    return weights(module), trainer.strategy.hook_state.summary()


def test_a_trainer_can_leave_the_choice_to_measurements() -> None:
    (first, summary), (second, _) = run_ranks(by_measurement, 2)
    assert same(first, second)
    assert "chosen: " in summary and ": a step takes" in summary


def train_in(rank: int, world_size: int, precision: str) -> tuple[list[Tensor], float, float]:
    """A step of rank 1 overflows; with a gradient scaler it must be skipped everywhere."""
    pose_as_torchrun(rank, world_size)
    family = load_family(FAMILIES[0])
    from lightning.pytorch.plugins import MixedPrecision

    scales = precision == "16-mixed"
    # A Trainer refuses fp16 on the CPU and takes bf16; its plugin does not.
    options: dict[str, Any] = (
        {"plugins": [MixedPrecision(precision, "cpu")]} if scales else {"precision": precision}
    )
    module = make_module(family)
    losses = []
    plain_step = module.training_step

    def step(batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = plain_step(batch, batch_idx)
        losses.append(loss.item())
        return loss * float("inf") if scales and rank == 1 and batch_idx == 5 else loss

    module.training_step = step
    trainer = make_trainer(family, strategy(), ".", max_epochs=3, **options)
    trainer.fit(module, loader())
    state = trainer.strategy.hook_state
    assert state.steps == 3 * STEPS
    norm = state.stats()["worker_residual_norm"]
    first, last = sum(losses[:STEPS]) / STEPS, sum(losses[-STEPS:]) / STEPS
    return weights(module), last / first, norm


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "64-true"])
def test_every_precision_trains(precision: str) -> None:
    first, second = run_ranks(train_in, 2, precision)
    assert same(first[0], second[0])
    for trained, progress, norm in (first, second):
        assert trained[0].dtype == (torch.float64 if precision == "64-true" else torch.float32)
        assert all(bool(w.isfinite().all()) for w in trained)
        assert progress < 0.9
        assert 0 < norm < float("inf")


def on_cuda(rank: int, world_size: int) -> tuple[str, int, bool]:
    pose_as_torchrun(rank, world_size)
    family = load_family(FAMILIES[0])
    module = make_module(family, body=lambda: nn.Sequential(*network(), nn.BatchNorm1d(5)))
    options = {"accelerator": "cuda", "precision": "16-mixed", "sync_batchnorm": True}
    trainer = make_trainer(family, strategy(), ".", **options)
    hooks = []
    module.on_train_end = lambda: hooks.append(
        trainer.strategy.model._get_ddp_logging_data()["comm_hook"]
    )
    trainer.fit(module, loader())
    finite = all(bool(w.isfinite().all()) for w in weights(module))
    return hooks[0], trainer.strategy.hook_state.steps, finite


@pytest.mark.gpu
def test_a_trainer_on_a_gpu() -> None:
    ((hook, steps, finite),) = run_ranks(on_cuda, 1, backend="nccl")
    assert (hook, steps, finite) == ("efficient_adam_hook", SAMPLES // BATCH, True)


def manual(rank: int, world_size: int, static_graph: bool) -> tuple[list[Tensor], int]:
    """Manual optimization: two backwards for every step, the first of them kept local."""
    pose_as_torchrun(rank, world_size)
    family = load_family(FAMILIES[0])
    module = make_module(family)
    module.automatic_optimization = False

    def step(batch: list[Tensor], batch_idx: int) -> None:
        optimizer = module.optimizers()
        module.manual_backward(module.loss(batch))
        optimizer.step()
        optimizer.zero_grad()

    module.training_step = step
    trainer = make_trainer(family, strategy(static_graph=static_graph), ".")
    trainer.fit(module, loader())
    return weights(module), trainer.strategy.hook_state.steps


@pytest.mark.parametrize("static_graph", [False, True])
def test_manual_optimization(static_graph: bool) -> None:
    first, second = run_ranks(manual, 2, static_graph)
    assert same(first[0], second[0])
    assert first[1] == second[1] == STEPS


class GAN(nn.Module):
    """Two networks, each trained by an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(7, 31), nn.Tanh(), nn.Linear(31, 23))
        self.critic = nn.Sequential(nn.Linear(23, 31), nn.Tanh(), nn.Linear(31, 1))


def adversaries(rank: int, world_size: int) -> tuple[list[Tensor], int, float]:
    pose_as_torchrun(rank, world_size)
    family = load_family(FAMILIES[1])
    module = make_module(family, body=GAN)
    module.automatic_optimization = False
    body = module.body

    def configure() -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(part.parameters(), lr=3e-3) for part in (body.generator, body.critic)
        ]

    def step(batch: list[Tensor], batch_idx: int) -> None:
        real = batch[0]
        noise = torch.randn(len(real), 7)
        for turn, optimizer in enumerate(module.optimizers()):
            module.toggle_optimizer(optimizer)
            made = body.generator(noise)
            if turn == 0:
                loss = -body.critic(made).mean()
            else:
                loss = body.critic(made.detach()).mean() - body.critic(real).tanh().mean()
            optimizer.zero_grad()
            module.manual_backward(loss)
            optimizer.step()
            module.untoggle_optimizer(optimizer)

    module.configure_optimizers = configure
    module.training_step = step
    trainer = make_trainer(family, strategy(find_unused_parameters=True), ".")
    trainer.fit(module, loader())
    stats = trainer.strategy.hook_state.stats()
    return weights(module), int(stats["steps"]), stats["worker_residual_norm"]


def test_two_optimizers_take_turns() -> None:
    first, second = run_ranks(adversaries, 2)
    assert same(first[0], second[0])
    assert not same(first[0], list(GAN().parameters()))
    assert first[1] == 2 * STEPS


def fabric_runs(rank: int, world_size: int, name: str, folder: str) -> list[Any]:
    """Fabric: an interrupted run and an uninterrupted one, with accumulation."""
    pose_as_torchrun(rank, world_size)
    fabric_package = load_family(name)
    from lightning_plugin import EfficientAdamFabricStrategy

    def start() -> tuple[Any, Any, Any]:
        fabric = fabric_package.Fabric(
            accelerator="cpu",
            devices=world_size,
            strategy=EfficientAdamFabricStrategy(quantizer="lloyd2", **BUCKETS),
        )
        fabric.launch()
        torch.manual_seed(0)
        module = network()
        return fabric, *fabric.setup(module, torch.optim.Adam(module.parameters(), lr=3e-3))

    def train(fabric: Any, module: Any, optimizer: Any, steps: range) -> None:
        for step in steps:
            for part in range(2):
                seed = 100 * step + 10 * part + rank
                batch = torch.randn(8, 23, generator=torch.Generator().manual_seed(seed))
                with fabric.no_backward_sync(module, enabled=part == 0):
                    fabric.backward(module(batch).square().mean())
            optimizer.step()
            optimizer.zero_grad()

    fabric, module, optimizer = start()
    train(fabric, module, optimizer, range(6))
    fabric.save(f"{folder}/f.ckpt", {"net": module, "optimizer": optimizer, "step": 6})
    train(fabric, module, optimizer, range(6, 9))

    fabric, again, optimizer = start()
    objects = {"net": again, "optimizer": optimizer, "step": 0}
    rest = fabric.load(f"{folder}/f.ckpt", objects)
    assert rest == {} and objects["step"] == 6
    train(fabric, again, optimizer, range(6, 9))
    hook = again._forward_module._get_ddp_logging_data()["comm_hook"]
    assert type(fabric.strategy).__module__.endswith(name.partition(".")[0].replace("_fabric", ""))
    return [weights(module), weights(again), fabric.strategy.hook_state(again).steps, hook]


@pytest.mark.parametrize("name", ["lightning.fabric", "lightning_fabric"])
def test_fabric_resumes_to_the_bit(name: str, tmp_path: Path) -> None:
    for whole, resumed, steps, hook in run_ranks(fabric_runs, 2, name, str(tmp_path)):
        assert same(whole, resumed)
        assert steps == 9
        assert hook == "efficient_adam_hook"


def adapted_cases(rank: int, world_size: int, folder: str) -> list[str]:
    """Run Lightning's tests of its DDPStrategy with this strategy."""
    pose_as_torchrun(rank, world_size)
    family = load_family(FAMILIES[0])
    done = []

    # torch.distributed is available in setup().
    module = make_module(family)
    module.setup = lambda stage: done.append(f"setup {torch.distributed.is_initialized()}")
    trainer = make_trainer(family, "effadam_find_unused_parameters_true", folder, max_steps=1)
    trainer.fit(module, loader())
    assert trainer.strategy._ddp_kwargs == {"find_unused_parameters": True}

    # Parameters that DDP is told to ignore stay local, and are not exchanged.
    module = make_module(family)
    module._ddp_params_and_buffers_to_ignore = ["body.0.weight"]
    trainer = make_trainer(family, strategy(), folder, max_steps=2)
    trainer.fit(module, loader())
    assert "body.0.weight" not in trainer.strategy.hook_state.state_dict()["worker"]
    done.append("ignored")

    # Parameters are on the device when optimizers are made, and the backend can be chosen.
    trainer = make_trainer(family, strategy(process_group_backend="gloo"), folder, max_steps=1)
    trainer.fit(make_module(family), loader())
    assert trainer.strategy.process_group_backend == "gloo"
    done.append("backend")

    # An unused parameter is reported in Lightning's words, and accepted when announced.
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(23, 5), nn.Linear(23, 5)

        def forward(self, batch: Tensor) -> Tensor:
            return self.used(batch)

    announced = make_trainer(family, strategy(find_unused_parameters=True), folder)
    announced.fit(make_module(family, body=Unused), loader())
    with pytest.raises(RuntimeError, match="find_unused_parameters"):
        make_trainer(family, strategy(), folder).fit(make_module(family, body=Unused), loader())
    done.append("unused")

    # Several optimizers are for manual optimization only, as with plain DDP.
    module = make_module(family)
    module.configure_optimizers = lambda: [
        torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (module.body[0], module.body[2])
    ]
    with pytest.raises(RuntimeError, match="manual optimization"):
        make_trainer(family, strategy(), folder).fit(module, loader())
    done.append("optimizers")
    return done


def test_cases_of_lightnings_own_suite(tmp_path: Path) -> None:
    for done in run_ranks(adapted_cases, 2, str(tmp_path)):
        assert done == ["setup True", "ignored", "backend", "unused", "optimizers"]


def under_slurm(rank: int, world_size: int) -> tuple[int, int]:
    os.environ.update(
        SLURM_NTASKS=str(world_size),
        SLURM_NTASKS_PER_NODE=str(world_size),
        SLURM_PROCID=str(rank),
        SLURM_LOCALID=str(rank),
        SLURM_NODEID="0",
        SLURM_JOB_ID="7",
        SLURM_JOB_NAME="train",
        LOCAL_WORLD_SIZE=str(world_size),
    )
    family = load_family(FAMILIES[0])
    trainer = make_trainer(family, "effadam", ".")
    trainer.fit(make_module(family), loader())
    assert type(trainer.strategy.cluster_environment).__name__ == "SLURMEnvironment"
    return trainer.global_rank, trainer.strategy.hook_state.steps


def test_slurm_environments_are_understood() -> None:
    assert run_ranks(under_slurm, 2) == [(0, STEPS), (1, STEPS)]


def launch(rank: int, world_size: int, name: str) -> float:
    """A single process that leaves the starting of the others to Lightning."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    family = load_family(FAMILIES[0])
    module = make_module(family)
    before = weights(module)
    trainer = make_trainer(family, name, ".")
    trainer.fit(module, loader())
    assert not same(before, weights(module))  # brought back from the child processes
    return float(trainer.callback_metrics["loss"])


def test_the_notebook_launcher_forks_the_ranks() -> None:
    (loss,) = run_ranks(launch, 1, "effadam_notebook", backend=None)
    assert loss < 2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["popen", "spawn", "torchrun"])
def test_launchers_of_scripts(launcher: str) -> None:
    script = str(Path(__file__).parent / "lightning_script.py")
    command = [sys.executable, script, "spawn" if launcher == "spawn" else "effadam"]
    if launcher == "torchrun":
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [sys.executable, *torchrun, script, "effadam"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=170)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its children too
            raise
    assert process.returncode == 0, stderr
    printed = sorted(line for line in stdout.splitlines() if line.startswith("rank"))
    nodes = 2 if launcher == "spawn" else 1
    expected = [f"rank {rank} efficient_adam_hook {STEPS} {nodes} nodes" for rank in range(2)]
    assert printed == expected


def on_nodes(rank: int, world_size: int, folder: str) -> tuple[str, list[Tensor]]:
    """Fit by LightningCLI with two nodes of two ranks."""
    from lightning.pytorch.cli import LightningCLI

    pose_as_torchrun(rank, world_size)
    family = load_family("lightning.pytorch")
    kind = type(make_module(family))
    arguments = ["--trainer.strategy=lightning_plugin.EfficientAdamStrategy"]
    arguments += ["--trainer.strategy.device_mesh=[2, 2]", "--trainer.strategy.quantizer=lloyd4"]
    options = {"accelerator": "cpu", "devices": world_size, "max_epochs": 2, "logger": False}
    options |= {"enable_progress_bar": False, "num_sanity_val_steps": 0}
    options |= {"enable_model_summary": False, "default_root_dir": folder}
    cli = LightningCLI(
        kind,
        args=arguments,
        trainer_defaults=options,
        run=False,
        save_config_callback=None,
    )
    cli.trainer.fit(cli.model, loader())
    state = cli.trainer.strategy.hook_state
    return state.summary(), weights(cli.model)


def test_lightning_cli_takes_nodes_and_ranks_as_two_numbers(tmp_path: Path) -> None:
    results = run_ranks(on_nodes, 4, str(tmp_path))
    for summary, trained in results:
        assert "topology     hierarchical, chosen: " in summary and "2 nodes x 2 ranks" in summary
        assert same(trained, results[0][1])


def fabric_on_nodes(rank: int, world_size: int) -> tuple[str, list[Tensor]]:
    pose_as_torchrun(rank, world_size)
    from lightning.fabric import Fabric

    from lightning_plugin import EfficientAdamFabricStrategy

    def node() -> torch.distributed.ProcessGroup:
        groups = [torch.distributed.new_group(ranks) for ranks in ([0, 2], [1, 3])]
        return groups[rank % 2]

    strategy = EfficientAdamFabricStrategy(intra_node_group=node)
    fabric = Fabric(accelerator="cpu", strategy=strategy, devices=world_size)
    fabric.launch()
    torch.manual_seed(0)
    module = network()
    module, optimizer = fabric.setup(module, torch.optim.Adam(module.parameters(), lr=3e-3))
    for step in range(3):
        batch = torch.randn(8, 23, generator=torch.Generator().manual_seed(10 * step + rank))
        fabric.backward(module(batch).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return fabric.strategy.hook_state(module).summary(), weights(module)


def test_fabric_calls_for_the_group_of_a_node_when_groups_exist() -> None:
    results = run_ranks(fabric_on_nodes, 4)
    for summary, trained in results:
        assert "topology     hierarchical, chosen: " in summary and "2 nodes x 2 ranks" in summary
        assert same(trained, results[0][1])
