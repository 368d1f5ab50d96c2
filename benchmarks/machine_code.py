"""Machine code of compiled Triton kernels: its path for full blocks, and what that path costs.

A kernel has a path for full, aligned blocks, and others for raw elements and for the rest. Its coded
path is found in the control flow of the disassembly: from the entry to an exit, with the most bytes of
memory accessed and, among these, the fewest instructions. Subroutines for rare operands (the slow part
of a division) are left out.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Code", "disassemble", "exchanges_planes", "read_amdgcn", "read_sass"]

_LABEL = re.compile(r"^(\.L_x_\d+|\.text\.\S+):")
_SUBROUTINE = re.compile(r"CALL\S* `\(\$")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;")


@dataclass(frozen=True)
class Code:
    """Describe the cost of the coded path of a kernel.

    Attributes:
        registers: Registers of a thread.
        spills: Loads and stores of spilled registers, in the whole kernel.
        total: Instructions of the whole kernel.
        instructions: Instructions of a warp on the coded path.
        loads: Loads from global memory on the path.
        stores: Stores to global memory on the path.
        widest_bytes: Width of the widest access.
    """

    registers: int
    spills: int
    total: int
    instructions: int
    loads: int
    stores: int
    widest_bytes: int


def disassemble(cubin: bytes, tools: Path) -> tuple[str, str]:
    """Return the resource usage and the disassembly of a CUDA binary.

    Args:
        cubin: The binary.
        tools: Folder of ``cuobjdump`` and ``nvdisasm``, which come with Triton.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        calls = (["cuobjdump", "--dump-resource-usage"], ["nvdisasm", "-c"])
        usage, sass = (
            subprocess.run(
                [tools / tool, *options, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, *options in calls
        )
    return usage, sass


def read_sass(usage: str, sass: str, trips: int) -> Code:
    """Read the output of :func:`disassemble`.

    Args:
        usage: Resource usage.
        sass: Disassembly.
        trips: Number of passes through a loop on the path.
    """
    graph = _Graph(sass)
    path = graph.coded_path(trips)
    everything = [line for block in graph.code.values() for line in block]
    registers = re.search(r"REG:(\d+)", usage)
    return Code(
        registers=int(registers[1]) if registers else -1,
        spills=sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in everything),
        total=len(everything),
        instructions=len(path),
        loads=sum("LDG" in line for line in path),
        stores=sum("STG" in line for line in path),
        widest_bytes=max((_width(line) for line in path), default=0),
    )


def read_amdgcn(assembly: str) -> Code:
    """Read AMD assembly, of which only whole kernels are counted.

    Spilled scalar registers are not counted: they stay in vector registers.
    """
    lines = [
        line for line in assembly.splitlines() if re.match(r"^\t[sv]_|^\t(global|flat|ds)_", line)
    ]
    spills = sum(int(n) for n in re.findall(r"\.vgpr_spill_count:\s+(\d+)", assembly))
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    loads = [line for line in lines if "global_load" in line]
    wide = any("dwordx4" in line for line in lines)
    return Code(
        registers=int(registers[1]) if registers else -1,
        spills=spills,
        total=len(lines),
        instructions=0,
        loads=len(loads),
        stores=sum("global_store" in line for line in lines),
        widest_bytes=16 if wide else 8,
    )


def exchanges_planes(ttgir: str) -> bool:
    """Return whether a sum over the planes of a tile involves several threads.

    It must not: the order of the sum would then depend on the tile, see ``block_sum``.
    """
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.\w+<.*>)$", ttgir, re.MULTILINE))
    axes = re.findall(
        r'"tt\.reduce"\(.*?<\{axis = (\d+) : i32[^}]*\}>.*?\}\) : \(tensor<\w+, (#\w+|#ttg[^)]*)>\)',
        ttgir,
        re.DOTALL,
    )
    return any(axis == "0" and _spreads_planes(layouts.get(name, name)) for axis, name in axes)


def _spreads_planes(layout: str) -> bool:
    if "slice" in layout:
        return False
    blocked = re.search(r"threadsPerWarp = \[(\d+).*?warpsPerCTA = \[(\d+)", layout)
    if blocked:
        return blocked[1] != "1" or blocked[2] != "1"
    linear = re.search(r"lane = (\[.*?\]), warp = (\[.*?\]), block", layout)
    if linear is None:
        raise ValueError(f"Unknown layout: {layout}.")
    return bool(re.search(r"\[[1-9]\d*, \d+, \d+\]", linear[1] + linear[2]))


def _width(line: str) -> int:
    access = re.search(r"\b(?:LDG|STG)\.E(\S*)", line)
    if access is None:
        return 0
    for name, width in ((".128", 16), (".64", 8), (".U16", 2), (".U8", 1)):
        if name in access[1]:
            return width
    return 4


class _Graph:
    """Basic blocks of a kernel, and where each continues."""

    def __init__(self, sass: str) -> None:
        self.code: dict[str, list[str]] = {"entry": []}
        current = "entry"
        for line in sass.splitlines():
            label, instruction = _LABEL.match(line), _INSTRUCTION.match(line)
            if label:
                current = label[1]
                self.code[current] = []
            elif instruction:
                self.code[current].append(instruction[1])
                if re.search(r"\b(BRA|EXIT|RET|CALL)\b", instruction[1]):
                    current = f"after {current}"
                    self.code[current] = []
        names = list(self.code)
        self._next = {
            name: [one for one in self._continues(name, after) if one in self.code]
            for name, after in zip(names, [*names[1:], ""], strict=True)
        }
        rare = {n for n, lines in self.code.items() if any(map(_SUBROUTINE.search, lines))}
        for name, following in self._next.items():
            self._next[name] = [one for one in following if one not in rare]
        self._depth_first()

    def _continues(self, name: str, after: str) -> list[str]:
        last = self.code[name][-1] if self.code[name] else ""
        conditional = bool(re.match(r"@", last)) or bool(re.search(r"BRA(\.\w+)* !?U?P\d", last))
        # A call of a label in the kernel itself is a branch.
        branches = "CALL" in last if "BRA" not in last else "BRA.DIV" not in last
        if branches and not _SUBROUTINE.search(last):
            target = re.search(r"`\((\S+?)\)", last)
            return [*([target[1]] if target else []), *([after] if conditional else [])]
        if re.search(r"\b(EXIT|RET)\b", last):
            return [after] if conditional else []
        return [after]

    def coded_path(self, trips: int) -> list[str]:
        """Return the instructions of the path, those of a loop ``trips`` times."""
        path = self._best("entry", self._exits())
        times = dict.fromkeys(path, 1)
        for latch, head in self._loops:
            if head not in path:
                continue
            if latch in path:
                body = path[path.index(head) : path.index(latch) + 1]
            else:
                body = self._best(head, {latch})
            times |= dict.fromkeys(body, trips)
        return [
            line for name, count in times.items() for _ in range(count) for line in self.code[name]
        ]

    def _exits(self) -> set[str]:
        return {name for name, lines in self.code.items() if any("EXIT" in x for x in lines[-1:])}

    def _depth_first(self) -> None:
        """Order the blocks, and find the edges that close a loop."""
        self._order: list[str] = []
        self._loops: list[tuple[str, str]] = []
        active, done = {"entry"}, set()
        stack = [("entry", iter(self._next["entry"]))]
        while stack:
            name, following = stack[-1]
            for one in following:
                if one in active:
                    self._loops.append((name, one))
                elif one not in done:
                    active.add(one)
                    stack.append((one, iter(self._next[one])))
                    break
            else:
                stack.pop()
                active.remove(name)
                done.add(name)
                self._order.append(name)

    def _best(self, start: str, ends: set[str]) -> list[str]:
        """Return the path that accesses the most bytes and then has the fewest instructions.

        Without the edges that close loops the graph has no cycle, so the best continuation of a block
        follows from those of its successors, which precede it in the order.
        """
        best: dict[str, tuple[int, int, str]] = {}
        for name in self._order:
            own = sum(map(_width, self.code[name])), -len(self.code[name])
            ways = [
                (best[one][0], best[one][1], one)
                for one in self._next[name]
                if one in best and (name, one) not in self._loops
            ]
            if name in ends:
                ways.append((0, 0, ""))
            if ways:
                moved, instructions, one = max(ways)
                best[name] = (own[0] + moved, own[1] + instructions, one)
        path = []
        while start in best:
            path.append(start)
            start = best[start][2]
        return path
