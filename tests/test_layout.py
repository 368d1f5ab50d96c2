"""Positions of elements in payloads: integers, equal on both sides."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effadam_hook.wire.layout import REPLICA_CHECK_BYTES, Slot, lay_out_bucket
from effadam_hook.wire.parts import cut
from effadam_hook.wire.quantizers import QUANTIZERS, get_quantizer
from effadam_hook.wire.shares import share_of, turn_of
from kernel_cases import layout_of

names = st.sampled_from(list(QUANTIZERS))


@given(st.integers(0, 5000), st.integers(0, 50), st.integers(4, 12), st.integers(1, 9))
def test_shares_partition_a_parameter(numel: int, turn: int, log_size: int, servers: int) -> None:
    size = 2**log_size
    shares = [share_of(numel, turn, size, server, servers) for server in range(servers)]
    covered = sorted((first, first + count) for first, count in shares if count)
    assert sum(count for _, count in shares) == numel
    assert all(end == first for (_, end), (first, _) in pairwise(covered))
    assert all(first % size == 0 for first, _ in covered)
    blocks = [-(-count // size) for _, count in shares]
    assert max(blocks) - min(blocks) <= 1


def test_odd_blocks_spread_over_the_servers() -> None:
    blocks = [0] * 4
    for turn in range(64):
        for server in range(4):
            blocks[server] += -(-share_of(257, turn, 256, server, 4)[1] // 256)
    assert blocks == [32, 32, 32, 32]


def test_names_spread_odd_blocks_over_the_servers() -> None:
    blocks = [0] * 4
    for layer in range(64):
        for server in range(4):
            turn = turn_of(f"layers.{layer}.weight")
            blocks[server] += share_of(64, turn, 64, server, 4)[1] // 64
    assert sum(blocks) == 64
    assert max(blocks) <= 24


@given(st.lists(st.integers(0, 700), min_size=1, max_size=6), names, st.integers(1, 4), st.data())
def test_pieces_tile_the_bucket_and_the_bytes(
    sizes: list[int], name: str, servers: int, data: st.DataObject
) -> None:
    exact = data.draw(st.sets(st.integers(0, len(sizes) - 1)))
    layout = layout_of(sizes, name, block_size=64, servers=servers, exact=sorted(exact))
    wire, quantizer = layout.uplink, get_quantizer(name)
    assert wire.numel == layout.numel == sum(sizes)
    seen = torch.zeros(layout.numel, dtype=torch.int32)
    for server, chunk in enumerate(wire.chunks):
        taken = torch.zeros(wire.stride_bytes, dtype=torch.int32)
        local = 0
        for piece in chunk.pieces:
            slot = layout.slots[piece.slot]
            unit = 16 if slot.exact else 64
            assert (piece.offset, piece.numel) == share_of(
                slot.numel, turn_of(slot.name), unit, server, servers
            )
            assert piece.start == slot.start + piece.offset
            assert piece.start + piece.numel <= slot.start + slot.numel
            assert piece.local == local
            assert piece.raw == (slot.exact or name == "none")
            local += piece.numel
            seen[piece.start : piece.start + piece.numel] += 1
            if piece.raw:
                taken[piece.data_at : piece.data_at + 4 * piece.numel] += 1
                continue
            full, rest = divmod(piece.numel, 64)
            code_bytes = full * quantizer.code_bytes(64) + quantizer.code_bytes(rest)
            taken[piece.scales_at : piece.scales_at + 2 * (full + (rest > 0))] += 1
            taken[piece.data_at : piece.data_at + code_bytes] += 1
        assert chunk.numel == local
        assert (taken[: chunk.used_bytes] == 1).all()
        assert (taken[chunk.used_bytes :] == 0).all()
        assert chunk.used_bytes <= wire.stride_bytes - REPLICA_CHECK_BYTES
    assert (seen == 1).all()
    assert wire.slot_numels == tuple(sizes[: len(wire.slot_numels)])
    assert not any(sizes[len(wire.slot_numels) :])


@pytest.mark.parametrize(
    ("name", "code_bytes"),
    [
        ("uniform8", 256 + 56),
        ("uniform4", 128 + 28),
        ("uniform3", 96 + 21),
        ("log4", 128 + 28),
        ("log3", 96 + 21),
        ("lloyd4", 128 + 28),
        ("lloyd3", 96 + 21),
        ("lloyd2", 64 + 14),
        ("ternary", 52 + 10),
        ("sign", 32 + 7),
    ],
)
def test_bytes_of_a_payload(name: str, code_bytes: int) -> None:
    # A full block and one of 50, and 3 raw elements.
    layout = layout_of((306, 3), name, exact=(1,))
    used = 3 * 4 + 2 * 2 + code_bytes
    assert layout.uplink.chunks[0].used_bytes == used
    assert layout.uplink.stride_bytes == -(-used // 8) * 8 + REPLICA_CHECK_BYTES
    assert layout.uplink.payload_bytes == layout.uplink.stride_bytes


def test_a_share_does_not_depend_on_the_bucket() -> None:
    def shares(slots: list[Slot]) -> dict[tuple[str, int], tuple[int, int]]:
        layout = lay_out_bucket(
            slots,
            uplink=get_quantizer("lloyd4"),
            downlink=get_quantizer("lloyd2"),
            scale_rule="least_squares",
            block_size=64,
            servers=3,
            itemsize=4,
        )
        return {
            (layout.slots[piece.slot].name, server): (piece.offset, piece.numel)
            for server, chunk in enumerate(layout.uplink.chunks)
            for piece in chunk.pieces
        }

    one = shares([Slot("a", 0, 500, True), Slot("b", 500, 300, False)])
    other = shares([Slot("b", 0, 300, False)]) | shares([Slot("a", 0, 500, True)])
    assert one == other


@pytest.mark.parametrize("servers", [3, 8, 16])
def test_a_bias_of_few_blocks_does_not_lengthen_a_payload(servers: int) -> None:
    weight, bias = servers * 256, 1024
    layout = layout_of((weight, bias), "lloyd4", servers=servers, exact=(1,))
    padded = layout_of((weight,), "lloyd4", servers=servers).uplink.payload_bytes + 4 * bias
    assert layout.uplink.payload_bytes <= padded + servers * (16 * 4 + 8)


def test_gaps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Slot of 'b' starts at element 11\. Must be 10"):
        lay_out_bucket(
            [Slot("a", 0, 10, False), Slot("b", 11, 10, False)],
            uplink=get_quantizer("sign"),
            downlink=get_quantizer("sign"),
            scale_rule="least_squares",
            block_size=64,
            servers=1,
            itemsize=4,
        )


def test_raw_chunks_keep_the_pieces() -> None:
    wire = layout_of((300, 40), "lloyd4", servers=2, exact=(1,)).uplink
    raw = wire.as_raw()
    for before, after in zip(wire.chunks, raw.chunks, strict=True):
        assert after.used_bytes == 4 * before.numel
        assert [p.local * 4 for p in before.pieces] == [p.data_at for p in after.pieces]
        assert all(piece.raw for piece in after.pieces)


@pytest.mark.parametrize(
    ("numels", "part_numel", "parts"),
    [
        ([3, 4, 5], None, [3]),
        ([3, 4, 5], 100, [3]),
        ([8, 1, 8, 1, 8], 8, [1, 2, 2]),
        ([1, 8, 1, 8, 1], 8, [2, 3]),  # the last is too small to go alone
        ([0, 3, 0, 3, 20, 3], 5, [4, 1, 1]),
        ([], 5, [0]),
    ],
)
def test_a_bucket_is_cut_between_parameters_once_a_part_is_large_enough(
    numels: list[int], part_numel: int | None, parts: list[int]
) -> None:
    slices = cut(numels, part_numel)
    assert [part.stop - part.start for part in slices] == parts
    assert [index for part in slices for index in range(part.start, part.stop)] == list(
        range(len(numels))
    )
