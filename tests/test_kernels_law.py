"""Requirements on every implementation of the kernels."""

from __future__ import annotations

import pytest
import torch

from effadam_hook.kernels import Kernels
from effadam_hook.kernels.fusions import Preconditioner
from effadam_hook.wire.quantizers import QUANTIZERS, get_quantizer
from kernel_cases import (
    COMBINATIONS,
    IMPLEMENTATIONS,
    SIZES,
    compute,
    decode,
    encode,
    layout_of,
    reduce_encode,
    round_trip,
    values_like_gradients,
)

each = pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
QUANTIZED = [name for name in QUANTIZERS if name != "none"]


def block_norms(x: torch.Tensor, sizes: tuple[int, ...], block_size: int) -> torch.Tensor:
    """Return the 2-norm of every block, in float64."""
    parts = x.double().split(list(sizes))
    blocks = [block for part in parts if len(part) for block in part.split(block_size)]
    return torch.stack([block.norm() for block in blocks])


@each
@pytest.mark.parametrize(("name", "rule"), COMBINATIONS)
def test_no_block_grows(kernels: Kernels, name: str, rule: str) -> None:
    if not get_quantizer(name).is_contraction(rule):
        pytest.skip("not a contraction by design")
    layout = layout_of(SIZES, name, rule=rule)
    x = values_like_gradients(layout.numel)
    error = x - decode(kernels, layout.uplink, encode(kernels, layout.uplink, x), torch.float32)
    before = block_norms(x, SIZES, 256)
    # A bfloat16 scale is off by 2**-9 at most, which adds 2**-18 of the square.
    assert (block_norms(error, SIZES, 256) <= before * (1 + 2.0**-18)).all()


@each
@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_sent_stays_in_the_residual(
    kernels: Kernels, name: str, dtype: torch.dtype
) -> None:
    layout = layout_of(SIZES, name, dtype=dtype, servers=3)
    workers = [values_like_gradients(layout.numel, dtype) for _ in range(4)]
    residuals = [torch.randn(layout.numel, dtype=compute(dtype)) * 0.1 for _ in workers]
    chunks = layout.downlink.chunks
    servers = [torch.randn(chunk.numel, dtype=compute(dtype)) * 0.1 for chunk in chunks]
    scattered = torch.zeros(layout.numel, dtype=torch.float64)

    def total() -> torch.Tensor:
        kept = sum(e.double() for e in residuals) / 4 + scattered
        for chunk, residual in zip(chunks, servers, strict=True):
            for piece in chunk.pieces:
                here = residual[piece.local : piece.local + piece.numel]
                kept[piece.start : piece.start + piece.numel] += here.double()
        return kept

    before = total() + sum(x.double() for x in workers) / 4
    out = round_trip(kernels, layout, workers, residuals, servers, dtype)["out"]
    error = (total() + out.double() - before).abs().max()
    assert error < (1e-6 if dtype == torch.float32 else 1e-14)


LAYOUT_SIZES = (300, 1, 77, 1024, 5)


def different_in_every_block(x: torch.Tensor) -> torch.Tensor:
    """Scale the blocks of 64 of a bucket of LAYOUT_SIZES by different powers of two."""
    blocks = [block for part in x.split(LAYOUT_SIZES) for block in part.split(64)]
    return torch.cat([block * 2.0 ** (7 * i % 41 - 20) for i, block in enumerate(blocks)])


@each
@pytest.mark.parametrize("servers", [1, 2, 3, 4])
@pytest.mark.parametrize("name", QUANTIZED)
def test_every_sign_and_scale_arrives_at_its_element(
    kernels: Kernels, name: str, servers: int
) -> None:
    layout = layout_of(LAYOUT_SIZES, name, block_size=64, servers=servers)
    x = different_in_every_block(torch.randint(2, (layout.numel,)) * 2.0 - 1)
    out = decode(kernels, layout.uplink, encode(kernels, layout.uplink, x), torch.float32)
    torch.testing.assert_close(out, x, rtol=2.0**-8, atol=0)


@each
@pytest.mark.parametrize(
    ("name", "rule"),
    [(n, r) for n, r in COMBINATIONS if n in QUANTIZED and get_quantizer(n).spread is None],
)
def test_every_level_arrives_at_its_element(kernels: Kernels, name: str, rule: str) -> None:
    layout = layout_of(LAYOUT_SIZES, name, rule=rule, block_size=64, servers=3)
    levels = torch.tensor(get_quantizer(name).levels)
    x = levels[torch.randint(len(levels), (layout.numel,))]
    for part in x.split(LAYOUT_SIZES):
        for block in part.split(64):
            block[0] = levels[-1]
    x = different_in_every_block(x)
    out = decode(kernels, layout.uplink, encode(kernels, layout.uplink, x), torch.float32)
    assert torch.equal(out, x)


@each
@pytest.mark.parametrize("name", [*QUANTIZED, "none"])
def test_infinity_and_nan_arrive_everywhere_and_stay_out_of_residuals(
    kernels: Kernels, name: str
) -> None:
    layout = layout_of((512, 40), name, exact=(1,))
    bad = values_like_gradients(552)
    bad[300], bad[530] = float("inf"), float("nan")
    residual = torch.full((552,), 0.25)
    server_residual = torch.full((552,), 0.5)
    workers = [values_like_gradients(552), bad]
    out = round_trip(
        kernels, layout, workers, [torch.zeros(552), residual], [server_residual], torch.float32
    )["out"]
    assert not out[300].isfinite()
    assert not out[530].isfinite()
    assert residual.isfinite().all()
    assert server_residual.isfinite().all()
    if name != "none":
        assert (residual[256:512] == 0.25).all()
        assert (server_residual[256:512] == 0.5).all()
        assert out[256:512].isnan().all()
    assert out[:256].isfinite().all()


@each
@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("scale", [0.0, 1e-44, 2.0**-101])
def test_an_idle_block_decodes_to_zeros_and_stays_whole(
    kernels: Kernels, name: str, scale: float
) -> None:
    layout = layout_of((300,), name)
    x = torch.rand(300) * scale
    residual = torch.zeros(300)
    payload = encode(kernels, layout.uplink, x, residual)
    assert torch.equal(decode(kernels, layout.uplink, payload, torch.float32), torch.zeros(300))
    assert torch.equal(residual, x)


@each
@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("scale", [1e-30, 1e38])
def test_extreme_magnitudes_decode_to_finite_values(
    kernels: Kernels, name: str, scale: float
) -> None:
    layout = layout_of((700,), name)
    x = torch.randn(700).clamp(-3.4, 3.4) * scale
    residual = torch.zeros(700)
    payload = encode(kernels, layout.uplink, x, residual)
    out = decode(kernels, layout.uplink, payload, torch.float32)
    assert out.isfinite().all()
    assert residual.isfinite().all()
    assert (out * x >= 0).all()


FLOAT32_MAX = torch.finfo(torch.float32).max


@each
@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("largest", [3e37, FLOAT32_MAX])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_gradients_stay_finite_however_long_errors_add_up(
    kernels: Kernels, name: str, largest: float, dtype: torch.dtype
) -> None:
    layout = layout_of((300, 77), name)
    # Half of the elements pull with all they have, so that errors add up; few reach the result.
    x = torch.where(torch.rand(3, 377) < 0.02, 1.0, torch.rand(3, 377) * 1e-3)
    x = x * largest * torch.where(torch.rand(377) < 0.5, 1.0, -1.0)
    workers = list(x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype))
    assert all(worker.isfinite().all() for worker in workers)
    residuals, server = [torch.zeros(377) for _ in workers], torch.zeros(377)
    wire_dtype = torch.float32
    for _ in range(30):
        out = round_trip(kernels, layout, workers, residuals, [server], wire_dtype)["out"]
        assert out.isfinite().all()
        assert all(residual.isfinite().all() for residual in (*residuals, server))


@each
@pytest.mark.parametrize("name", ["lloyd2", "sign", "uniform8", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_preconditioned_gradients_that_overflow_stay_finite(
    kernels: Kernels, name: str, dtype: torch.dtype
) -> None:
    layout = layout_of((300, 300, 300), name, dtype=dtype)
    top = torch.finfo(dtype)
    moments = [torch.full((300,), v, dtype=dtype) for v in (top.tiny * 1e4, 1.0, top.max / 4)]
    moments[2][::7] = top.tiny
    source = Preconditioner(tuple(moments))
    for size in (top.max, top.max**0.5):
        workers = [(torch.rand(900, dtype=dtype) * 2 - 1) * size for _ in range(3)]
        residuals = [worker.clone() for worker in workers]
        server = torch.full((900,), size, dtype=dtype)
        made = round_trip(
            kernels, layout, workers, residuals, [server], dtype, preconditioner=source
        )
        for part in (made["out"], server, *residuals):
            assert part.isfinite().all()


@each
def test_a_sum_that_overflows_becomes_the_largest_bfloat16(kernels: Kernels) -> None:
    layout = layout_of((64,), "uniform4")
    x = torch.full((64,), FLOAT32_MAX)
    x[::2] *= -1
    residual = x.clone()
    payload = encode(kernels, layout.uplink, x, residual)
    out = decode(kernels, layout.uplink, payload, torch.float32)
    largest = torch.finfo(torch.bfloat16).max
    assert torch.equal(out + residual, x.sign() * largest)
    assert (out.abs() > 0.99 * largest).all()


@each
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_is_not_taken_for_an_overflow(kernels: Kernels, bad: float) -> None:
    layout = layout_of((64, 64, 64), "lloyd2", exact=(2,))
    x, residual = torch.full((192,), FLOAT32_MAX), torch.full((192,), FLOAT32_MAX)
    x[3], x[130] = bad, bad
    source = Preconditioner((torch.full((64,), 1e-30), None, None))
    payload = encode(kernels, layout.uplink, x, residual, preconditioner=source)
    out = decode(kernels, layout.uplink, payload, torch.float32, preconditioner=source)
    assert out[:64].isnan().all()
    assert out[64:128].isfinite().all()
    assert not out[130].isfinite()
    assert (residual[:64] == FLOAT32_MAX).all()


@each
def test_raw_elements_travel_as_they_are(kernels: Kernels) -> None:
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        layout = layout_of(SIZES, "none", dtype=dtype, servers=2)
        x = values_like_gradients(layout.numel, dtype)
        payload = encode(kernels, layout.uplink, x)
        assert torch.equal(decode(kernels, layout.uplink, payload, dtype), x)


@each
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5, 8, 9])
def test_the_server_takes_the_mean(kernels: Kernels, workers: int) -> None:
    layout = layout_of((600, 50), "uniform4", "none", exact=(1,))
    sent = [encode(kernels, layout.uplink, torch.randn(650)) for _ in range(workers)]
    mean = sum(decode(kernels, layout.uplink, p, torch.float32).double() for p in sent) / workers
    gathered = torch.cat(sent)
    chunk = reduce_encode(kernels, layout, 0, gathered, None, torch.float32)
    out = decode(kernels, layout.downlink, chunk[None], torch.float32)
    torch.testing.assert_close(out.double(), mean, rtol=1e-6, atol=1e-6)


@each
def test_an_empty_bucket_is_no_trouble(kernels: Kernels) -> None:
    layout = layout_of((0, 0), "lloyd4", servers=2)
    payload = encode(kernels, layout.uplink, torch.empty(0), torch.empty(0))
    assert decode(kernels, layout.uplink, payload, torch.float32).numel() == 0


@each
def test_many_small_parameters(kernels: Kernels) -> None:
    layout = layout_of([1 + i % 9 for i in range(400)], "uniform8", servers=4)
    x = values_like_gradients(layout.numel)
    out = decode(kernels, layout.uplink, encode(kernels, layout.uplink, x), torch.float32)
    torch.testing.assert_close(out, x, rtol=0.05, atol=0.01)


@each
@pytest.mark.parametrize(("up", "down"), [("sign", "lloyd3"), ("none", "sign")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_residuals_of_unused_parameters_are_neither_sent_nor_changed(
    kernels: Kernels, up: str, down: str, dtype: torch.dtype
) -> None:
    """The first parameter is unused, the second but for its last element, the third is exact."""
    layout = layout_of((70, 40, 33), up, down, block_size=16, servers=2, dtype=dtype, exact=(2,))
    x = values_like_gradients(layout.numel, dtype)
    x[:110], x[20], x[109] = 0, -0.0, 1
    e = torch.randn(layout.numel, dtype=compute(dtype))
    kept, used = e.clone(), torch.full((3,), 7, dtype=torch.int32)
    payload = encode(kernels, layout.uplink, x, kept, used=used)
    if up != "none":
        assert used[:2].tolist() == [0, 1]
        assert torch.equal(kept[:70], e[:70])
        assert not torch.equal(kept[70:110], e[70:110])
        assert not decode(kernels, layout.uplink, payload, dtype)[:70].any()
        everything = encode(kernels, layout.uplink, x, e.clone())
        assert decode(kernels, layout.uplink, everything, dtype)[:70].all()
    nothing = encode(kernels, layout.uplink, torch.zeros_like(x), None)
    for server, chunk in enumerate(layout.downlink.chunks):
        e = torch.randn(chunk.numel, dtype=compute(dtype))
        kept, used = e.clone(), torch.full((3,), 7, dtype=torch.int32)
        both = torch.stack([nothing[server], payload[server]])
        sent = reduce_encode(kernels, layout, server, both, kept, dtype, used=used)
        made = torch.zeros(2, layout.downlink.stride_bytes, dtype=torch.uint8)
        made[server] = sent
        out = decode(kernels, layout.downlink, made, dtype)
        for piece in chunk.pieces[:2]:
            here = slice(piece.local, piece.local + piece.numel)
            is_used = bool(x[piece.start : piece.start + piece.numel].any()) or (
                up != "none" and piece.slot == 1
            )
            assert bool(used[piece.slot]) is is_used
            assert torch.equal(kept[here], e[here]) is not is_used
            assert out[piece.start : piece.start + piece.numel].any() == is_used


@each
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(9)}, ValueError, r"Invalid shape of bucket: \(9,\)\. Must be \(10,\)"),
        ({"x": torch.zeros(10, dtype=torch.int32)}, TypeError, "Invalid dtype of bucket"),
        ({"x": torch.zeros(20)[::2]}, ValueError, "Invalid strides of bucket"),
        ({"residual": torch.zeros(10).double()}, TypeError, "Invalid dtype of residual"),
        ({"residual": torch.zeros(11)}, ValueError, "Invalid shape of residual"),
        ({"payload": torch.zeros(1, 3).byte()}, ValueError, "Invalid shape of payload"),
        ({"used": torch.zeros(1)}, TypeError, "Invalid dtype of used"),
        ({"used": torch.zeros(0).int()}, ValueError, r"Invalid shape of used: \(0,\)"),
        ({"dtype": torch.float16}, TypeError, "Must be a floating dtype of 4 bytes"),
    ],
)
def test_wrong_arguments_are_refused(
    kernels: Kernels, change: dict[str, object], error: type[Exception], message: str
) -> None:
    wire = layout_of((10,), "lloyd4").uplink
    arguments = {
        "x": torch.zeros(10),
        "residual": None,
        "payload": torch.zeros(1, wire.stride_bytes, dtype=torch.uint8),
        "dtype": torch.float32,
    }
    with pytest.raises(error, match=message):
        kernels.encode_(wire, **(arguments | change))


@each
def test_a_wrong_server_is_refused(kernels: Kernels) -> None:
    layout = layout_of((10,), "lloyd4")
    payloads = torch.zeros(2, layout.uplink.stride_bytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"Invalid server: 1\. Must be from 0 to 0"):
        reduce_encode(kernels, layout, 1, payloads, None, torch.float32)
    other = layout_of((11,), "lloyd4").uplink
    payload = torch.zeros(layout.downlink.stride_bytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match="Invalid uplink: its pieces differ"):
        kernels.reduce_encode_(other, layout.downlink, 0, payloads, None, torch.float32, payload)
