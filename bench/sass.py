"""What a compiled kernel's machine code says of its cost: instructions by the units that run them."""

from __future__ import annotations

import bisect
import re
import struct
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

# Of compute capability 9.0, by CUDA's guide: 64 lanes a clock of a multiprocessor for integers, comparisons and selections
# (the rest, here); as many for integer products and twice as many for floats, elsewhere; 32 for memory and shuffles.
FUSED = {"IMAD", "FADD", "FFMA", "FMUL", "HFMA2"}
MEMORY = {"LDG", "STG", "LDS", "STS", "LDSM", "LDC", "LDGSTS", "SHFL", "ATOMG", "RED", "REDUX", "MATCH", "VOTE"}
OTHER = {"BAR", "BRA", "NOP", "EXIT", "BSSY", "BSYNC", "WARPSYNC", "ENDCOLLECTIVE", "SYNCS", "HGMMA", "HMMA", "WARPGROUP",
         "ELECT", "S2R", "S2UR", "UTMALDG", "DEPBAR", "R2UR", "CS2R", "MUFU", "I2F", "F2I"}  # fmt: skip


class Code:
    """The instructions of one kernel, in order."""

    def __init__(self, cubin: Path, tool: Path):
        text = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
        line = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)([^;]*);")
        self.lines = [(int(at, 16), op, rest) for at, op, rest in line.findall(text)]
        usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True)
        self.registers = int(re.findall(r"REG:(\d+)", usage.stdout + usage.stderr)[-1])

    @property
    def ops(self) -> list[str]:
        return [op for _, op, _ in self.lines]

    def loops(self) -> list[tuple[int, int]]:
        """First and last place of every loop."""
        place = {at: i for i, (at, _, _) in enumerate(self.lines)}
        found = []
        for i, (_, op, rest) in enumerate(self.lines):
            target = re.search(r"0x([0-9a-f]+)", rest)
            if op == "BRA" and target and (start := place.get(int(target[1], 16), i)) < i:
                found.append((start, i))
        return found

    def loop_around(self, op: str) -> list[str]:
        """The ops of the loop that ends last of those that hold every `op`; all where there is none."""
        held = [i for i, name in enumerate(self.ops) if name == op]
        around = [(start, end) for start, end in self.loops() if held and start <= held[0] and held[-1] <= end]
        start, end = max(around, key=lambda loop: loop[1], default=(0, len(self.lines)))
        return self.ops[start:end]

    def innermost(self, *names: str) -> list[str]:
        """The ops of the shortest loop that holds one of these."""
        around = [loop for loop in self.loops() if any(name in names for name in self.ops[loop[0] : loop[1]])]
        start, end = min(around, key=lambda loop: loop[1] - loop[0])
        return self.ops[start:end]

    def bisection(self) -> list[str]:
        """The ops of the first loop, that of a selection's bound."""
        start, end = min(self.loops())
        return self.ops[start:end]

    def outer_and_inner(self) -> tuple[list[str], list[str]]:
        """The ops of the first loop that holds another, and of that."""
        loops = sorted(self.loops())
        outer = next(loop for loop in loops if any(loop[0] < start and end <= loop[1] for start, end in loops))
        inner = next(loop for loop in loops if outer[0] < loop[0] and loop[1] <= outer[1])
        return self.ops[outer[0] : outer[1]], self.ops[inner[0] : inner[1]]

    def without(self, op: str) -> list[str]:
        """All ops but those of the branch that holds an `op` and ends the program, and what follows the program's end:
        ways for warps whose lanes have parted, which these have not."""
        place, at = {at: i for i, (at, _, _) in enumerate(self.lines)}, self.ops.index(op)
        branches = []
        for i, (_, name, rest) in enumerate(self.lines[:at]):
            target = re.search(r"0x([0-9a-f]+)", rest)
            if (
                name == "BRA"
                and target
                and (end := place.get(int(target[1], 16), 0)) > at
                and self.ops[end - 1] == "EXIT"
            ):
                branches.append((i + 1, end))
        start, end = min(branches, key=lambda branch: branch[1] - branch[0], default=(0, 0))
        last = len(self.ops) - self.ops[::-1].index("EXIT")
        return self.ops[:start] + self.ops[end:last]

    def after_product(self) -> list[str]:
        """What follows the matrix instructions in their loop: of a persistent product, its epilogue."""
        ops = self.loop_around("HGMMA")
        return ops[len(ops) - ops[::-1].index("HGMMA") :] if "HGMMA" in ops else []


def units(ops: Iterable[str]) -> Counter[str]:
    """How many of them each unit runs, and how many are `issued`."""
    found: Counter[str] = Counter()
    for op in ops:
        found["issued"] += 1
        if op in MEMORY:
            found["memory"] += 1
        elif op in FUSED:
            found["fused"] += 1
        elif op not in OTHER and not op.startswith("U"):
            found["integer"] += 1
    return found


def clocks(ops: Iterable[str]) -> float:
    """Of a multiprocessor, for one warp to run these beside enough others: the unit with the most work, or the issue of
    four instructions a clock."""
    found = units(ops)
    return max(found["memory"], found["fused"] / 2, found["integer"] / 2, found["issued"] / 4)


def disassembled(cubins: Sequence[bytes], architecture: str, tool: Path, file: Path) -> list[str]:
    """The instructions of each kernel, all from one run of nvdisasm, which takes 0.3 s to begin and 0.01 s a kernel. `file`
    is written on the way. Jumps lead to places in all of them together."""
    codes = [_instructions(cubin) for cubin in cubins]
    file.write_bytes(b"".join(codes))
    text = subprocess.run([tool, "-b", architecture, file], capture_output=True, text=True, check=True).stdout
    begins, at = [], 0
    for code in codes:
        begins.append(at)
        at += len(code)
    found: list[list[str]] = [[] for _ in codes]
    for place, instruction in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*;)", text):
        found[bisect.bisect(begins, int(place, 16)) - 1].append(instruction)
    assert all(found), "a kernel without instructions"
    return ["\n".join(lines) for lines in found]


def _instructions(cubin: bytes) -> bytes:
    """The section `.text.NAME` of an ELF file of 64 bits, of which there is one."""
    (table,), (size, n, of_names) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<3H", cubin, 0x3A)
    sections = [struct.unpack_from("<2I4Q", cubin, table + i * size) for i in range(n)]  # name, .., offset and length
    names = sections[of_names][4]
    (code,) = (s for s in sections if cubin.startswith(b".text.", names + s[0]))
    return cubin[code[4] : code[4] + code[5]]
