"""The rule of topology="auto": hierarchical where nodes have several ranks, else sharded."""

from __future__ import annotations

import logging
import os
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from effadam_hook import DisagreementError, EfficientAdam, EfficientAdamState, attach
from effadam_hook.config.options import DEFAULTS
from effadam_hook.exchange.node_description import HOST_VARIABLE
from effadam_hook.exchange.topology import NodeTable, choose_topology
from effadam_hook.session import node_buffers
from harness import run_ranks
from training import ChosenGradients, ddp, gradients_of

Nodes = tuple[tuple[int, ...], ...]
TWO_BY_TWO: Nodes = ((0, 2), (1, 3))
ONE_NODE: Nodes = ((0, 1, 2, 3),)


@pytest.mark.parametrize(
    ("nodes", "topology", "reason"),
    [
        (((0,),), "sharded", "every node has one rank"),
        (((0,), (1,), (2,)), "sharded", "every node has one rank"),
        (((0, 1),), "sharded", "all ranks are on one node"),
        (((0, 1), (2, 3)), "hierarchical", "nodes have 2 ranks, which share a network card"),
        (((0, 3), (1, 4), (2, 5)), "hierarchical", "nodes have 2 ranks"),
        (((0, 1, 2), (3, 4, 5)), "hierarchical", "nodes have 3 ranks"),
        (
            ((0, 1), (2,)),
            "sharded",
            "the nodes have unequal numbers of ranks",
        ),
    ],
)
def test_the_shape_of_the_nodes_decides(nodes: Nodes, topology: str, reason: str) -> None:
    choice = choose_topology(NodeTable.of(nodes))
    assert choice.name == topology and reason in choice.reason


def test_what_cannot_be_divided_and_unknown_nodes_are_sharded() -> None:
    table = NodeTable.of(TWO_BY_TWO)
    choice = choose_topology(table, "quantize_weights=True")
    assert choice.name == "sharded"
    assert choice.reason == (
        "nodes have 2 ranks, and quantize_weights=True does not work with hierarchical"
    )
    assert choose_topology(None).name == "sharded"


def test_auto_is_the_default() -> None:
    assert DEFAULTS["topology"] == "auto"
    assert EfficientAdamState().config.topology == "auto"


# Real ranks


def pretend(rank: int, nodes: Nodes) -> None:
    """Take the environment of a rank on one of several hosts."""
    node = next(m for m, ranks in enumerate(nodes) if rank in ranks)
    os.environ[HOST_VARIABLE] = f"host{node}"


class Logged(logging.Handler):
    """Collect what the package logs at level INFO and above, as ``LEVEL text``."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        logger = logging.getLogger("effadam_hook")
        logger.addHandler(self)
        logger.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


def choose(
    rank: int, world_size: int, nodes: Nodes, options: dict[str, Any]
) -> tuple[str, list[str]]:
    pretend(rank, nodes)
    logged = Logged()
    model = ddp(ChosenGradients())
    if options.pop("updates", False):
        options["optimizer"] = EfficientAdam(model.parameters())
    state = attach(model, quantizer="lloyd4", **options)
    for step in range(2):
        gradients_of(model, rank, step)
    state.close()
    return state.summary(), logged.lines


@pytest.mark.parametrize(
    ("nodes", "options", "summary", "line"),
    [
        (
            TWO_BY_TWO,
            {},
            "topology     hierarchical, chosen: nodes have 2 ranks, which share a network card; "
            "2 nodes x 2 ranks, by host",
            'INFO topology="auto" takes "hierarchical": nodes have 2 ranks, which share',
        ),
        (
            ((0,), (1,), (2,)),
            {},
            "topology     sharded, chosen: every node has one rank; 3 nodes x 1 rank, by host",
            'INFO topology="auto" takes "sharded": every node has one rank.',
        ),
        (
            ((0, 2), (1,)),
            {},
            "topology     sharded, chosen: the nodes have unequal numbers of ranks",
            'INFO topology="auto" takes "sharded": the nodes have unequal numbers of ranks '
            "('host0' has 2 ranks (0, 2); 'host1' has 1 rank (1)).",
        ),
        (
            ONE_NODE,
            {},
            "topology     sharded, chosen: all ranks are on one node; 1 node x 4 ranks, by host",
            'INFO All 4 ranks are on one node (topology "sharded"). Compression seldom pays inside',
        ),
        (
            ONE_NODE,
            {"topology": "rank0"},
            "topology     rank0; 1 node x 4 ranks, by host",
            'INFO All 4 ranks are on one node (topology "rank0"). Compression seldom pays inside',
        ),
        (
            TWO_BY_TWO,
            {"updates": True, "quantize_weights": True},
            "topology     sharded, chosen: nodes have 2 ranks, and quantize_weights=True does not work",
            'INFO topology="auto" takes "sharded": nodes have 2 ranks, and quantize_weights=True',
        ),
    ],
)
def test_summary_and_log_say_the_choice_and_its_reason(
    nodes: Nodes, options: dict[str, Any], summary: str, line: str
) -> None:
    results = run_ranks(choose, sum(map(len, nodes)), nodes, options)
    for rank, (said, lines) in enumerate(results):
        assert summary in said
        assert [one.startswith(line) for one in lines] == [True] * (rank == 0)


def exchange_inside(rank: int, world_size: int, can_map: bool) -> tuple[str, list[str]]:
    pretend(rank, TWO_BY_TWO)
    logged = Logged()
    if not can_map and rank == 3:  # as in a container of its own
        node_buffers.open_ticket = lambda ticket: None
    model = ddp(ChosenGradients())
    state = attach(model, quantizer="lloyd4")
    for step in range(5):
        gradients_of(model, rank, step)
    return state.summary(), [line for line in logged.lines if "exchange gradients" in line]


def test_summary_and_log_say_how_the_ranks_of_a_node_exchange() -> None:
    shared = "exchange gradients through shared memory"
    sent = "exchange gradients by collectives: a rank of the node cannot map the memory of another"
    for can_map in (True, False):
        for rank, (said, lines) in enumerate(run_ranks(exchange_inside, 4, can_map)):
            found = shared if can_map or rank in TWO_BY_TWO[0] else sent
            assert f"in a node    {found.removeprefix('exchange gradients ')}" in said
            assert [found in line for line in lines] == [True] * (rank < 2)


FLAT_ON_NODES = (
    r'INFO topology="(.*)" sends about (.*) kB a step through the card of a node with 2 ranks; '
    r'topology="hierarchical" would send (.*) kB, (.*)x less\.'
)


@pytest.mark.parametrize(
    ("topology", "least", "padding"), [("sharded", 1.7, 0.1), ("rank0", 1.9, 0.6)]
)
def test_flat_topologies_on_nodes_with_several_ranks_say_what_hierarchical_sends(
    topology: str, least: float, padding: float
) -> None:
    hierarchical = run_ranks(choose, 4, TWO_BY_TWO, {})[0][0]
    results = run_ranks(choose, 4, TWO_BY_TWO, {"topology": topology})
    found = [
        [m for line in lines if (m := re.fullmatch(FLAT_ON_NODES, line))] for _, lines in results
    ]
    assert [len(matches) for matches in found] == [1, 0, 0, 0]
    name, flat, other, ratio = found[0][0].groups()
    assert name == topology and float(ratio) > least
    assert float(flat) / float(other) == pytest.approx(float(ratio), abs=0.05)
    # The two cards are those of the summaries, apart from the padding of chunks in so small a model.
    cards = [
        re.search(r"card  .*about (.*) kB a step", one) for one in (results[0][0], hierarchical)
    ]
    assert cards[0] is not None and float(cards[0][1]) == pytest.approx(float(flat), rel=padding)
    assert cards[1] is not None and float(cards[1][1]) == pytest.approx(float(other), rel=padding)


def bad_environment(rank: int, world_size: int) -> tuple[str, list[str]]:
    os.environ["LOCAL_RANK"] = "one" if rank == 1 else str(rank)
    return choose(rank, world_size, TWO_BY_TWO, {})


def test_contradictions_do_not_stop_training_but_are_a_warning() -> None:
    results = run_ranks(bad_environment, 4)
    assert all("topology     sharded, chosen: the nodes are unknown" in said for said, _ in results)
    (line,) = [one for one in results[0][1] if one.startswith("WARNING")]
    assert 'topology="auto" takes "sharded": ' in line and "LOCAL_RANK is 'one'" in line


def name_nodes(rank: int, world_size: int) -> str:
    mesh = DeviceMesh("cpu", torch.tensor(TWO_BY_TWO))
    return choose(rank, world_size, ONE_NODE, {"device_mesh": mesh})[0]


def test_the_rule_follows_nodes_that_the_user_names() -> None:
    for said in run_ranks(name_nodes, 4):
        assert (
            "topology     hierarchical, chosen" in said
            and "by intra_node_group or device_mesh" in said
        )


# Saved states


def train(rank: int, nodes: Nodes, options: dict[str, Any], saved: Any, first: int) -> Any:
    pretend(rank, nodes)
    torch.manual_seed(0)
    model = ddp(ChosenGradients())
    state = attach(model, quantizer="lloyd2", **options)
    if saved is not None:
        state.load_state_dict(saved)
    got = [gradients_of(model, rank, step) for step in range(first, first + 2)]
    return state, got


def resume(
    rank: int, world_size: int, saved_with: str, how: str
) -> tuple[str, list[list[Tensor]], list[list[Tensor]]]:
    state, _ = train(rank, TWO_BY_TWO, {"topology": saved_with}, None, 0)
    saved = [state.state_dict() if how == "own" else state.full_state_dict()]
    if how == "full":
        dist.broadcast_object_list(saved, src=0)
    _, expected = train(rank, TWO_BY_TWO, {"topology": saved_with}, saved[0], 2)
    resumed, got = train(rank, TWO_BY_TWO, {}, saved[0], 2)
    return resumed.summary(), expected, got


@pytest.mark.parametrize("how", ["own", "full"])
@pytest.mark.parametrize("saved_with", ["rank0", "hierarchical"])
def test_a_saved_state_of_as_many_ranks_keeps_its_topology_and_bits(
    saved_with: str, how: str
) -> None:
    for summary, expected, got in run_ranks(resume, 4, saved_with, how):
        assert f"topology     {saved_with}, chosen: " in summary
        assert ("as the saved state" in summary) == (saved_with == "rank0")
        for here, there in zip(got, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def save(rank: int, world_size: int, topology: str) -> dict[str, Any]:
    state, _ = train(rank, ONE_NODE, {"topology": topology}, None, 0)
    full: dict[str, Any] = state.full_state_dict()
    return full


def resume_elsewhere(rank: int, world_size: int, nodes: Nodes, saved: dict[str, Any]) -> str:
    return str(train(rank, nodes, {}, saved, 2)[0].summary())


def test_on_another_number_of_ranks_the_rule_decides() -> None:
    saved = run_ranks(save, 2, "rank0")[0]
    for nodes, topology in ((TWO_BY_TWO, "hierarchical"), (((0,), (1,), (2,)), "sharded")):
        for summary in run_ranks(resume_elsewhere, sum(map(len, nodes)), nodes, saved):
            assert f"topology     {topology}, chosen: " in summary
            assert "as the saved state" not in summary


def load_before_names(rank: int, world_size: int, saved: dict[str, Any]) -> str:
    """A state that is registered by hand loads before the ranks have met."""
    from effadam_hook import efficient_adam_hook

    torch.manual_seed(0)
    model = ddp(ChosenGradients())
    state = EfficientAdamState(quantizer="lloyd2")
    state.load_state_dict(saved)
    model.register_comm_hook(state, efficient_adam_hook)
    gradients_of(model, rank, 2)
    return state.summary()


def save_unnamed(rank: int, world_size: int) -> dict[str, Any]:
    from effadam_hook import efficient_adam_hook

    torch.manual_seed(0)
    model = ddp(ChosenGradients())
    state = EfficientAdamState(quantizer="lloyd2", topology="rank0")
    model.register_comm_hook(state, efficient_adam_hook)
    gradients_of(model, rank, 0)
    return state.full_state_dict()


def test_a_state_without_names_keeps_the_topology_too() -> None:
    saved = run_ranks(save_unnamed, 2)[0]
    for summary in run_ranks(load_before_names, 2, saved):
        assert "topology     rank0, chosen: as the saved state" in summary


def load_on_one_rank(rank: int, world_size: int, saved: dict[str, Any]) -> str:
    torch.manual_seed(0)
    model = ddp(ChosenGradients())
    state = attach(model, quantizer="lloyd2")
    if rank == 1:
        state.load_state_dict(saved)
    with pytest.raises(DisagreementError) as caught:
        gradients_of(model, rank, 0)
    return str(caught.value)


def save_before_steps(rank: int, world_size: int) -> dict[str, Any]:
    return attach(ddp(ChosenGradients()), topology="rank0").full_state_dict()


def test_topologies_that_differ_between_ranks_are_an_error_on_all() -> None:
    saved = run_ranks(save_before_steps, 2)[0]
    for said in run_ranks(load_on_one_rank, 2, saved):
        assert "different topologies or blocks: rank 1 has rank0 with blocks" in said
