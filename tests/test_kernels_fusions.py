"""Preconditioned gradients and Adam updates in the kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effadam_hook.kernels import Kernels, reference
from effadam_hook.kernels.fusions import AdamSource, Preconditioner
from effadam_hook.wire.layout import BucketLayout
from kernel_cases import (
    IMPLEMENTATIONS,
    SIZES,
    VARIANTS,
    assert_same,
    compiled,
    compute,
    decode,
    encode,
    layout_of,
    needs_library,
    round_trip,
    values_like_gradients,
)

each = pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
PAIRS = [("lloyd4", "lloyd2"), ("ternary", "uniform8"), ("none", "sign"), ("log4", "none")]


def preconditioner_of(sizes: tuple[int, ...], dtype: torch.dtype) -> Preconditioner:
    moments: list[Tensor | None] = [torch.rand(n, dtype=dtype) ** 8 for n in sizes]
    moments[3] = None
    moments[7] = torch.zeros(sizes[7], dtype=dtype)
    moments[8][2] = float("nan")
    moments[9] = torch.full((sizes[9],), 1e-45, dtype=dtype)
    return Preconditioner(tuple(moments))


def adam_of(layout: BucketLayout, dtype: torch.dtype, eps: float = 1e-8) -> AdamSource:
    row = (0.9, 1 - 0.9, 0.999, 1 - 0.999, 1e-3, 1.7, eps)
    terms = torch.tensor([row] * len(layout.slots), dtype=torch.float64)
    terms[::2, 4] *= 3
    v = torch.rand(layout.numel, dtype=dtype) ** 4
    return AdamSource(torch.randn(layout.numel, dtype=dtype), v, terms)


@needs_library
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("up", "down"), PAIRS)
def test_preconditioning_makes_the_bits_of_the_reference(
    up: str, down: str, dtype: torch.dtype, variant: str
) -> None:
    layout = layout_of(SIZES, up, down, servers=2, dtype=dtype, exact=(4,))
    workers = [values_like_gradients(layout.numel, dtype) for _ in range(3)]
    if down != "none":
        # Which NaN a conversion to bfloat16 makes is torch's business, and varies.
        workers[1][700] = float("inf")
    source = preconditioner_of(SIZES, compute(dtype))

    def made(kernels: Kernels) -> dict[str, Tensor]:
        residuals = [torch.full((layout.numel,), 0.01, dtype=compute(dtype)) for _ in workers]
        chunks = layout.downlink.chunks
        servers = [torch.full((chunk.numel,), -0.02, dtype=compute(dtype)) for chunk in chunks]
        return round_trip(
            kernels, layout, workers, residuals, servers, dtype, preconditioner=source
        )

    assert_same(made(compiled(variant)), made(reference))


@needs_library
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize("quantizer", ["lloyd2", "uniform8", "none"])
def test_updates_make_the_bits_of_the_reference(
    quantizer: str, eps: float, dtype: torch.dtype, variant: str
) -> None:
    layout = layout_of(SIZES, quantizer, servers=2, dtype=dtype, exact=(4,))
    x = values_like_gradients(layout.numel, dtype)
    x[40:45] = 0
    x[600], x[800] = float("nan"), float("inf")

    def made(kernels: Kernels) -> dict[str, Tensor]:
        torch.manual_seed(1)
        adam = adam_of(layout, compute(dtype), eps)
        adam.exp_avg[40:45] = 0
        adam.exp_avg_sq[40:45] = 0
        adam.exp_avg_sq[900] = torch.finfo(compute(dtype)).max
        residual = torch.randn(layout.numel, dtype=compute(dtype)) * 1e-4
        payload = encode(kernels, layout.uplink, x, residual, dtype, adam=adam)
        out = decode(kernels, layout.uplink, payload, dtype)
        return {
            "residual": residual,
            "out": out,
            "exp_avg": adam.exp_avg,
            "exp_avg_sq": adam.exp_avg_sq,
        }

    assert_same(made(compiled(variant)), made(reference))


@each
def test_updates_follow_the_formulas(kernels: Kernels) -> None:
    layout = layout_of((300, 40), "lloyd4", dtype=torch.float64, exact=(1,))
    adam = adam_of(layout, torch.float64)
    g = torch.randn(340, dtype=torch.float64)
    step_size = torch.tensor([3e-3] * 300 + [1e-3] * 40, dtype=torch.float64)
    v = adam.exp_avg_sq * 0.999 + g * g * (1 - 0.999)
    m = adam.exp_avg * 0.9 + g * (1 - 0.9)
    u = step_size * m / (v.sqrt() * 1.7 + 1e-8)
    residual = torch.zeros(340, dtype=torch.float64)
    payload = encode(kernels, layout.uplink, g, residual, adam=adam)
    out = decode(kernels, layout.uplink, payload, torch.float64)
    torch.testing.assert_close(adam.exp_avg, m, rtol=1e-13, atol=0)
    torch.testing.assert_close(adam.exp_avg_sq, v, rtol=1e-13, atol=0)
    torch.testing.assert_close(out + residual, u, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(out[300:], u[300:], rtol=1e-12, atol=0)


@each
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_gradient_that_overflows_leaves_the_moments_of_its_block(
    kernels: Kernels, bad: float
) -> None:
    layout = layout_of((512, 20), "lloyd4", exact=(1,))
    adam = adam_of(layout, torch.float32)
    m, v = adam.exp_avg.clone(), adam.exp_avg_sq.clone()
    g = torch.randn(532)
    g[300], g[520] = bad, bad
    residual = torch.full((532,), 0.5)
    payload = encode(kernels, layout.uplink, g, residual, adam=adam)
    out = decode(kernels, layout.uplink, payload, torch.float32)
    untouched = torch.zeros(532, dtype=torch.bool)
    untouched[256:512] = True
    untouched[520] = True
    assert torch.equal(out.isnan(), untouched)
    assert (residual[256:512] == 0.5).all()
    for now, before in ((adam.exp_avg, m), (adam.exp_avg_sq, v)):
        assert torch.equal(now == before, untouched)


@each
def test_nothing_divided_by_nothing_is_no_update(kernels: Kernels) -> None:
    layout = layout_of((64,), "uniform8")
    adam = adam_of(layout, torch.float32, eps=0.0)
    g = torch.randn(64)
    for tensor in (g, adam.exp_avg, adam.exp_avg_sq):
        tensor[:10] = 0
    residual = torch.zeros(64)
    out = decode(
        kernels,
        layout.uplink,
        encode(kernels, layout.uplink, g, residual, adam=adam),
        torch.float32,
    )
    assert (out[:10] == 0).all()
    assert (out[10:].abs() + residual[10:].abs() > 0).all()


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_preconditioning_loses_nothing(kernels: Kernels, dtype: torch.dtype) -> None:
    sizes = (600, 50)
    layout = layout_of(sizes, "lloyd3", dtype=dtype)
    v = torch.rand(600, dtype=dtype) ** 6
    source = Preconditioner((v, None))
    workers = [torch.randn(650, dtype=dtype) for _ in range(3)]
    residuals = [torch.zeros(650, dtype=dtype) for _ in workers]
    server = torch.zeros(650, dtype=dtype)
    out = round_trip(kernels, layout, workers, residuals, [server], dtype, preconditioner=source)
    sent = out["out"].double() + server.double() + sum(e.double() for e in residuals) / 3
    mean = sum(x.double() for x in workers) / 3
    assert (sent - mean).abs().max() < (2e-6 if dtype == torch.float32 else 1e-14)


@each
def test_preconditioning_lowers_the_error_relative_to_the_second_moment(kernels: Kernels) -> None:
    """Compare the error relative to sqrt(v) with that without preconditioning, where v varies."""
    layout = layout_of((4096,), "lloyd2")
    v = torch.rand(4096) ** 8 + 1e-6
    x = torch.randn(4096) * v.sqrt()

    def error(**sources: object) -> float:
        payload = encode(kernels, layout.uplink, x, **sources)
        out = decode(kernels, layout.uplink, payload, torch.float32, **sources)
        return float(((out - x) / v.sqrt()).pow(2).mean())

    assert error(preconditioner=Preconditioner((v,))) < 0.5 * error()


@each
def test_wrong_fusions_are_refused(kernels: Kernels) -> None:
    layout = layout_of((10, 6), "lloyd4")
    x, residual = torch.zeros(16), torch.zeros(16)
    with pytest.raises(ValueError, match=r"Invalid length of second_moments: 1\. Must be 2"):
        encode(kernels, layout.uplink, x, preconditioner=Preconditioner((None,)))
    short = Preconditioner((torch.zeros(9), None))
    with pytest.raises(ValueError, match=r"Invalid shape of second_moments\[0\]: \(9,\)"):
        encode(kernels, layout.uplink, x, preconditioner=short)
    adam = adam_of(layout, torch.float64)
    with pytest.raises(TypeError, match="Invalid dtype of exp_avg"):
        encode(kernels, layout.uplink, x, residual, adam=adam)
    adam = adam_of(layout, torch.float32)
    few = AdamSource(adam.exp_avg, adam.exp_avg_sq, adam.terms[:1])
    with pytest.raises(ValueError, match="Invalid shape of terms"):
        encode(kernels, layout.uplink, x, residual, adam=few)
    with pytest.raises(ValueError, match="an AdamSource sends updates"):
        encode(kernels, layout.uplink, x, adam=adam, preconditioner=Preconditioner((None, None)))
