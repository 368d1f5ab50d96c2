"""Nodes are found from hosts and launchers, or named by the user; every contradiction is an error."""

from __future__ import annotations

import logging
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from effadam_hook import DisagreementError, EffAdamError, EfficientAdamState, attach
from effadam_hook.exchange.node_description import HOST_VARIABLE, Description, describe_rank
from effadam_hook.exchange.nodes import tabulate
from harness import run_ranks
from training import ChosenGradients, ddp, gradients_of


def ranks_on(*hosts: str, **known: Any) -> list[Description]:
    return [Description(host, f"name of {host}", **known) for host in hosts]


def test_hosts_make_the_nodes_in_any_order_of_ranks() -> None:
    assert tabulate(ranks_on("a", "a", "b", "b")).nodes == ((0, 1), (2, 3))
    assert tabulate(ranks_on("b", "a", "b", "a")).nodes == ((0, 2), (1, 3))
    table = tabulate(ranks_on("c", "a", "b", "b", "a", "c"))
    assert table.nodes == ((0, 5), (1, 4), (2, 3))
    assert table.locate(4) == (1, 1)
    assert table.node_of(4) == (1, 4)
    assert table.peers_of(4) == (5, 4, 3)
    assert table.describe() == "3 nodes x 2 ranks, by host"


def test_one_rank_a_node_and_a_single_rank_are_tables() -> None:
    assert tabulate(ranks_on("a", "b", "c")).ranks_per_node == 1
    assert tabulate(ranks_on("a")).nodes == ((0,),)


def test_unequal_nodes_and_a_single_node_are_tables_with_names() -> None:
    table = tabulate(ranks_on("a", "b", "a"))
    assert not table.is_even
    assert table.describe() == "2 nodes with 2, 1 ranks, by host"
    assert table.list_nodes() == "'name of a' has 2 ranks (0, 2); 'name of b' has 1 rank (1)"
    assert tabulate(ranks_on("a", "a", "a")).describe() == "1 node x 3 ranks, by host"


TORCHRUN = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}
SLURM = {"SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODEID": "1"}
SLURM_RANK = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    ("environment", "launcher", "known"),
    [
        ({}, "", (None, None, None)),
        (TORCHRUN, "torchrun", (1, 2, 1)),
        ({**TORCHRUN, "RANK": "3", "WORLD_SIZE": "4"}, "torchrun", (1, 2, 1)),
        ({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "4"}, "", (None, None, None)),
        ({**TORCHRUN, **SLURM, **SLURM_RANK}, "torchrun", (1, 2, 1)),
        ({"LOCAL_RANK": "1", "NODE_RANK": "1"}, "the launcher", (1, None, 1)),
        ({**SLURM, **SLURM_RANK}, "SLURM", (1, 2, 1)),
        ({**SLURM, **SLURM_RANK, "SLURM_NTASKS": "1"}, "", (None, None, None)),
    ],
)
def test_launchers_are_heard_where_they_mean_this_rank(
    environment: dict[str, str], launcher: str, known: tuple[int | None, ...]
) -> None:
    own = describe_rank(environment, 3, 4)
    assert own.launcher == launcher
    assert (own.local_rank, own.local_world_size, own.node) == known


def test_the_host_can_be_replaced() -> None:
    first, again = describe_rank({}, 0, 2), describe_rank({}, 1, 2)
    assert first.host == again.host != ""
    other = describe_rank({HOST_VARIABLE: "b"}, 1, 2)
    assert (other.host, other.name) == ("b", "b")


def test_a_variable_that_is_no_number_is_an_error() -> None:
    with pytest.raises(EffAdamError, match="LOCAL_RANK is 'one'"):
        describe_rank({"LOCAL_RANK": "one"}, 0, 2)


def launched(host: str, local_rank: int, size: int | None, node: int | None) -> Description:
    return Description(host, host, "torchrun", local_rank, size, node)


def test_launchers_that_agree_with_the_hosts_pass() -> None:
    rows = [launched("a", 0, 2, 0), launched("b", 0, 2, 1)]
    rows += [launched("a", 1, 2, 0), launched("b", 1, 2, 1)]
    table = tabulate(rows)
    assert table.nodes == ((0, 2), (1, 3))
    assert table.describe() == "2 nodes x 2 ranks, by host, as torchrun says"


def test_a_part_of_the_ranks_of_a_node_passes() -> None:
    rows = [launched(host, local, 8, node) for node, host in enumerate("ab") for local in (3, 5)]
    assert tabulate(rows).nodes == ((0, 1), (2, 3))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [launched("a", 0, 2, 0), launched("b", 1, 2, 0)],
            "rank 0 and rank 1 are both on node 0 of torchrun, and on different hosts",
        ),
        (
            [launched("a", 0, 1, 0), launched("a", 0, 1, 1)],
            "both on host 'a', and on the nodes 0 and 1 of torchrun",
        ),
        (
            [launched("a", i, 2, None) for i in range(3)],
            r"host 'a' has 3 ranks \(0, 1, 2\), and torchrun has set 2 on rank 0",
        ),
        (
            [launched("a", 1, None, None), launched("a", 1, None, None)],
            "rank 0 and rank 1 are both on host 'a', and have the local rank 1",
        ),
    ],
)
def test_contradictions_between_hosts_and_launchers_are_errors(
    rows: list[Description], message: str
) -> None:
    with pytest.raises(
        DisagreementError, match=f"(?s){message}.*intra_node_group= or device_mesh="
    ):
        tabulate(rows)


@pytest.mark.parametrize(
    ("known", "text"),
    [
        (
            ((0, 1, 0), (0, 1, 1)),
            "1 node x 2 ranks, by host (not by torchrun, which counts 2 nodes)",
        ),
        (((0, 1, None), (1, 1, None)), "1 node x 2 ranks, by host (not by torchrun)"),
    ],
)
def test_ranks_of_one_boot_are_on_one_node_whatever_their_launchers_count(
    known: tuple[tuple[int, int, int | None], ...], text: str
) -> None:
    rows = [Description("a boot namespace", "a", "torchrun", *own) for own in known]
    assert tabulate(rows).describe() == text
    with pytest.raises(DisagreementError):
        tabulate([Description("a", "a", "torchrun", *own) for own in known])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([(0, 1), (0, 1), None], "Rank 2 has neither"),
        ([(0, 1), (1, 2), (1, 2)], "The ranks name different nodes: rank 0"),
        ([(1,), (1,)], "The node of rank 0 has the ranks 1, without rank 0"),
    ],
)
def test_named_nodes_must_agree(members: list[Any], message: str) -> None:
    rows = [Description("a", "a", members=own) for own in members]
    with pytest.raises(DisagreementError, match=message):
        tabulate(rows)


def test_failures_are_reported_with_their_ranks() -> None:
    rows = [Description("a", "a"), Description("", "", failure="no host.")]
    with pytest.raises(EffAdamError, match="cannot be found: rank 1: no host"):
        tabulate(rows)


# Real ranks


def pretend(rank: int, nodes: tuple[tuple[int, ...], ...], local_world_size: int) -> None:
    """Take the environment of a rank on one of several hosts."""
    node = next(m for m, ranks in enumerate(nodes) if rank in ranks)
    os.environ[HOST_VARIABLE] = f"host{node}"
    os.environ["LOCAL_RANK"] = str(nodes[node].index(rank))
    os.environ["LOCAL_WORLD_SIZE"] = str(local_world_size)


def find(
    rank: int, world_size: int, nodes: tuple[tuple[int, ...], ...], how: str
) -> tuple[str, str]:
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    options: dict[str, Any] = {}
    groups = [dist.new_group(list(ranks)) for ranks in nodes]
    mine = next(g for g, ranks in zip(groups, nodes, strict=True) if rank in ranks)
    if how == "group":
        options = {"intra_node_group": mine}
    elif how == "mesh":
        options = {"device_mesh": DeviceMesh("cpu", torch.tensor(nodes))}
    else:
        pretend(rank, nodes, max(map(len, nodes)))
    model = ddp(ChosenGradients())
    try:
        state = attach(model, topology="hierarchical", **options)
    except EffAdamError as error:
        return str(error), ""
    gradients_of(model, rank, 0)
    return state.summary(), state.session.topology.name


@pytest.mark.parametrize("how", ["environment", "group", "mesh"])
def test_the_summary_says_nodes_and_ranks(how: str) -> None:
    for summary, name in run_ranks(find, 4, ((0, 2), (1, 3)), how):
        assert name == "hierarchical"
        assert "  topology     hierarchical; 2 nodes x 2 ranks, by " in summary


def test_one_rank_a_node_is_sharded(capfd: pytest.CaptureFixture[str]) -> None:
    for summary, name in run_ranks(find, 2, ((0,), (1,)), "environment"):
        assert name == "sharded"
        assert "2 nodes x 1 rank" in summary
    assert capfd.readouterr().out.count("Every node has one rank") == 1


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (((0, 1, 2),), "All ranks are on one node: 'host0' has 3 ranks (0, 1, 2)"),
        (((0, 2), (1,)), "'host0' has 2 ranks (0, 2); 'host1' has 1 rank (1)"),
    ],
)
def test_other_nodes_are_errors_on_every_rank(
    nodes: tuple[tuple[int, ...], ...], message: str
) -> None:
    results = run_ranks(find, 3, nodes, "environment")
    for rank, (said, _) in enumerate(results):
        assert message in said and f"Rank {rank}, finding the nodes" in said


def a_bad_variable_on_one_rank(rank: int, world_size: int) -> str:
    if rank == 1:
        os.environ["LOCAL_RANK"] = "one"
    with pytest.raises(EffAdamError) as caught:
        attach(ddp(ChosenGradients()), topology="hierarchical")
    return str(caught.value)


def test_a_rank_that_cannot_describe_itself_stops_all() -> None:
    for said in run_ranks(a_bad_variable_on_one_rank, 2):
        assert "rank 1: The environment variable LOCAL_RANK is 'one'" in said


def wrong_options(rank: int, world_size: int) -> None:
    group = dist.group.WORLD
    mesh = DeviceMesh("cpu", [[0]])
    for error, options in [
        (ValueError, {"topology": "sharded", "intra_node_group": group}),
        (ValueError, {"topology": "hierarchical", "intra_node_group": group, "device_mesh": mesh}),
        (ValueError, {"topology": "hierarchical", "device_mesh": DeviceMesh("cpu", [0])}),
        (TypeError, {"topology": "hierarchical", "intra_node_group": [0]}),
        (TypeError, {"topology": "hierarchical", "device_mesh": 2}),
        (ValueError, {"device_mesh": (2, 0)}),
        (ValueError, {"device_mesh": (2, 2, 2)}),
    ]:
        with pytest.raises(error, match=r"Invalid .*Must"):
            EfficientAdamState(**options)


def test_options_that_name_nodes_are_checked() -> None:
    run_ranks(wrong_options, 1)


def name_nodes(rank: int, world_size: int) -> None:
    nodes = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    for options in (
        {"device_mesh": (2, 2)},
        {"device_mesh": lambda: DeviceMesh("cpu", torch.tensor([[0, 2], [1, 3]]))},
        {"intra_node_group": lambda: nodes[rank % 2]},
    ):
        state = attach(ddp(ChosenGradients()), **options)
        table = state.session.connection.choice.table
        assert table is not None and state.session.topology.name == "hierarchical"
        in_order = options.get("device_mesh") == (2, 2)
        assert table.nodes == (((0, 1), (2, 3)) if in_order else ((0, 2), (1, 3)))


def test_nodes_are_named_by_numbers_or_when_groups_exist() -> None:
    run_ranks(name_nodes, 4)


def fail_to_name(rank: int, world_size: int) -> list[str]:
    def fails() -> DeviceMesh:
        if rank == 1:
            raise RuntimeError("no mesh here")
        return DeviceMesh("cpu", torch.tensor([[0, 1]]))

    said = []
    for options in ({"device_mesh": (3, 1)}, {"device_mesh": fails}):
        with pytest.raises(EffAdamError) as caught:
            attach(ddp(ChosenGradients()), **options)
        said.append(str(caught.value))
    return said


def test_nodes_that_cannot_be_named_are_an_error_on_every_rank_with_auto_too() -> None:
    for mesh, function in run_ranks(fail_to_name, 2):
        assert "device_mesh=(3, 1) has 3 ranks, and the process group 2" in mesh
        assert "rank 1: no mesh here" in function
