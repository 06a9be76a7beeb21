"""The tables of kernels/README.md: ``python -m pelt_fast.testing.gpu_free.report``.

Bytes are counted by running the kernels interpreted; registers and occupancy are read from machine code. No times.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch

from ...backends.triton_ import adapter as triton_adapter
from ...backends.triton_ import lora as triton_lora
from ...kernels.common.hardware import l2_cache
from ..adapter_workloads import HOULSBY, PFEIFFER, AdapterCase, AdapterInputs
from ..oracle import as_rows
from ..workloads import Adapter, Case, LoRAInputs
from . import Trace, compiling, dram_bytes, inspect_launches, interpreting

BYTES_CASE = Case("bytes", (1024,), 1024, 1024, (Adapter(16),), bias=False)
CODE_CASE = Case("code", (4096,), 4096, 4096, (Adapter(16, 0.5, 0.1),), bias=False)
ADAPTER_BYTES_CASE = AdapterCase("bytes", (2048,), 768, 48, **HOULSBY)
ADAPTER_CODE_CASE = AdapterCase("code", (2048,), 768, 64, **PFEIFFER, dropout_p=0.1)


def launches(inputs: LoRAInputs) -> tuple[Callable[[], None], Callable[[], None]]:
    """Forward and backward of one call, to be run in this order."""
    rows, n = as_rows(inputs), len(inputs.lora_a)
    seed = torch.zeros(1, dtype=torch.int64) if any(rows.dropout_p) else None
    rest, saved = (rows.scaling, rows.dropout_p, seed), []

    def forward() -> None:
        weights = (rows.weight, rows.bias, rows.lora_a, rows.lora_b, rows.lora_bias)
        saved.append(triton_lora.lora_linear_fwd(rows.x, *weights, *rest)[1])

    def backward() -> None:
        triton_lora.lora_linear_bwd(
            rows.dy,
            rows.x,
            rows.weight,
            rows.lora_a,
            rows.lora_b,
            saved[0],
            *rest,
            need_dx=True,
            need_dbias=False,
            need_da=[True] * n,
            need_db=[True] * n,
            need_dlora_bias=[False] * n,
        )

    return forward, backward


def compulsory_bytes(case: Case, size: int, backward: bool) -> int:
    """Every tensor of the call once: inputs read, results written."""
    t, k, n, r = case.tokens, case.in_features, case.out_features, sum(case.ranks)
    base, adapters, s = t * k + t * n + k * n, r * (k + n), t * r
    if not backward:
        return size * (base + adapters + s)
    return size * (base + t * k + 2 * adapters + s)


def adapter_compulsory_bytes(inputs: AdapterInputs, backward: bool) -> int:
    """Every tensor of the call once: arguments and what forward saved read, results written.

    One gradient serves x and skip where they are alike.
    """
    tensors = dict(inputs.named_tensors())
    dy, x = tensors.pop("dy"), tensors["x"]
    saved = x.element_size() * inputs.tokens * inputs.down.shape[0]
    saved += 8 * inputs.tokens * ((inputs.pre_weight is not None) + (inputs.ln_weight is not None))
    arguments = sum(t.nbytes for t in tensors.values())
    if not backward:
        return arguments + saved + x.nbytes
    alike = inputs.skip_in and inputs.residual_x == inputs.residual_skip
    results = arguments - (x.nbytes if alike else 0)
    # of the biases that are added last backward reads nothing
    unread = sum(t.nbytes for t in (inputs.down_bias, inputs.ln_bias) if t is not None)
    return dy.nbytes + arguments - unread + saved + results


def eager_bytes(case: Case, size: int, backward: bool) -> int:
    """PEFT's composition in one dtype: each ATen operation reads its operands and writes its result."""
    t, k, n, r = case.tokens, case.in_features, case.out_features, sum(case.ranks)
    x, y, s, weight, a, b = t * k, t * n, t * r, k * n, r * k, r * n
    masked = any(adapter.dropout_p for adapter in case.adapters)
    mask = x // size if masked else 0  # one byte an element
    if not backward:
        dropout = 2 * x + mask if masked else 0
        linear, shrink, expand = x + weight + y, x + a + s, s + b + y
        scale, add = 2 * y, 3 * y
        return size * (dropout + linear + shrink + expand + scale + add)
    scale, grad_b, grad_s = 2 * y, y + s + b, y + b + s
    grad_a, through_a, dropout = s + x + a, s + a + x, 2 * x + mask if masked else 0
    base, add = y + weight + x, 3 * x
    return size * (scale + grad_b + grad_s + grad_a + through_a + dropout + base + add)


def adapter_launches(inputs: AdapterInputs) -> tuple[Callable[[], None], Callable[[], None]]:
    """The same for the bottleneck adapter, every gradient wanted."""
    seed = torch.zeros(1, dtype=torch.int64) if inputs.dropout_p else None
    x, skip, *parameters = inputs.operands
    rest: tuple[Any, ...] = (*parameters, seed, *inputs.settings)
    needs, saved = [t is not None for t in inputs.operands], list[Any]()
    assert x is not None

    def forward() -> None:
        saved.extend(triton_adapter.bottleneck_adapter_fwd(x, skip, *rest)[1:])

    def backward() -> None:
        triton_adapter.bottleneck_adapter_bwd(*(inputs.dy, x, skip, *saved, *rest, needs))

    return forward, backward


def adapter_eager_bytes(case: AdapterCase, size: int, backward: bool) -> int:
    """Houlsby's block in the `adapters` library: each ATen operation reads its operands and writes its result."""
    rows, q = case.tokens * case.features, case.tokens * case.bottleneck
    weight = case.features * case.bottleneck
    down, up = rows + weight + q, q + weight + rows
    if not backward:
        activation, scaling, residuals, layernorm = 2 * q, 2 * rows, 6 * rows, 2 * rows
        return size * (down + activation + up + scaling + residuals + layernorm)
    # its rows, and once more dy and s for the sums over tokens
    layernorm, scaling, activation = 5 * rows, 2 * rows, 3 * q
    biases, residual = rows + q, 3 * rows
    return size * (layernorm + scaling + 2 * up + activation + 2 * down + biases + residual)


def byte_rows() -> Iterator[tuple[str, ...]]:
    """What each launch of `BYTES_CASE` loads and stores, in MiB."""
    passes = launches(BYTES_CASE.make(torch.bfloat16))
    for name, run, backward in zip(("forward", "backward"), passes, (False, True), strict=True):
        trace = yield from _launch_rows(name, run)
        counted = sum(_once(launch.loaded, launch.footprint) for launch in trace.launches)
        counted += sum(sum(launch.stored.values()) for launch in trace.launches)
        compulsory = compulsory_bytes(BYTES_CASE, 2, backward)
        eager = eager_bytes(BYTES_CASE, 2, backward)
        yield name, "all, tiles re-read from L2 left out", "", _mib(counted), ""
        yield name, "compulsory", "", _mib(compulsory), ""
        yield name, "PEFT eager, bf16 adapter", "", _mib(eager), ""


def adapter_byte_rows() -> Iterator[tuple[str, ...]]:
    """The same of `ADAPTER_BYTES_CASE`; minutes, for its many small programs."""
    inputs = ADAPTER_BYTES_CASE.make(torch.bfloat16)
    passes = adapter_launches(inputs)
    for name, run, backward in zip(("forward", "backward"), passes, (False, True), strict=True):
        trace = yield from _launch_rows(name, run)
        counted = dram_bytes(trace.launches, l2_cache("sm_90"))
        yield name, "all, to DRAM (`dram_bytes`)", "", _mib(counted), ""
        yield name, "compulsory", "", _mib(adapter_compulsory_bytes(inputs, backward)), ""
        eager = adapter_eager_bytes(ADAPTER_BYTES_CASE, 2, backward)
        yield name, "adapters eager", "", _mib(eager), ""


def _launch_rows(name: str, run: Callable[[], None]) -> Generator[tuple[str, ...], None, Trace]:
    trace = Trace()
    with interpreting(trace, capability=90):
        run()
    for launch in trace.launches:
        loaded, stored = sum(launch.loaded.values()), sum(launch.stored.values())
        yield name, launch.name.strip("_"), str(launch.programs), _mib(loaded), _mib(stored)
    return trace


def code_rows() -> Iterator[tuple[str, ...]]:
    """Registers, shared memory, tensor-core instructions and occupancy of each kernel of the two code cases."""
    for capability in (80, 90, 100):
        with compiling(capability) as compiled:
            for run in (
                *launches(CODE_CASE.make(torch.bfloat16)),
                *adapter_launches(ADAPTER_CODE_CASE.make(torch.bfloat16)),
            ):
                run()
        for report in inspect_launches(compiled):
            yield (
                f"sm_{capability}",
                report.name.strip("_"),
                str(report.registers),
                str(report.spills),
                f"{report.shared / 1024:.0f}",
                str(report.warps),
                str(report.tensor_core),
                f"{report.occupancy:.0%}",
            )


def _once(loaded: dict[str, int], footprint: dict[str, int]) -> int:
    """Loaded bytes, each argument at most once: what reaches DRAM when re-reads hit the L2 cache."""
    return sum(min(count, footprint[name]) for name, count in loaded.items())


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f}"


def _print(header: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> None:
    for row in (header, tuple("---" for _ in header), *rows):
        print("| " + " | ".join(row) + " |", flush=True)  # noqa: T201


if __name__ == "__main__":
    for rows in (byte_rows(), adapter_byte_rows()):
        _print(("pass", "launch", "programs", "loaded, MiB", "stored, MiB"), rows)
    _print(
        (
            "arch",
            "kernel",
            "registers",
            "spills",
            "shared, KiB",
            "warps",
            "tensor-core",
            "occupancy",
        ),
        code_rows(),
    )
