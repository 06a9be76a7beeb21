"""Kernels run as they are: compiled on a GPU (`--device cuda`), interpreted and checked on a CPU."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from pelt_fast.testing import oracle
from pelt_fast.testing.workloads import Adapter, Case, LoRAInputs

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


@pytest.fixture
def kernels(device: str) -> Kernels:
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        pytest.skip(
            "TRITON_INTERPRET=1 keeps Triton from compiling; these tests interpret by themselves"
        )
    return Kernels(device)


@pytest.fixture(params=["tiles and strips", "split reduction"])
def several_programs(request: pytest.FixtureRequest) -> Case:
    """More than one program in every grid, partials of every reduction, ragged edges."""
    if request.param == "split reduction":
        return Case("split", (20,), 1040, 24, (Adapter(20),))
    return Case("tiles", (70,), 132, 70, (Adapter(20, 0.5, 0.25),))
