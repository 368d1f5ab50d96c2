"""Models that FSDP2 shards: the exchange between replicas against FSDP's own, its states, and refusals.

The comparison is a copy of the model that is sharded over the mesh of both dimensions (HSDP).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from harness import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional

from effadam_hook import DisagreementError, EffAdamError, EfficientAdam, StateMismatchError, attach
from effadam_hook.wire.quantizers import QUANTIZERS

fsdp = pytest.importorskip("torch.distributed.fsdp")
pytestmark = [
    pytest.mark.skipif(not hasattr(fsdp, "FSDPModule"), reason="torch has no FSDP2"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module"),
]

WORDS, WIDTH, INNER = 33, 20, 37  # odd: shards of different sizes, and one without elements


class Net(nn.Module):
    """A small residual network with an embedding, whose inputs have no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH))
            for _ in range(2)
        )
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.scale * x)


def mesh_of(replicas: int, shards: int) -> DeviceMesh:
    return init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicate", "shard"))


def sharded(mesh: DeviceMesh, **options: Any) -> Any:
    torch.manual_seed(0)
    model = Net()
    for block in model.blocks:
        fsdp.fully_shard(block, mesh=mesh, **options)
    return fsdp.fully_shard(model, mesh=mesh, **options)


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    own = torch.Generator().manual_seed(1000 * step + rank)
    words = torch.randint(WORDS, (4, 9), generator=own)
    return functional.cross_entropy(model(words).flatten(0, 1).float(), words.roll(1).flatten())


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, rank: int) -> None:
    optimizer.zero_grad()
    loss_of(model, step, rank).backward()
    optimizer.step()


def locals_of(model: nn.Module) -> list[Tensor]:
    return [parameter.to_local().detach().clone() for parameter in model.parameters()]


def distance(model: nn.Module, other: nn.Module) -> float:
    """Return the largest difference, in units of the largest weight."""
    pairs = zip(locals_of(model), locals_of(other), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs if a.numel())


# A dense exchange is FSDP's own


def _hundred_steps(rank: int, _: int, replicas: int, shards: int) -> float:
    mesh = mesh_of(replicas, shards)
    own, other = sharded(mesh["shard"]), sharded(mesh)
    attach(own, process_group=mesh.get_group("replicate"), quantizer="none")
    for model in (own, other):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(100):
            one_step(model, optimizer, step, rank)
    return distance(own, other)


@pytest.mark.parametrize(("replicas", "shards"), [(2, 2), (3, 2)])
def test_without_a_quantizer_training_is_that_of_native_hsdp(replicas: int, shards: int) -> None:
    found = run_ranks(_hundred_steps, replicas * shards, replicas, shards, timeout=120)
    assert max(found) < 1e-5  # three replicas are summed in another order


def _plain(model: Any, step: int, rank: int) -> None:
    loss_of(model, step, rank).backward()


def _accumulate_locally(model: Any, step: int, rank: int) -> None:
    model.set_requires_gradient_sync(False)
    loss_of(model, step, rank).backward()
    model.set_requires_gradient_sync(True)
    loss_of(model, step + 50, rank).backward()


def _accumulate_in_the_mesh(model: Any, step: int, rank: int) -> None:
    for number in range(3):
        model.set_requires_all_reduce(number == 2)
        loss_of(model, step + 50 * number, rank).backward()


def _clip(model: Any, step: int, rank: int) -> None:
    loss_of(model, step, rank).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)


def _twice_without_zero_grad(model: Any, step: int, rank: int) -> None:
    loss_of(model, step, rank).backward()
    loss_of(model, step + 50, rank).backward()


def _placed_in_dimension_1(parameter: nn.Parameter) -> Any:
    from torch.distributed.tensor import Shard

    return Shard(1) if parameter.ndim == 2 and parameter.shape[1] % 2 == 0 else None


def _divide_by(model: Any, factor: float) -> None:
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # Gloo has no PREMUL_SUM
            module.set_gradient_divide_factor(factor)


def _checkpoint_activations(model: Any) -> None:
    from torch.utils.checkpoint import checkpoint

    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def _freeze(model: Any) -> None:
    model.blocks[0][0].weight.requires_grad_(False)
    model.words.weight.requires_grad_(False)


def _tie(model: Any) -> None:
    model.head.weight = model.words.weight


def _leave(model: Any) -> None:
    pass


LOW = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
LOWEST = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.bfloat16}
Case = tuple[dict[str, Any], Callable[[Any], None], Callable[[Any, int, int], None], float]
FEATURES: dict[str, Callable[[], Case]] = {
    "sync off": lambda: ({}, _leave, _accumulate_locally, 1e-6),
    "all-reduce off": lambda: ({}, _leave, _accumulate_in_the_mesh, 1e-6),
    "clipping": lambda: ({}, _leave, _clip, 1e-6),
    "no zero_grad": lambda: ({}, _leave, _twice_without_zero_grad, 1e-6),
    "bf16 parameters": lambda: ({"mp_policy": _policy(LOW)}, _leave, _plain, 1e-6),
    # The exchange sums in float32, native HSDP in bfloat16.
    "bf16 reduce": lambda: ({"mp_policy": _policy(LOWEST)}, _leave, _plain, 2e-2),
    "no resharding": lambda: ({"reshard_after_forward": False}, _leave, _plain, 1e-6),
    "Shard(1)": lambda: ({"shard_placement_fn": _placed_in_dimension_1}, _leave, _plain, 1e-6),
    "offload": lambda: (
        {"offload_policy": fsdp.CPUOffloadPolicy(pin_memory=False)},
        _leave,
        _plain,
        1e-6,
    ),
    "divide factor": lambda: ({}, functools.partial(_divide_by, factor=7.0), _plain, 1e-6),
    "checkpointing": lambda: ({}, _checkpoint_activations, _plain, 1e-6),
    "frozen": lambda: ({}, _freeze, _plain, 1e-6),
    "tied": lambda: ({}, _tie, _plain, 1e-6),
}


def _policy(dtypes: dict[str, Any]) -> Any:
    return fsdp.MixedPrecisionPolicy(**dtypes)


def _features(rank: int, _: int) -> dict[str, tuple[float, float, float]]:
    mesh = mesh_of(2, 2)
    found = {}
    for name, make in FEATURES.items():
        options, prepare, backward, bound = make()
        models = []
        for each in (mesh["shard"], mesh):
            torch.manual_seed(0)
            model: Any = Net()
            prepare_first = prepare in (_tie,)
            if prepare_first:
                prepare(model)
            for block in model.blocks:
                fsdp.fully_shard(block, mesh=each, **options)
            fsdp.fully_shard(model, mesh=each, **options)
            if not prepare_first:
                prepare(model)
            models.append(model)
        state = attach(models[0], process_group=mesh.get_group("replicate"), quantizer="none")
        start = locals_of(models[1])
        for model in models:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            for step in range(5):
                optimizer.zero_grad()
                backward(model, step, rank)
                optimizer.step()
        moved = max(
            float((a - b).abs().max())
            for a, b in zip(start, locals_of(models[1]), strict=True)
            if a.numel()
        )
        found[name] = (distance(*models) / bound, moved, state.stats()["steps"])
        state.close()
    return found


def test_every_feature_of_fsdp_gives_the_gradients_of_native_hsdp() -> None:
    for found in run_ranks(_features, 4, timeout=180):
        assert {name: error for name, (error, _, _) in found.items() if error > 1} == {}
        assert all(moved > 1e-2 for _, moved, _ in found.values())
        steps = {name: steps for name, (_, _, steps) in found.items() if steps != 5}
        assert steps == {"no zero_grad": 10}


def _two_groups(rank: int, _: int) -> list[float]:
    from torch.distributed.fsdp._fully_shard._fsdp_common import (
        FSDPMeshInfo,
        HSDPMeshInfo,
        ShardPlacementResult,
    )
    from torch.distributed.tensor import Shard

    mesh = mesh_of(2, 2)
    again = mesh_of(2, 2)  # as for experts, which have a mesh of their own
    models = []
    for hybrid in (False, True):
        info = (
            HSDPMeshInfo(again, shard_mesh_dim=1, replicate_mesh_dim=0)
            if hybrid
            else FSDPMeshInfo(again["shard"], shard_mesh_dim=0)
        )
        torch.manual_seed(0)
        model = Net()
        inner = {block[0].weight for block in model.blocks}

        def place(parameter: Any, info: Any = info, inner: Any = inner) -> Any:
            return ShardPlacementResult(Shard(0), info) if parameter in inner else None

        for block in model.blocks:
            own = mesh if hybrid else mesh["shard"]
            fsdp.fully_shard(block, mesh=own, shard_placement_fn=place)
        models.append(fsdp.fully_shard(model, mesh=mesh if hybrid else mesh["shard"]))
    state = attach(models[0], process_group=mesh.get_group("replicate"), quantizer="none")
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(4):
            one_step(model, optimizer, step, rank)
    return [distance(*models), len(state.session.buckets)]


def test_modules_with_several_parameter_groups_have_a_bucket_for_each() -> None:
    common = pytest.importorskip("torch.distributed.fsdp._fully_shard._fsdp_common")
    if not hasattr(common, "ShardPlacementResult"):
        pytest.skip("torch has one parameter group a module")
    for error, buckets in run_ranks(_two_groups, 4, timeout=90):
        assert error < 1e-6
        assert buckets == 5  # two of each block, and the root's
