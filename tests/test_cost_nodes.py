"""The cost model of nodes with several ranks: counted bytes, and what shares a card."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from test_netlab import _namespaces  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from end_to_end import measure, table
from lab_run import LabRun
from netlab import Link as LabLink
from netlab import NetLab

from effadam_hook.planner.advice import FORWARD_SHARE, advise, break_even_s, forecast
from effadam_hook.planner.cluster import Cluster, Compute, Link, Speed
from effadam_hook.planner.method import Method
from effadam_hook.planner.predict import predict
from effadam_hook.planner.traffic import ParameterSize, legs_of, payload_bytes, square_model
from effadam_hook.planner.workloads import Workload, describe
from effadam_hook.wire.layout import Slot, lay_out_bucket
from effadam_hook.wire.quantizers import get_quantizer

BUCKET = [ParameterSize(1 << 20, 1024)]
BYTES = 4 << 20


def card(megabytes_s: float = 25.0) -> Link:
    return Link(megabytes_s * 1e6, efficiency=1.0)


@pytest.mark.usefixtures("_namespaces")
def test_predicted_bytes_are_those_that_the_hosts_links_count() -> None:
    names = ("fp32", "lloyd4/hierarchical", "lloyd4/sharded", "lloyd4/rank0")
    workload = Workload(layers=2, width=512, sleep_ms=0.0)
    run = LabRun(names, 1, 4, 2, workload, False)
    with NetLab(2, LabLink.parse("500mbit"), ranks_per_host=2) as lab:
        rows = table(measure(run, lab, quiet=True), lab.link)
    sizes = describe(workload.model())
    cluster = Cluster(4, Link(1e9), ranks_per_node=2)
    for row in rows:
        predicted = predict(Method.parse(row.method), sizes, cluster).busiest_bytes
        assert row.busiest_mb * 1e6 == pytest.approx(predicted, rel=0.06), row.method


def test_a_dense_ring_crosses_a_card_once_and_a_flat_all_to_all_once_for_each_rank() -> None:
    (ring,) = legs_of(Method.parse("fp32"), BUCKET, 2, ranks_per_node=4)
    assert (ring.out_bytes, ring.in_bytes, ring.inside_bytes) == (BYTES * 7 / 4,) * 3
    size = payload_bytes(BUCKET, "lloyd4", 8)
    up, down = legs_of(Method.parse("lloyd4/sharded"), BUCKET, 2, ranks_per_node=4)
    assert (up.out_bytes, up.in_bytes, up.inside_bytes) == (size * 2, size * 2, size * 3 / 8)
    assert (down.out_bytes, down.in_bytes, down.inside_bytes) == (size * 7 / 8,) * 3


def test_the_hierarchical_topology_crosses_a_card_as_if_nodes_had_one_rank() -> None:
    size = payload_bytes(BUCKET, "lloyd4", 8, shares=4)
    mean, up, down, gather = legs_of(
        Method.parse("lloyd4/hierarchical"), BUCKET, 2, ranks_per_node=4
    )
    assert (mean.busiest_bytes, mean.inside_bytes) == (0, 0)  # read from shared memory
    on_nccl = legs_of(Method.parse("lloyd4/hierarchical"), BUCKET, 2, True, 4)[0]
    assert (on_nccl.busiest_bytes, on_nccl.inside_bytes) == (0, BYTES * 3 / 4)
    assert (up.out_bytes, up.in_bytes, up.inside_bytes) == (size / 2, size / 2, 0)
    assert (down.out_bytes, down.in_bytes) == (size / 2, size / 2)
    assert (gather.busiest_bytes, gather.inside_bytes) == (0, size * 3 / 4)


def test_gloos_broadcast_leaves_the_first_node_from_each_of_its_ranks() -> None:
    size = payload_bytes(BUCKET, "lloyd4", 1)
    method = Method.parse("lloyd4/rank0")
    for nodes, ranks, leaving in ((2, 2, 2), (2, 4, 4), (3, 2, 4), (4, 1, 2)):
        up, down = legs_of(method, BUCKET, nodes, ranks_per_node=ranks)
        assert (up.in_bytes, down.out_bytes) == ((nodes - 1) * ranks * size, leaving * size)
    assert legs_of(method, BUCKET, 2, on_nccl=True, ranks_per_node=4)[1].out_bytes == size


@pytest.mark.parametrize("shares", [2, 3])
def test_payloads_of_nodes_have_the_size_of_the_layout(shares: int) -> None:
    bucket = [ParameterSize(70_001, 7), ParameterSize(13), ParameterSize(4096, 64), *BUCKET]
    slots, start = [], 0
    for order, parameter in enumerate(bucket):
        slots.append(Slot(str(order), start, parameter.numel, parameter.rows == 0))
        start += parameter.numel
    lloyd4 = get_quantizer("lloyd4")
    layout = lay_out_bucket(
        slots,
        uplink=lloyd4,
        downlink=lloyd4,
        scale_rule="least_squares",
        block_size=256,
        servers=2 * shares,
        itemsize=4,
        shares=shares,
    )
    assert payload_bytes(bucket, "lloyd4", 2 * shares, shares=shares) == layout.uplink.payload_bytes


def test_a_name_without_a_topology_follows_the_rule_of_auto() -> None:
    for name in ("lloyd4", "update:lloyd2@5", "sign/auto", "lloyd4/hierarchical"):
        method = Method.parse(name)
        assert method.on_nodes(2).topology == "hierarchical"
        assert method.on_nodes(1).topology == "sharded"
        assert method.on_nodes(2).name == name
    flat = Method.parse("lloyd4/rank0")
    assert flat.on_nodes(8) == flat
    several, single = Cluster(8, card(), ranks_per_node=4), Cluster(8, card(), ranks_per_node=8)
    assert predict(Method.parse("lloyd4"), BUCKET, several).method.topology == "hierarchical"
    # All ranks on one node: there is nothing between nodes.
    assert predict(Method.parse("lloyd4"), BUCKET, single).method.topology == "sharded"


def test_with_a_slow_card_a_step_takes_its_wire_time_whatever_a_node_holds() -> None:
    model = square_model(8 << 20)
    for ranks in (1, 2, 8):
        cluster = Cluster(2 * ranks, card(1.0), ranks_per_node=ranks, inside=card(1e4))
        predicted = predict(Method.parse("lloyd4@4"), model, cluster)
        assert predicted.exchange_s == pytest.approx(predicted.floor_s, rel=0.02)
        assert predicted.busiest_bytes == pytest.approx(
            predict(Method.parse("lloyd4@4"), model, Cluster(2, card(1.0))).busiest_bytes, rel=0.01
        )


def test_a_slow_link_inside_the_node_is_the_floor_of_the_node_mean() -> None:
    cluster = Cluster(4, card(1e6), on_nccl=True, ranks_per_node=2, inside=card(10.0))
    predicted = predict(Method.parse("lloyd4/hierarchical"), BUCKET, cluster)
    inside = BYTES / 2 + payload_bytes(BUCKET, "lloyd4", 4, shares=2) / 2
    assert predicted.floor_s == pytest.approx(inside / 10e6)
    assert predicted.exchange_s >= predicted.floor_s


def test_packing_and_the_node_mean_count_once_for_every_element() -> None:
    speed = Speed(encode_s=8e-9, pack_s=1e-9, mean_s=2e-9, reduce_s=16e-9, reduce_payload_s=4e-9)
    numel = 1 << 20
    cluster = Cluster(8, card(1e9), ranks_per_node=4, inside=card(1e9))
    hierarchical, flat = (
        predict(Method.parse(f"lloyd4/{name}"), BUCKET, cluster, speed).exchange_s
        for name in ("hierarchical", "sharded")
    )
    # 2 nodes are the workers of the one, 8 ranks those of the other.
    assert hierarchical == pytest.approx(
        numel * (1e-9 + 2e-9 + 8e-9 / 4 + (16e-9 + 2 * 4e-9) / 8), rel=1e-3
    )
    assert flat == pytest.approx(numel * (8e-9 + (16e-9 + 8 * 4e-9) / 8), rel=1e-3)


def test_nodes_of_unequal_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Invalid ranks_per_node: 3. Must divide .* 8"):
        Cluster(8, card(), ranks_per_node=3)


def test_compression_pays_up_to_the_compute_time_that_hides_dense() -> None:
    model, cluster = square_model(8 << 20), Cluster(4, card())
    methods = [Method.parse("fp32@4"), Method.parse("lloyd4@4")]

    def at(seconds: float) -> bool:
        compute = Compute(seconds * FORWARD_SHARE, seconds * (1 - FORWARD_SHARE))
        predictions = forecast(methods, model, cluster, {}, compute)
        return advise(predictions, predictions[0]).pays

    unknown = forecast(methods, model, cluster, {}, Compute())
    limit_s = break_even_s(advise(unknown, unknown[0]), [unknown[0]], model, cluster, {})
    assert at(0.9 * limit_s) and not at(1.1 * limit_s) and not math.isinf(limit_s)
