"""Multi-LoRA in CUDA C++ without a GPU: its PTX on CPU tensors through its own host code, and its machine code."""

from __future__ import annotations

import fcntl
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")  # its wheel brings the disassembler
from pelt_fast.backends.cuda import multi_lora as backend
from pelt_fast.segments import MultiAdapterPlan
from pelt_fast.testing.gpu_free import ptx
from pelt_fast.testing.gpu_free.cuda_runtime import EmulatedLibrary, command, nvcc
from pelt_fast.testing.gpu_free.sass import BINARIES

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="no CUDA toolkit: nvcc is not on PATH")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> EmulatedLibrary:
    """Built once for all workers."""
    folder = tmp_path_factory.getbasetemp()
    if folder.name.startswith("popen-"):  # a worker's
        folder = folder.parent
    sources = [SOURCES / "multi_lora.cu", SOURCES / "multi_lora_op.cpp"]
    with open(folder / "emulated_cuda.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        flags = ["-DPELT_FAST_CUDA_DISPATCH_KEY=CPU"]
        return EmulatedLibrary(sources, folder / "emulated_cuda", flags)


@dataclass
class Emulated:
    """The backend, its operator's launches emulated."""

    library: EmulatedLibrary
    launches: list[ptx.Launch]

    def operator(self, *args: Any) -> None:
        with self.library.emulating(_tensors(args)) as launches:
            torch.ops.pelt_fast_cuda.multi_lora_fwd.default(*args)
        self.launches += launches


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list):
            yield from _tensors(value)


@pytest.fixture
def emulated(library: EmulatedLibrary, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    found = Emulated(library, [])
    monkeypatch.setattr(backend, "_operator", lambda: found.operator)
    return found


class Projection(NamedTuple):
    out_features: int
    rank: int
    base: bool = True
    ranks: tuple[int, ...] | None = None  # of the adapters; None: the rank


@dataclass(frozen=True)
class Case:
    ids: tuple[int, ...]
    adapters: int
    in_features: int
    projections: tuple[Projection, ...]
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype | None = None
    row_scale: torch.dtype | None = None
    inplace: bool = False
    layout: Callable[[Tensor], Tensor] = lambda t: t

    def make(self) -> dict[str, Any]:
        """Arguments of `multi_lora_fwd`; what stands beyond an adapter's rank is NaN."""
        generator = torch.Generator().manual_seed(len(self.ids) * 1000 + self.in_features)

        def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(dtype)

        tokens, k = len(self.ids), self.in_features
        weight_dtype = self.adapter_dtype or self.dtype
        plan = MultiAdapterPlan(self.ids, self.adapters)
        lora_a, lora_b, base, ranks, scaling = [], [], [], [], []
        for p in self.projections:
            given = torch.tensor(p.ranks or (p.rank,) * self.adapters, dtype=torch.int32)
            a = random(self.adapters, p.rank, k, dtype=weight_dtype, scale=k**-0.5)
            b = random(self.adapters, p.out_features, p.rank, dtype=weight_dtype)
            for i, rank in enumerate(given.clamp(0, p.rank).tolist()):
                a[i, rank:], b[i, :, rank:] = torch.nan, torch.nan
            lora_a.append(self.layout(a))
            lora_b.append(self.layout(b))
            one = self.layout(random(tokens, p.out_features, dtype=self.dtype))
            base.append(one if p.base else None)
            ranks.append(given)
            scaling.append(torch.rand(self.adapters, generator=generator) + 0.5)
        row_scale = None
        if self.row_scale:
            row_scale = random(tokens, dtype=self.row_scale)
        return {
            "x": self.layout(random(tokens, k, dtype=self.dtype)),
            "lora_a": lora_a,
            "lora_b": lora_b,
            "base": base,
            "plan": plan.arrays,
            "ranks": ranks,
            "scaling": scaling,
            "row_scale": row_scale,
            "dropout_p": 0.0,
            "seed": None,
            "inplace": self.inplace,
        }


def _wide(t: Tensor) -> np.ndarray:
    return t.double().numpy()


def _assert_accurate(case: Case, args: dict[str, Any], y: list[Tensor], s: Tensor) -> None:
    """Against NumPy in fp64: s from x and A; y from the kernel's own s, so that each bound is one rounding."""
    unit = torch.finfo(case.dtype).eps / 2
    single = 2.0**-24
    x, used, first = _wide(args["x"]), np.array(case.ids), 0
    live = (used >= 0) & (used < case.adapters)
    for i, p in enumerate(case.projections):
        a, b = _wide(args["lora_a"][i]), _wide(args["lora_b"][i])
        ranks = args["ranks"][i].clamp(0, p.rank).numpy()
        got_s = _wide(s[:, first : first + p.rank])
        first += p.rank
        before = args["base"][i]
        for t in range(len(used)):
            start = np.zeros(p.out_features) if before is None else _wide(before[t])
            rank = ranks[used[t]] if live[t] else 0
            assert not got_s[t, rank:].any()
            got_y = _wide(y[i][t])
            if rank == 0:
                np.testing.assert_array_equal(got_y, start)
                continue
            g = used[t]
            products = a[g, :rank] * x[t]
            exact = products.sum(1)
            bound = unit * np.abs(exact) + 32 * single * np.abs(products).sum(1)
            assert (np.abs(got_s[t, :rank] - exact) <= bound).all()
            factor = float(args["scaling"][i][g])
            if args["row_scale"] is not None:
                factor *= float(args["row_scale"][t])
            products = factor * b[g, :, :rank] * got_s[t, :rank]
            exact = start + products.sum(1)
            inner = np.abs(products).sum(1) + np.abs(start)
            bound = unit * np.abs(exact) + (rank + 4) * single * inner
            assert (np.abs(got_y - exact) <= bound).all()


def _padded(t: Tensor) -> Tensor:
    """The same numbers in rows that start at no multiple of 16 bytes."""
    wider = torch.full((*t.shape[:-1], t.shape[-1] + 1), torch.nan, dtype=t.dtype)
    wider[..., 1:] = t
    return wider[..., 1:]


def _far_rows(t: Tensor) -> Tensor:
    """The same numbers in longer rows, aligned."""
    wider = torch.full((*t.shape[:-1], t.shape[-1] + 16), torch.nan, dtype=t.dtype)
    wider[..., : t.shape[-1]] = t
    return wider[..., : t.shape[-1]]


def _transposed(t: Tensor) -> Tensor:
    """Weights (L, R, K) whose last dimension does not lie closest; x and base as they are."""
    return t.mT.contiguous().mT if t.dim() == 3 else t


MIXED = (2, 0, -1, 2, 5, 0, 2, 7, 2, 0, 2, 2, 2, 2)  # a tile of 8 of one adapter, 3, 1, two of none
ONE = (Projection(72, 16),)
QKV = (Projection(136, 16), Projection(40, 8), Projection(24, 16, ranks=(16, 0, 3, 9, 16, 1)))
VALUES = {
    "bfloat16": Case(MIXED, 6, 264, ONE),
    "float16": Case(MIXED, 6, 264, ONE, torch.float16),
    "float32": Case(MIXED, 6, 264, ONE, torch.float32),
    "bfloat16_with_float32_adapters": Case(MIXED, 6, 264, ONE, adapter_dtype=torch.float32),
    "float16_with_float32_adapters": Case(
        MIXED, 6, 264, ONE, torch.float16, adapter_dtype=torch.float32
    ),
    "every_token_its_own": Case((3, 0, 2, 1, 4), 5, 512, ONE),
    "one_token": Case((1,), 2, 4104, ONE),  # more than sixteen passes over K: two each
    "full_tiles": Case((0,) * 37, 1, 64, ONE, torch.float32),
    "all_null": Case((-1,) * 5, 3, 64, ONE),
    "several_projections": Case(MIXED, 6, 264, QKV, row_scale=torch.float32),
    "more_than_one_launch": Case(MIXED, 6, 72, (Projection(24, 8),) * 6),
    "ranks_of_their_own": Case(
        MIXED, 6, 264, (Projection(72, 24, ranks=(24, 1, 7, 0, -3, 99)),), row_scale=torch.float16
    ),
    "odd": Case(MIXED, 6, 261, (Projection(73, 5, ranks=(5, 1, 4, 0, 2, 3)),)),
    "odd_float32": Case(MIXED, 6, 261, (Projection(73, 5, base=False),), torch.float32),
    "rank_256": Case((0, 1, 1), 2, 24, (Projection(40, 256, ranks=(256, 201)),)),
    "rank_1": Case(MIXED, 6, 24, (Projection(8, 1),)),
    "unaligned": Case(MIXED, 6, 264, QKV, layout=_padded),
    "far_rows": Case(MIXED, 6, 264, QKV, layout=_far_rows, inplace=True),
    "transposed": Case(MIXED, 6, 264, QKV, layout=_transposed),
    "no_base": Case(MIXED, 6, 264, (Projection(72, 16, base=False), Projection(72, 16))),
    "in_place": Case(MIXED, 6, 264, QKV, inplace=True),
}
QUICK = ("bfloat16", "float16", "odd_float32", "several_projections", "unaligned", "in_place")


@needs_nvcc
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in VALUES]
)
def test_values(name: str, emulated: Emulated):
    case = VALUES[name]
    args = case.make()
    kept = {**args, "base": [None if b is None else b.clone() for b in args["base"]]}
    y, s = backend.multi_lora_fwd(**args)
    _assert_accurate(case, kept, y, s)
    if case.inplace:
        assert all(one is base for one, base in zip(y, args["base"], strict=True))


@needs_nvcc
def test_a_token_has_the_same_bits_alone_and_in_any_batch(emulated: Emulated):
    case = replace(VALUES["ranks_of_their_own"], row_scale=None, in_features=520)
    args = case.make()
    y, s = backend.multi_lora_fwd(**args)
    for t in (0, 2, 7, 13):  # of a tile of eight, of none, alone in its tile, the last
        alone = {**args, "x": args["x"][t : t + 1], "base": [b[t : t + 1] for b in args["base"]]}
        alone["plan"] = MultiAdapterPlan(case.ids[t : t + 1], case.adapters).arrays
        one, its_s = backend.multi_lora_fwd(**alone)
        assert torch.equal(one[0][0], y[0][t])
        assert torch.equal(its_s[0], s[t])


@needs_nvcc
def test_layouts_have_the_same_bits(emulated: Emulated):
    case = VALUES["several_projections"]
    y, s = backend.multi_lora_fwd(**case.make())
    again, its_s = backend.multi_lora_fwd(**replace(case, layout=_padded).make())
    assert torch.equal(s, its_s)
    assert all(map(torch.equal, y, again))


@needs_nvcc
def test_an_adapter_is_read_once_for_a_tile(emulated: Emulated):
    """Five tokens of five adapters, then fifteen of them: the weights that come from memory are the same."""
    few = Case((3, 0, 2, 1, 4), 5, 512, (Projection(256, 16),))
    for case in (few, replace(few, ids=few.ids * 3)):
        args = case.make()
        emulated.launches.clear()
        backend.multi_lora_fwd(**args)
        shrink, expand = emulated.launches
        assert shrink.loaded[args["lora_a"][0].data_ptr()] == args["lora_a"][0].nbytes
        assert expand.loaded[args["lora_b"][0].data_ptr()] == args["lora_b"][0].nbytes
        # x once for each split of K that reads it, y once
        assert shrink.loaded[args["x"].data_ptr()] == args["x"].nbytes
        assert args["base"][0].nbytes in expand.stored.values()
        assert shrink.widths[16] > 0
        assert expand.widths[16] > 0
        assert not shrink.widths[2] + expand.widths[1]


@needs_nvcc
@pytest.mark.parametrize("barrier", [1, 2])
def test_the_emulator_misses_a_barrier(barrier: int, emulated: Emulated):
    """Of each kernel: without what stands between a write to shared memory and another warp's read, it faults."""
    kept = dict(emulated.library.entries)
    found = 0
    try:
        for name, entry in kept.items():
            at = [i for i, one in enumerate(entry.code) if one.opcode.startswith("bar")]
            if len(at) >= barrier:
                code = list(entry.code)
                code[at[barrier - 1]] = replace(
                    code[at[0]], opcode="mov.b32", operands=("%gone", "0")
                )
                emulated.library.entries[name] = replace(entry, code=code)
                found += 1
        assert found
        with pytest.raises(ptx.Fault, match="no barrier between"):
            backend.multi_lora_fwd(**replace(VALUES["bfloat16"], ids=(0,) * 16).make())
    finally:
        emulated.library.entries.update(kept)


@needs_nvcc
@pytest.mark.parametrize("name", ["lora_a", "lora_b"])
def test_the_emulator_keeps_to_the_tensors(name: str, emulated: Emulated):
    """The last adapter's last row is one element short."""
    case = replace(VALUES["bfloat16"], ids=(5,))
    args = case.make()
    (weights,) = args[name]
    memory = weights.flatten()[:-1].clone()
    short = memory.as_strided((5, *weights.shape[1:]), weights.stride())
    args[name] = [short]
    with pytest.raises(ptx.Fault, match="outside of every tensor"):
        backend.multi_lora_fwd(**args)


def _compile(architecture: int, folder: Path) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Registers and opcodes of each kernel."""
    cubin = folder / f"{architecture}.cubin"
    flags = (f"-arch=sm_{architecture}", "-cubin", "-O3")
    subprocess.run(command(*flags, str(SOURCES / "multi_lora.cu"), "-o", str(cubin)), check=True)

    def output(tool: str, *more: str) -> str:
        what = [str(BINARIES / tool), *more, str(cubin)]
        return subprocess.run(what, capture_output=True, text=True, check=True).stdout

    usage = output("cuobjdump", "--dump-resource-usage")
    registers = {
        name: int(count) for name, count in re.findall(r"Function (\S+):\s+REG:(\d+)", usage)
    }
    opcodes: dict[str, list[str]] = {}
    for section in re.split(r"\.section\s", output("nvdisasm", "-c")):
        name = re.match(r"\.text\.(\w+)", section)
        if name:
            opcodes[name.group(1)] = re.findall(
                r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]+)", section
            )
    return registers, opcodes


@needs_nvcc
@pytest.mark.skipif(
    not (BINARIES / "nvdisasm").exists(), reason="this triton has no NVIDIA disassembler"
)
@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_machine_code(architecture: int, tmp_path: Path):
    """No spills, 16-byte accesses where rows are aligned, at least three blocks on a multiprocessor, no atomics."""
    registers, opcodes = _compile(architecture, tmp_path)
    assert len(registers) == 20
    assert opcodes.keys() == registers.keys()
    for name, count in registers.items():
        aligned = "Lb1E" in name
        assert count <= (128 if aligned or "expand" in name else 168), name
        found = opcodes[name]
        assert len(found) > 500, name
        assert not [one for one in found if one.startswith(("LDL", "STL", "ATOM", "RED."))], name
        if aligned:
            assert [one for one in found if one.startswith("LDG.E.128")], name
            assert "expand" not in name or [one for one in found if one.startswith("STG.E.128")]


@dataclass(frozen=True)
class Problem:
    op: str = "multi_lora_fwd"
    device_type: str = "cuda"
    arch: str = "sm_90"
    dtype: torch.dtype = torch.bfloat16
    rank: int = 16
    dropout: bool = False


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (Problem(op="multi_lora_bwd"), "forward only"),
        (Problem(device_type="cpu", arch="avx2"), "the tensors are on cpu"),
        (Problem(arch="sm_75"), "older than sm_80"),
        (Problem(dtype=torch.float64), "no kernel for torch.float64"),
        (Problem(rank=257), "rank 257 is above 256"),
        (Problem(dropout=True), "no dropout"),
    ],
)
def test_what_is_not_served_has_a_reason(problem: Problem, reason: str):
    assert [one for one in backend.unsupported(problem) if reason in one]
    assert not [one for one in backend.unsupported(Problem()) if reason in one]


def test_it_is_never_chosen_by_itself():
    from pelt_fast.dispatch.registry import AUTOMATIC

    assert "cuda" not in AUTOMATIC
    assert backend.priority(Problem()) == 0
