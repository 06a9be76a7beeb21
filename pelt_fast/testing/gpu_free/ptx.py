"""Runs the PTX that nvcc makes of a CUDA C++ kernel, on the memory of CPU tensors, with no GPU.

What it knows is the subset that the kernels in ``csrc/cuda`` compile to; anything else raises `Fault`. Blocks run
together in lockstep, a thread at the smallest program counter first, so threads meet again where branches join.

It faults on accesses outside the tensors it was given or not aligned to their width; on two blocks of a launch that
touch the same byte, one of them writing; on two warps that do so in shared memory with no barrier between; on lanes
missing from a warp's shuffle; on a barrier that some threads never reach. Shared memory starts as NaN.

It is exact but for ``fma``, which rounds twice (to fp64, then to fp32). Nothing here gives a time, and it has never
been compared with a GPU.
"""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

Lanes = np.ndarray[Any, Any]

_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
_ALIGNMENT = re.compile(r"\.align\s+(\d+)")
_LANES_AT_ONCE = 8192
_SECTOR = 32  # bytes


class Fault(Exception):
    """What a GPU would answer with an error, garbage or a hang; or an instruction that is not known here."""


@dataclass(frozen=True)
class Instruction:
    """``@predicate opcode operands``."""

    opcode: str
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")


@dataclass
class Entry:
    """A kernel: its code, and where parameters and shared variables stand."""

    name: str
    threads: int
    code: list[Instruction]
    labels: dict[str, int]
    parameters: list[tuple[int, int]]  # offset, bytes
    symbols: dict[str, int]
    shared: int  # bytes of static shared memory; dynamic memory begins there


@dataclass
class Launch:
    """What one launch did."""

    name: str
    grid: tuple[int, int, int]
    dynamic: Counter[str] = field(default_factory=Counter)  # warp instructions by opcode
    # bytes by address of the memory; a sector counts once for each block that touches it
    loaded: Counter[int] = field(default_factory=Counter)
    stored: Counter[int] = field(default_factory=Counter)
    widths: Counter[int] = field(default_factory=Counter)  # global accesses by bytes of a lane


# ---------------------------------------------------------------------------------------- parsing


def parse(ptx: str) -> dict[str, Entry]:
    """The kernels of a module by their mangled names."""
    ptx = re.sub(r"//[^\n]*", "", ptx)
    dynamic = re.findall(r"\.extern \.shared[^;]*?\.b8 (\w+)\[\]", ptx)
    entries = {}
    for match in re.finditer(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{(.*?)\n\}", ptx, re.DOTALL):
        name, parameters, directives, body = match.groups()
        entries[name] = _entry(name, parameters, directives, body, dynamic)
    return entries


def _entry(name: str, parameters: str, directives: str, body: str, dynamic: list[str]) -> Entry:
    symbols: dict[str, int] = {}
    places, end = [], 0
    for text in filter(None, map(str.strip, parameters.split(","))):
        symbol, size, alignment = _variable(text)
        end = -(-end // alignment) * alignment
        symbols[symbol] = end
        places.append((end, size))
        end += size
    shared = 0
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in body.split(";"):
        text = statement.strip()
        while label := re.match(r"(\$[\w$]+):\s*|[{}]\s*", text):
            if label.group(1):
                labels[label.group(1)] = len(code)
            text = text[label.end() :]
        if text.startswith(".shared"):
            symbol, size, alignment = _variable(text)
            shared = -(-shared // alignment) * alignment
            symbols[symbol] = shared
            shared += size
        elif text and not text.startswith((".reg", ".loc", ".pragma")):
            code.append(_instruction(text))
    shared = -(-shared // 16) * 16
    symbols |= dict.fromkeys(dynamic, shared)
    threads = re.search(r"\.(?:maxntid|reqntid)\s+(\d+)", directives)
    if threads is None:
        raise Fault(f"{name} does not say how many threads a block has")
    return Entry(name, int(threads.group(1)), code, labels, places, symbols, shared)


def _variable(text: str) -> tuple[str, int, int]:
    """Name, bytes and alignment of a declaration."""
    match = re.search(r"\.[busf](\d+)\s+(\w+)(?:\[(\d+)\])?$", text)
    if match is None:
        raise Fault(f"not understood: {text}")
    bits, symbol, count = match.groups()
    alignment = _ALIGNMENT.search(text)
    size = int(bits) // 8
    return symbol, size * int(count or 1), int(alignment.group(1)) if alignment else size


def _instruction(text: str) -> Instruction:
    predicate, negated = None, False
    if guard := re.match(r"@(!?)(%\w+)\s+", text):
        negated, predicate = guard.group(1) == "!", guard.group(2)
        text = text[guard.end() :]
    opcode, _, rest = text.partition(" ") if " " in text else (text, "", "")
    opcode, tab, more = opcode.partition("\t")
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", more + " " + rest if tab else rest)
    return Instruction(opcode.strip(), tuple(operands), predicate, negated)


# ----------------------------------------------------------------------------------------- memory


class Memory:
    """The bytes of tensors, and for each byte which blocks of the running launch touched it."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        spans = sorted({_span(t) for t in tensors if t.numel()})
        merged: list[list[int]] = []
        for start, end in spans:
            if merged and start < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])
        self.starts = np.array([start for start, _ in merged], np.int64)
        self.ends = np.array([end for _, end in merged], np.int64)
        self.bytes = [
            np.ctypeslib.as_array((ctypes.c_uint8 * (end - start)).from_address(start))
            for start, end in merged
        ]
        self.begin()

    def begin(self) -> None:
        """A new launch: what the last one wrote is there for everybody."""
        self.writer = [np.full(b.shape, -1, np.int32) for b in self.bytes]
        self.reader = [np.full(b.shape, -1, np.int32) for b in self.bytes]  # -2: several blocks
        self.sectors: dict[tuple[int, bool], set[int]] = {}

    def access(self, address: Lanes, size: int, block: Lanes, value: Lanes | None) -> Lanes:
        """Loads (lanes, size) bytes, or stores ``value``."""
        if (address % size).any():
            raise Fault(f"an access of {size} bytes is not aligned")
        which = np.searchsorted(self.starts, address, "right") - 1
        if (which < 0).any() or (address + size > self.ends[which]).any():
            raise Fault(f"{'load' if value is None else 'store'} outside of every tensor")
        out = np.zeros((len(address), size), np.uint8)
        for i in np.unique(which):
            here = which == i
            index = (address[here] - self.starts[i])[:, None] + np.arange(size)
            owner = np.broadcast_to(block[here][:, None], index.shape)
            writer, reader = self.writer[i][index], self.reader[i][index]
            if ((writer >= 0) & (writer != owner)).any():
                raise Fault("a block touches what another block of the launch wrote")
            if value is None:
                out[here] = self.bytes[i][index]
                self.reader[i][index] = np.where((reader == -1) | (reader == owner), owner, -2)
            else:
                if ((reader != -1) & (reader != owner)).any():
                    raise Fault("a block writes what another block of the launch read")
                self.bytes[i][index] = value[here]
                self.writer[i][index] = owner
            sectors = self.sectors.setdefault((int(self.starts[i]), value is not None), set())
            sectors.update(
                np.unique((address[here] - self.starts[i]) // _SECTOR << 24 | block[here]).tolist()
            )
        return out


def _span(t: Tensor) -> tuple[int, int]:
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


class SharedMemory:
    """That of the blocks which run together; a race is two warps at one byte between two barriers."""

    def __init__(self, blocks: int, size: int) -> None:
        self.size = size
        self.bytes = np.full((blocks, size), 0xFF, np.uint8)
        self.epoch = np.zeros(blocks, np.int32)
        shape = (blocks, size)
        self.writer, self.written = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
        self.reader, self.read = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)

    def access(
        self, address: Lanes, size: int, block: Lanes, warp: Lanes, value: Lanes | None
    ) -> Lanes:
        """Loads (lanes, size) bytes, or stores ``value``."""
        if (address % size).any():
            raise Fault(f"a shared access of {size} bytes is not aligned")
        if (address < 0).any() or (address + size > self.size).any():
            raise Fault("access outside of shared memory")
        at = (block[:, None], address[:, None] + np.arange(size))
        owner, now = warp[:, None], self.epoch[block][:, None]
        if ((self.written[at] == now) & (self.writer[at] != owner)).any():
            raise Fault("a warp touches shared memory that another wrote, with no barrier between")
        if value is None:
            same = (self.read[at] != now) | (self.reader[at] == owner)
            self.reader[at] = np.where(same, owner, -2)
            self.read[at] = np.broadcast_to(now, same.shape)
            return self.bytes[at]
        if ((self.read[at] == now) & (self.reader[at] != owner)).any():
            raise Fault("a warp writes shared memory that another read, with no barrier between")
        self.bytes[at] = value
        self.writer[at] = np.broadcast_to(owner, value.shape)
        self.written[at] = np.broadcast_to(now, value.shape)
        return value


# -------------------------------------------------------------------------------------- execution


def run(
    entry: Entry,
    grid: tuple[int, int, int],
    arguments: Sequence[bytes],
    memory: Memory,
    dynamic_shared: int = 0,
) -> Launch:
    """Launches a kernel; ``arguments`` are the bytes of its parameters."""
    if [len(a) for a in arguments] != [size for _, size in entry.parameters]:
        raise Fault(f"{entry.name} takes parameters of other sizes")
    end = max((offset + size for offset, size in entry.parameters), default=0)
    parameters = np.zeros(end, np.uint8)
    for (offset, size), value in zip(entry.parameters, arguments, strict=True):
        parameters[offset : offset + size] = np.frombuffer(value, np.uint8)
    launch = Launch(entry.name, grid)
    memory.begin()
    blocks = np.arange(grid[0] * grid[1] * grid[2])
    step = max(1, _LANES_AT_ONCE // entry.threads)
    for start in range(0, len(blocks), step):
        some = blocks[start : start + step]
        _Blocks(entry, grid, some, parameters, memory, dynamic_shared, launch).execute()
    for (start, stored), sectors in memory.sectors.items():
        (launch.stored if stored else launch.loaded)[start] = len(sectors) * _SECTOR
    return launch


class _Blocks:
    """Blocks that run together, a lane for each of their threads."""

    def __init__(
        self,
        entry: Entry,
        grid: tuple[int, int, int],
        blocks: Lanes,
        parameters: Lanes,
        memory: Memory,
        dynamic_shared: int,
        launch: Launch,
    ) -> None:
        self.entry, self.parameters, self.memory, self.launch = entry, parameters, memory, launch
        self.n = len(blocks) * entry.threads
        self.shared = SharedMemory(len(blocks), entry.shared + dynamic_shared)
        lane = np.arange(self.n)
        self.slot, self.warp = lane // entry.threads, lane // 32
        self.block = blocks[self.slot].astype(np.int32)
        x, y, z = (
            self.block % grid[0],
            self.block // grid[0] % grid[1],
            self.block // grid[0] // grid[1],
        )
        special: dict[str, Lanes] = {
            "%tid.x": lane % entry.threads,
            "%tid.y": 0 * lane,
            "%tid.z": 0 * lane,
            "%ntid.x": 0 * lane + entry.threads,
            "%laneid": lane % 32,
            "%ctaid.x": x,
            "%ctaid.y": y,
            "%ctaid.z": z,
            "%nctaid.x": 0 * lane + grid[0],
            "%nctaid.y": 0 * lane + grid[1],
            "%nctaid.z": 0 * lane + grid[2],
        }
        self.registers: dict[str, Lanes] = {k: v.astype(np.uint32) for k, v in special.items()}
        self.pc = np.zeros(self.n, np.int64)
        self.alive = np.ones(self.n, bool)
        self.at_barrier = np.zeros(self.n, bool)
        self.at_shuffle = np.zeros(self.n, bool)

    def execute(self) -> None:
        with np.errstate(all="ignore"):
            while self.alive.any():
                runnable = self.alive & ~self.at_barrier & ~self.at_shuffle
                if not runnable.any():
                    raise Fault("threads wait for others that never come")
                pc = int(self.pc[runnable].min())
                active = runnable & (self.pc == pc)
                rest = self.pc[runnable & ~active]
                self._advance(pc, active, int(rest.min()) if len(rest) else 1 << 60)

    def _advance(self, pc: int, active: Lanes, others: int) -> None:
        """Runs lanes that stand at one instruction, until they part, wait or meet others."""
        while pc < others:
            instruction = self.entry.code[pc]
            mask = active
            if instruction.predicate:
                condition = self.registers[instruction.predicate].astype(bool)
                mask = active & (condition != instruction.negated)
            parts = instruction.parts
            self.launch.dynamic[parts[0]] += int(active.reshape(-1, 32).any(1).sum())
            if parts[0] == "bra":
                target = self.entry.labels[instruction.operands[0]]
                if mask.any() and (mask == active).all():
                    pc = target
                    continue
                if mask.any():
                    self.pc[active] = pc + 1
                    self.pc[mask] = target
                    return
            elif parts[0] in ("ret", "exit"):
                self.pc[active] = pc + 1
                self.alive &= ~mask
                self._release()
                return
            elif parts[0] in ("bar", "barrier"):
                self.pc[active] = pc + 1
                self.at_barrier |= active
                self._release()
                return
            elif parts[0] == "shfl":
                arrived = active | (self.at_shuffle & (self.pc == pc))
                complete = arrived.reshape(-1, 32).all(1).repeat(32)
                self.pc[arrived] = pc
                self.at_shuffle = (self.at_shuffle | active) & ~(arrived & complete)
                active = arrived & complete
                if not active.any():
                    return
                self._shuffle(instruction, active)
            elif mask.any():
                self._simple(instruction, parts, mask)
            pc += 1
        self.pc[active] = pc

    def _release(self) -> None:
        """Lets go on every block all of whose threads wait or have ended."""
        threads = self.entry.threads
        waiting = self.at_barrier.reshape(-1, threads)
        done = (waiting | ~self.alive.reshape(-1, threads)).all(1)
        self.shared.epoch[done & waiting.any(1)] += 1
        self.at_barrier &= ~done.repeat(threads)

    # operands

    def _read(self, operand: str, bits: int) -> Lanes:
        if operand in self.registers:
            return self.registers[operand]
        if operand.startswith(("0f", "0F", "0d", "0D")):
            return np.full(self.n, int(operand[2:], 16), _UNSIGNED[bits])
        if operand in self.entry.symbols:
            return np.full(self.n, self.entry.symbols[operand], _UNSIGNED[bits])
        if operand.startswith("%"):
            raise Fault(f"{operand} is read before it is written")
        return np.full(self.n, int(operand, 0) & ((1 << bits) - 1), _UNSIGNED[bits])

    def _write(self, operand: str, value: Lanes, mask: Lanes) -> None:
        before = self.registers.get(operand)
        if before is None or before.dtype != value.dtype:
            before = np.zeros(self.n, value.dtype)
        self.registers[operand] = np.where(mask, value, before)

    def _address(self, operand: str) -> Lanes:
        base, _, offset = operand.strip("[] ").partition("+")
        return self._read(base.strip(), 64).astype(np.int64) + (int(offset, 0) if offset else 0)

    # instructions

    def _shuffle(self, instruction: Instruction, active: Lanes) -> None:
        to, source, offset, _, members = instruction.operands
        everyone = self._read(members, 32)[active] == 0xFFFFFFFF
        if instruction.parts[2] != "bfly" or not everyone.all():
            raise Fault(f"not known: {instruction}")
        lane = np.arange(self.n)
        partner = lane ^ self._read(offset, 32).astype(np.int64)
        self._write(to.split("|")[0], self._read(source, 32)[partner], active)

    def _simple(self, instruction: Instruction, parts: list[str], mask: Lanes) -> None:
        kind, operands = parts[0], instruction.operands
        if kind in ("ld", "st"):
            self._memory(parts, operands, mask)
        elif kind == "cvt":
            self._write(operands[0], self._convert(parts, operands), mask)
        elif kind == "mov" and operands[1].startswith("{"):
            bits = _bits(parts[-1])
            low, high = (
                self._read(o.strip(), bits // 2) for o in operands[1].strip("{}").split(",")
            )
            joined = low.astype(_UNSIGNED[bits]) | high.astype(_UNSIGNED[bits]) << _UNSIGNED[bits](
                bits // 2
            )
            self._write(operands[0], joined, mask)
        elif kind == "mov" and operands[0].startswith("{"):
            bits, half = _bits(parts[-1]), _bits(parts[-1]) // 2
            value = self._read(operands[1], bits)
            names = [o.strip() for o in operands[0].strip("{}").split(",")]
            for i, name in enumerate(names):
                shifted = value >> _UNSIGNED[bits](half * i)
                self._write(name, shifted.astype(_UNSIGNED[half]), mask)
        elif kind in ("mov", "cvta"):
            bits = 1 if parts[-1] == "pred" else _bits(parts[-1])
            value = self._read(operands[-1], max(bits, 8))
            self._write(operands[0], value.astype(bool) if bits == 1 else value, mask)
        elif kind == "setp":
            a, b = (_typed(self._read(o, _bits(parts[-1])), parts[-1]) for o in operands[1:3])
            self._write(operands[0], _COMPARISONS[parts[1]](a, b), mask)
        elif kind == "selp":
            a, b = (self._read(o, _bits(parts[-1])) for o in operands[1:3])
            self._write(operands[0], np.where(self._read(operands[3], 8).astype(bool), a, b), mask)
        elif parts[-1] == "pred":
            values = [self._read(o, 8).astype(bool) for o in operands[1:]]
            self._write(operands[0], _ARITHMETIC[kind](*values), mask)
        else:
            self._write(operands[0], self._arithmetic(kind, parts, operands), mask)

    def _arithmetic(self, kind: str, parts: list[str], operands: tuple[str, ...]) -> Lanes:
        type_, bits = parts[-1], _bits(parts[-1])
        values = [_typed(self._read(o, bits), type_) for o in operands[1:]]
        if kind in ("shl", "shr"):
            count = self._read(operands[2], 32).astype(values[0].dtype)
            return _raw(values[0] << count if kind == "shl" else values[0] >> count)
        if kind == "fma":
            wide = [v.astype(np.float64) for v in values]
            return _raw((wide[0] * wide[1] + wide[2]).astype(np.float32))
        if kind in ("mul", "mad") and type_[0] in "su":
            wide_type = (_SIGNED if type_[0] == "s" else _UNSIGNED)[
                2 * bits if "wide" in parts else bits
            ]
            product = values[0].astype(wide_type) * values[1].astype(wide_type)
            if parts[1] not in ("lo", "wide"):
                raise Fault(f"not known: {'.'.join(parts)}")
            if kind == "mad":
                product = product + _raw(values[2]).view(wide_type)
            return _raw(product)
        if kind in ("div", "rem") and type_[0] in "su":
            quotient = np.trunc(values[0] / np.where(values[1] == 0, 1, values[1]))
            quotient = quotient.astype(values[0].dtype)  # exact: of 32 bits each
            if bits > 32:
                raise Fault(f"not known: {'.'.join(parts)}")
            return _raw(quotient if kind == "div" else values[0] - quotient * values[1])
        if kind not in _ARITHMETIC:
            raise Fault(f"not known: {'.'.join(parts)}")
        return _raw(_ARITHMETIC[kind](*values))

    def _convert(self, parts: list[str], operands: tuple[str, ...]) -> Lanes:
        to, source = parts[-2:]
        value = self._read(operands[1], _bits(source))
        if source == "f32" and to == "bf16":
            bits = value.astype(np.uint64)
            rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
            return np.where(np.isnan(value.view(np.float32)), 0x7FFF, rounded).astype(np.uint16)
        if source == "bf16":
            return value.astype(np.uint32) << np.uint32(16)
        if "f16" in (to, source) or source[0] in "su":
            number = _typed(value.astype(_UNSIGNED[_bits(source)]), source)
            target: Any = {"f16": np.float16, "f32": np.float32}.get(to)
            if target is None:
                target = (_SIGNED if to[0] == "s" else _UNSIGNED)[_bits(to)]
            return _raw(number.astype(target))
        raise Fault(f"not known: {'.'.join(parts)}")

    def _memory(self, parts: list[str], operands: tuple[str, ...], mask: Lanes) -> None:
        kind, space, type_ = parts[0], parts[1], parts[-1]
        bits, count = _bits(type_), 4 if "v4" in parts else 2 if "v2" in parts else 1
        size, lanes = bits // 8 * count, np.flatnonzero(mask)
        to, address = operands if kind == "ld" else operands[::-1]
        where = self._address(address)[lanes]
        names = [name.strip() for name in to.strip("{} ").split(",")]
        value = None
        if kind == "st":
            columns = [self._read(n, bits).astype(_UNSIGNED[bits])[lanes] for n in names]
            value = np.ascontiguousarray(np.stack(columns, 1)).view(np.uint8)
        if space == "param":
            loaded = self.parameters[where[:, None] + np.arange(size)]
        elif space == "shared":
            loaded = self.shared.access(where, size, self.slot[lanes], self.warp[lanes], value)
        elif space == "global":
            self.launch.widths[size] += 1
            loaded = self.memory.access(where, size, self.block[lanes], value)
        else:
            raise Fault(f"not known: {'.'.join(parts)}")
        if kind == "ld":
            words = np.ascontiguousarray(loaded).view(_UNSIGNED[bits]).reshape(len(lanes), count)
            for i, name in enumerate(names):
                # a register may be wider than what is loaded into it
                wide = (
                    64
                    if name.startswith("%rd")
                    else 32
                    if name.startswith("%r") and bits < 32 and not name.startswith("%rs")
                    else bits
                )
                word = (
                    _raw(_typed(words[:, i], type_).astype(_SIGNED[wide]))
                    if type_[0] == "s"
                    else words[:, i].astype(_UNSIGNED[wide])
                )
                full = np.zeros(self.n, word.dtype)
                full[lanes] = word
                self._write(name, full, mask)


def _bits(type_: str) -> int:
    if not (digits := re.fullmatch(r"(?:b|u|s|f|bf)(\d+)", type_)):
        raise Fault(f"not a type: {type_}")
    return int(digits.group(1))


def _typed(value: Lanes, type_: str) -> Lanes:
    """Raw bits as numbers of a type."""
    bits = _bits(type_)
    value = np.ascontiguousarray(value.astype(_UNSIGNED[bits]))
    if type_[0] == "f":
        return value.view({16: np.float16, 32: np.float32, 64: np.float64}[bits])
    return value.view(_SIGNED[bits]) if type_[0] == "s" else value


def _raw(value: Lanes) -> Lanes:
    if value.dtype == bool:
        return value
    return np.ascontiguousarray(value).view(_UNSIGNED[value.dtype.itemsize * 8])


_COMPARISONS: dict[str, Callable[[Lanes, Lanes], Lanes]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_ARITHMETIC: dict[str, Callable[..., Lanes]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "neg": np.negative,
}
