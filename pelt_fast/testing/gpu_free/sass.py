"""What a compiled kernel does, read from its machine code, and the gates that it has to pass.

The disassembler comes inside the triton wheel.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import triton

from .compile import CompiledLaunch
from .driver import SHARED_MEMORY

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
REGISTERS, WARPS, SHARED_RESERVED = 65536, 64, 1024  # per multiprocessor; the last one per program
_MULTIPROCESSOR_SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
_TENSOR_CORE = re.compile(r"(HMMA|HGMMA|UTC\w*MMA|QGMMA|IMMA)\b")
_GLOBAL = re.compile(r"(LDG|STG|LDGSTS)\.E\S*")
_WIDTH = re.compile(r"\.(U8|S8|U16|S16|64|128|256)\b")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?(\S+)")


@dataclass(frozen=True)
class KernelReport:
    """Counted in the machine code of one kernel; nothing here is a time."""

    name: str
    capability: int
    warps: int
    registers: int
    shared: int  # bytes
    spills: int  # loads and stores of local memory
    tensor_core: int  # matrix instructions
    loads: Counter[int]  # global loads by bits per thread, asynchronous copies included
    stores: Counter[int]
    tma: int  # bulk copies
    instructions: int

    @property
    def programs_per_sm(self) -> int:
        """How many programs fit on one multiprocessor."""
        per_warp = math.ceil(self.registers * 32 / 256) * 256
        by_registers = REGISTERS // per_warp // self.warps
        total = _MULTIPROCESSOR_SHARED.get(self.capability, 100 << 10)
        by_shared = total // (math.ceil(self.shared / 128) * 128 + SHARED_RESERVED)
        return min(by_registers, WARPS // self.warps, by_shared, 32)

    @property
    def occupancy(self) -> float:
        """Share of a multiprocessor's warps that can be resident."""
        return self.programs_per_sm * self.warps / WARPS


def inspect_kernel(launch: CompiledLaunch) -> KernelReport:
    """Disassembles the kernel of a launch."""
    assembly, resources = _disassemble(launch.kernel.asm["cubin"])
    opcodes = [m.group(1) for m in map(_INSTRUCTION.match, assembly.splitlines()) if m]
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for opcode in opcodes:
        if _GLOBAL.match(opcode):
            (stores if opcode.startswith("STG") else loads)[_bits(opcode)] += 1
    threads = re.search(r"\.reqntid\s+(\d+)", launch.kernel.asm["ptx"])
    registers = re.search(r"REG:(\d+)", resources)
    assert threads is not None
    assert registers is not None
    return KernelReport(
        name=launch.name,
        capability=launch.capability,
        warps=int(threads.group(1)) // 32,
        registers=int(registers.group(1)),
        shared=launch.kernel.metadata.shared,
        spills=sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes),
        tensor_core=sum(bool(_TENSOR_CORE.match(opcode)) for opcode in opcodes),
        loads=loads,
        stores=stores,
        tma=sum(opcode.startswith(("UTMALDG", "UTMASTG")) for opcode in opcodes),
        instructions=len(opcodes),
    )


def inspect_launches(launches: Iterable[CompiledLaunch]) -> list[KernelReport]:
    """The report of each distinct kernel among the launches."""
    distinct = {(launch.name, id(launch.kernel)): launch for launch in launches}
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(inspect_kernel, distinct.values()))


def violations(
    report: KernelReport,
    *,
    tensor_core: bool,
    aligned: bool,
    min_occupancy: float,
    narrow: int = 0,
) -> list[str]:
    """The gates that a kernel does not pass; empty when it passes all.

    Args:
        report: of the kernel.
        tensor_core: it has a dot of a type that tensor cores serve.
        aligned: every dimension of its arguments is a multiple of 16 and every pointer is aligned.
        min_occupancy: share of a multiprocessor's warps that has to be able to be resident.
        narrow: how many accesses of 8 or 16 bits an aligned kernel may have: those of vectors, an element a thread.
    """
    found = []
    if report.spills:
        found.append(f"{report.spills} loads and stores of spilled registers")
    if tensor_core and not report.tensor_core:
        found.append("no tensor-core instruction")
    if report.shared > SHARED_MEMORY[report.capability]:
        found.append(
            f"{report.shared} bytes of shared memory, {SHARED_MEMORY[report.capability]} are there"
        )
    if aligned:
        for what, widths in (("load", report.loads), ("store", report.stores)):
            if widths and not widths[128] and not report.tma:
                found.append(f"no 128-bit global {what}: {dict(widths)}")
            if widths[8] + widths[16] > narrow:
                found.append(f"{widths[8] + widths[16]} global {what}s of 8 or 16 bits")
    if report.occupancy < min_occupancy:
        found.append(f"occupancy {report.occupancy:.0%} is below {min_occupancy:.0%}")
    return found


def _bits(opcode: str) -> int:
    width = _WIDTH.search(opcode)
    return int(width.group(1).lstrip("US")) if width else 32


@cache
def _disassemble(cubin: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def output(tool: str, *flags: str) -> str:
            command = [str(BINARIES / tool), *flags, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        return output("nvdisasm", "-c"), output("cuobjdump", "--dump-resource-usage")
