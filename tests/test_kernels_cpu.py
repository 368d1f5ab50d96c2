"""Compiled kernels are bit-identical to the reference, with all instruction sets and thread counts."""

from __future__ import annotations

import dataclasses
import gc
import tracemalloc

import pytest
import torch
from torch import Tensor

from effadam_hook.kernels import Kernels, reference
from effadam_hook.kernels.fusions import AdamSource, Preconditioner
from effadam_hook.wire.layout import BucketLayout
from effadam_hook.wire.quantizers import Quantizer
from kernel_cases import (
    COMBINATIONS,
    DTYPES,
    SIZES,
    VARIANTS,
    assert_same,
    compiled,
    compute,
    decode,
    encode,
    layout_of,
    needs_library,
    reduce_encode,
    round_trip,
    values_like_gradients,
)

pytestmark = needs_library


def exchanged(
    kernels: Kernels, layout: BucketLayout, dtype: torch.dtype, workers: list[Tensor]
) -> dict[str, Tensor]:
    torch.manual_seed(1)
    numel = layout.numel
    residuals = [torch.randn(numel, dtype=compute(dtype)) * 0.1 for _ in workers]
    servers = [
        torch.randn(chunk.numel, dtype=compute(dtype)) * 0.1 for chunk in layout.downlink.chunks
    ]
    return round_trip(kernels, layout, workers, residuals, servers, dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("name", "rule"), COMBINATIONS)
def test_makes_the_bits_of_the_reference(name: str, rule: str, variant: str) -> None:
    layout = layout_of(SIZES, name, rule=rule, servers=2, exact=(4, 9))
    workers = [values_like_gradients(layout.numel) for _ in range(5)]
    made = exchanged(compiled(variant), layout, torch.float32, workers)
    assert_same(made, exchanged(reference, layout, torch.float32, workers))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("block_size", [16, 17, 64, 1024, 4096])
@pytest.mark.parametrize("name", ["uniform8", "lloyd3", "lloyd4", "ternary", "sign"])
def test_makes_the_bits_of_the_reference_for_every_block_size(
    name: str, block_size: int, variant: str
) -> None:
    layout = layout_of((5000, 17, 300), name, block_size=block_size)
    workers = [values_like_gradients(layout.numel)] * 5
    made = exchanged(compiled(variant), layout, torch.float32, workers)
    assert_same(made, exchanged(reference, layout, torch.float32, workers))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("count", [1, 3, 4, 6, 8])
@pytest.mark.parametrize("name", ["uniform8", "lloyd2", "ternary", "sign"])
def test_makes_the_bits_of_the_reference_for_every_number_of_workers(
    name: str, count: int, variant: str
) -> None:
    layout = layout_of((1300, 64), name)
    workers = [values_like_gradients(layout.numel) for _ in range(count)]
    workers[0][:256] *= 1e-37
    made = exchanged(compiled(variant), layout, torch.float32, workers)
    assert_same(made, exchanged(reference, layout, torch.float32, workers))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("up", "down"), [("lloyd4", "log4"), ("none", "lloyd2"), ("sign", "none")])
def test_makes_the_bits_of_the_reference_for_every_dtype(
    up: str, down: str, dtype: torch.dtype, variant: str
) -> None:
    layout = layout_of(SIZES, up, down, dtype=dtype, servers=3, exact=(3,))
    workers = [values_like_gradients(layout.numel, dtype) for _ in range(4)]
    made = exchanged(compiled(variant), layout, dtype, workers)
    assert_same(made, exchanged(reference, layout, dtype, workers))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_the_bucket_may_differ_from_the_raw_elements(
    stored: torch.dtype, dtype: torch.dtype, variant: str
) -> None:
    layout = layout_of((100, 300), "lloyd4", dtype=dtype, exact=(0,))
    x = values_like_gradients(layout.numel, stored)
    x[:4] = torch.tensor([1e-7, 6e-8, 65504.0, -1e-45]).to(stored)
    ours, law = compiled(variant), reference
    payload = encode(law, layout.uplink, x, None, dtype)
    assert torch.equal(encode(ours, layout.uplink, x, None, dtype), payload)
    assert torch.equal(
        decode(ours, layout.uplink, payload, dtype, stored),
        decode(law, layout.uplink, payload, dtype, stored),
    )


def awkward(name: str) -> Tensor:
    x = values_like_gradients(1200)
    if name == "zeros":
        return torch.zeros_like(x)
    if name == "negative zeros":
        return -torch.zeros_like(x)
    if name == "denormal":
        return x * 1e-42
    if name == "near the zero limit":
        return x / x[:256].abs().max() * 2.0**-100
    if name == "huge":
        return x.sign() * 3e38
    if name == "wide":
        return x * torch.tensor(10.0) ** torch.randint(-40, 30, (1200,))
    if name == "one spike":
        return torch.zeros_like(x).index_fill_(0, torch.tensor([700]), 1e30)
    if name == "ties":
        return torch.randint(-14, 15, (1200,)) / 2.0
    x[5], x[600], x[900] = float("nan"), float("inf"), float("-inf")
    return x


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "name",
    [
        "zeros",
        "negative zeros",
        "denormal",
        "near the zero limit",
        "huge",
        "wide",
        "one spike",
        "ties",
        "not finite",
    ],
)
@pytest.mark.parametrize("quantizer", ["uniform8", "uniform4", "log4", "lloyd4", "ternary", "sign"])
def test_makes_the_bits_of_the_reference_on_awkward_input(
    quantizer: str, name: str, variant: str
) -> None:
    layout = layout_of((256, 513, 431), quantizer)
    workers = [awkward(name), awkward(name)]
    made = exchanged(compiled(variant), layout, torch.float32, workers)
    assert_same(made, exchanged(reference, layout, torch.float32, workers))
    bare = encode(compiled(variant), layout.uplink, workers[0])
    assert torch.equal(bare, encode(reference, layout.uplink, workers[0]))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantizer", ["uniform8", "lloyd2", "ternary", "sign", "none"])
def test_makes_the_bits_of_the_reference_where_sums_and_quotients_overflow(
    quantizer: str, dtype: torch.dtype, variant: str
) -> None:
    layout = layout_of((256, 300, 77, 40), quantizer, "lloyd3", dtype=dtype, exact=(3,))
    top, real = torch.finfo(dtype), compute(dtype)
    workers = [(torch.rand(673).mul(2).sub(1).double() * top.max).to(dtype) for _ in range(3)]
    workers[0][600], workers[1][650] = float("nan"), float("inf")
    limits = torch.finfo(real)
    moments = [torch.rand(n, dtype=real) * v for n, v in ((256, limits.tiny * 1e5), (300, 1e30))]
    law: dict[str, Tensor] = {}
    for source in (None, Preconditioner((*moments, None, None))):
        for kernels in (reference, compiled(variant)):
            torch.manual_seed(2)
            residuals = [(torch.rand(673, dtype=real) * 2 - 1) * limits.max for _ in workers]
            servers = [(torch.rand(673, dtype=real) * 2 - 1) * limits.max]
            made = round_trip(
                kernels, layout, workers, residuals, servers, dtype, preconditioner=source
            )
            if kernels is not reference:
                assert_same(made, law)
            law = made


@pytest.mark.parametrize("variant", VARIANTS)
def test_updates_make_the_bits_of_the_reference_where_they_overflow(variant: str) -> None:
    layout = layout_of((256, 77), "lloyd2")
    terms = torch.tensor([[0.9, 0.1, 0.99, 0.01, 3e36, 1.0, 0.0]] * 2, dtype=torch.float64)
    made = []
    for kernels in (reference, compiled(variant)):
        torch.manual_seed(3)
        g, e = torch.randn(333), torch.randn(333).sign() * torch.finfo(torch.float32).max
        g[300] = 1e20  # whose square overflows
        m, v = torch.randn(333), torch.rand(333) + 1
        payload = encode(kernels, layout.uplink, g, e, adam=AdamSource(m, v, terms))
        out = decode(kernels, layout.uplink, payload, torch.float32)
        made.append({"payload": payload, "e": e, "m": m, "v": v, "out": out})
    assert_same(made[1], made[0])
    assert made[0]["out"][:256].isfinite().all()
    assert made[0]["out"][256:].isnan().all()
    assert made[0]["e"].isfinite().all()


def test_a_table_that_is_too_long_is_refused() -> None:
    levels = Quantizer("log5", (0.0, *(2.0**-k for k in range(14, -1, -1))), 8, 8, None)
    wire = dataclasses.replace(layout_of((64,), "uniform8").uplink, quantizer=levels)
    x = values_like_gradients(64)
    assert encode(reference, wire, x).any()
    with pytest.raises(
        ValueError, match=r"'log5': it has 31 levels\. Must be at most 16 .*reference"
    ):
        encode(compiled(), wire, x)


@pytest.mark.parametrize("quantizer", ["lloyd4", "ternary", "none"])
def test_the_number_of_threads_changes_nothing(quantizer: str) -> None:
    layout = layout_of((200_001, 7, 99_999), quantizer, servers=2, exact=(2,))
    workers = [values_like_gradients(layout.numel) for _ in range(2)]
    before = torch.get_num_threads()
    try:
        made = []
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            made.append(exchanged(compiled(), layout, torch.float32, workers))
    finally:
        torch.set_num_threads(before)
    for other in made[1:]:
        assert_same(other, made[0])


def test_memory_need_not_be_aligned() -> None:
    layout = layout_of((1000,), "lloyd4")
    numel, wire = layout.numel, layout.uplink
    x = values_like_gradients(numel)
    expected = encode(reference, wire, x)
    shifted = torch.empty(numel + 1)[1:].copy_(x)
    payload = torch.zeros(wire.payload_bytes + 3, dtype=torch.uint8)[3:].view(1, -1)
    compiled().encode_(wire, shifted, None, payload, torch.float32)
    used = wire.chunks[0].used_bytes
    assert torch.equal(payload[:, :used], expected[:, :used])


def test_writes_nothing_but_its_own_bytes() -> None:
    layout = layout_of((1001, 3, 130), "lloyd3", servers=2)
    wire = layout.uplink
    for variant in VARIANTS:
        around = torch.full((wire.payload_bytes + 128,), 77, dtype=torch.uint8)
        payload = around[64:-64].view(2, -1)
        bucket = torch.full((layout.numel + 32,), 77.0)
        compiled(variant).encode_(wire, bucket[16:-16] * 0 + 1, None, payload, torch.float32)
        compiled(variant).decode(wire, payload, bucket[16:-16], torch.float32)
        assert (around[:64] == 77).all()
        assert (around[-64:] == 77).all()
        assert (bucket[:16] == 77).all()
        assert (bucket[-16:] == 77).all()
        for server, chunk in enumerate(wire.chunks):
            assert (payload[server, chunk.used_bytes :] == 77).all()


def test_allocates_nothing_that_stays() -> None:
    layout = layout_of((3000, 17), "lloyd4")
    kernels, x, residual = compiled(), values_like_gradients(3017), torch.zeros(3017)
    payload = encode(kernels, layout.uplink, x, residual)
    server_residual, out = torch.zeros(3017), torch.empty(3017)
    chunk = reduce_encode(kernels, layout, 0, payload, server_residual, torch.float32)

    def step() -> None:
        kernels.encode_(layout.uplink, x, residual, payload, torch.float32)
        kernels.reduce_encode_(
            layout.uplink, layout.downlink, 0, payload, server_residual, torch.float32, chunk
        )
        kernels.decode(layout.downlink, chunk[None], out, torch.float32)

    def objects_after(steps: int) -> tuple[int, int]:
        for _ in range(steps):
            step()
        gc.collect()
        return len(gc.get_objects()), tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        objects_after(10)
        before = objects_after(10)
        after = objects_after(100)
    finally:
        tracemalloc.stop()
    assert after[0] <= before[0] + 5
    assert after[1] <= before[1] + 4096


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Invalid variant: 'mmx'\. Must be one of .*plain"):
        compiled("mmx")


@pytest.mark.parametrize("index", [-(2**31), -1, 3, 2**31 - 1])
def test_an_instruction_set_out_of_range_is_replaced_by_plain_code(index: int) -> None:
    layout = layout_of((300,), "lloyd4")
    x = values_like_gradients(300)
    kernels = compiled()
    assert kernels._library.effadam_variant_name(index) is None
    kernels._variant_index = index
    payload = encode(kernels, layout.uplink, x)
    assert torch.equal(payload, encode(reference, layout.uplink, x))
