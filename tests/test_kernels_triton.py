"""The Triton kernels against the reference: under Triton's interpreter, and natively on a GPU."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

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
    compute,
    decode,
    encode,
    layout_of,
    reduce_encode,
    same,
    values_like_gradients,
)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SIZES = (130, 1, 33, 5)


@pytest.fixture(name="kernels", scope="module")
def _kernels() -> Kernels:
    """Import the module; without a GPU, its functions run interpreted (conftest.py)."""
    return importlib.import_module("effadam_hook.kernels.triton_kernels")


def there(tensor: Tensor) -> Tensor:
    return tensor.to(DEVICE, copy=True)


def assert_near(ours: Tensor, law: Tensor, levels: int = 1) -> None:
    """Assert equality, except for scales one place apart and codes at a tie."""
    assert torch.equal(ours.isfinite(), law.isfinite())
    ours, law = ours.nan_to_num().double(), law.nan_to_num().double()
    far = (ours - law).abs() > 2.0**-7 * law.abs()
    assert far.double().mean() <= 0.02 * levels


def inputs(layout: BucketLayout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = values_like_gradients(layout.numel, dtype)
    return x, torch.randn(layout.numel, dtype=compute(dtype)) * 0.1


@pytest.mark.parametrize(("name", "rule"), COMBINATIONS)
def test_encodes_and_decodes_like_the_reference(kernels: Kernels, name: str, rule: str) -> None:
    layout = layout_of(SIZES, name, rule=rule, block_size=64, servers=2, exact=(2,))
    x, e = inputs(layout, torch.float32)
    kept, e_there = e.clone(), there(e)
    payload = encode(reference, layout.uplink, x, kept)
    ours = encode(kernels, layout.uplink, there(x), e_there)
    law = decode(reference, layout.uplink, payload, torch.float32)
    assert torch.equal(decode(kernels, layout.uplink, there(payload), torch.float32).cpu(), law)
    out = decode(reference, layout.uplink, ours.cpu(), torch.float32)
    assert_near(out, law)
    quantized = torch.ones(layout.numel, dtype=torch.bool)
    quantized[131:164] = name == "none"
    quantized &= name != "none"
    lost = (out + e_there.cpu() - x - e)[quantized]
    assert lost.numel() == 0 or lost.abs().max() < 1e-6
    for server, chunk in enumerate(layout.uplink.chunks):
        assert (ours[server, chunk.used_bytes :] == 255).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("up", "down"), [("lloyd4", "lloyd2"), ("ternary", "uniform8"), ("none", "sign")]
)
def test_reduces_like_the_reference(
    kernels: Kernels, up: str, down: str, dtype: torch.dtype
) -> None:
    layout = layout_of(SIZES, up, down, block_size=64, servers=2, dtype=dtype, exact=(2,))
    sent = [encode(reference, layout.uplink, inputs(layout, dtype)[0]) for _ in range(3)]
    for server, chunk in enumerate(layout.downlink.chunks):
        e = torch.randn(chunk.numel, dtype=compute(dtype)) * 0.1
        kept, kept_there = e.clone(), there(e)
        payloads = torch.stack([payload[server] for payload in sent])
        law = reduce_encode(reference, layout, server, payloads, kept, dtype)
        ours = reduce_encode(kernels, layout, server, there(payloads), kept_there, dtype)
        both = torch.zeros(2, 2, layout.downlink.stride_bytes, dtype=torch.uint8)
        both[0, server], both[1, server] = law, ours.cpu()
        first, second = (decode(reference, layout.downlink, p, dtype) for p in both)
        assert_near(second, first)


@pytest.mark.parametrize("block_size", [16, 4096, 24, 72, 144, 150, 200])
def test_every_block_size(kernels: Kernels, block_size: int) -> None:
    layout = layout_of((70, 20), "lloyd3", block_size=block_size)
    x, e = inputs(layout, torch.float32)
    payload = encode(reference, layout.uplink, x, e.clone())
    law = decode(reference, layout.uplink, payload, torch.float32)
    assert torch.equal(decode(kernels, layout.uplink, there(payload), torch.float32).cpu(), law)
    ours = encode(kernels, layout.uplink, there(x), there(e)).cpu()
    assert_near(decode(reference, layout.uplink, ours, torch.float32), law)


@pytest.mark.parametrize("name", ["lloyd4", "uniform8", "ternary"])
def test_awkward_blocks(kernels: Kernels, name: str) -> None:
    layout = layout_of((64,) * 6, name, block_size=64)
    x = values_like_gradients(384)
    x[:64] = 0
    x[64:128] *= 1e-42
    x[128:192] = x[128:192].sign() * 3e38
    x[200], x[300] = float("nan"), float("-inf")
    kept, kept_there = torch.zeros(384), there(torch.zeros(384))
    payload = encode(reference, layout.uplink, x, kept)
    ours = encode(kernels, layout.uplink, there(x), kept_there)
    law = decode(reference, layout.uplink, payload, torch.float32)
    assert same(decode(kernels, layout.uplink, there(payload), torch.float32).cpu(), law)
    assert_near(decode(reference, layout.uplink, ours.cpu(), torch.float32), law)
    assert kept_there.isfinite().all()
    assert torch.equal(kept_there.cpu()[:128], kept[:128])


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("name", ["lloyd2", "sign", "uniform8"])
def test_sums_and_quotients_that_overflow_saturate(
    kernels: Kernels, name: str, preconditioned: bool
) -> None:
    layout = layout_of((64, 64, 30), name, block_size=64)
    largest = torch.finfo(torch.float32).max
    x = (torch.rand(158) * 2 - 1) * largest
    x[140] = float("inf")
    e = x.sign() * largest
    e[140] = 1.0
    source = source_there = None
    if preconditioned:
        moments = (torch.rand(64) * 1e-33, torch.rand(64) * 1e30)
        source = Preconditioner((*moments, None))
        source_there = Preconditioner((*map(there, moments), None))
    kept, kept_there = e.clone(), there(e)
    payload = encode(reference, layout.uplink, x, kept, preconditioner=source)
    ours = encode(kernels, layout.uplink, there(x), kept_there, preconditioner=source_there)
    law = decode(reference, layout.uplink, payload, torch.float32, preconditioner=source)
    out = decode(kernels, layout.uplink, ours, torch.float32, preconditioner=source_there).cpu()
    assert out[:128].isfinite().all()
    assert out[128:].isnan().all()
    assert kept_there.isfinite().all()
    assert_near(out, law)
    both = torch.stack([ours[0]] * 3)
    server = there(torch.full((158,), largest))
    chunk = reduce_encode(
        kernels, layout, 0, both, server, torch.float32, preconditioner=source_there
    )
    out = decode(kernels, layout.downlink, chunk[None], torch.float32, preconditioner=source_there)
    assert out[:128].isfinite().all()
    assert server.isfinite().all()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("lloyd4", torch.float32),
        ("log3", torch.float64),
        ("ternary", torch.float32),
        ("uniform8", torch.bfloat16),
        ("none", torch.float32),
    ],
)
def test_a_block_has_one_result_in_full_and_in_partial_tiles(
    kernels: Kernels, name: str, dtype: torch.dtype
) -> None:
    """The same values in an aligned tile of 4096 elements, in an unaligned one, and in short ones."""
    values = values_like_gradients(8192, dtype)
    layout = layout_of((8192, 3, 8192, 512, 8192 - 512), name, dtype=dtype)
    parts = [values, values[:3], values, values[:512], values[512:]]
    x = torch.cat(parts)
    e = torch.cat([(part * 0.3).to(compute(dtype)) for part in parts])
    kept, e_there = e.clone(), there(e)
    payload = encode(kernels, layout.uplink, there(x), e_there, dtype)
    out = decode(kernels, layout.uplink, payload, dtype)
    aligned, _, unaligned, short, rest = out.split([len(part) for part in parts])
    assert torch.equal(aligned, unaligned)
    assert torch.equal(aligned, torch.cat([short, rest]))
    first, _, second, *others = e_there.split([len(part) for part in parts])
    assert torch.equal(first, second)
    assert torch.equal(first, torch.cat(others))
    assert_near(out.cpu(), decode(reference, layout.uplink, payload.cpu(), dtype), 0)
    law = encode(reference, layout.uplink, x, kept, dtype)
    assert_near(out.cpu(), decode(reference, layout.uplink, law, dtype))
    both = torch.cat([payload, there(law)])
    server_law, server = e.clone(), there(e)
    reduced_law = reduce_encode(reference, layout, 0, both.cpu(), server_law, dtype)
    reduced = reduce_encode(kernels, layout, 0, both, server, dtype)
    made, expected = (
        decode(reference, layout.downlink, one.cpu()[None], dtype) for one in (reduced, reduced_law)
    )
    assert_near(made, expected)
    aligned, _, unaligned, short, rest = made.split([len(part) for part in parts])
    assert torch.equal(aligned, unaligned)
    assert torch.equal(aligned, torch.cat([short, rest]))


@pytest.mark.skipif(ON_GPU, reason="counts what the interpreter reads and writes")
@pytest.mark.parametrize("name", ["lloyd4", "ternary", "none"])
def test_kernels_move_the_bytes_of_their_docstrings(
    kernels: Kernels, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apart from the lookups of a program, at most 200 bytes."""
    builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
    moved = [0]
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        made = load(self, pointers, mask, *rest)
        moved[0] += int(mask.data.sum()) * made.data.itemsize
        return made

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        moved[0] += int(mask.data.sum()) * value.data.itemsize
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", counted_load)
    monkeypatch.setattr(builder, "create_masked_store", counted_store)
    numel = 2 * 4096
    layout = layout_of((numel,), name)
    wire = layout.uplink
    code = wire.chunks[0].used_bytes / numel
    residual = 0 if name == "none" else 8
    x, e = values_like_gradients(numel), torch.zeros(numel)
    payload = torch.zeros(1, wire.stride_bytes, dtype=torch.uint8)
    four = payload.expand(4, -1).contiguous()

    def count(call: Callable[[], object]) -> float:
        moved[0] = 0
        call()
        return moved[0] / numel

    def expect(bytes_per_element: float) -> Any:
        return pytest.approx(bytes_per_element, abs=4 * 200 / numel)

    assert count(lambda: encode(kernels, wire, x, e)) == expect(4 + residual + code)
    reduced = count(lambda: reduce_encode(kernels, layout, 0, four, e, torch.float32))
    assert reduced == expect(5 * code + residual)
    assert count(lambda: decode(kernels, wire, payload, torch.float32)) == expect(4 + code)


@pytest.mark.parametrize(
    ("version", "fine"), [("3.1.0", False), ("3.2.0", True), ("4.0.1+git", True)]
)
def test_a_triton_that_is_too_old_is_named(kernels: Kernels, version: str, fine: bool) -> None:
    constants = importlib.import_module(f"{kernels.__name__}.constants")  # type: ignore[attr-defined]
    if fine:
        constants.check_version(version)
        return
    with pytest.raises(ImportError, match=r"Triton 3\.1\.0 is too old\. Must be 3\.2 or newer"):
        constants.check_version(version)


def test_a_table_that_is_too_long_is_refused(kernels: Kernels) -> None:
    levels = Quantizer("log5", (0.0, *(2.0**-k for k in range(14, -1, -1))), 8, 8, None)
    wire = dataclasses.replace(layout_of((64,), "uniform8").uplink, quantizer=levels)
    with pytest.raises(ValueError, match=r"'log5': it has 31 levels\. Must be at most 16"):
        encode(kernels, wire, there(values_like_gradients(64)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_preconditions_like_the_reference(kernels: Kernels, dtype: torch.dtype) -> None:
    layout = layout_of(SIZES, "lloyd3", "lloyd4", block_size=64, dtype=dtype, exact=(1,))
    moments = [torch.rand(n, dtype=dtype) ** 6 for n in SIZES]
    law_source = Preconditioner((moments[0], moments[1], None, moments[3]))
    source = Preconditioner(
        tuple(None if v is None else there(v) for v in law_source.second_moments)
    )
    x, e = inputs(layout, dtype)
    kept, kept_there = e.clone(), there(e)
    payload = encode(reference, layout.uplink, x, kept, preconditioner=law_source)
    ours = encode(kernels, layout.uplink, there(x), kept_there, preconditioner=source)
    law = decode(reference, layout.uplink, payload, dtype, preconditioner=law_source)
    out = decode(kernels, layout.uplink, there(payload), dtype, preconditioner=source)
    torch.testing.assert_close(out.cpu(), law, rtol=1e-6, atol=0)
    out = decode(kernels, layout.uplink, ours, dtype, preconditioner=source)
    assert_near(out.cpu(), law)
    assert (out.cpu() + kept_there.cpu() - x - e)[:130].abs().max() < 1e-6
    law_chunk = reduce_encode(
        reference, layout, 0, payload, e.clone(), dtype, preconditioner=law_source
    )
    chunk = reduce_encode(
        kernels, layout, 0, there(payload), there(e), dtype, preconditioner=source
    )
    assert_near(
        decode(reference, layout.downlink, chunk.cpu()[None], dtype, preconditioner=law_source),
        decode(reference, layout.downlink, law_chunk[None], dtype, preconditioner=law_source),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_updates_like_the_reference(kernels: Kernels, dtype: torch.dtype) -> None:
    layout = layout_of(SIZES, "lloyd4", block_size=64, dtype=dtype, exact=(2,))
    g, e = inputs(layout, dtype)
    g[70], g[140] = float("inf"), float("nan")
    m = torch.randn(layout.numel, dtype=dtype)
    v = torch.rand(layout.numel, dtype=dtype)
    m[:4], v[:4], g[:4] = 0, 0, 0
    terms = torch.tensor([[0.9, 0.1, 0.99, 0.01, 1e-3, 1.5, 0.0]] * 4, dtype=torch.float64)
    law, ours = AdamSource(m.clone(), v.clone(), terms), AdamSource(there(m), there(v), terms)
    kept, kept_there = e.clone(), there(e)
    payload = encode(reference, layout.uplink, g, kept, adam=law)
    made = encode(kernels, layout.uplink, there(g), kept_there, adam=ours)
    torch.testing.assert_close(ours.exp_avg.cpu(), law.exp_avg, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours.exp_avg_sq.cpu(), law.exp_avg_sq, rtol=1e-6, atol=1e-7)
    first = decode(reference, layout.uplink, payload, dtype)
    assert_near(decode(reference, layout.uplink, made.cpu(), dtype), first)
    torch.testing.assert_close(kept_there.cpu().isfinite(), kept.isfinite())


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_runs_in_a_cuda_graph(kernels: Kernels) -> None:
    layout = layout_of((5000, 300), "lloyd4", exact=(1,))
    x = there(values_like_gradients(layout.numel))
    residual = torch.zeros(layout.numel, device=DEVICE)
    out = torch.empty(layout.numel, device=DEVICE)
    shape = (1, layout.uplink.stride_bytes)
    payload = torch.zeros(shape, dtype=torch.uint8, device=DEVICE)

    def step() -> None:
        kernels.encode_(layout.uplink, x, residual, payload, torch.float32)
        kernels.decode(layout.uplink, payload, out, torch.float32)

    step()
    residual.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    residual.zero_()
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(out + residual, x)
