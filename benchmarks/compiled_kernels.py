"""Compile the Triton kernels for GPUs that are not here, and count what their code costs.

    python benchmarks/compiled_kernels.py                          # the table of docs/kernels.md
    python benchmarks/compiled_kernels.py --all --csv all.csv      # every variant, hours; resumes
    python benchmarks/compiled_kernels.py --check                  # a few variants against the goals
    python benchmarks/compiled_kernels.py --targets sm_80 gfx942 --dtypes bfloat16 --fusions adam

No GPU is needed: Triton compiles for a named target, and its package contains a disassembler. Counts
are those of one warp on the path for full, aligned blocks (see machine_code.py), divided by the warp's
blocks. "bytes" are read and written per block. "memory ns" and "issue ns" are the times of 1,000 blocks
on an H100 that copies at 3.0 TB/s and issues 9e11 warp instructions a second: the larger one bounds the
kernel. They are arithmetic, not a measurement.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import itertools
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are defined

import torch
import triton
from machine_code import Code, disassemble, exchanges_planes, read_amdgcn, read_sass
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from effadam_hook.kernels.triton_kernels.constants import (
    blocks_of,
    decode_constants,
    encode_constants,
    marking_constants,
    reduce_constants,
)
from effadam_hook.kernels.triton_kernels.decode import decode_kernel
from effadam_hook.kernels.triton_kernels.encode import encode_kernel
from effadam_hook.kernels.triton_kernels.reduce import reduce_encode_kernel
from effadam_hook.kernels.triton_kernels.unused import (
    mark_used_input_kernel,
    mark_used_mean_kernel,
)
from effadam_hook.wire.layout import Slot, Wire, lay_out_bucket
from effadam_hook.wire.quantizers import QUANTIZERS, SCALE_RULES, get_quantizer

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {
    "float32": (torch.float32, "fp32"),
    "float64": (torch.float64, "fp64"),
    "float16": (torch.float16, "fp16"),
    "bfloat16": (torch.bfloat16, "bf16"),
}
KERNELS = {"encode": encode_kernel, "reduce": reduce_encode_kernel, "decode": decode_kernel}
FUSIONS = {
    "encode": ("plain", "preconditioner", "adam", "no residual"),
    "reduce": ("plain", "preconditioner", "no residual"),
    "decode": ("plain", "preconditioner"),
}
WORKERS = 4
COPY_BYTES_PER_S, ISSUES_PER_S = 3.0e12, 9e11
# Instructions of a block of 256 elements on the coded path, for lloyd4 and float32 on sm_90.
GOALS = {"encode": 500, "reduce": 1000, "decode": 150}


@dataclass(frozen=True)
class Variant:
    """One compilation.

    Attributes:
        kernel: ``encode``, ``reduce`` or ``decode``.
        quantizer: Its name, or two with an arrow where a server uses another one.
        rule: Rule for the scale.
        dtype: Name of the bucket's dtype.
        fusion: An entry of ``FUSIONS``.
        target: Key of ``TARGETS``.
        block_size: Number of elements of a block.
    """

    kernel: str
    quantizer: str
    rule: str = "least_squares"
    dtype: str = "float32"
    fusion: str = "plain"
    target: str = "sm_90"
    block_size: int = 256

    def wires(self) -> tuple[Wire, Wire]:
        """Return the wires of both directions."""
        up, _, down = self.quantizer.partition("->")
        layout = lay_out_bucket(
            [Slot("weight", 0, 1 << 20, False)],
            uplink=get_quantizer(up),
            downlink=get_quantizer(down or up),
            scale_rule=self.rule,
            block_size=self.block_size,
            servers=1,
            itemsize=DTYPES[self.dtype][0].itemsize,
        )
        return layout.uplink, layout.downlink

    def bytes_per_block(self) -> float:
        """Return the bytes that the kernel must read and write for a block."""
        sent, received = (wire.payload_bytes * self.block_size / (1 << 20) for wire in self.wires())
        itemsize = DTYPES[self.dtype][0].itemsize
        dense, compute = itemsize * self.block_size, max(4, itemsize) * self.block_size
        raw = QUANTIZERS[self.quantizer.rpartition("->")[2]].is_raw
        residual = 0 if raw or self.fusion == "no residual" else 2 * compute
        extra = {"preconditioner": compute, "adam": 4 * compute}.get(self.fusion, 0)
        if self.kernel == "decode":
            return received + dense + extra
        if self.kernel == "encode":
            return dense + residual + sent + extra
        return WORKERS * sent + residual + received + extra


@dataclass(frozen=True)
class Row:
    """A variant, and what its code costs; counts are those of one block."""

    kernel: str
    quantizer: str
    rule: str
    dtype: str
    fusion: str
    target: str
    instructions: float
    loads: float
    stores: float
    widest_bytes: int
    registers: int
    spills: int
    total: int
    exchanges_planes: bool
    bytes: float
    memory_ns: float
    issue_ns: float
    compile_s: float


def compile_variant(variant: Variant) -> Row:
    """Compile a variant, and read its code."""
    kernel = KERNELS[variant.kernel]
    uplink, downlink = variant.wires()
    dtype, short = DTYPES[variant.dtype]
    if variant.kernel == "reduce":
        known = reduce_constants(uplink, downlink, dtype)
    else:
        constants = encode_constants if variant.kernel == "encode" else decode_constants
        known = constants(uplink if variant.kernel == "encode" else downlink, dtype)
    real = "*fp64" if short == "fp64" else "*fp32"
    pointers = {"x": f"*{short}", "out": f"*{short}", "residual": real, "owner": "*i32"}
    pointers |= dict.fromkeys(("payload", "payloads"), "*u8")
    pointers |= dict.fromkeys(("pieces", "sources"), "*i64")
    pointers |= dict.fromkeys(("exp_avg", "exp_avg_sq"), real) | {"terms": "*fp64"}
    pointers |= {"moments": "*i64", "used": "*i32"}
    absent = set()
    if variant.fusion != "adam":
        absent |= {"exp_avg", "exp_avg_sq", "terms"}
    else:
        absent.add("used")  # as at run time: momentum continues without a gradient
    if variant.fusion != "preconditioner":
        absent.add("moments")
    if variant.fusion == "no residual":
        absent |= {"residual", "used"}
    types = {name: kind for name, kind in pointers.items() if name not in absent}
    types |= {"workers": "i32", "stride": "i64"}
    source = source_of(kernel, types, known)
    target = TARGETS[variant.target]
    warps = 128 // target.warp_size
    options = {"num_warps": warps, "enable_fp_fusion": known["enable_fp_fusion"]}
    start_s = time.perf_counter()
    made = triton.compile(source, target=target, options=options)
    compile_s = time.perf_counter() - start_s
    code = read(made, variant.target)
    tiles_of = uplink if variant.kernel == "encode" else downlink
    blocks = blocks_of(tiles_of) / warps
    moved = variant.bytes_per_block()
    return Row(
        *(getattr(variant, name) for name in ("kernel", "quantizer", "rule", "dtype", "fusion")),
        target=variant.target,
        instructions=code.instructions / blocks,
        loads=code.loads / blocks,
        stores=code.stores / blocks,
        widest_bytes=code.widest_bytes,
        registers=code.registers,
        spills=code.spills,
        total=code.total,
        exchanges_planes=exchanges_planes(made.asm["ttgir"]),
        bytes=moved,
        memory_ns=1e9 * 1000 * moved / COPY_BYTES_PER_S,
        issue_ns=1e9 * 1000 * code.instructions / blocks / ISSUES_PER_S,
        compile_s=compile_s,
    )


def compile_marking(target: str) -> None:
    """Compile the kernels that find unused parameters, for every dtype."""
    for name, (dtype, short) in DTYPES.items():
        constants = reduce_constants(*Variant("reduce", "lloyd4", dtype=name).wires(), dtype)
        known = marking_constants(constants, raw=True)
        types = {"x": f"*{short}", "payloads": "*u8", "workers": "i32", "stride": "i64"}
        types |= {"used": "*i32", "owner": "*i32", "sources": "*i64", "pieces": "*i64"}
        for kernel in (mark_used_input_kernel, mark_used_mean_kernel):
            given = {
                key: types[key] for key in inspect.signature(kernel.fn).parameters if key in types
            }
            triton.compile(
                source_of(kernel, given, known), target=TARGETS[target], options={"num_warps": 1}
            )


def source_of(kernel: Any, types: dict[str, str], known: dict[str, Any]) -> ASTSource:
    """Specialize a kernel as at run time, where the memory of tensors is aligned to 16 bytes.

    Args:
        kernel: The kernel.
        types: Types of its arguments by name.
        known: Values of its constants by name; None for absent ones.
    """
    names = list(inspect.signature(kernel.fn).parameters)
    constants = {name: known.get(name) for name in names if name not in types}
    aligned = [i for i, name in enumerate(names) if types.get(name, "").startswith("*")]
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version >= (3, 3):
        return ASTSource(
            fn=kernel,
            signature={name: types.get(name, "constexpr") for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        )
    if version == (3, 2):
        from triton.backends.compiler import AttrsDescriptor

        attributes = AttrsDescriptor.from_hints(dict.fromkeys(aligned, 16))
        types = {name: types[name] for name in names if name in types}
        return ASTSource(fn=kernel, signature=types, constants=constants, attrs=attributes)
    from triton.compiler import AttrsDescriptor

    return ASTSource(
        fn=kernel,
        signature={i: types[name] for i, name in enumerate(names) if name in types},
        constants={names.index(name): value for name, value in constants.items()},
        attrs=AttrsDescriptor(divisible_by_16=aligned, equal_to_1=[]),
    )


def read(made: Any, target: str) -> Code:
    if target.startswith("gfx"):
        return read_amdgcn(made.asm["amdgcn"])
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return read_sass(*disassemble(made.asm["cubin"], tools), WORKERS)


def complaints(row: Row) -> Iterator[str]:
    """Yield what is wrong with a compiled kernel."""
    what = f"{row.kernel} of {row.quantizer}, {row.dtype}, {row.fusion}, {row.target}"
    if row.spills and row.dtype != "float64":  # of which a thread has twice as many registers
        yield f"{what}: {row.spills} loads and stores of spilled registers"
    if row.exchanges_planes:
        yield f"{what}: a sum over planes involves several threads, so its order depends on the tile"
    goal = GOALS[row.kernel]
    if what.endswith("of lloyd4, float32, plain, sm_90") and row.instructions > goal:
        yield f"{what}: {row.instructions:.0f} instructions a block. Must be at most {goal}"
    # Without a residual, a reduction reads and writes codes and raw elements only.
    dense = row.kernel != "reduce" or (row.fusion != "no residual" and row.quantizer != "none")
    if dense and row.dtype == "float32" and row.widest_bytes < 16:
        yield f"{what}: no access is wider than {row.widest_bytes} bytes"


def every_variant(options: argparse.Namespace) -> Iterator[Variant]:
    chosen = itertools.product(options.targets, options.dtypes, options.rules, options.quantizers)
    for target, dtype, rule, quantizer in chosen:
        for kernel, fusions in FUSIONS.items():
            for fusion in fusions:
                useful = kernel != "decode" or rule == "least_squares"
                if fusion in options.fusions and useful:
                    yield Variant(kernel, quantizer, rule, dtype, fusion, target)


def table_variants() -> Iterator[Variant]:
    """Yield the variants of the table in docs/kernels.md."""
    for quantizer in QUANTIZERS:
        for kernel in KERNELS:
            yield Variant(kernel, quantizer)
    for kernel, fusions in FUSIONS.items():
        yield Variant(kernel, "lloyd4", "absmax")
        for fusion in fusions[1:]:
            yield Variant(kernel, "lloyd4", fusion=fusion)
        for target in TARGETS:
            yield Variant(kernel, "lloyd4", target=target)
        for dtype in DTYPES:
            yield Variant(kernel, "lloyd4", dtype=dtype)
    yield Variant("reduce", "ternary->uniform8")


def check_variants() -> Iterator[Variant]:
    """Yield a few variants that reach each branch of the kernels at least once."""
    for kernel in KERNELS:
        yield Variant(kernel, "lloyd4")
    yield Variant("encode", "ternary", dtype="bfloat16", fusion="adam", target="sm_80")
    yield Variant("reduce", "sign->uniform8", fusion="preconditioner", target="gfx942")
    yield Variant("decode", "log3", dtype="float64", fusion="preconditioner", target="sm_100")


HEADER = (
    "| kernel | quantizer | rule | dtype | fusion | target | instructions | loads | stores | widest | "
    "registers | spills | bytes | memory ns | issue ns |"
)


def format_row(row: Row) -> str:
    rule = {"least_squares": "ls"}.get(row.rule, row.rule)
    amd = row.target.startswith("gfx")
    counts = (
        ["", "", ""]
        if amd
        else [f"{row.instructions:.0f}", f"{row.loads:.1f}", f"{row.stores:.1f}"]
    )
    times = ["", ""] if amd else [f"{row.memory_ns:.0f}", f"{row.issue_ns:.0f}"]
    cells = [row.kernel, f"`{row.quantizer}`", rule, row.dtype, row.fusion, row.target, *counts]
    cells += [
        f"{row.widest_bytes}",
        f"{row.registers}",
        f"{row.spills}",
        f"{row.bytes:.0f}",
        *times,
    ]
    return "| " + " | ".join(cells) + " |"


def key_of(row: Variant | Row) -> tuple[str, ...]:
    """Return what tells a variant from others of the same block size."""
    return row.kernel, row.quantizer, row.rule, row.dtype, row.fusion, row.target


def read_rows(path: Path) -> dict[tuple[str, ...], Row]:
    """Read the rows of a file by the keys of their variants."""
    convert = {"float": float, "int": int, "bool": lambda text: text == "True", "str": str}
    fields = Row.__dataclass_fields__.values()
    with path.open(newline="") as file:
        rows = [
            Row(**{field.name: convert[str(field.type)](line[field.name]) for field in fields})
            for line in csv.DictReader(file)
        ]
    return {key_of(row): row for row in rows}


def append_row(path: Path, row: Row) -> None:
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(Row.__dataclass_fields__))
        if is_new:
            writer.writeheader()
        writer.writerow(asdict(row))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every variant of the options below")
    parser.add_argument("--check", action="store_true", help="a few variants, quickly")
    parser.add_argument("--targets", nargs="+", choices=TARGETS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--quantizers", nargs="+", choices=QUANTIZERS)
    parser.add_argument("--rules", nargs="+", choices=SCALE_RULES)
    fusions = sorted({fusion for some in FUSIONS.values() for fusion in some})
    parser.add_argument("--fusions", nargs="+", choices=fusions)
    parser.add_argument(
        "--csv", type=Path, help="append the rows to this file, and skip variants that it contains"
    )
    options = parser.parse_args()
    given = {"targets": TARGETS, "dtypes": DTYPES, "quantizers": QUANTIZERS}
    given |= {"rules": SCALE_RULES, "fusions": fusions}
    options.all |= any(getattr(options, name) for name in given)
    for name, default in given.items():
        setattr(options, name, getattr(options, name) or list(default))
    return options


def main() -> int:
    options = parse()
    variants: Iterator[Variant] = table_variants()
    if options.check:
        variants = check_variants()
        compile_marking("sm_90")
    elif options.all:
        variants = every_variant(options)
    print(f"Triton {triton.__version__}; blocks of 256 elements; counts per block\n")
    print(HEADER)
    print("|" + "---|" * (HEADER.count("|") - 1))
    rows, wrong = [], []
    known = read_rows(options.csv) if options.csv and options.csv.exists() else {}
    for variant in dict.fromkeys(variants):
        row = known.get(key_of(variant))
        if row is None:
            row = compile_variant(variant)
            if options.csv:
                append_row(options.csv, row)
        rows.append(row)
        print(format_row(row), flush=True)
        wrong += complaints(row)
    print(f"\n{len(rows)} variants, {sum(row.compile_s for row in rows):.0f} s of compilation")
    for one in wrong:
        print(f"FAILED {one}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
