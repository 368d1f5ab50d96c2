"""Ranks and nodes that are lost in the hierarchical topology: every survivor names them, in seconds."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from effadam_hook import attach
from harness import Died, run_ranks
from test_faults_processes import at_phase, attempt, backward
from training import ChosenGradients, ddp

STAGES = ("node mean", "encode", "uplink", "reduce", "downlink", "node gather", "decode")


def lose(
    rank: int, world_size: int, folder: str, phase: str, victims: tuple[int, ...]
) -> tuple[str, float]:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    model = ddp(ChosenGradients())
    mesh = DeviceMesh("cpu", torch.tensor([[0, 1], [2, 3]]))
    attach(model, quantizer="lloyd3", topology="hierarchical", device_mesh=mesh)
    if rank in victims:
        at_phase(phase, lambda: os.kill(os.getpid(), signal.SIGKILL))
    for step in range(2):
        backward(model, rank, step)
    return attempt(lambda: [backward(model, rank, step) for step in range(2, 6)])


@pytest.mark.parametrize(
    ("victims", "phase", "named"),
    [
        ((1,), "pack", "rank 1 (on node 0)"),
        ((3,), "reduce", "rank 3 (on node 1)"),
        ((0,), "average", "rank 0 (on node 0)"),
        ((2,), "downlink", "rank 2 (on node 1)"),
        ((1,), "decode", "rank 1 (on node 0)"),
        ((2, 3), "encode", "node 1 (ranks 2, 3)"),
    ],
)
def test_survivors_name_the_rank_or_node_that_is_lost_and_the_stage(
    victims: tuple[int, ...], phase: str, named: str, tmp_path: Path
) -> None:
    results = run_ranks(
        lose,
        4,
        *(str(tmp_path), phase, victims),
        backend=None,
        may_die=set(victims),
        timeout=40,
        grace=15,
    )
    for rank, result in enumerate(results):
        if rank in victims:
            assert isinstance(result, Died)
            continue
        message, seconds = result
        assert f"No answer from {named}: killed" in message, message
        assert f"Rank {rank}, bucket " in message
        assert any(stage in message for stage in STAGES), message
        assert seconds < 10, message
