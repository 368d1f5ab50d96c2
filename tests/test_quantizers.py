"""Properties that hold for every quantizer and any input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effadam_hook.kernels import Kernels
from effadam_hook.wire.quantizers import QUANTIZERS, SCALE_RULES, get_quantizer
from kernel_cases import IMPLEMENTATIONS, decode, encode, layout_of

KERNELS = IMPLEMENTATIONS[0].values[0], IMPLEMENTATIONS[-1].values[0]

names = st.sampled_from(list(QUANTIZERS))
rules = st.sampled_from(SCALE_RULES)
sizes = st.lists(st.integers(0, 70), min_size=1, max_size=4)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def inputs(draw: st.DrawFn) -> tuple[list[int], torch.Tensor]:
    chosen = draw(sizes)
    numbers = draw(st.lists(finite, min_size=sum(chosen), max_size=sum(chosen)))
    return chosen, torch.tensor(numbers, dtype=torch.float32)


@settings(max_examples=150)
@given(inputs(), names, rules)
def test_nothing_finite_grows(
    given_input: tuple[list[int], torch.Tensor], name: str, rule: str
) -> None:
    chosen, x = given_input
    if not get_quantizer(name).is_contraction(rule):
        return
    layout = layout_of(chosen, name, rule=rule, block_size=32)
    for kernels in KERNELS:
        residual = torch.zeros_like(x)
        payload = encode(kernels, layout.uplink, x, residual)
        out = decode(kernels, layout.uplink, payload, torch.float32)
        assert out.isfinite().all()
        start = 0
        for numel in chosen:
            for first in range(start, start + numel, 32):
                here = slice(first, min(first + 32, start + numel))
                before, after = x[here].double(), residual[here].double()
                error = before - out[here].double()
                assert error.norm() <= before.norm() * (1 + 2.0**-18)
                if name != "none":
                    tolerance = 2.0**-22 * float(before.abs().max())
                    assert (after - error).abs().max() <= tolerance
            start += numel


@settings(max_examples=100)
@given(st.data(), names.filter(lambda name: name != "none"), st.integers(1, 90))
def test_any_payload_decodes_and_encodes_again_to_itself(
    data: st.DataObject, name: str, numel: int
) -> None:
    quantizer = get_quantizer(name)
    layout = layout_of((numel,), name, rule="absmax", block_size=128)
    count = len(quantizer.levels)
    codes = data.draw(st.lists(st.integers(0, count - 1), min_size=numel, max_size=numel))
    # The first code is the top level, so that an absmax scale is found again; spread quantizers
    # place their levels by it too under this rule.
    codes[0] = count - 1
    scale = 2.0 ** data.draw(st.integers(-60, 60))
    x = torch.tensor([quantizer.levels[code] * scale for code in codes])
    for kernels in KERNELS:
        payload = encode(kernels, layout.uplink, x)
        out = decode(kernels, layout.uplink, payload, torch.float32)
        assert torch.equal(out, x)
        assert torch.equal(encode(kernels, layout.uplink, out), payload)


@settings(max_examples=60)
@given(st.data(), names, st.integers(0, 600))
def test_any_bytes_decode_alike_everywhere(data: st.DataObject, name: str, numel: int) -> None:
    quantizer = get_quantizer(name)
    if name.startswith(("uniform", "log", "none")):
        # These have fewer levels than codes: bytes that nobody sends.
        return
    layout = layout_of((numel,), name, block_size=64)
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    wire = layout.uplink
    payload = torch.randint(256, (1, wire.stride_bytes), dtype=torch.uint8, generator=generator)
    first, second = (decode(kernels, wire, payload, torch.float32) for kernels in KERNELS)
    assert torch.equal(first.isnan(), second.isnan())
    assert torch.equal(first.nan_to_num(), second.nan_to_num())
    assert quantizer.code_bytes(64) == wire.quantizer.code_bytes(64)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-38, 3.4e38, -1.0])
def test_one_element(kernels: Kernels, name: str, value: float) -> None:
    layout = layout_of((1,), name)
    x, residual = torch.tensor([value]), torch.zeros(1)
    payload = encode(kernels, layout.uplink, x, residual)
    out = decode(kernels, layout.uplink, payload, torch.float32)
    assert out.isfinite().all()
    assert (out - x).abs() <= x.abs()
    if abs(value) == 1:
        torch.testing.assert_close(out, x, rtol=2.0**-8, atol=0)


@pytest.mark.parametrize(("name", "bits"), [("lloyd4", 4), ("lloyd3", 3), ("lloyd2", 2)])
def test_lloyd_levels_are_a_fixed_point(name: str, bits: int) -> None:
    """Each level is the mean of the unit normal between its thresholds."""
    quantizer = get_quantizer(name)
    assert len(quantizer.levels) == 2**bits
    edges = (0.0, *quantizer.thresholds, math.inf)
    for level, low, high in zip(quantizer.magnitudes, edges, edges[1:], strict=False):
        density = math.exp(-low * low / 2) - math.exp(-high * high / 2)
        mass = math.sqrt(math.pi / 2) * (
            math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))
        )
        # Levels are rounded to 2**-13, and their thresholds with them.
        assert abs(density / mass - level) < 2.0**-12


def test_the_ternary_spread_is_a_fixed_point() -> None:
    """The levels 0 and ±a with thresholds a / 2: a is the mean beyond a / 2."""
    a = get_quantizer("ternary").spread
    assert a is not None
    tail = 1 - math.erf(a / 2 / math.sqrt(2))
    mean = math.sqrt(2 / math.pi) * math.exp(-a * a / 8) / tail
    assert abs(mean - a) < 1e-3


@pytest.mark.parametrize("name", QUANTIZERS)
def test_products_with_a_scale_are_exact(name: str) -> None:
    for magnitude in get_quantizer(name).magnitudes:
        assert magnitude * 8192 == int(magnitude * 8192) < 2**20
        # 16 bits of level and 8 bits of scale make at most the 24 bits of a float.
        assert int(magnitude * 8192) >> 4 < 2**16


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if name != "none"])
def test_the_largest_scale_is_the_last_with_a_finite_top(name: str) -> None:
    quantizer = get_quantizer(name)
    scale = torch.tensor(quantizer.largest_scale).to(torch.bfloat16)
    assert float(scale) == quantizer.largest_scale
    top = torch.tensor(quantizer.magnitudes[-1])
    above = torch.nextafter(scale, torch.tensor(float("inf"), dtype=torch.bfloat16))
    largest = torch.finfo(torch.bfloat16).max
    assert scale.float() * top <= largest
    assert above.double() * top > largest


@pytest.mark.parametrize("name", ["lloyd5", "", None, "Lloyd4"])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"Invalid quantizer: .* Must be one of uniform8"):
        get_quantizer(name)
