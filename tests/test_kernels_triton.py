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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["sign", "none"])
def test_keeps_the_residuals_of_unused_parameters_like_the_reference(
    kernels: Kernels, name: str, dtype: torch.dtype
) -> None:
    """The first parameter is unused, and so are all but the last elements of the second."""
    layout = layout_of((33, 4400, 70), name, "lloyd3", servers=2, dtype=dtype, exact=(2,))
    x, e = inputs(layout, dtype)
    x[: 33 + 4399], x[7] = 0, -0.0
    kept, kept_there = e.clone(), there(e)
    used, used_there = torch.full((3,), 7).int(), there(torch.full((3,), 7).int())
    payload = encode(reference, layout.uplink, x, kept, used=used)
    ours = encode(kernels, layout.uplink, there(x), kept_there, used=used_there)
    first, second = (decode(reference, layout.uplink, p.cpu(), dtype) for p in (payload, ours))
    assert_near(second, first)
    assert_near(kept_there.cpu(), kept)
    if name != "none":
        assert used[:2].tolist() == used_there[:2].tolist() == [0, 1]
        assert torch.equal(kept_there.cpu()[:33], e[:33])
    for server, chunk in enumerate(layout.downlink.chunks):
        e = torch.randn(chunk.numel, dtype=compute(dtype))
        kept, kept_there = e.clone(), there(e)
        payloads = torch.stack([payload[server]] * 3)
        law = reduce_encode(reference, layout, server, payloads, kept, dtype, used=used)
        ours = reduce_encode(
            kernels, layout, server, there(payloads), kept_there, dtype, used=used_there
        )
        assert_near(kept_there.cpu(), kept)
        for piece in chunk.pieces:
            if piece.raw:
                continue
            assert used[piece.slot] == used_there[piece.slot]
            here = slice(piece.local, piece.local + piece.numel)
            assert torch.equal(kept_there.cpu()[here], e[here]) is not bool(used[piece.slot])
        assert torch.equal(ours.cpu(), law) or name == "sign"


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


MOVED = 2 * 4096  # two tiles


@pytest.fixture(name="count")
def _count(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> Callable[..., float]:
    """Return a function that counts the bytes per element that a call reads and writes."""
    if ON_GPU:
        pytest.skip("counts what the interpreter reads and writes")
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

    def count(call: Callable[..., object], *args: Any, **sources: Any) -> float:
        moved[0] = 0
        call(kernels, *args, **sources)
        return moved[0] / MOVED

    return count


def about(bytes_per_element: float) -> Any:
    """Equal, apart from the lookups of two programs, at most 400 bytes each."""
    return pytest.approx(bytes_per_element, abs=2 * 400 / MOVED)


def read_and_written(layout: BucketLayout, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes per element of a payload, and of a residual that is read and written."""
    raw = layout.uplink.quantizer.is_raw
    code = layout.uplink.chunks[0].used_bytes / MOVED
    return code, 0 if raw else 2 * compute(dtype).itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["lloyd4", "ternary", "none"])
def test_kernels_move_the_bytes_of_their_docstrings(
    count: Callable[..., float], name: str, dtype: torch.dtype
) -> None:
    layout = layout_of((MOVED,), name, dtype=dtype)
    code, residual = read_and_written(layout, dtype)
    size = dtype.itemsize
    x, e = values_like_gradients(MOVED, dtype), torch.zeros(MOVED, dtype=compute(dtype))
    payload = torch.zeros(1, layout.uplink.stride_bytes, dtype=torch.uint8)
    four = payload.expand(4, -1).contiguous()
    assert count(encode, layout.uplink, x, e) == about(size + residual + code)
    assert count(encode, layout.uplink, x, None) == about(size + code)
    assert count(reduce_encode, layout, 0, four, e, dtype) == about(5 * code + residual)
    assert count(decode, layout.uplink, payload, dtype) == about(size + code)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["lloyd4", "none"])
def test_fusions_move_the_bytes_of_their_docstrings(
    count: Callable[..., float], name: str, dtype: torch.dtype
) -> None:
    layout = layout_of((MOVED,), name, dtype=dtype)
    code, residual = read_and_written(layout, dtype)
    size = dtype.itemsize
    x, e = values_like_gradients(MOVED, dtype), torch.zeros(MOVED, dtype=dtype)
    payload = torch.zeros(1, layout.uplink.stride_bytes, dtype=torch.uint8)
    four = payload.expand(4, -1).contiguous()
    terms = torch.tensor([[0.9, 0.1, 0.99, 0.01, 1e-3, 1.5, 0.0]], dtype=torch.float64)
    adam = AdamSource(torch.zeros_like(x), torch.ones_like(x), terms)
    expected = about(size + residual + code + 4 * size)
    assert count(encode, layout.uplink, x, e, adam=adam) == expected
    by = {"preconditioner": Preconditioner((torch.ones_like(x),))}
    moments = 0 if name == "none" else size
    assert count(encode, layout.uplink, x, e, **by) == about(size + residual + code + moments)
    assert count(decode, layout.uplink, payload, dtype, **by) == about(size + code + moments)
    reduced = count(reduce_encode, layout, 0, four, e, dtype, **by)
    assert reduced == about(5 * code + residual + size)  # of raw elements too


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["lloyd4", "none"])
def test_marking_kernels_move_the_bytes_of_their_docstrings(
    count: Callable[..., float], name: str, dtype: torch.dtype
) -> None:
    """Calls without flags are subtracted."""
    layout = layout_of((MOVED,), name, "lloyd4", dtype=dtype)
    size = dtype.itemsize
    e, used = torch.ones(MOVED, dtype=compute(dtype)), torch.zeros(1, dtype=torch.int32)
    x, zeros = torch.ones(MOVED, dtype=dtype), torch.zeros(MOVED, dtype=dtype)

    def added(call: Any, *args: Any) -> Any:
        return count(call, *args, used=used) - count(call, *args)

    kept = 0 if name == "none" else 2 * compute(dtype).itemsize  # an unused residual is not touched
    found = 256 * size / MOVED
    marked = 0 if name == "none" else size  # raw elements have no residual
    assert added(encode, layout.uplink, zeros, e) == about(marked - kept)
    assert added(encode, layout.uplink, x, e) == about(found if name != "none" else 0)
    row = size if name == "none" else 2 / 256
    found = 256 * size / MOVED if name == "none" else 16 * 2 / MOVED  # a tile has 16 scales
    four = torch.zeros(4, layout.uplink.stride_bytes, dtype=torch.uint8)
    assert added(reduce_encode, layout, 0, four, e, dtype) == about(4 * row - 2 * 4)
    four[3] = 1
    late = 3 * row / 2  # of the first program; the second one reads nothing
    assert added(reduce_encode, layout, 0, four, e, dtype) == about(late + found)
    four[0] = 1
    assert added(reduce_encode, layout, 0, four, e, dtype) == about(found)


@pytest.mark.parametrize(
    ("version", "fine"), [("2.3.1", False), ("3.0.0", True), ("4.0.1+git", True)]
)
def test_a_triton_that_is_too_old_is_named(kernels: Kernels, version: str, fine: bool) -> None:
    constants = importlib.import_module(f"{kernels.__name__}.constants")  # type: ignore[attr-defined]
    if fine:
        constants.check_version(version)
        return
    with pytest.raises(ImportError, match=r"Triton 2\.3\.1 is too old\. Must be 3\.0 or newer"):
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
