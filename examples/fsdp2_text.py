"""Train a small GPT that FSDP2 shards inside each node, with quantized gradients between the nodes.

    python examples/fsdp2_text.py                  # two replicas of two ranks, 4 bits between them
    python examples/fsdp2_text.py --compare        # also FSDP's own all-reduce (HSDP), and a table
    python examples/fsdp2_text.py --checkpoint outputs/fsdp2 --stop-after 150     # or kill it
    python examples/fsdp2_text.py --checkpoint outputs/fsdp2 --resume             # goes on to the bit
    torchrun --nproc-per-node 8 --nnodes 4 examples/fsdp2_text.py --replicas 4 --shards 8

Ranks are ordered by nodes, as torchrun does: rank r belongs to replica r // shards. A checkpoint is one
of `torch.distributed.checkpoint`, and can be resumed with other `--replicas` and `--shards`. Text and
model are those of `train_text.py`.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common.launch import Worker, launch
from common.training import cross_entropy, evaluate, lr_factor
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from train_text import GPT, Text, TextOptions

from effadam_hook import EfficientAdamState, attach

NATIVE = {"hsdp fp32": torch.float32, "hsdp bf16": torch.bfloat16}
"""FSDP's own all-reduce between replicas, by the dtype of its reductions."""


@dataclass(frozen=True)
class Result:
    """The end of one run: validation loss in nats, and bytes of one rank between the replicas."""

    mode: str
    loss: float
    sent_bytes_per_step: float
    step_ms: float


def shard(model: GPT, mesh: DeviceMesh, reduce_dtype: torch.dtype) -> nn.Module:
    """Shard every block, then the rest of the model."""
    policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def train(worker: Worker, args: argparse.Namespace) -> None:
    """Train with every mode, and print the table on the first rank."""
    mesh = init_device_mesh(
        worker.device.type, (args.replicas, args.shards), mesh_dim_names=("replicate", "shard")
    )
    text = TextOptions(None, args.max_bytes, args.context, args.layers, args.width, args.heads)
    task = Text(text)
    modes = [*NATIVE, *args.quantizers] if args.compare else args.quantizers
    results = [run(worker, args, mesh, task, mode) for mode in modes]
    if worker.is_main:
        print("\nmode           loss    kB a step   ms a step")
        for result in results:
            kilobytes = result.sent_bytes_per_step / 1e3
            print(f"{result.mode:12} {result.loss:7.4f} {kilobytes:11.1f} {result.step_ms:11.1f}")
        print("kB: what one rank sends to other replicas; a dense all-reduce in a ring.")


def run(
    worker: Worker, args: argparse.Namespace, mesh: DeviceMesh, task: Text, mode: str
) -> Result:
    """Train in one mode.

    Args:
        worker: This rank.
        args: The options.
        mesh: The mesh (replicate, shard).
        task: The text.
        mode: A quantizer, or a key of ``NATIVE``.
    """
    torch.manual_seed(args.seed)
    model: Any = task.build_model().to(worker.device)
    state: EfficientAdamState | None = None
    if mode in NATIVE:
        shard(model, mesh, NATIVE[mode])
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    else:
        shard(model, mesh["shard"], torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
        state = attach(
            model,
            process_group=mesh.get_group("replicate"),
            optimizer=optimizer if args.precondition else None,
            precondition=args.precondition,
            quantizer=mode,
        )
    numel = sum(parameter.to_local().numel() for parameter in model.parameters())
    held_out = tuple(part[worker.rank :: worker.world_size] for part in task.held_out())
    first = resume(args.checkpoint, model, optimizer, state) if args.resume else 0
    last = min(args.steps, args.stop_after or args.steps)
    seconds, loss = 0.0, float("nan")
    if first >= last:
        loss, _ = evaluate(model, held_out, worker)
        if worker.is_main:
            print(f"{mode:12} has {first} steps already, validation loss {loss:.4f}", flush=True)
    for step in range(first, last):
        began = time.perf_counter()
        rng = np.random.default_rng([args.seed, step, worker.rank])
        inputs, targets = task.sample(rng, args.batch_size)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * lr_factor(step, args.steps, args.lr_warmup)
        optimizer.zero_grad()
        cross_entropy(model(inputs.to(worker.device)), targets.to(worker.device)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds += time.perf_counter() - began
        if (step + 1) % args.validate_every and step + 1 != last:
            continue
        loss, _ = evaluate(model, held_out, worker)
        if worker.is_main:
            print(f"{mode:12} step {step + 1:4}  validation loss {loss:.4f}", flush=True)
        if args.checkpoint:
            save(args.checkpoint, step + 1, model, optimizer, state, worker)
    steps = max(1, last - first)
    result = Result(mode, loss, sent_bytes(numel, mode, mesh, state), 1e3 * seconds / steps)
    if state is not None:
        if worker.is_main:
            print(state.summary(), flush=True)
        state.close()
    return result


def sent_bytes(numel: int, mode: str, mesh: DeviceMesh, state: EfficientAdamState | None) -> float:
    """Return the bytes that a rank with ``numel`` elements sends to other replicas in a step."""
    share = 1 - 1 / mesh["replicate"].size()  # a rank keeps its own part
    if state is None:
        return 2 * share * NATIVE[mode].itemsize * numel
    stats = state.stats()
    return share * (stats["uplink_bytes"] + stats["downlink_bytes"]) / max(1, stats["steps"])


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: EfficientAdamState | None,
    worker: Worker,
) -> None:
    """Write a checkpoint; every rank must call this. A killed run leaves the one before complete."""
    weights, moments = get_state_dict(model, optimizer)
    content: dict[str, Any] = {"model": weights, "optimizer": moments}
    if state is not None:
        content["effadam"] = state.state_dict()
    dcp.save(content, storage_writer=dcp.FileSystemWriter(folder / f"step{step}", overwrite=True))
    if worker.is_main:
        unfinished = folder / "latest.unfinished"
        unfinished.write_text(str(step))
        unfinished.replace(folder / "latest")
    dist.barrier()


def resume(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: EfficientAdamState | None,
) -> int:
    """Read the latest checkpoint, and return its step; every rank must call this."""
    step = int((folder / "latest").read_text())
    path = folder / f"step{step}"
    weights, moments = get_state_dict(model, optimizer)
    content = {"model": weights, "optimizer": moments}
    dcp.load(content, checkpoint_id=path)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=content["model"],
        optim_state_dict=content["optimizer"],
    )
    if state is not None:
        state.load_checkpoint(path)
    return step


def read_options() -> argparse.Namespace:
    """Read the command line; exit with a message if an option is invalid."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = {
        "replicas": 2,
        "shards": 2,
        "steps": 300,
        "batch-size": 8,
        "lr-warmup": 50,
        "validate-every": 50,
        "seed": 0,
        "max-bytes": 4_000_000,
        "context": 64,
        "layers": 2,
        "width": 128,
        "heads": 4,
    }
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="default %(default)s")
    parser.add_argument("--lr", type=float, default=6e-3, help="default %(default)s")
    parser.add_argument(
        "--quantizers",
        default="lloyd4",
        help="one or several, comma-separated (default %(default)s)",
    )
    parser.add_argument(
        "--precondition", action="store_true", help="divide by Adam's second moment"
    )
    parser.add_argument("--compare", action="store_true", help="train with FSDP's all-reduce, too")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--stop-after", type=int, default=0, help="end early, for a later --resume")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="save at every validation")
    parser.add_argument("--resume", action="store_true", help="go on from --checkpoint")
    args = parser.parse_args()
    args.quantizers = args.quantizers.split(",")
    if args.checkpoint and (args.compare or len(args.quantizers) > 1):
        parser.error("--checkpoint is for one mode: leave out --compare, and name one quantizer")
    if args.resume and not (args.checkpoint and (args.checkpoint / "latest").is_file()):
        parser.error("--resume needs --checkpoint with a folder that holds a checkpoint")
    return args


def main() -> None:
    """Read the command line and start the ranks."""
    args = read_options()
    launch(train, args.replicas * args.shards, args.device, args)


if __name__ == "__main__":
    main()
