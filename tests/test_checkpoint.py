"""Schema of saved states: every wrong value is refused with its key, its value and the rule."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from effadam_hook import StateMismatchError
from effadam_hook.feedback.checkpoint import RankState, Share, join_ranks, read_states
from effadam_hook.feedback.checksum import with_checksum
from effadam_hook.feedback.reshard import Role, deal, merge, reassign
from effadam_hook.wire.counters import Counters

MOMENTS = {"exp_avg": torch.ones(6), "exp_avg_sq": torch.ones(6), "step": 3, "decay": 0.5}


def make_state(rank: int = 0) -> RankState:
    """Return the state of one of two ranks with a parameter of 6 elements in blocks of 2."""
    role = Role(rank, 2, rank, 2, block_size=2)
    first, numel = role.share("w", 6)
    return RankState(
        rank=rank,
        world_size=2,
        topology="sharded",
        servers=2,
        block_size=2,
        counters=Counters(steps=3, dense_bytes=48, uplink_bytes=5, downlink_bytes=6),
        units="updates",
        worker={"w": torch.arange(6.0) + rank},
        server={"w": Share(first, torch.arange(first, first + numel, dtype=torch.float32))},
        moments={"w": MOMENTS},
        config={"topology": "sharded", "exact": ["1d"]},
    )


def test_the_dictionary_of_a_record_gives_the_same_record() -> None:
    saved = make_state().to_dict()
    again = RankState.from_dict(copy.deepcopy(saved)).to_dict()
    assert again["checksum"] == saved["checksum"]
    assert [state.rank for state in read_states(join_ranks([saved, make_state(1).to_dict()]))] == [
        0,
        1,
    ]


ALTERED: tuple[tuple[str, Any, str], ...] = (
    ("version", 0, "version = 0, .* an integer of 1 or more"),
    ("version", "2", "version = '2'"),
    ("rank", 2, "rank = 2, .* below the world size, 2"),
    ("rank", True, "rank = True, .* an integer of 0 or more"),
    ("rank", 1 << 70, "rank = 1180591620717411303424, .* below the world size, 2"),
    ("rank", [1 << 20000], r"rank\[0\] = an integer of more than 8192 bits, .* a plain value"),
    ("world_size", 0, "world_size = 0, .* an integer of 1 or more"),
    ("world_size", 2.0, "world_size = 2.0"),
    ("servers", 3, "servers = 3, .* at most the world size, 2"),
    ("block_size", 0, "block_size = 0"),
    ("topology", "ring", "topology = 'ring', .* one of '', 'rank0', 'sharded'"),
    ("topology", ["rank0"], r"topology = \['rank0'\]"),
    ("units", 7, "units = 7, .* a text"),
    ("config", 7, "config = 7, .* a dictionary"),
    ("counters", [], "counters = .* a dictionary"),
    (
        "counters",
        {"steps": 1},
        "the names of counters = .* exactly dense_bytes, downlink_bytes, steps",
    ),
    ("counters.steps", -1, r"counters\.steps = -1, .* an integer of 0 or more"),
    ("counters.steps", None, r"counters\.steps = None"),
    ("worker", None, "worker = None, .* a dictionary"),
    ("worker", {3: torch.zeros(6)}, "the key of worker = 3, .* a name"),
    ("worker.w", torch.zeros(2, 3), "worker residual of 'w' must be a one-dimensional floating"),
    ("worker.w", torch.zeros(6, dtype=torch.int32), "worker residual of 'w' must be"),
    ("worker.w", [0.0] * 6, "worker residual of 'w' must be"),
    ("worker.w", torch.tensor([torch.inf]), "'w' holds a NaN or an infinity"),
    ("worker.w", torch.zeros(6).to_sparse(), r"worker\.w = .* a tensor or a plain value"),
    ("worker.w", torch.zeros(6, device="meta"), r"worker\.w = .* a tensor or a plain value"),
    ("worker.w", {1, 2}, r"worker\.w = \{1, 2\}, .* a tensor or a plain value"),
    ("worker", {}, r"server_start\.w = \d, .* a share of a saved parameter"),
    ("server.w", torch.zeros(7), r"server_start\.w = \d"),
    ("server", {}, "the names of server_start = .* exactly none"),
    ("server_start", {}, "the names of server_start = .* exactly w"),
    ("server_start.w", 1 << 40, r"server_start\.w = 1099511627776"),
    ("server_start.w", "0", r"server_start\.w = '0'"),
    ("moments", 1.5, "moments = 1.5, .* a dictionary"),
    ("moments.w", 1.5, r"moments\.w = 1.5, .* a dictionary"),
    ("moments.w", {}, "moments of 'w' lack 'exp_avg'"),
    ("moments.w.exp_avg", torch.ones(2, 3), "exp_avg of 'w' must be a one-dimensional"),
    ("moments.w.step", -1, "step of 'w' is -1"),
    ("new", object(), "new = <object .* a tensor or a plain value"),
    ("new", (1, [[complex(1)]]), r"new\[1\]\[0\]\[0\] = \(1\+0j\), .* a plain value"),
)


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize(("key", "value", "message"), ALTERED)
def test_every_wrong_value_is_named(key: str, value: Any, message: str, sealed: bool) -> None:
    saved = copy.deepcopy(make_state().to_dict())
    *path, last = key.split(".")
    place = saved
    for name in path:
        place = place[name]
    place[last] = value
    plain = "a plain value" not in message
    if sealed and plain:
        saved = with_checksum(saved)
    with pytest.raises(StateMismatchError, match=message) as caught:
        RankState.from_dict(saved)
    if not sealed and plain and last != "version":
        assert "damaged" in str(caught.value)


@pytest.mark.parametrize("key", sorted(make_state().to_dict().keys() - {"package"}))
def test_a_missing_value_is_refused(key: str) -> None:
    saved = make_state().to_dict()
    del saved[key]
    with pytest.raises(StateMismatchError, match=r"no saved state|damaged"):
        RankState.from_dict(saved)


@pytest.mark.parametrize(
    "saved",
    [
        *(None, 3, [], {}, {"ranks": []}, {"version": 2, "ranks": []}, {"version": 2, "ranks": 7}),
        *({"version": 2, "ranks": [None]}, {"ranks": [make_state().to_dict()]}),
    ],
)
def test_what_is_no_saved_state_is_refused(saved: Any) -> None:
    with pytest.raises(StateMismatchError):
        read_states(saved)


@pytest.mark.parametrize(
    ("option", "servers", "topology"),
    [
        *(("rank0", 1, "rank0"), ("auto", 2, "sharded"), ("auto", 1, "rank0")),
        *(("ring", 1, None), (["rank0"], 1, None), (None, 1, None), ("auto", 3, None)),
    ],
)
def test_the_topology_of_version_1_follows_from_its_options(
    option: Any, servers: int, topology: str | None
) -> None:
    saved = make_state().to_dict()
    del saved["topology"], saved["checksum"]
    ranks = max(2, servers + 1 if topology is None and servers > 1 else 2)
    saved |= {"version": 1, "config": {"topology": option}, "servers": servers, "world_size": ranks}
    if topology is not None:
        assert RankState.from_dict(saved).topology == topology
        return
    with pytest.raises(StateMismatchError, match="never writes"):
        RankState.from_dict(saved)


def test_merged_states_must_be_those_of_one_run() -> None:
    first, second = make_state(0), make_state(1)
    merged = merge([first, second])
    assert torch.equal(merged.worker["w"], torch.arange(6.0) + 0.5)
    assert torch.equal(merged.server["w"].values, torch.arange(6.0))
    shorter = replace(second, worker={"w": torch.zeros(5)})
    overlapping = replace(second, server={"w": first.server["w"]})
    for other, message in (
        (first, "State 1 of 2 is that of rank 0 of 2"),
        (shorter, "worker residual of 'w' has 5 elements on one rank and 6 on another"),
        (overlapping, r"server_start\.w = \[\d, \d\]"),
        (replace(second, server={}), r"server_start\.w = \[\d\]"),
        (replace(second, moments={}), "moments of 'w' are those of 1 of 2 ranks"),
    ):
        with pytest.raises(StateMismatchError, match=message):
            merge([first, other])


def test_dealt_shares_cover_a_parameter_once() -> None:
    merged = merge([make_state(0), make_state(1)])
    shares = [deal(merged, Role(rank, 3, rank, 3, 2)).server.get("w") for rank in range(3)]
    elements = sorted(i for s in shares if s for i in range(s.start, s.end))
    assert elements == list(range(6))
    assert deal(merged, Role(1, 2, None, 1, 2)).server == {}


@pytest.mark.parametrize("sign", [1, -1])
def test_a_share_that_is_no_longer_served_moves_to_the_worker(sign: int) -> None:
    state = make_state(1)
    share = state.server["w"]
    fitted = reassign(state, Role(1, 2, None, 1, 2), sign)
    assert fitted.server == {}
    moved = torch.zeros(6)
    moved[share.start : share.end] = 2.0 * sign * share.values
    assert torch.equal(fitted.worker["w"], state.worker["w"] + moved)
    assert reassign(state, Role(1, 2, 1, 2, 2), sign).server["w"] is share
