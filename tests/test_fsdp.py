"""Models that FSDP2 shards: the exchange between replicas against FSDP's own, its states, and refusals.

The comparison is a copy of the model that is sharded over the mesh of both dimensions (HSDP).
"""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional

from effadam_hook import DisagreementError, EffAdamError, EfficientAdam, StateMismatchError, attach
from effadam_hook.fsdp.groups import Shard, find_groups
from effadam_hook.wire.quantizers import QUANTIZERS
from harness import run_ranks

fsdp = pytest.importorskip("torch.distributed.fsdp")
pytestmark = pytest.mark.skipif(not hasattr(fsdp, "FSDPModule"), reason="torch has no FSDP2")
compares_with_hsdp = pytest.mark.skipif(
    not hasattr(getattr(fsdp, "FSDPModule", None), "set_force_sum_reduction_for_comms"),
    reason="FSDP's own all-reduce does not run on Gloo before torch 2.8",
)

WORDS, WIDTH, INNER = 33, 20, 37  # odd: shards of different sizes, and one without elements


class Net(nn.Module):
    """A small residual network with an embedding, whose inputs have no gradient."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH))
            for _ in range(blocks)
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


def sharded(mesh: DeviceMesh, blocks: int = 2) -> Any:
    torch.manual_seed(0)
    model = Net(blocks)
    for block in model.blocks:
        fsdp.fully_shard(block, mesh=mesh)
    return fsdp.fully_shard(model, mesh=mesh)


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
    own, other = sharded(mesh["shard"], blocks=1), sharded(mesh, blocks=1)
    attach(own, process_group=mesh.get_group("replicate"), quantizer="none")
    for model in (own, other):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(100):
            one_step(model, optimizer, step, rank)
    return distance(own, other)


@compares_with_hsdp
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


def _compile(model: Any) -> None:
    for number, block in enumerate(model.blocks):
        model.blocks[number] = torch.compile(block, backend="aot_eager")


def _divide_after_the_hook(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


def _step_in_the_backward(model: Any) -> None:
    def descend(parameter: Any) -> None:
        parameter.data.add_(parameter.grad, alpha=-0.2)

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(descend)


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
    "sum, then divide": lambda: ({}, _divide_after_the_hook, _plain, 1e-6),
    "hooks of gradients": lambda: ({}, _step_in_the_backward, _plain, 1e-6),
    "checkpointing": lambda: ({}, _checkpoint_activations, _plain, 1e-6),
    "frozen": lambda: ({}, _freeze, _plain, 1e-6),
    "tied": lambda: ({}, _tie, _plain, 1e-6),
    "compiled": lambda: ({}, _compile, _plain, 1e-6),
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
            prepare_first = prepare in (_tie, _compile)
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
            optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
            for step in range(3):
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


@compares_with_hsdp
def test_every_feature_of_fsdp_gives_the_gradients_of_native_hsdp() -> None:
    for found in run_ranks(_features, 4, timeout=180):
        assert {name: error for name, (error, _, _) in found.items() if error > 1} == {}
        assert all(moved > 1e-2 for _, moved, _ in found.values())
        steps = {name: steps for name, (_, _, steps) in found.items() if steps != 3}
        assert steps == {"no zero_grad": 6}


def _random_shapes(rank: int, _: int, seed: int) -> list[tuple[float, float]]:
    draw = random.Random(seed)
    found = []
    for replicas, shards in ((1, 4), (2, 2), (4, 1)):
        mesh = mesh_of(replicas, shards)
        sizes = [draw.randint(1, 40) for _ in range(draw.randint(3, 6))]
        biased = [draw.random() < 0.7 for _ in sizes]
        wrapped = [draw.random() < 0.6 for _ in sizes]
        options = {"reshard_after_forward": draw.choice((True, False, 2 if shards == 4 else True))}
        models = []
        for own in (mesh["shard"], mesh):
            torch.manual_seed(seed)
            layers = [nn.Linear(*each) for each in zip(sizes, sizes[1:], biased, strict=False)]
            model: Any = nn.Sequential(*layers)
            for layer, is_wrapped in zip(layers, wrapped, strict=False):
                if is_wrapped:
                    fsdp.fully_shard(layer, mesh=own, **options)
            models.append(fsdp.fully_shard(model, mesh=own))
        state = attach(models[0], process_group=mesh.get_group("replicate"), quantizer="none")
        start = locals_of(models[0])
        for model in models:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            for step in range(3):
                optimizer.zero_grad()
                own_seed = torch.Generator().manual_seed(10 * step + rank)
                outputs = model(torch.randn(3, sizes[0], generator=own_seed))
                (outputs - 1).square().sum(1).mean().backward()
                optimizer.step()
        assert state.stats()["steps"] == 3
        moved = [
            float((a - b).abs().sum()) for a, b in zip(start, locals_of(models[0]), strict=True)
        ]
        found.append((distance(*models), sum(moved)))
        state.close()
    return found


@compares_with_hsdp
@pytest.mark.parametrize("seed", [1, 2])
def test_models_and_meshes_drawn_at_random_train_as_with_native_hsdp(seed: int) -> None:
    ranks = run_ranks(_random_shapes, 4, seed, timeout=60)
    for number in range(3):
        assert max(errors[number][0] for errors in ranks) < 1e-5
        assert max(errors[number][1] for errors in ranks) > 1e-3


def _late_replica(rank: int, _: int) -> int:
    mesh = mesh_of(2, 1)
    model = sharded(mesh["shard"])
    state = attach(model, process_group=mesh.get_group("replicate"), quantizer="lloyd4")
    loss_of(model, 0, rank).backward()
    model.zero_grad()
    store = dist.distributed_c10d._get_default_store()
    if rank == 0:
        model.blocks[0].register_full_backward_hook(lambda *_: store.set("passed", "1"))
    loss = loss_of(model, 1, rank)
    if rank == 1:  # whose groups rank 0 would wait for, without end
        store.wait(["passed"], timedelta(seconds=20))
    loss.backward()
    return state.stats()["steps"]


def test_the_backward_continues_while_groups_travel() -> None:
    assert run_ranks(_late_replica, 2, timeout=40) == [2, 2]


def _owners(rank: int, _: int) -> list[Any]:
    """Let this process have another device, on which gradients are reduced."""
    mesh = mesh_of(2, 2)
    root, *_ = find_groups(sharded(mesh["shard"], blocks=1))
    record = root.shards[0]._param
    here, elsewhere = Shard(record, torch.device("cpu")), Shard(record, torch.device("meta"))
    shares = here.owner.data_ptr() == record.sharded_param.to_local().data_ptr()
    moved = elsewhere.follow()
    return [shares, moved, elsewhere.owner.device.type, elsewhere.owner.untyped_storage().nbytes()]


def test_the_owner_of_a_shard_has_its_weights_unless_they_are_offloaded() -> None:
    assert run_ranks(_owners, 4, timeout=40) == [[True, False, "meta", 4]] * 4


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


def _tensor_parallel(rank: int, _: int, path: Path) -> tuple[float, str]:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("replicate", "shard", "tensor"))
    models = []
    for own in (mesh["shard"], mesh["replicate", "shard"]):
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(8, 36), nn.GELU(), nn.Linear(36, 6))
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        models.append(fsdp.fully_shard(model, mesh=own))
    state = attach(models[0], process_group=mesh.get_group("replicate"), quantizer="none")
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            inputs = torch.randn(5, 8, generator=torch.Generator().manual_seed(step + rank // 2))
            model(inputs).square().mean().backward()
            optimizer.step()
    dcp.save({"effadam": state.state_dict()}, checkpoint_id=path)
    state.load_checkpoint(path)
    return distance(*models), str(state.state_dict()["server"]["2.weight"].placements[1])


@compares_with_hsdp
def test_replicas_may_be_tensor_parallel(tmp_path: Path) -> None:
    for error, placement in run_ranks(_tensor_parallel, 4, tmp_path / "step3", timeout=60):
        assert error < 1e-6
        assert "1" in placement


# Quantized exchanges


def _quantized_replicas(rank: int, _: int, names: list[str]) -> list[tuple[str, list[Tensor]]]:
    mesh = mesh_of(2, 2)
    found = []
    for name in names:
        model = sharded(mesh["shard"])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        options = {"quantizer": name.partition("/")[0], "precondition": name.endswith("/v")}
        given = optimizer if options["precondition"] else None
        group = mesh.get_group("replicate")
        state = attach(model, process_group=group, optimizer=given, **options)
        for step in range(4):
            state.enabled = step != 2  # a dense step in between
            one_step(model, optimizer, step, rank)
        found.append((name, locals_of(model)))
        state.close()
    return found


def test_replicas_are_identical_with_every_quantizer() -> None:
    names = [*QUANTIZERS, "lloyd2/v"]
    ranks = run_ranks(_quantized_replicas, 4, names, timeout=120)
    everything = {}
    for here, there in ((0, 2), (1, 3)):  # the replicas of each shard
        for (name, own), (_, other) in zip(ranks[here], ranks[there], strict=True):
            assert all(map(torch.equal, own, other)), name
            everything.setdefault(tuple(float(t.double().sum()) for t in own), name)
    assert len(everything) == 2 * len(names)  # no quantizer was ignored, nor the second moment


class Chosen(nn.Module):
    """Parameters whose gradients are those that the caller passes."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(37, 53), (5, 70), (3, 4), (1, 300)]
        self.weights = nn.ParameterList(
            nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in shapes
        )

    def forward(self, gradients: list[Tensor]) -> Tensor:
        return sum((w * g).sum() for w, g in zip(self.weights, gradients, strict=True))


def _chosen(rank: int, step: int) -> list[Tensor]:
    own = torch.Generator().manual_seed(1000 * step + rank)
    shapes = [w.shape for w in Chosen().weights]
    return [torch.randn(s, generator=own, dtype=torch.float64) for s in shapes]


def _conserved(rank: int, _: int, topology: str) -> dict[str, Any]:
    mesh = mesh_of(2, 2)
    model = fsdp.fully_shard(Chosen(), mesh=mesh["shard"])
    state = attach(
        model,
        process_group=mesh.get_group("replicate"),
        quantizer="lloyd2",
        block_size=16,
        topology=topology,
    )
    for step in range(5):
        model(_chosen(rank, step)).backward()  # FSDP accumulates the results
    saved = state.state_dict()
    return {
        name: [
            parameter.grad.full_tensor(),
            saved["worker"][str(rank // 2)][name].full_tensor(),
            saved["server"][name].full_tensor(),
        ]
        for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize("topology", ["sharded", "rank0"])
def test_what_is_not_sent_yet_is_in_the_residuals(topology: str) -> None:
    """Σ_t δ̃_t + ẽ + (1/M) Σ e_m equals the sum of all gradients' means, in float64."""
    ranks = run_ranks(_conserved, 4, topology, timeout=60)
    for number in range(4):
        name = f"weights.{number}"
        given = sum(_chosen(rank, step)[number] for rank in range(4) for step in range(5)) / 4
        sent, _, server = ranks[0][name]
        kept = (ranks[0][name][1] + ranks[2][name][1]) / 2
        assert kept.abs().max() > 1e-2
        assert server.abs().max() > 1e-2
        assert (sent + server + kept - given).abs().max() < 1e-12


# Saved states


def _train(mesh: DeviceMesh, rank: int, path: Path, first: int, last: int, at: int = -1) -> Any:
    """Train from a checkpoint if ``first`` is not 0, and write one after step ``at``."""
    model = sharded(mesh["shard"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = attach(model, process_group=mesh.get_group("replicate"), quantizer="lloyd2")
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    if first:
        weights, moments = get_state_dict(model, optimizer)
        content = {"model": weights, "optimizer": moments}
        dcp.load(content, checkpoint_id=path)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=content["model"],
            optim_state_dict=content["optimizer"],
        )
        state.load_checkpoint(path)
    for step in range(first, last):
        one_step(model, optimizer, step, rank)
        if step == at:
            weights, moments = get_state_dict(model, optimizer)
            content = {"model": weights, "optimizer": moments, "effadam": state.state_dict()}
            dcp.save(content, checkpoint_id=path)
    return model, state


def _resume(rank: int, _: int, path: Path) -> tuple[bool, dict[str, float]]:
    mesh = mesh_of(2, 2)
    whole, state = _train(mesh, rank, path, 0, 8, at=3)
    again, resumed = _train(mesh, rank, path, 4, 8)
    same = all(map(torch.equal, locals_of(whole), locals_of(again)))
    residuals = dict(resumed.session.worker)
    same &= all(torch.equal(a, residuals[name]) for name, a in state.session.worker)
    # The idiom for states of the same ranks.
    template = {"effadam": resumed.state_dict()}
    dcp.load(template, checkpoint_id=path)
    resumed.load_state_dict(template["effadam"])
    return same, {**resumed.stats(), "norm": state.stats()["worker_residual_norm"]}


def test_a_resumed_run_continues_to_the_bit(tmp_path: Path) -> None:
    for same, stats in run_ranks(_resume, 4, tmp_path / "step4", timeout=90):
        assert same
        assert stats["steps"] == 4
        assert stats["worker_residual_norm"] > 0


def _total(state: Any, replicas: int) -> dict[str, Tensor]:
    """Return the mean worker residual plus the server's, of whole parameters."""
    saved = state.state_dict()
    (own,) = saved["worker"].values()
    found = {}
    for name, residual in own.items():
        mean = residual.full_tensor().double()
        dist.all_reduce(mean)
        mean /= dist.get_world_size()  # each of the ranks of a replica has added it
        found[name] = mean + saved["server"][name].full_tensor().double()
    return found


def _another_mesh(rank: int, _: int, path: Path) -> Any:
    state = _train(mesh_of(2, 2), rank, path, 0, 4, at=3)[1]
    before = _total(state, 2)
    found = []
    for replicas, shards in ((4, 1), (1, 4)):
        mesh = mesh_of(replicas, shards)
        model = sharded(mesh["shard"])
        resumed = attach(model, process_group=mesh.get_group("replicate"), quantizer="lloyd2")
        resumed.load_checkpoint(path)
        after = _total(resumed, replicas)
        found.append((max(float((after[n] - b).abs().max()) for n, b in before.items()), after))
        with pytest.raises(StateMismatchError, match=r"2 replicas.*load_checkpoint"):
            resumed.load_state_dict(state.state_dict())
    wrapped = nn.Sequential(sharded(mesh["shard"]))
    fsdp.fully_shard(wrapped, mesh=mesh["shard"])
    renamed = attach(wrapped, process_group=mesh.get_group("replicate"), quantizer="lloyd2")
    with pytest.raises(
        StateMismatchError, match="residuals of parameters that this model does not"
    ):
        renamed.load_checkpoint(path)
    return found, max(float(b.abs().max()) for b in before.values())


def test_means_of_residuals_survive_another_number_of_replicas_and_shards(tmp_path: Path) -> None:
    for found, size in run_ranks(_another_mesh, 4, tmp_path / "step4", timeout=90):
        assert size > 1e-4
        for error, _ in found:
            assert error < 1e-6 * size


# Refusals


def _refusals(rank: int, _: int) -> list[str]:
    mesh = mesh_of(2, 2)
    group = mesh.get_group("replicate")
    model = sharded(mesh["shard"])
    optimizer = EfficientAdam([nn.Parameter(torch.zeros(2))])
    attached = sharded(mesh["shard"])
    attach(attached, process_group=group)
    hybrid, plain = sharded(mesh), nn.Linear(2, 2)
    replicated = _replicated(mesh)
    messages = []
    for given, options in (
        (hybrid, {"process_group": group}),
        (replicated, {"process_group": group}),
        (model, {}),
        (model, {"process_group": dist.group.WORLD}),
        (model, {"process_group": mesh["replicate"]}),
        (model, {"process_group": group, "optimizer": optimizer}),
        (model, {"process_group": group, "quantize_weights": True}),
        (model, {"process_group": group, "topology": "hierarchical"}),
        (attached, {"process_group": group}),
        (plain, {"process_group": group}),
    ):
        with pytest.raises((ValueError, TypeError, EffAdamError)) as raised:
            attach(given, **options)
        messages.append(str(raised.value))
    return messages


def _replicated(mesh: DeviceMesh) -> nn.Module:
    try:
        from torch.distributed._composable.replicate_with_fsdp import replicate
    except ImportError:  # replicate() of torch 2.7 is DDP
        return sharded(mesh)
    takes_mesh = "mesh" in inspect.signature(replicate).parameters
    options = {"mesh": mesh["replicate"]} if takes_mesh else {"device_mesh": mesh_of(4, 1)}
    model = nn.Linear(3, 3)
    replicate(model, **options)
    return model


def test_unsupported_models_groups_and_options_are_refused_with_a_remedy() -> None:
    expected = [
        'mesh=mesh["shard"]',
        "replicate()",
        'process_group=mesh.get_group("replicate")',
        "only this rank of the mesh",
        "Must be a process group, such as mesh.get_group",
        "update mode does not support",
        "quantize_weights",
        "FSDP averages inside",
        "already, and FSDP takes only one",
        "Must be a DistributedDataParallel",
    ]
    for messages in run_ranks(_refusals, 4, timeout=60):
        for message, remedy in zip(messages, expected, strict=True):
            assert remedy in message


def _another_shape(rank: int, _: int, path: Path) -> list[str]:
    mesh = mesh_of(2, 2)
    group = mesh.get_group("replicate")
    model = sharded(mesh["shard"])
    state = attach(model, process_group=group)
    assert f"replica {rank // 2} of 2 (global ranks {rank % 2}, {rank % 2 + 2})" in state.summary()
    loss_of(model, 0, rank).backward()
    saved = state.state_dict()
    dcp.save({"effadam": saved}, checkpoint_id=path)
    wider = Net()
    wider.head = nn.Linear(WIDTH, WORDS + 2)
    fsdp.fully_shard(wider, mesh=mesh["shard"])
    state = attach(wider, process_group=group)
    messages = []
    for load in (lambda: state.load_checkpoint(path), lambda: state.load_state_dict(saved)):
        with pytest.raises(StateMismatchError) as raised:
            load()
        messages.append(str(raised.value))
    assert not len(state.session.worker)
    return messages


def test_residuals_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    for messages in run_ranks(_another_shape, 4, tmp_path / "step1", timeout=90):
        for message in messages:
            assert "(33, 20) for 'head.weight', and the parameter has shape (35, 20)" in message


def _without_elements(rank: int, _: int) -> list[tuple[Any, list[Tensor]]]:
    mesh = mesh_of(2, 2)
    found = []
    for name in QUANTIZERS:
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 1))  # shard 1 has no elements
        for module in model:
            fsdp.fully_shard(module, mesh=mesh["shard"])
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        state = attach(
            model,
            process_group=mesh.get_group("replicate"),
            quantizer=name,
            exact=(),
            optimizer=optimizer,
            precondition=True,
        )
        for step in range(3):
            optimizer.zero_grad()
            own = torch.Generator().manual_seed(10 * step + rank)
            model(torch.randn(5, 3, generator=own)).square().mean().backward()
            optimizer.step()
            state.load_state_dict(state.state_dict())
        found.append((name, locals_of(model)))
    return found


@pytest.mark.filterwarnings("ignore:exact=")
def test_ranks_without_elements_train_and_save_with_every_quantizer() -> None:
    ranks = run_ranks(_without_elements, 4, timeout=90)
    for shard in (0, 1):
        for (name, own), (_, other) in zip(ranks[shard], ranks[shard + 2], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True)), name
            assert sum(tensor.numel() for tensor in own) == (0 if shard else 6)


def _not_finite(rank: int, _: int) -> tuple[bool, bool, bool]:
    mesh = mesh_of(2, 2)
    model = sharded(mesh["shard"])
    state = attach(model, process_group=mesh.get_group("replicate"))
    loss_of(model, 0, rank).backward()
    model.zero_grad()
    (loss_of(model, 1, rank) * (float("nan") if rank == 3 else 1)).backward()
    spoilt = not any(bool(p.grad.to_local().isfinite().all()) for p in model.blocks.parameters())
    model.zero_grad()
    saved = state.state_dict()
    held = [*saved["worker"][str(rank // 2)].values(), *saved["server"].values()]
    state.load_state_dict(saved)
    loss_of(model, 2, rank).backward()
    return (
        spoilt,
        all(bool(tensor.to_local().isfinite().all()) for tensor in held),
        all(bool(p.grad.to_local().isfinite().all()) for p in model.parameters()),
    )


def test_a_gradient_that_is_not_finite_spoils_its_step_on_every_rank_and_no_saved_state() -> None:
    assert run_ranks(_not_finite, 4, timeout=90) == [(True, True, True)] * 4


def _one_rank_differs(rank: int, _: int) -> str:
    mesh = mesh_of(2, 2)
    quantizer = "lloyd2" if rank == 3 else "lloyd4"
    with pytest.raises(DisagreementError) as raised:
        attach(
            sharded(mesh["shard"]), process_group=mesh.get_group("replicate"), quantizer=quantizer
        )
    return str(raised.value)


def test_a_rank_with_other_options_is_an_error_on_every_rank() -> None:
    for message in run_ranks(_one_rank_differs, 4, timeout=30):
        assert "quantizer" in message


class Branches(nn.Module):
    """A model that may leave one branch unused."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        return (self.first(x) + self.second(x) if both else self.first(x)).sum()


def _unused(rank: int, _: int) -> str:
    mesh = mesh_of(2, 2)
    model: Any = fsdp.fully_shard(Branches(), mesh=mesh["shard"])
    state = attach(model, process_group=mesh.get_group("replicate"), quantizer="lloyd2")
    if hasattr(model, "set_reduce_scatter_unused_params"):
        model.set_reduce_scatter_unused_params(True)
        model(torch.ones(2, 8) + rank, both=True).backward()
        held = state.session.worker.get("second.weight")
        assert held is not None
        kept = held.clone()
        model(torch.ones(2, 8) + rank, both=False).backward()
        assert torch.equal(held, kept)  # an unused parameter sends nothing
        model.set_reduce_scatter_unused_params(False)
    with pytest.raises(EffAdamError, match="set_reduce_scatter_unused_params") as raised:
        model(torch.ones(2, 8), both=False).backward()
    return str(raised.value)


def test_parameters_without_a_gradient_are_an_error_unless_fsdp_includes_them() -> None:
    run_ranks(_unused, 4, timeout=30)


def _unused_on_one_replica(rank: int, _: int) -> str:
    mesh = mesh_of(2, 2)
    model: Any = fsdp.fully_shard(Branches(), mesh=mesh["shard"])
    attach(model, process_group=mesh.get_group("replicate"))
    inputs = torch.ones(3, 8)
    model(inputs, both=True).backward()
    with pytest.raises(EffAdamError) as raised:
        model(inputs, both=rank >= 2).backward()
    dist.barrier()  # all ranks live on
    return str(raised.value)


def test_an_error_of_one_replica_is_raised_on_all_while_it_lives_on() -> None:
    for message in run_ranks(_unused_on_one_replica, 4, timeout=30):
        assert "set_reduce_scatter_unused_params" in message


class Interrupted(nn.Module):
    """A net whose backward is interrupted on request, after the last block."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.interrupts = Net(), False
        self.net.blocks[0].register_full_backward_hook(self._interrupt)

    def forward(self, words: Tensor) -> Tensor:
        return self.net(words)

    def _interrupt(self, *_: Any) -> None:
        if self.interrupts:
            raise KeyError("interrupted")


def _interrupted(rank: int, _: int) -> float:
    mesh = mesh_of(2, 2)
    model: Any = Interrupted()
    for block in model.net.blocks:
        fsdp.fully_shard(block, mesh=mesh["shard"])
    fsdp.fully_shard(model, mesh=mesh["shard"])
    state = attach(model, process_group=mesh.get_group("replicate"), quantizer="lloyd4")
    for step in range(3):
        model.interrupts = step == 1
        if model.interrupts:
            with pytest.raises(KeyError):
                loss_of(model, step, rank).backward()
            model.reset_iter_state()
            continue
        loss_of(model, step, rank).backward()
    return state.stats()["steps"]


def test_steps_go_on_after_a_backward_that_an_error_of_the_model_has_ended() -> None:
    if not hasattr(fsdp.FSDPModule, "reset_iter_state"):
        pytest.skip("FSDP does not recover from errors")
    assert run_ranks(_interrupted, 4, timeout=40) == [2] * 4


def _reset_between(rank: int, _: int) -> float:
    mesh = mesh_of(2, 2)
    models = []
    for own in (mesh["shard"], mesh):
        torch.manual_seed(0)
        model: Any = Interrupted()
        for block in model.net.blocks:
            fsdp.fully_shard(block, mesh=own)
        models.append(fsdp.fully_shard(model, mesh=own))
    attach(models[0], process_group=mesh.get_group("replicate"), quantizer="none")
    for model in models:
        model.set_requires_all_reduce(False)
        loss_of(model, 0, rank).backward()
        model.interrupts = True
        with pytest.raises(KeyError):
            loss_of(model, 1, rank).backward()
        model.interrupts = False
        model.reset_iter_state()
        model.zero_grad()
        loss_of(model, 2, rank).backward()
        model.set_requires_all_reduce(True)
        loss_of(model, 3, rank).backward()
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    gradients = [(a.grad.to_local(), b.grad.to_local()) for a, b in pairs]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in gradients if a.numel())


def test_a_reset_drops_the_gradients_of_earlier_micro_batches_as_in_native_hsdp() -> None:
    if not hasattr(fsdp.FSDPModule, "reset_iter_state"):
        pytest.skip("FSDP does not recover from errors")
    assert max(run_ranks(_reset_between, 4, timeout=40)) < 1e-5


def _dies(rank: int, _: int) -> str:
    mesh = mesh_of(2, 2)
    model = sharded(mesh["shard"])
    state = attach(model, process_group=mesh.get_group("replicate"), quantizer="lloyd4")
    loss_of(model, 0, rank).backward()
    loss = loss_of(model, 1, rank)
    dist.barrier()
    if rank == 3:
        import os

        os._exit(1)
    with pytest.raises(RuntimeError) as raised:
        loss.backward()
    state.close()
    return str(raised.value)


def test_a_rank_that_dies_in_a_backward_is_an_error_on_every_rank() -> None:
    run_ranks(_dies, 4, timeout=60, may_die=[3])
