"""Check the GPU's kernels against the reference on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from effadam_hook.kernels import Kernels, choose, reference
from effadam_hook.kernels.fusions import AdamSource, Preconditioner
from effadam_hook.wire.layout import BucketLayout, Slot, lay_out_bucket
from effadam_hook.wire.quantizers import QUANTIZERS, SCALE_RULES, get_quantizer
from gpu_check.device import Device, device_of
from gpu_check.outcome import SKIPPED, Checks, Context, require

__all__ = ["run"]

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Single elements, blocks around their size, an unaligned start of whole tiles, an exact parameter.
SMALL = (1, 2, 5, 15, 16, 17, 0, 255, 256, 257, 1000, 40, 3)
SIZES = (*SMALL, 8192, 4096 + 3, 30_000)
EXACT = (10,)
FUSIONS = ("plain", "preconditioner", "adam", "no residual")
BLOCK_SIZES = (16, 32, 64, 128, 512, 1024, 2048, 4096)
# A code at a tie, or a scale at one, differs between orders of summation.
LARGEST_SHARE, SMALL_NUMEL, SMALL_DIFFERENT = 0.01, 300, 4


def run(context: Context) -> Checks:
    """Compare every kernel with the reference, for all quantizers, rules, dtypes and fusions."""
    checks = Checks()
    device = device_of(context.device)
    kernels = choose(device.device).kernels
    if kernels.name != "triton":
        checks.add("the kernels", SKIPPED, f"they are {kernels.name!r}, see section machine")
        return checks
    torch.set_num_threads(1)  # other parts use the other cores, and compile on them

    def checked(name: str, check: Callable[[], object]) -> bool:
        """Return whether the part goes on."""
        if context.left_s < 0:
            reason = f"the time is over: {len(checks.outcomes)} of {len(mine)} checks of this part"
            checks.add(f"from {name} on", SKIPPED, reason)
            return False
        if checks.run(name, check):
            return True
        try:
            device.synchronize()
        except RuntimeError as error:  # all that follows in this process fails
            reason = f"the device is unusable after {name!r} has failed: {error}"
            checks.add(f"after {name}", SKIPPED, reason.partition("\n")[0])
            return False
        return True

    mine = list(itertools.islice(cases(device, kernels), context.part, None, context.parts))
    for name, check in mine:
        if not checked(name, check):
            break
    return checks


def cases(device: Device, kernels: Kernels) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield all checks by name, the most important ones first."""
    yield "blocks without values, with infinities and NaN", lambda: awkward(kernels, device)
    yield "a block in full and in partial tiles", lambda: one_result(kernels, device)
    for size in BLOCK_SIZES if device.is_gpu else BLOCK_SIZES[:1]:
        case = Case("lloyd4", "least_squares", torch.float32, "plain", device, size)
        yield f"blocks of {size}", lambda case=case: case.check(kernels)
    # On the CPU the interpreter runs them, which is slow.
    for name, rule, dtype, fusion in itertools.islice(variants(), None if device.is_gpu else 3):
        what = f"{name}, {rule}, {str(dtype).removeprefix('torch.')}, {fusion}"
        case = Case(name, rule, dtype, fusion, device)
        yield what, lambda case=case: case.check(kernels)


def variants() -> Iterator[tuple[str, str, torch.dtype, str]]:
    """Yield quantizer, rule, dtype and fusion, the most used ones first."""
    usual = [("lloyd4", "least_squares", torch.float32, fusion) for fusion in FUSIONS]
    yield from usual
    for variant in itertools.product(QUANTIZERS, SCALE_RULES, DTYPES, FUSIONS):
        if variant not in usual:
            yield variant


def layout_of(
    sizes: tuple[int, ...], name: str, rule: str, block_size: int, itemsize: int
) -> BucketLayout:
    starts = [0, *itertools.accumulate(sizes)]
    slots = [
        Slot(f"p{i}", start, numel, i in EXACT and len(sizes) > 8)
        for i, (start, numel) in enumerate(zip(starts, sizes, strict=False))
    ]
    quantizer = get_quantizer(name)
    return lay_out_bucket(
        slots,
        uplink=quantizer,
        downlink=quantizer,
        scale_rule=rule,
        block_size=block_size,
        servers=1,
        itemsize=itemsize,
    )


def values(numel: int, dtype: torch.dtype) -> Tensor:
    """Draw values with heavy tails and several orders of magnitude."""
    return (torch.randn(numel) * torch.rand(numel) ** 4).to(dtype)


class Case:
    """A variant of the kernels, with inputs that are the same for both implementations."""

    def __init__(
        self,
        name: str,
        rule: str,
        dtype: torch.dtype,
        fusion: str,
        device: Device,
        block_size: int = 256,
    ) -> None:
        self.sizes = SIZES if device.is_gpu else SMALL
        self.layout = layout_of(self.sizes, name, rule, block_size, dtype.itemsize)
        self.dtype, self.device, self.fusion = dtype, device, fusion
        self.compute = torch.float64 if dtype == torch.float64 else torch.float32

    def _draw(self) -> None:
        torch.manual_seed(0)
        numel = self.layout.numel
        self.x = [values(numel, self.dtype) for _ in range(3)]
        self.e = torch.randn(numel, dtype=self.compute) * 0.1
        self.v = [torch.rand(n, dtype=self.compute) ** 6 for n in self.sizes]
        self.moments = [torch.rand(numel, dtype=self.compute) for _ in range(2)]
        row = [0.9, 0.1, 0.99, 0.01, 1e-3, 1.5, 1e-8]
        self.terms = torch.tensor([row] * len(self.sizes), dtype=torch.float64)

    def check(self, kernels: Kernels) -> str:
        """Compare decoded values, residuals and moments; return the share of other elements."""
        self._draw()
        law = self._exchange(reference, torch.device("cpu"))
        ours = self._exchange(kernels, self.device.device)
        worst = 0.0
        for name, other in law.items():
            worst = max(worst, self._compare(name, ours[name].cpu(), other))
        if self.fusion == "plain" and self.dtype == self.compute:
            self._conserves(ours["own payload"].cpu(), ours["residual"].cpu())
        return f"{worst:.3%} of the elements of a tensor differ, at most"

    def _compare(self, name: str, found: Tensor, law: Tensor) -> float:
        """Require equal values but for ties; return the share of others."""
        require(
            bool((found.isfinite() == law.isfinite()).all()), f"{name}: infinities or NaN differ"
        )
        far = (found.double() - law.double()).abs() > 2.0**-6 * law.double().abs() + 1e-7
        far &= law.isfinite()
        share = float(far.double().mean())
        # Triton's interpreter truncates where a GPU rounds.
        exact = name == "payload of the reference" and self.fusion != "preconditioner"
        if exact and (self.device.is_gpu or self.dtype != torch.bfloat16):
            differ = int((found[law.isfinite()] != law[law.isfinite()]).sum())
            require(differ == 0, f"{name}: {differ} elements are decoded to other values")
        require(
            share <= LARGEST_SHARE,
            f"{name}: {share:.1%} of the elements differ. At most {LARGEST_SHARE:.0%} may.",
        )
        # A tile that is wrong has few elements, but all of them differ.
        small = sum(
            int(part.sum()) for part in far.split(self.sizes) if part.numel() <= SMALL_NUMEL
        )
        require(
            small <= SMALL_DIFFERENT,
            f"{name}: {small} elements differ in parameters of up to {SMALL_NUMEL}. At most "
            f"{SMALL_DIFFERENT} may.",
        )
        return share

    def _conserves(self, decoded: Tensor, residual: Tensor) -> None:
        """Require that what is decoded and what is kept add up to what was given."""
        coded = torch.cat(
            [
                torch.full((n,), not (i in EXACT and len(self.sizes) > 8))
                for i, n in enumerate(self.sizes)
            ]
        )
        given = (self.x[0].double() + self.e.double())[coded]
        lost = float((decoded.double() + residual.double())[coded].sub(given).abs().max())
        # The residual is rounded once.
        allowed = 4 * torch.finfo(self.compute).eps * float(given.abs().max())
        require(lost <= allowed, f"{lost:.1e} of an element is lost. Must be within {allowed:.1e}.")

    def _exchange(self, kernels: Kernels, device: torch.device) -> dict[str, Tensor]:
        up, down = self.layout.uplink, self.layout.downlink
        e = None if self.fusion == "no residual" else self.e.to(device, copy=True)
        first_e = None
        server_e = None if e is None else (self.e * 0.5).to(device)
        source = adam = None
        if self.fusion == "preconditioner":
            source = Preconditioner(tuple(v.to(device) for v in self.v))
        if self.fusion == "adam":
            m, v = (one.to(device, copy=True) for one in self.moments)
            adam = AdamSource(m, v, self.terms)
        shape = (1, up.stride_bytes)
        payloads = []
        for x in self.x:
            payload = torch.zeros(shape, dtype=torch.uint8, device=device)
            kernels.encode_(
                up, x.to(device), e, payload, self.dtype, preconditioner=source, adam=adam
            )
            payloads.append(payload)
            first_e = e.clone() if first_e is None and e is not None else first_e
        reduced = torch.zeros((1, down.stride_bytes), dtype=torch.uint8, device=device)
        kernels.reduce_encode_(
            up,
            down,
            0,
            torch.cat(payloads),
            server_e,
            self.dtype,
            reduced[0],
            preconditioner=source,
        )
        made: dict[str, Tensor] = {}
        for name, payload in (("own payload", payloads[0]), ("mean", reduced)):
            made[name] = self._decode(kernels, payload, source, device)
        law = torch.zeros(shape, dtype=torch.uint8)
        reference.encode_(up, self.x[0], None, law, self.dtype)
        name = "payload of the reference"
        made[name] = self._decode(kernels, law.to(device), source, device)
        if e is not None and first_e is not None and server_e is not None:
            made |= {"residual": first_e, "last residual": e, "server's residual": server_e}
        if adam is not None:
            made |= {"first moment": adam.exp_avg, "second moment": adam.exp_avg_sq}
        return made

    def _decode(
        self,
        kernels: Kernels,
        payload: Tensor,
        source: Preconditioner | None,
        device: torch.device,
    ) -> Tensor:
        out = torch.full((self.layout.numel,), float("nan"), dtype=self.dtype, device=device)
        kernels.decode(self.layout.downlink, payload, out, self.dtype, preconditioner=source)
        return out


def awkward(kernels: Kernels, on: Device) -> None:
    """Encode blocks of zeros, of tiny and of huge values, and blocks that are not finite."""
    device = on.device
    torch.manual_seed(0)
    for name in ("lloyd4", "uniform8", "ternary", "sign"):
        layout = layout_of((256,) * 6, name, "least_squares", 256, 4)
        x = values(1536, torch.float32)
        x[:256] = 0
        x[256:512] *= 1e-42
        x[512:768] = x[512:768].sign() * 3e38
        x[800], x[1200] = float("nan"), float("-inf")
        e = torch.zeros(1536, device=device)
        payload = torch.zeros((1, layout.uplink.stride_bytes), dtype=torch.uint8, device=device)
        kernels.encode_(layout.uplink, x.to(device), e, payload, torch.float32)
        out = torch.empty(1536, device=device)
        kernels.decode(layout.uplink, payload, out, torch.float32)
        require(bool(e.isfinite().all()), f"{name}: a residual is not finite")
        require(bool(out[:768].isfinite().all()), f"{name}: a finite block is decoded as infinity")
        require(
            bool(out[768:1280].isnan().all()), f"{name}: a block with NaN or infinity is finite"
        )
        require(bool((out[:512] == 0).all()), f"{name}: an empty block is not decoded as zeros")


def one_result(kernels: Kernels, on: Device) -> None:
    """Encode the same blocks in an aligned tile, in an unaligned one and in short ones."""
    torch.manual_seed(0)
    device = on.device
    names, dtypes = tuple(QUANTIZERS), (torch.float32, torch.bfloat16)
    for name, dtype in itertools.product(
        *(names, dtypes) if on.is_gpu else (names[:1], dtypes[:1])
    ):
        one = values(8192, dtype)
        parts = [one, one[:3], one, one[:512], one[512:]]
        sizes = tuple(len(part) for part in parts)
        layout = layout_of(sizes, name, "least_squares", 256, dtype.itemsize)
        x = torch.cat(parts).to(device)
        e = x.to(torch.float32) * 0.3
        payload = torch.zeros((1, layout.uplink.stride_bytes), dtype=torch.uint8, device=device)
        kernels.encode_(layout.uplink, x, e, payload, dtype)
        out = torch.empty_like(x)
        kernels.decode(layout.uplink, payload, out, dtype)
        for what, tensor in (("decoded values", out), ("residuals", e)):
            aligned, _, unaligned, short, rest = tensor.split(sizes)
            same = torch.equal(aligned, unaligned) and torch.equal(
                aligned, torch.cat([short, rest])
            )
            require(same, f"{name}, {dtype}: {what} depend on the tile of a block")
