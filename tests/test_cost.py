"""The cost model: hand-computed cases, limits, and what must grow with what."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effadam_hook.planner.method import Method, expand_names
from effadam_hook.planner.predict import Cluster, Compute, Link, Speed, predict
from effadam_hook.planner.timeline import Transit, Work, run_timeline
from effadam_hook.planner.traffic import (
    ParameterSize,
    legs_of,
    make_buckets,
    parts_of,
    payload_bytes,
    square_model,
)
from effadam_hook.wire.layout import Slot, lay_out_bucket
from effadam_hook.wire.quantizers import get_quantizer

MLP = [
    parameter for _ in range(6) for parameter in (ParameterSize(1 << 20, 1024), ParameterSize(1024))
]
NUMEL = 6 * ((1 << 20) + 1024)
OURS = ("lloyd4/sharded@1", "lloyd2/rank0@1", "lloyd4/sharded", "update:sign/rank0")
ALL = ("fp32", "fp16", "powersgd4", *OURS)


def link(megabytes_s: float = 100.0, **values: float) -> Link:
    return Link(megabytes_s * 1e6, efficiency=1.0, **values)  # type: ignore[arg-type]


def test_a_dense_ring_carries_twice_the_gradients_less_one_nth() -> None:
    predicted = predict(Method.parse("fp32"), MLP, Cluster(4, link(25.0)))
    assert predicted.busiest_bytes == 2 * 4 * NUMEL * 3 / 4
    assert predicted.exchange_s == pytest.approx(2 * 4 * NUMEL * 3 / 4 / 25e6)


def test_an_all_reduce_waits_for_every_round_of_its_ring_or_tree() -> None:
    late, model = link(1e6, latency_s=0.001), [ParameterSize(1024)]
    for on_nccl, rounds in ((False, 30), (True, 8)):
        cluster = Cluster(16, late, on_nccl=on_nccl)
        exchange_s = predict(Method.parse("fp32"), model, cluster).exchange_s
        assert exchange_s == pytest.approx(rounds * 0.001, rel=1e-3)


def test_half_the_bytes_take_half_the_time() -> None:
    cluster = Cluster(4, link())
    dense, half = (predict(Method.parse(name), MLP, cluster) for name in ("fp32", "fp16"))
    assert half.exchange_s == pytest.approx(dense.exchange_s / 2)


def test_rank_0_takes_in_n_minus_1_payloads_and_is_the_root_of_a_tree() -> None:
    bucket = [ParameterSize(1 << 20, 1024)]
    size = payload_bytes(bucket, "lloyd4", servers=1)
    assert size == (1 << 20) // 2 + (1 << 20) // 256 * 2 + 16  # codes, scales, seal
    up, down = legs_of(Method.parse("lloyd4/rank0"), bucket, 4)
    assert (up.out_bytes, up.in_bytes, up.rounds) == (0, 3 * size, 1)
    assert (down.out_bytes, down.in_bytes, down.rounds) == (2 * size, 0, 2)
    assert legs_of(Method.parse("lloyd4/rank0"), bucket, 2)[1].rounds == 1
    assert legs_of(Method.parse("lloyd4/rank0"), bucket, 8, on_nccl=True)[1].out_bytes == size
    assert (up.messages, down.messages) == (2, 0)


def test_large_buckets_of_ours_travel_in_parts_but_not_on_one_stream() -> None:
    bucket = [ParameterSize(1 << 20, 1024)] * 4
    ours = Method.parse("lloyd4/sharded")
    assert [len(part) for part in parts_of(ours, bucket, 4)] == [1, 1, 1, 1]
    assert [len(part) for part in parts_of(ours, bucket, 32)] == [2, 2]
    assert parts_of(Method.parse("fp32"), bucket, 4) == [bucket]
    speed = Speed(encode_s=1e-8, decode_s=1e-8)
    whole, parts = (
        predict(ours, bucket, Cluster(4, link(), on_nccl=on_nccl), speed).exchange_s
        for on_nccl in (True, False)
    )
    assert parts < 0.8 * whole


def test_sharded_sends_what_is_not_its_own_and_gets_as_much_in_both_legs() -> None:
    bucket = [ParameterSize(1 << 20, 1024)]
    size = payload_bytes(bucket, "lloyd4", servers=4)
    for leg in legs_of(Method.parse("lloyd4/sharded"), bucket, 4):
        assert (leg.out_bytes, leg.in_bytes, leg.rounds) == (size * 3 / 4, size * 3 / 4, 1)


def test_powersgd_sends_two_thin_factors_and_the_vectors() -> None:
    sizes = [leg.busiest_bytes for leg in legs_of(Method.parse("powersgd4"), MLP, 2)]
    assert sizes == [4 * 6 * 1024, 4 * 6 * 4 * 1024, 4 * 6 * 4 * 1024]


def test_both_legs_of_sharded_share_the_link_and_those_of_rank0_do_not() -> None:
    model = square_model(64 << 20)
    cluster = Cluster(2, link())
    size = sum(payload_bytes(b, "lloyd4", 2) for b in make_buckets(model, 4))
    sharded = predict(Method.parse("lloyd4/sharded@4"), model, cluster)
    assert sharded.exchange_s == pytest.approx(size / 100e6, rel=0.01)
    # Two ranks: one payload each way, so up and down fill a direction each.
    rank0 = predict(Method.parse("lloyd4/rank0@4"), model, cluster)
    assert rank0.exchange_s == pytest.approx(size / 100e6 * (1 + 1 / 64), rel=0.01)
    assert sharded.floor_s == pytest.approx(sharded.exchange_s, rel=0.01)


def test_one_bucket_overlaps_nothing() -> None:
    speed = Speed(encode_s=1e-9, reduce_s=2e-9, reduce_payload_s=1e-9, decode_s=3e-9, call_s=1e-4)
    model = [ParameterSize(1 << 20, 1024)]
    size = payload_bytes(model, "lloyd4", 4)
    predicted = predict(
        Method.parse("lloyd4/sharded"), model, Cluster(4, link(latency_s=0.01)), speed
    )
    kernels_s = (1 << 20) * (1e-9 + (2e-9 + 4 * 1e-9) / 4 + 3e-9) + 3e-4
    assert predicted.exchange_s == pytest.approx(kernels_s + 2 * (size * 0.75 / 100e6 + 0.01))


def test_an_exchange_hides_behind_a_long_backward_all_but_its_last_bucket() -> None:
    compute = Compute(forward_s=1.0, backward_s=10.0, rest_s=0.5)
    cluster = Cluster(4, link(1000))
    predicted = predict(Method.parse("lloyd4/sharded@1"), MLP, cluster, compute=compute)
    last = make_buckets(MLP, 1)[-1]
    legs_s = 2 * payload_bytes(last, "lloyd4", 4) * 0.75 / 1e9
    assert predicted.step_s == pytest.approx(11.5 + legs_s)
    assert predicted.exposed_s == pytest.approx(legs_s, rel=1e-6)


def test_messages_take_their_processor_time_from_backward_where_cores_are_short() -> None:
    legs = {"up/sharded": 0.05, "down/sharded": 0.02}
    busy = replace(link(1e6), cpu_s=legs, cpu_s_per_byte={"up/sharded": 1e-8})
    compute = Compute(backward_s=10.0)
    method = Method.parse("lloyd4/sharded@1")
    parts = [p for b in make_buckets(MLP, 1) for p in parts_of(method, b, 4)]
    bytes_up = sum(payload_bytes(part, "lloyd4", 4) * 0.75 for part in parts)
    one_core = predict(method, MLP, Cluster(4, busy, cores=1.0), compute=compute)
    assert one_core.step_s == pytest.approx(10 + len(parts) * 0.07 + bytes_up * 1e-8, rel=1e-3)
    many_cores = predict(method, MLP, Cluster(4, busy), compute=compute)
    assert many_cores.step_s == pytest.approx(10, rel=1e-3)


def test_where_the_link_is_slow_a_step_is_what_the_wire_takes() -> None:
    compute = Compute(backward_s=0.05)
    predicted = predict(Method.parse("fp32@4"), MLP, Cluster(4, link(1.0)), compute=compute)
    assert predicted.floor_s < predicted.step_s < predicted.floor_s + 0.05


@pytest.mark.parametrize("name", ALL)
def test_one_rank_has_no_traffic(name: str) -> None:
    predicted = predict(
        Method.parse(name), MLP, Cluster(1, link(latency_s=1.0)), compute=Compute(1.0, 2.0, 3.0)
    )
    assert (predicted.step_s, predicted.floor_s, predicted.busiest_bytes) == (6.0, 0.0, 0.0)


def test_no_communication_costs_nothing() -> None:
    predicted = predict(Method.parse("none"), MLP, Cluster(8, link()), compute=Compute(1, 2, 3))
    assert (predicted.step_s, predicted.exposed_s) == (6.0, 0.0)


def test_threads_that_share_a_core_take_their_times_together() -> None:
    backward = Work("backward", 1.0, {"cpu": 1.0})
    transit = Transit(0.0, [Work("encode", 0.5, {"cpu": 1.0})])
    assert run_timeline(backward, [transit], {"cpu": 1.0}) == (1.5, 1.5)
    assert run_timeline(backward, [transit], {"cpu": 2.0}) == (1.0, 1.0)
    # Half of backward alone, then both at half speed.
    late = Transit(0.5, [Work("encode", 0.5, {"cpu": 1.0})])
    assert run_timeline(backward, [late], {"cpu": 1.0}) == pytest.approx((1.5, 1.5))


def test_a_stage_takes_one_bucket_at_a_time_and_delays_any_number() -> None:
    none = Work("backward", 0.0)
    buckets = [Transit(0.0, [Work("up", 1.0), Work("", 5.0), Work("down", 1.0)])] * 3
    assert run_timeline(none, buckets, {})[0] == 9.0


def test_buckets_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ready at \[1.0, 0.5\]"):
        run_timeline(Work("b", 1.0), [Transit(1.0, []), Transit(0.5, [])], {})


slow = st.floats(1.0, 4.0)
SPEED = Speed(1e-9, 1e-9, 1e-9, 1e-9, 1e-5)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ALL), st.integers(2, 64), st.floats(1, 1e4), slow, slow, slow)
def test_what_is_slower_takes_longer_and_never_less_than_the_wire(
    name: str, n: int, rate: float, bandwidth: float, latency: float, kernels: float
) -> None:
    method, compute = Method.parse(name), Compute(0.01, 0.02, 0.01)

    def step(b: float, late: float, k: float) -> float:
        speed = Speed(*(k * value for value in vars(SPEED).values()))
        cluster = Cluster(n, link(rate / b, latency_s=late * 1e-4), cores=2)
        predicted = predict(method, MLP, cluster, speed, compute)
        assert predicted.step_s >= max(predicted.floor_s, 0.04) * (1 - 1e-9)
        return predicted.step_s

    least = step(1, 1, 1) * (1 - 1e-6)
    assert step(bandwidth, 1, 1) >= least
    assert step(1, latency, 1) >= least
    assert step(1, 1, kernels) >= least


@pytest.mark.parametrize("name", ["lloyd4/rank0", "fp32"])
def test_more_ranks_mean_more_bytes(name: str) -> None:
    sizes = [
        predict(Method.parse(name), MLP, Cluster(n, link())).busiest_bytes for n in (2, 3, 8, 64)
    ]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("quantizer", ["lloyd4", "sign", "ternary", "none"])
@pytest.mark.parametrize("servers", [1, 3, 50])
def test_payloads_have_the_size_of_the_layout(quantizer: str, servers: int) -> None:
    bucket = [
        ParameterSize(70_001, 7),
        ParameterSize(13),
        ParameterSize(4096, 64),
        ParameterSize(1),
        *MLP[:2],
    ]
    slots, start = [], 0
    for order, parameter in enumerate(bucket):
        slots.append(Slot(str(order), start, parameter.numel, parameter.rows == 0))
        start += parameter.numel
    layout = lay_out_bucket(
        slots,
        uplink=get_quantizer(quantizer),
        downlink=get_quantizer(quantizer),
        scale_rule="least_squares",
        block_size=256,
        servers=servers,
        itemsize=4,
    )
    assert payload_bytes(bucket, quantizer, servers) == layout.uplink.payload_bytes


def test_very_many_shares_are_estimated_to_two_per_cent() -> None:
    model = square_model(200 << 20)
    exact, estimated = payload_bytes(model, "lloyd4", 1000), payload_bytes(model, "lloyd4", 1001)
    assert estimated == pytest.approx(exact, rel=0.02)


def test_buckets_are_closed_by_the_parameter_that_fills_them() -> None:
    sizes = [[p.numel for p in bucket] for bucket in make_buckets(MLP, 1)]
    assert sizes[0] == [1024, 1 << 20]
    assert sizes == [[1024, 1 << 20]] * 6
    default = [sum(p.numel for p in bucket) for bucket in make_buckets(MLP)]
    assert default == [1024 + (1 << 20), 5 * (1024 + (1 << 20))]
    assert len(make_buckets(MLP, math.inf)) == 1


def test_a_model_of_which_the_size_is_known_has_that_size() -> None:
    assert sum(p.numel for p in square_model(6_300_000)) == 6_300_000
    with pytest.raises(ValueError, match="Invalid numel: 0"):
        square_model(0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Link(0.0), "bandwidth_bytes_s: 0.0"),
        (lambda: Link(1.0, efficiency=1.5), "efficiency: 1.5"),
        (lambda: Link(1.0, latency_s=-1.0), "latency_s: -1.0"),
        (lambda: Link(1.0, message_s=-1.0), "message_s: -1.0"),
        (lambda: Cluster(0, Link(1.0)), "world_size: 0"),
        (lambda: Cluster(1, Link(1.0), cores=0), "cores: 0"),
        (lambda: make_buckets(MLP, -1.0), "bucket_mb: -1.0"),
        (lambda: predict(Method.parse("fp32"), [], Cluster(2, Link(1.0))), "parameters: none"),
        (lambda: Method.parse("lloyd5"), "method: 'lloyd5'"),
        (lambda: Method.parse("lloyd4/ring"), "method: 'lloyd4/ring'"),
        (lambda: Method.parse("fp16@"), "method: 'fp16@'"),
        (lambda: Method.parse("fp16@1.2.3"), "method: 'fp16@1.2.3'"),
        (lambda: Method.parse("powersgd"), "method: 'powersgd'"),
    ],
)
def test_a_value_that_cannot_be_is_refused(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=rf"Invalid {said}"):
        make()  # type: ignore[operator]


def test_names_say_the_scheme_and_what_its_speed_depends_on() -> None:
    names = list(expand_names("fp32,{lloyd4,sign}/{sharded,rank0}@1, update:lloyd2"))
    assert names[1:3] == ["lloyd4/sharded@1", "lloyd4/rank0@1"]
    update = Method.parse("update:lloyd2/rank0@5")
    assert (update.kind, update.arithmetic, update.bucket_mb) == ("update", "update:lloyd2", 5.0)
    assert Method.parse("fp32@3").arithmetic == ""
    assert update.with_buckets(1.0).bucket_mb == 5.0
    assert Method.parse("fp16").with_buckets(1.0).bucket_mb == 1.0
