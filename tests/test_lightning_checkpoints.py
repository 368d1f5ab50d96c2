"""Checkpoints hold every rank's residuals: to the bit on as many ranks, in the mean on others."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from effadam_hook import EfficientAdam
from effadam_hook.feedback.checkpoint import RankState
from effadam_hook.feedback.reshard import merge
from harness import Died, run_ranks
from lightning_training import (
    FAMILIES,
    load_family,
    loader,
    make_module,
    make_trainer,
    pose_as_torchrun,
    same,
    weights,
)

pytest.importorskip("lightning")
KEY = "effadam_hook"
OPTIONS: dict[str, Any] = {"quantizer": "lloyd2", "bucket_cap_mb": 0.004}
MODES = ("gradient", "update")
TOPOLOGIES = ("rank0", "sharded")


def strategy(**options: Any) -> Any:
    from lightning_plugin import EfficientAdamStrategy

    return EfficientAdamStrategy(**{**OPTIONS, **options})


def make_optimizer(mode: str) -> Any:
    return EfficientAdam if mode == "update" else torch.optim.Adam


def train_and_die(rank: int, world_size: int, folder: str, topology: str, mode: str) -> None:
    pose_as_torchrun(rank, world_size)
    family = load_family(FAMILIES[0])

    class KilledAfterCheckpoint(family.Callback):  # type: ignore[misc]
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    saving = family.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = make_trainer(
        family,
        strategy(topology=topology),
        folder,
        max_epochs=4,
        enable_checkpointing=True,
        callbacks=[saving, KilledAfterCheckpoint()],
    )
    trainer.fit(make_module(family, make_optimizer(mode)), loader())


def train_on(
    rank: int, world_size: int, mode: str, paths: list[str | None], topologies: tuple[str, ...]
) -> list[Any]:
    """Trains to the end of epoch 4, from the start or from checkpoints; weights and steps."""
    pose_as_torchrun(rank, world_size)
    family = load_family(FAMILIES[0])
    results = []
    for path, topology in zip(paths, topologies, strict=True):
        module = make_module(family, make_optimizer(mode))
        trainer = make_trainer(family, strategy(topology=topology), ".", max_epochs=4)
        trainer.fit(module, loader(), ckpt_path=path)
        results.append((weights(module), trainer.strategy.hook_state.steps))
    return results


@pytest.mark.parametrize("mode", MODES)
def test_a_killed_run_resumes_to_the_bit(mode: str, tmp_path: Path) -> None:
    paths: list[str | None] = []
    for topology in TOPOLOGIES:
        folder = tmp_path / topology
        dead = run_ranks(train_and_die, 3, str(folder), topology, mode, may_die={0, 1, 2})
        assert dead == [Died(-signal.SIGKILL)] * 3
        paths.append(str(folder / "epoch=1.ckpt"))
    results = run_ranks(train_on, 3, mode, [None, *paths], ("rank0", *TOPOLOGIES))
    for whole, *resumed in results:
        assert whole[1] == 4 * 8
        for one in resumed:
            assert one[1] == whole[1]
            assert same(one[0], whole[0])
    # Without the residuals it would not be so.
    saved = torch.load(paths[0] or "", weights_only=True)
    assert len(saved[KEY]["model"]["ranks"]) == 3
    del saved[KEY]
    torch.save(saved, tmp_path / "without.ckpt")
    (result,) = run_ranks(train_on, 3, mode, [str(tmp_path / "without.ckpt")], ("rank0",))[0]
    assert not same(result[0], results[0][0][0])


def save_after_one_epoch(rank: int, world_size: int, folder: str, mode: str) -> None:
    pose_as_torchrun(rank, world_size)
    family = load_family(FAMILIES[1])
    for topology in TOPOLOGIES:
        trainer = make_trainer(family, strategy(topology=topology), folder)
        trainer.fit(make_module(family, make_optimizer(mode)), loader())
        trainer.save_checkpoint(f"{folder}/{topology}-{world_size}.ckpt")


def load_and_look(
    rank: int, world_size: int, path: str, topology: str, mode: str
) -> tuple[dict[str, Any], list[Tensor]]:
    """This rank's state after a checkpoint is restored and before the first step."""
    pose_as_torchrun(rank, world_size)
    family = load_family(FAMILIES[0])
    seen = {}

    class Look(family.Callback):  # type: ignore[misc]
        def on_train_start(self, trainer: Any, module: Any) -> None:
            seen.update(trainer.strategy.hook_state.state_dict())

    trainer = make_trainer(
        family, strategy(topology=topology), ".", max_epochs=2, callbacks=[Look()]
    )
    module = make_module(family, make_optimizer(mode))
    trainer.fit(module, loader(), ckpt_path=path)
    return seen, weights(module)


def merged(states: list[dict[str, Any]]) -> dict[str, Any]:
    return merge([RankState.from_dict(state) for state in states]).to_dict()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 4)])
def test_other_numbers_of_ranks_keep_the_means(
    before: int, after: int, mode: str, tmp_path: Path
) -> None:
    run_ranks(save_after_one_epoch, before, str(tmp_path), mode)
    for topology in TOPOLOGIES:
        path = tmp_path / f"{topology}-{before}.ckpt"
        saved = merged(torch.load(path, weights_only=True)[KEY]["model"]["ranks"])
        results = run_ranks(load_and_look, after, str(path), topology, mode)
        assert all(same(one, results[0][1]) for _, one in results)
        loaded = merged([state for state, _ in results])
        assert loaded["worker"].keys() == saved["worker"].keys()
        for name, residual in saved["worker"].items():
            assert torch.equal(loaded["worker"][name], residual)
        for name, residual in saved["server"].items():
            assert torch.equal(loaded["server"][name], residual)
        assert any(bool(residual.any()) for residual in saved["worker"].values())
        assert loaded["moments"].keys() == saved["moments"].keys()
        assert bool(saved["moments"]) == (mode == "update")
        for name, moments in saved["moments"].items():
            for key, value in moments.items():
                assert torch.equal(
                    torch.as_tensor(loaded["moments"][name][key]), torch.as_tensor(value)
                )


def save_in_every_way(rank: int, world_size: int, folder: str) -> tuple[list[str], list[str]]:
    pose_as_torchrun(rank, world_size)
    family = load_family(FAMILIES[0])
    from lightning.pytorch.plugins.io import AsyncCheckpointIO

    background = AsyncCheckpointIO()
    trainer = make_trainer(family, strategy(), folder, plugins=[background])
    module = make_module(family)
    trainer.fit(module, loader())
    trainer.save_checkpoint(f"{folder}/ours.ckpt")
    trainer.save_checkpoint(f"{folder}/weights.ckpt", weights_only=True)
    background.teardown()
    torch.distributed.barrier()

    # Ours in plain DDP, and what plain DDP writes in ours.
    plain = make_trainer(family, "ddp", folder, max_epochs=2)
    plain.fit(make_module(family), loader(), ckpt_path=f"{folder}/ours.ckpt")
    plain.save_checkpoint(f"{folder}/plain.ckpt")
    again = make_trainer(family, strategy(), folder, max_epochs=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again.fit(make_module(family), loader(), ckpt_path=f"{folder}/plain.ckpt")
    ours = [str(w.message) for w in caught if "compressed exchange" in str(w.message)]

    # Evaluation needs no state; a checkpoint of another model is refused.
    again.test(module, loader(), ckpt_path=f"{folder}/weights.ckpt", verbose=False)
    again.predict(module, loader())
    other = torch.load(f"{folder}/ours.ckpt", weights_only=True)
    for one in other[KEY]["model"]["ranks"]:
        one["worker"]["body.0.weight"] = torch.zeros(7)
    path = f"{folder}/other{rank}.ckpt"
    torch.save(other, path)
    refusals = []
    try:
        make_trainer(family, strategy(), folder).fit(make_module(family), loader(), ckpt_path=path)
    except RuntimeError as error:
        refusals.append(str(error))
    # Residuals of gradients are no residuals of updates.
    path = f"{folder}/ours.ckpt"
    try:
        make_trainer(family, strategy(), folder, max_epochs=2).fit(
            make_module(family, EfficientAdam), loader(), ckpt_path=path
        )
    except RuntimeError as error:
        refusals.append(str(error))
    return ours, refusals


def test_checkpoints_go_to_plain_ddp_and_back(tmp_path: Path) -> None:
    (warned, refused), (silent, also_refused) = run_ranks(save_in_every_way, 2, str(tmp_path))
    assert len(warned) == 1 and "residuals start at zero" in warned[0]
    assert not silent
    assert "body.0.weight" in refused[0] and "damaged" in refused[0]
    assert "residuals are those of gradients" in refused[1]
    assert refused == also_refused
    assert KEY in torch.load(tmp_path / "ours.ckpt", weights_only=True)
    assert KEY not in torch.load(tmp_path / "weights.ckpt", weights_only=True)
    assert KEY not in torch.load(tmp_path / "plain.ckpt", weights_only=True)
