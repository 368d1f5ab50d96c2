"""Shares of local ranks: runs of parameters, whatever the bucket; encoded as in the whole bucket."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import math
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effadam_hook.exchange.staging import Staging
from effadam_hook.kernels.fusions import Preconditioner
from effadam_hook.session import node_buffers, node_memory
from effadam_hook.session.node_buffers import NodeBuffers
from effadam_hook.session.node_log import describe_exchange
from effadam_hook.session.node_memory import TICKET_BYTES, open_ticket
from effadam_hook.wire.layout import BucketLayout, Slot, lay_out_bucket
from effadam_hook.wire.node_layout import NodeLayout, lay_out_node
from effadam_hook.wire.node_shares import node_share_of, position_of
from effadam_hook.wire.quantizers import get_quantizer
from effadam_hook.wire.shares import share_of
from kernel_cases import IMPLEMENTATIONS, values_like_gradients

SIZES = (130, 1, 33, 5, 0, 700, 64)


def layout_of(sizes: Sequence[int], nodes: int, shares: int) -> BucketLayout:
    slots, start = [], 0
    for index, numel in enumerate(sizes):
        slots.append(Slot(f"p{index}", start, numel, index == 2))
        start += numel
    return lay_out_bucket(
        slots,
        uplink=get_quantizer("lloyd2"),
        downlink=get_quantizer("lloyd4"),
        scale_rule="least_squares",
        block_size=16,
        servers=nodes * shares,
        itemsize=4,
        shares=shares,
    )


@given(st.integers(0, 2000), st.integers(0, 99), st.integers(1, 5), st.integers(1, 5))
def test_servers_of_a_local_rank_have_consecutive_runs(
    numel: int, turn: int, nodes: int, shares: int
) -> None:
    servers = nodes * shares
    positions = [position_of(server, turn, servers, shares) for server in range(servers)]
    assert sorted(positions) == list(range(servers))
    ends = []
    for share in range(shares):
        first, count = node_share_of(numel, turn, 16, share, shares, servers)
        own = sorted(
            run
            for server in range(share * nodes, (share + 1) * nodes)
            if (run := share_of(numel, 0, 16, positions[server], servers))[1]
        )
        assert sum(run[1] for run in own) == count
        assert not own or own[0][0] == first
        assert all(a + n == b for (a, n), (b, _) in pairwise(own))
        ends.append(count)
    assert sum(ends) == numel


@given(st.integers(0, 2000), st.integers(0, 99), st.integers(1, 9))
def test_one_rank_a_node_has_the_shares_of_sharded(numel: int, turn: int, nodes: int) -> None:
    for server in range(nodes):
        position = position_of(server, turn, nodes, 1)
        assert share_of(numel, 0, 16, position, nodes) == share_of(numel, turn, 16, server, nodes)


def node_of(
    layouts: Sequence[NodeLayout],
    dtype: torch.dtype = torch.float32,
    precise: torch.dtype = torch.float32,
    payload: tuple[int, int] = (0, 0),
) -> list[NodeBuffers]:
    """The buffers of all ranks of a node, in this process."""
    cpu = torch.device("cpu")
    ranks = range(len(layouts))
    return [NodeBuffers(layouts, own, dtype, precise, cpu, Staging(), payload) for own in ranks]


def average(buckets: Sequence[torch.Tensor], node: Sequence[NodeBuffers]) -> None:
    """One exchange of a node, with the all-to-all as copies."""
    for bucket, buffers in zip(buckets, node, strict=True):
        buffers.pack(bucket)
    sent = [buffers.packed_bytes.split(buffers.packed_sizes) for buffers in node]
    for own, buffers in enumerate(node):
        received = buffers.received_bytes.split(buffers.received_sizes)
        for rank, row in enumerate(received):
            row.copy_(sent[rank][own])
    for buffers in node:
        buffers.average()


@pytest.mark.parametrize(("nodes", "shares"), [(2, 2), (3, 2), (2, 3), (4, 8)])
def test_shares_divide_the_bucket(nodes: int, shares: int) -> None:
    layout = layout_of(SIZES, nodes, shares)
    covered = torch.zeros(layout.numel, dtype=torch.int64)
    for own in lay_out_node(layout, shares):
        local = 0
        for run in own.runs:
            assert run.local == local
            assert run.start == layout.slots[run.slot].start + run.offset
            covered[run.start : run.start + run.numel] += 1
            local += run.numel
        assert local == own.numel == own.uplink.numel
        assert own.uplink.stride_bytes == layout.uplink.stride_bytes
    assert bool((covered == 1).all())


def implementations() -> list[Any]:
    found = list(IMPLEMENTATIONS)
    if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
        found.append(pytest.param("triton", id="triton, interpreted"))
    return found


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("kernels", implementations())
def test_a_share_is_encoded_as_in_the_whole_bucket(kernels: Any, preconditioned: bool) -> None:
    if kernels == "triton":
        kernels = importlib.import_module("effadam_hook.kernels.triton_kernels")
    nodes, shares = 3, 4  # a power of two, so that the mean of equal ranks is exact
    layout = layout_of(SIZES, nodes, shares)
    bucket = values_like_gradients(layout.numel)
    residual = torch.randn(layout.numel) * 0.1
    kept = residual.clone()
    moments = tuple(None if i == 3 else torch.rand(numel) for i, numel in enumerate(SIZES))
    whole = Preconditioner(moments) if preconditioned else None
    payload = torch.zeros(nodes * shares, layout.uplink.stride_bytes, dtype=torch.uint8)
    kernels.encode_(layout.uplink, bucket, kept, payload, torch.float32, preconditioner=whole)
    layouts = lay_out_node(layout, shares)
    node = node_of(layouts)
    average([bucket] * shares, node)
    for share, (own, buffers) in enumerate(zip(layouts, node, strict=True)):
        places = torch.cat([torch.arange(r.start, r.start + r.numel) for r in own.runs])
        assert torch.equal(buffers.mean, bucket[places])
        own_residual = residual[places].clone()
        rows = torch.zeros(nodes, layout.uplink.stride_bytes, dtype=torch.uint8)
        part = buffers.share_of(whole)
        kernels.encode_(
            own.uplink, buffers.mean, own_residual, rows, torch.float32, preconditioner=part
        )
        assert torch.equal(rows, payload[share * nodes : (share + 1) * nodes])
        assert torch.equal(own_residual, kept[places])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shares", [2, 3, 5])
def test_the_mean_is_the_sum_divided_by_the_ranks(shares: int, dtype: torch.dtype) -> None:
    layouts = lay_out_node(layout_of((100, 7), 2, shares), shares)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    node = node_of(layouts, dtype, precise)
    largest = 2.0 ** (math.frexp(torch.finfo(dtype).max)[1] - 1)
    for exchange in range(4):  # shares are sent twice, then read from memory
        buckets = torch.randint(-99, 99, (shares, 107)).to(dtype)
        buckets[:, 0] = largest
        average(list(buckets), node)
        wanted = buckets.to(precise).sum(0) / shares
        wanted[0] = largest
        for buffers in node:
            places = torch.cat(
                [torch.arange(r.start, r.start + r.numel) for r in buffers.layout.runs]
            )
            assert torch.equal(buffers.mean, wanted[places])
            assert buffers.is_shared == (exchange > 0)


def test_the_ranks_of_a_node_receive_into_one_payload() -> None:
    node = node_of(lay_out_node(layout_of((100, 7), 2, 3), 3), payload=(6, 24))
    for _ in range(2):
        assert all(one.payload is None and one.served.shape == (2, 24) for one in node)
        average(list(torch.ones(3, 107)), node)
    for own, one in enumerate(node):
        one.served.fill_(own + 1)
    for one in node:
        assert one.payload is not None
        assert one.payload[:, 0].tolist() == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("without", [0, 2])
def test_all_ranks_send_shares_if_one_of_them_cannot_map_the_others(
    without: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts = lay_out_node(layout_of((100, 7), 2, 3), 3)
    node = node_of(layouts)
    open_ticket = node_buffers.open_ticket
    calls = iter(range(6))  # two by each rank
    monkeypatch.setattr(
        node_buffers,
        "open_ticket",
        lambda ticket: None if next(calls) // 2 == without else open_ticket(ticket),
    )
    for _ in range(4):
        buckets = list(torch.randint(-99, 99, (3, 107)).float())
        average(buckets, node)
    assert not any(buffers.is_shared for buffers in node)
    mean = sum(buckets) / 3
    for buffers in node:
        places = torch.cat([torch.arange(r.start, r.start + r.numel) for r in buffers.layout.runs])
        assert torch.equal(buffers.mean, mean[places])


def test_memory_is_mapped_by_its_ticket_and_by_no_other() -> None:
    if not hasattr(os, "memfd_create"):
        pytest.skip("this system has no memfd")
    memory = node_memory.share(100)
    memory.bytes[:] = 7
    mapped = open_ticket(memory.ticket)
    assert mapped is not None and mapped.tolist() == [7] * 100
    mapped[0] = 8
    assert memory.bytes[0] == 8
    forged = memory.ticket[:-1] + bytes([memory.ticket[-1] ^ 1])
    assert open_ticket(forged) is None and open_ticket(bytes(TICKET_BYTES)) is None
    memory.seal()
    assert open_ticket(memory.ticket) is None
    del memory
    assert mapped[1] == 7  # what is mapped remains


def test_more_buckets_than_files_share_memory_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(node_memory, "_MOST_FILES", 4)
    before = len(list(Path("/proc/self/fd").iterdir()))
    layouts = lay_out_node(layout_of((100, 7), 2, 3), 3)
    buckets = [node_of(layouts) for _ in range(3)]  # 9 files
    found = []
    for _ in range(8):
        for node in buckets:
            gradients = list(torch.randint(-99, 99, (3, 107)).float())
            average(gradients, node)
            mean = sum(gradients) / 3
            for buffers in node:
                runs = buffers.layout.runs
                places = torch.cat([torch.arange(r.start, r.start + r.numel) for r in runs])
                assert torch.equal(buffers.mean, mean[places])
        found.append(describe_exchange([one for node in buckets for one in node]))
    assert found[0] == "" and found[-1] == "through shared memory"
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_a_process_with_too_many_files_sends_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(node_buffers, "_MOST_OFFERS", 3)
    monkeypatch.setattr(os, "memfd_create", refuse, raising=False)
    node = node_of(lay_out_node(layout_of((100, 7), 2, 2), 2))
    for _ in range(5):
        average(list(torch.ones(2, 107)), node)
    assert "Too many open files" in describe_exchange(node)


def test_a_file_too_many_for_the_mapping_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, refused = os.open, []

    def refuse_first(path: str, *rest: int) -> int:
        if len(refused) < 3:
            refused.append(path)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return opened(path, *rest)

    monkeypatch.setattr(os, "open", refuse_first)
    node = node_of(lay_out_node(layout_of((100, 7), 2, 2), 2))
    for _ in range(8):
        average(list(torch.ones(2, 107)), node)
    assert len(refused) == 3 and describe_exchange(node) == "through shared memory"


def test_a_system_without_such_memory_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    node = node_of(lay_out_node(layout_of((100, 7), 2, 2), 2))
    for _ in range(3):
        average(list(torch.ones(2, 107)), node)
    found = describe_exchange(node)
    assert found.startswith("by collectives: this system has no memory to share: ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shares", [2, 3, 5, 6, 7, 12])
def test_the_mean_of_the_largest_values_does_not_overflow(shares: int, dtype: torch.dtype) -> None:
    """DDP's own sum of gradients that are divided beforehand may, where rounding goes up."""
    node = node_of(lay_out_node(layout_of((60_000,), 2, shares), shares), dtype, dtype)
    limits = torch.finfo(dtype)
    below = torch.randint(0, 6, (shares, 60_000)) * limits.eps / 2
    below[:, 0] = 0
    sign = torch.randint(0, 2, (60_000,)) * 2 - 1
    buckets = (limits.max * (1 - below.to(torch.float64))).to(dtype) * sign
    average(list(buckets), node)
    means = [buffers.mean for buffers in node]
    assert all(bool(mean.isfinite().all()) for mean in means)
    assert all(bool((mean.abs() >= limits.max * (1 - 8 * limits.eps)).all()) for mean in means)
    buckets[1, 3] = float("inf")
    average(list(buckets), node)
    assert sum(int(mean.isfinite().logical_not().sum()) for mean in means) == 1
