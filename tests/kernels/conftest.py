"""Kernels run as they are: compiled on a GPU (`--device cuda`), interpreted and checked on a CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from pelt_fast.testing import adapter_oracle, oracle
from pelt_fast.testing.adapter_workloads import AdapterInputs
from pelt_fast.testing.workloads import Adapter, Case, LoRAInputs

AnyKernels = TypeVar("AnyKernels", bound="Kernels")
SEED = -0x0123456789ABCDEF  # both halves of Philox's key differ, and the sign bit is set


@dataclass(frozen=True)
class Kernels:
    """The Triton backend's operations on one device, without autograd, operators and dispatch above them."""

    device: str

    def seed(self, inputs: LoRAInputs) -> Tensor | None:
        return torch.tensor([SEED], device=self.device) if any(inputs.dropout_p) else None

    def masks(self, inputs: LoRAInputs) -> list[Tensor | None]:
        return oracle.masks(inputs, self.seed(inputs))

    def context(self, trace: Any = None, capability: int = 80) -> Any:
        """Where launches work: as they are on a GPU; interpreted, under the trace, on a CPU."""
        if self.device != "cpu":
            return nullcontext()
        from pelt_fast.testing.gpu_free import interpreting

        return interpreting(trace, capability)

    def run(self, inputs: LoRAInputs, trace: Any = None, capability: int = 80) -> oracle.Results:
        """y and every gradient but the frozen weight's, by name."""
        with self.context(trace, capability):
            return self.launch(inputs)

    def launch(self, inputs: LoRAInputs) -> oracle.Results:
        from pelt_fast.backends.triton_ import lora as triton_lora

        rows, seed, n = oracle.as_rows(inputs), self.seed(inputs), len(inputs.lora_a)
        factors = (rows.scaling, rows.dropout_p, seed)
        y, s = triton_lora.lora_linear_fwd(
            rows.x, rows.weight, rows.bias, rows.lora_a, rows.lora_b, rows.lora_bias, *factors
        )
        dx, dbias, da, db, dlora_bias = triton_lora.lora_linear_bwd(
            *(rows.dy, rows.x, rows.weight, rows.lora_a, rows.lora_b, s, *factors),
            need_dx=True,
            need_dbias=rows.bias is not None,
            need_da=[True] * n,
            need_db=[True] * n,
            need_dlora_bias=[bias is not None for bias in rows.lora_bias],
        )
        results = {"y": y, "x": dx, "bias": dbias}
        for i in range(n):
            results |= {f"lora_a.{i}": da[i], f"lora_b.{i}": db[i], f"lora_bias.{i}": dlora_bias[i]}
        return {name: value for name, value in results.items() if value is not None}


@dataclass(frozen=True)
class AdapterKernels(Kernels):
    """The same of the bottleneck adapter; results fit `adapter_oracle.as_rows` of the inputs."""

    def seed(self, inputs: AdapterInputs) -> Tensor | None:
        return torch.tensor([SEED], device=self.device) if inputs.dropout_p else None

    def mask(self, inputs: AdapterInputs) -> Tensor | None:
        return adapter_oracle.mask(inputs, self.seed(inputs))

    def launch(self, inputs: AdapterInputs, wanted: Iterable[str] | None = None) -> oracle.Results:
        from pelt_fast.backends.triton_ import adapter

        return adapter_oracle.run_backend(adapter, inputs, self.seed(inputs), wanted)

    def run_wanted(self, inputs: AdapterInputs, wanted: Iterable[str]) -> oracle.Results:
        """`run` that asks for these gradients alone."""
        from pelt_fast.testing.gpu_free import Trace

        with self.context(Trace("random")):
            return self.launch(inputs, wanted)


@pytest.fixture
def kernels(device: str) -> Kernels:
    return _on(device, Kernels)


@pytest.fixture
def adapter_kernels(device: str) -> AdapterKernels:
    return _on(device, AdapterKernels)


def _on(device: str, kind: type[AnyKernels]) -> AnyKernels:
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        pytest.skip(
            "TRITON_INTERPRET=1 keeps Triton from compiling; these tests interpret by themselves"
        )
    return kind(device)


@pytest.fixture(params=["tiles and strips", "split reduction"])
def several_programs(request: pytest.FixtureRequest) -> Case:
    """More than one program in every grid, partials of every reduction, ragged edges."""
    if request.param == "split reduction":
        return Case("split", (20,), 1040, 24, (Adapter(20),))
    return Case("tiles", (70,), 132, 70, (Adapter(20, 0.5, 0.25),))


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.fixture
def far_rows(tmp_path: Path) -> Callable[[Tensor, str], Tensor]:
    """The same rows, 2**30 elements apart, in the middle of storage that takes up no memory until it is written."""

    def moved(rows: Tensor, name: str) -> Tensor:
        stride, middle = 2**30, 2**31
        size = 2 * middle + rows.shape[1]
        if rows.device.type == "cpu":
            path = str(tmp_path / name)
            storage = torch.from_file(path, shared=True, size=size, dtype=rows.dtype)
        else:
            storage = torch.zeros(size, dtype=rows.dtype, device=rows.device)
        far = storage.as_strided(rows.shape, (stride, 1), middle)
        far.copy_(rows)
        return far

    return moved


@pytest.fixture
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles: chunks, tiles of the bottleneck, strips and slabs, more than one of each at 36 x 40 x 20."""
    from pelt_fast.kernels.adapter import forward, grad_columns, grad_rows

    columns = grad_columns.ColumnsConfig(16, 32, 16, 2)
    held = forward.ForwardConfig(16, 32, 16, True)
    monkeypatch.setattr(forward, "default_config", lambda problem: held)
    monkeypatch.setattr(
        grad_rows, "default_config", lambda problem: grad_rows.RowsConfig(16, 32, 16)
    )
    monkeypatch.setattr(grad_columns, "default_config", lambda problem: columns)
    monkeypatch.setattr(grad_columns, "slab_rows", lambda problem, streams: 32)
