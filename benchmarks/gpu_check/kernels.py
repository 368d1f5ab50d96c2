"""Check the GPU's kernels against the reference on the CPU."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from effadam_hook.kernels import Kernels, choose, reference
from effadam_hook.kernels.fusions import AdamSource, Preconditioner
from effadam_hook.wire.layout import BucketLayout, Slot, lay_out_bucket
from effadam_hook.wire.quantizers import QUANTIZERS, SCALE_RULES, get_quantizer
from gpu_check.outcome import Checks, Context, SkipError, require

__all__ = ["run"]

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Single elements, blocks around their size, an unaligned start of whole tiles, an exact parameter.
SMALL = (1, 2, 5, 15, 16, 17, 0, 255, 256, 257, 1000, 40, 3)
SIZES = (*SMALL, 8192, 4096 + 3, 30_000)
EXACT = (10,)
FUSIONS = ("plain", "preconditioner", "adam", "no residual")


def run(context: Context) -> Checks:
    """Compare every kernel with the reference, for all quantizers, rules, dtypes and fusions."""
    checks = Checks()
    device = torch.device(context.device)
    kernels = choose(device).kernels
    require(kernels.name == "triton", f"The kernels are {kernels.name!r}. Must be 'triton'.")
    end_s = time.monotonic() + context.seconds
    # On the CPU the interpreter runs them, which is slow.
    chosen = list(variants() if device.type == "cuda" else itertools.islice(variants(), 0, 120, 20))
    for name, rule, dtype, fusion in chosen:
        what = f"{name}, {rule}, {str(dtype).removeprefix('torch.')}, {fusion}"
        if time.monotonic() > end_s:
            checks.run(f"from {what} on", _no_time)
            break
        case = _Case(name, rule, dtype, fusion, device)
        checks.run(what, lambda case=case: case.check(kernels))
    for size in (16, 32, 64, 128, 512, 1024, 2048, 4096) if device.type == "cuda" else (16, 4096):
        case = _Case("lloyd4", "least_squares", torch.float32, "plain", device, size)
        checks.run(f"blocks of {size}", lambda case=case: case.check(kernels))
    checks.run("blocks without values, with infinities and NaN", lambda: awkward(kernels, device))
    checks.run("a block in full and in partial tiles", lambda: one_result(kernels, device))
    return checks


def _no_time() -> None:
    raise SkipError("the time of the section is over")


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


class _Case:
    """Inputs of one variant, the same for both implementations."""

    def __init__(
        self,
        name: str,
        rule: str,
        dtype: torch.dtype,
        fusion: str,
        device: torch.device,
        block_size: int = 256,
    ) -> None:
        torch.manual_seed(0)
        sizes = SIZES if device.type == "cuda" else SMALL
        self.layout = layout_of(sizes, name, rule, block_size, dtype.itemsize)
        self.dtype, self.device, self.fusion = dtype, device, fusion
        numel = self.layout.numel
        self.compute = torch.float64 if dtype == torch.float64 else torch.float32
        self.x = [values(numel, dtype) for _ in range(3)]
        self.e = torch.randn(numel, dtype=self.compute) * 0.1
        self.v = [torch.rand(n, dtype=self.compute) ** 6 for n in sizes]
        self.moments = [torch.rand(numel, dtype=self.compute) for _ in range(2)]
        row = [0.9, 0.1, 0.99, 0.01, 1e-3, 1.5, 1e-8]
        self.terms = torch.tensor([row] * len(sizes), dtype=torch.float64)

    def check(self, kernels: Kernels) -> str:
        """Compare payloads, decoded values and residuals; return the share of other codes."""
        law = self._exchange(reference, torch.device("cpu"))
        ours = self._exchange(kernels, self.device)
        worst = 0.0
        for name, other in law.items():
            all_found = ours[name].cpu()
            finite = all_found.isfinite()
            same = bool((finite == other.isfinite()).all())
            require(same, f"{name}: infinities or NaN differ")
            found, expected = all_found[finite].double(), other[finite].double()
            far = (found - expected).abs() > 2.0**-6 * expected.abs() + 1e-7
            share = float(far.double().mean()) if far.numel() else 0.0
            exact = name == "decoded payload of the reference" and self.fusion != "preconditioner"
            # Triton's interpreter truncates where a GPU rounds.
            exact &= self.device.type == "cuda" or self.dtype != torch.bfloat16
            if exact:
                require(
                    bool((found == expected).all()), f"{name}: {int(far.sum())} elements differ"
                )
            # A residual differs where a code at a threshold does, by a whole step of its block.
            require(share <= (0.1 if "residual" in name else 0.03), f"{name}: {share:.1%} differ")
            worst = max(worst, share)
        return f"{worst:.2%} of codes differ at ties"

    def _exchange(self, kernels: Kernels, device: torch.device) -> dict[str, Tensor]:
        up, down = self.layout.uplink, self.layout.downlink
        e = None if self.fusion == "no residual" else self.e.to(device, copy=True)
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
        for name, payload in (("decoded", payloads[0]), ("decoded mean", reduced)):
            made[name] = self._decode(kernels, payload, source, device)
        law = torch.zeros(shape, dtype=torch.uint8)
        reference.encode_(up, self.x[0], None, law, self.dtype)
        name = "decoded payload of the reference"
        made[name] = self._decode(kernels, law.to(device), source, device)
        if e is not None and server_e is not None:
            made |= {"residual": e, "server's residual": server_e}
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


def awkward(kernels: Kernels, device: torch.device) -> None:
    """Encode blocks of zeros, of tiny and of huge values, and blocks that are not finite."""
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


def one_result(kernels: Kernels, device: torch.device) -> None:
    """Encode the same blocks in an aligned tile, in an unaligned one and in short ones."""
    torch.manual_seed(0)
    names = QUANTIZERS if device.type == "cuda" else ("lloyd4",)
    for name, dtype in itertools.product(names, (torch.float32, torch.bfloat16)):
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
