"""Models and kinds of training that a hook must support, and saved states that it must refuse."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from effadam_hook import EfficientAdamState, StateMismatchError, attach, efficient_adam_hook
from effadam_hook.wire.layout import Slot, lay_out_bucket
from effadam_hook.wire.quantizers import get_quantizer
from effadam_hook.wire.shares import share_of
from harness import run_ranks
from training import ChosenGradients, ddp, drawn_gradients, loss_of


class Layers(nn.Module):
    """Three wide layers; ``how`` says what is unusual about them."""

    def __init__(self, how: str = "", width: int = 33) -> None:
        super().__init__()
        self.how = how
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        if how == "tied":
            self.layers[2].weight = self.layers[0].weight
        if how == "frozen":
            self.layers[1].weight.requires_grad_(False)
        if how == "empty":
            self.nothing = nn.Parameter(torch.zeros(0, 5))
        if how == "permuted":
            wide = nn.Parameter(torch.randn(4, 3, 5, 7).to(memory_format=torch.channels_last))
            self.wide = wide

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = checkpoint(layer, x, use_reentrant=False) if self.how == "checkpoint" else layer(x)
            x = x + torch.tanh(y)
        if self.how == "empty":
            x = x + self.nothing.sum()
        if self.how == "permuted":
            x = x + self.wide.square().mean()
        return x


def train(
    model: nn.Module, rank: int, steps: int, loss: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    data = torch.Generator().manual_seed(rank)
    width = next(p for p in model.parameters() if p.ndim == 2 and p.numel()).shape[1]
    for _ in range(steps):
        optimizer.zero_grad()
        batch = torch.randn(4, width, generator=data)
        (loss_of(model, batch) if loss is None else loss(batch)).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def compare_with_plain_ddp(rank: int, world_size: int, how: str) -> tuple[list[Tensor], float]:
    """Weights after training, and how far those of an exchange without quantization are from DDP's."""
    options = {"static_graph": True} if how == "static_graph" else {}
    trained = []
    for quantizer in (None, "none", "lloyd3"):
        torch.manual_seed(0)
        model = ddp(Layers(how), **options)
        if quantizer:
            attach(model, quantizer=quantizer)
        trained.append(train(model, rank, 6))
    plain, exact, quantized = trained
    apart = max(float((a - b).abs().max()) for a, b in zip(plain, exact, strict=True) if a.numel())
    return quantized, apart


@pytest.mark.parametrize(
    "how", ["tied", "frozen", "empty", "permuted", "checkpoint", "static_graph"]
)
def test_unusual_models_train_as_in_plain_ddp(how: str) -> None:
    ranks = run_ranks(compare_with_plain_ddp, 2, how)
    for weights, apart in ranks:
        assert apart < 1e-6
        assert all(torch.equal(a, b) for a, b in zip(weights, ranks[0][0], strict=True))


def go_backward_twice(rank: int, world_size: int) -> list[bool]:
    """A second backward through the same graph exchanges nothing, in plain DDP and here."""
    gradients = []
    for hook in (False, True):
        model = ddp(ChosenGradients())
        if hook:
            state = attach(model, quantizer="none")
        loss = model(drawn_gradients(rank, 0))
        loss.backward(retain_graph=True)
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    same = all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(*gradients, strict=True))
    return [same, state.steps == 1]


def test_a_second_backward_through_a_retained_graph_is_ddps() -> None:
    assert run_ranks(go_backward_twice, 2) == [[True, True]] * 2


def unfreeze(rank: int, world_size: int) -> bool:
    """A parameter is unfrozen, DDP built anew, and the residuals of the others carried over."""
    torch.manual_seed(0)
    module = Layers("frozen")
    model = ddp(module)
    state = attach(model, quantizer="lloyd2")
    train(model, rank, 3)
    saved = state.state_dict()
    module.layers[1].weight.requires_grad_(True)
    again = ddp(module)
    state_again = attach(again, quantizer="lloyd2")
    state_again.load_state_dict(saved)
    kept = state_again.state_dict()["worker"]
    assert all(torch.equal(kept[name], value) for name, value in saved["worker"].items())
    train(again, rank, 3)
    return "layers.1.weight" in state_again.state_dict()["worker"]


def test_a_parameter_can_be_unfrozen_in_mid_run() -> None:
    assert run_ranks(unfreeze, 2) == [True, True]


def compile_model(rank: int, world_size: int) -> tuple[list[Tensor], float, int]:
    weights = []
    for compiled in (False, True):
        torch.manual_seed(0)
        # The DDPOptimizer wants a first bucket, 1 MB, that is no larger than the others.
        model = DistributedDataParallel(Layers(width=600), bucket_cap_mb=1.5)
        state = attach(model, quantizer="lloyd3")
        run = torch.compile(model, backend="aot_eager") if compiled else model
        weights.append(train(run, rank, 4))
    apart = max(float((a - b).abs().max()) for a, b in zip(*weights, strict=True))
    return weights[1], apart, len(state.session.buckets)


def test_torch_compile_with_the_ddp_optimizer() -> None:
    ranks = run_ranks(compile_model, 2, timeout=150)
    for weights, apart, buckets in ranks:
        assert buckets >= 2
        assert apart < 1e-4
        assert all(torch.equal(a, b) for a, b in zip(weights, ranks[0][0], strict=True))


def use_python_reducer(rank: int, world_size: int) -> str:
    torch._dynamo.config.optimize_ddp = "python_reducer"
    model = DistributedDataParallel(Layers())
    try:
        attach(model)
        run = torch.compile(model, backend="aot_eager")
        compiled = torch._dynamo.compiled_autograd
        enable = getattr(compiled, "_enable", None) or compiled.enable  # in torch 2.4
        with enable(torch.compile(backend="aot_eager")):
            train(run, rank, 1)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_the_python_reducer_is_refused_with_the_remedy() -> None:
    for message in run_ranks(use_python_reducer, 2, timeout=120):
        assert "python_reducer" in message
        assert 'optimize_ddp = "ddp_optimizer"' in message


def test_index_arithmetic_is_exact_beyond_2_to_31_elements() -> None:
    numel, servers = 2**33 + 5, 3
    slots = [Slot("small", 0, 7, False), Slot("huge", 7, numel, False)]
    layout = lay_out_bucket(
        slots,
        uplink=get_quantizer("lloyd4"),
        downlink=get_quantizer("sign"),
        scale_rule="least_squares",
        block_size=256,
        servers=servers,
        itemsize=4,
    )
    pieces = sorted(
        (piece for chunk in layout.uplink.chunks for piece in chunk.pieces if piece.slot == 1),
        key=lambda piece: piece.start,
    )
    end = 7
    for piece in pieces:
        assert piece.start == end
        end += piece.numel
    assert end == layout.numel == numel + 7
    blocks = -(-numel // 256)
    used = sum(chunk.used_bytes for chunk in layout.uplink.chunks)
    assert used == blocks * 2 + (blocks - 1) * 128 + 4 + (2 + 4)
    assert sum(share_of(numel, 3, 256, s, servers)[1] for s in range(servers)) == numel


# Saved states


def make_state(rank: int, world_size: int) -> tuple[EfficientAdamState, nn.Module]:
    model = ddp(ChosenGradients())
    state = attach(model, quantizer="lloyd2", topology="sharded")
    for step in range(3):
        model.zero_grad()
        model(drawn_gradients(rank, step)).backward()
    return state, model


def alterations(value: Any) -> list[Any]:
    """Other things than a value of this kind."""
    if isinstance(value, Tensor):
        broken = value.clone()
        broken[:1] = torch.nan
        other = [broken, value.long(), value.view(1, -1), None]
        return [*other, torch.cat([value, value])] if value.numel() else [None]
    if isinstance(value, dict):
        return [None, [], "text", 1]
    return [None, "text", -1, 1.5, [1]]


def paths(saved: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [prefix] if prefix else []
    if isinstance(saved, dict):
        return found + [p for key, value in saved.items() for p in paths(value, (*prefix, key))]
    if isinstance(saved, list):
        return found + [p for i, value in enumerate(saved) for p in paths(value, (*prefix, i))]
    return found


def altered(saved: Any, path: tuple[Any, ...], value: Any) -> Any:
    result = copy.deepcopy(saved)
    place = result
    for key in path[:-1]:
        place = place[key]
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return result


def look_up(saved: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        saved = saved[key]
    return saved


def refuse_altered(rank: int, world_size: int) -> tuple[int, list[str]]:
    state, _ = make_state(rank, world_size)
    own = state.state_dict()
    box = [state.full_state_dict()]
    torch.distributed.broadcast_object_list(box)
    tried, wrong = 0, []
    for saved in (own, box[0]):
        for path in paths(saved):
            for value in [*alterations(look_up(saved, path)), KeyError]:
                if value is look_up(saved, path):  # an option that is None
                    continue
                tried += 1
                try:
                    state.load_state_dict(altered(saved, path, value))
                except StateMismatchError:
                    pass
                except Exception as error:
                    wrong.append(f"{path} = {value!r:.30}: {type(error).__name__}: {error}")
                else:
                    wrong.append(f"{path} = {value!r:.30}: accepted")
                now = state.state_dict()
                for side in ("worker", "server"):
                    if not all(torch.equal(now[side][n], own[side][n]) for n in own[side]):
                        wrong.append(f"{path} = {value!r:.30}: changed the running state")
                        state.load_state_dict(own)
    return tried, wrong


def test_any_altered_state_is_refused_and_changes_nothing() -> None:
    for tried, wrong in run_ranks(refuse_altered, 2):
        assert tried > 300
        assert wrong == []


def load_damaged_files(rank: int, world_size: int) -> list[str]:
    state, _ = make_state(rank, world_size)
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    data = file.getvalue()
    results = []
    for cut in (0, 10, len(data) // 2, len(data) - 20):
        try:
            state.load_state_dict(torch.load(io.BytesIO(data[:cut]), weights_only=True))
        except Exception as error:
            results.append(type(error).__name__)
    state.load_state_dict(torch.load(io.BytesIO(data), weights_only=True))
    return results


def test_truncated_files_do_not_load_and_whole_ones_do_with_weights_only() -> None:
    for errors in run_ranks(load_damaged_files, 2):
        assert len(errors) == 4


def test_the_package_pickles_nothing() -> None:
    root = Path(__file__).parent.parent / "effadam_hook"
    for path in root.rglob("*.py"):
        assert "pickle" not in path.read_text(), path


ELASTIC = """
import os, sys
import torch, torch.distributed as dist
sys.path.insert(0, {tests!r})
import training
from effadam_hook import attach

attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
# torchrun keeps its store over a restart, and Gloo would read the dead ranks' addresses in it.
store = dist.PrefixStore(attempt, dist.TCPStore(address, port, is_master=False))
rank, folder = int(os.environ["RANK"]), {folder!r}
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
model = training.ddp(training.ChosenGradients())
state = attach(model, quantizer="lloyd2")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
first = 0
if os.path.exists(folder + "/saved"):
    saved = torch.load(folder + "/saved", weights_only=True)
    model.load_state_dict(saved["model"])
    state.load_state_dict(saved["hook"])
    first = saved["step"]
for step in range(first, 8):
    if attempt == "0" and step == 6 and rank == 1:
        os._exit(3)
    optimizer.zero_grad()
    model(training.drawn_gradients(rank, step)).backward()
    optimizer.step()
    if step == 3:
        full = state.full_state_dict()
        if rank == 0:
            torch.save(dict(model=model.state_dict(), hook=full, step=4), folder + "/saved.new")
            os.replace(folder + "/saved.new", folder + "/saved")
        dist.barrier()
if rank == 0:
    torch.save([attempt, [p.detach() for p in model.parameters()]], folder + "/result")
dist.destroy_process_group()
"""


def run_elastic(folder: Path) -> tuple[str, list[Tensor]]:
    script = folder / "train.py"
    here = str(Path(__file__).parent)
    script.write_text(ELASTIC.format(tests=here, folder=str(folder)))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "--max-restarts=1", str(script)],
        env=env,
        capture_output=True,
        timeout=160,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    attempt, weights = torch.load(folder / "result")
    return attempt, weights


@pytest.mark.slow
@pytest.mark.timeout(330)
def test_torchruns_elastic_restart_resumes_with_the_residuals_to_the_bit(tmp_path: Path) -> None:
    attempt, weights = run_elastic(tmp_path)
    assert attempt == "1"
    expected = run_ranks(train_without_failure, 2)[0]
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def train_without_failure(rank: int, world_size: int) -> list[Tensor]:
    model = ddp(ChosenGradients())
    attach(model, quantizer="lloyd2")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(8):
        optimizer.zero_grad()
        model(drawn_gradients(rank, step)).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def test_a_hook_registered_by_hand_needs_no_more() -> None:
    assert run_ranks(train_by_hand, 2) == [3, 3]


def train_by_hand(rank: int, world_size: int) -> int:
    model = ddp(ChosenGradients())
    state = EfficientAdamState(enabled=False)
    model.register_comm_hook(state, efficient_adam_hook)
    for step in range(3):
        state.enabled = step != 1
        model.zero_grad()
        model(drawn_gradients(rank, step)).backward()
    return state.steps
