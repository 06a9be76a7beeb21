"""The inputs that tests and benchmarks share, so that both speak about the same problem.

A `Case` says what a call looks like (shapes, layouts, adapters); `Case.make` draws its tensors. Tensors are drawn in
the target dtype, so that an fp64 oracle sees exactly the numbers that a kernel sees. `lora_b` is never zero: at the
zero that LoRA starts from, the gradient of `lora_a` vanishes and any backward looks right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import inputs
from .inputs import LAYOUTS, Inputs

__all__ = [
    "ADAPTERS",
    "CASES",
    "DROPOUT",
    "FP16_OVERFLOW",
    "LAYOUTS",
    "MIXED_DTYPE",
    "RANKS",
    "SHAPES",
    "STRIDES",
    "Adapter",
    "Case",
    "LoRAInputs",
]


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter of a case."""

    rank: int
    scaling: float = 0.5
    dropout_p: float = 0.0
    bias: bool = False


@dataclass(frozen=True)
class LoRAInputs(Inputs):
    """The tensors of one `lora_linear` call, and the gradient that comes back to it."""

    operation = "lora_linear"
    weight: Tensor
    bias: Tensor | None
    lora_a: tuple[Tensor, ...]
    lora_b: tuple[Tensor, ...]
    lora_bias: tuple[Tensor | None, ...]
    scaling: tuple[float, ...]
    dropout_p: tuple[float, ...]

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments of `functional.lora_linear`."""
        return (self.x, self.weight, self.bias, self.lora_a, self.lora_b, self.scaling)

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of `functional.lora_linear`."""
        return {
            "lora_bias": self.lora_bias,
            "dropout_p": self.dropout_p,
            "training": any(self.dropout_p),
        }


@dataclass(frozen=True)
class Case:
    """One `lora_linear` problem; ``shape`` is the shape of x without its last dimension."""

    name: str
    shape: tuple[int, ...]
    in_features: int
    out_features: int
    adapters: tuple[Adapter, ...] = (Adapter(8),)
    bias: bool = True
    x_layout: str = "contiguous"
    dy_layout: str = "contiguous"
    weight_layout: str = "contiguous"
    adapter_dtype: torch.dtype | None = None  # None: the dtype of x
    x_std: float = 1.0
    lora_a_std: float | None = None  # None: 1 / sqrt(in_features)

    def __str__(self) -> str:
        return self.name

    @property
    def tokens(self) -> int:
        """Rows of x, all leading dimensions together."""
        return math.prod(self.shape)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each adapter."""
        return tuple(adapter.rank for adapter in self.adapters)

    def make(
        self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
    ) -> LoRAInputs:
        """Draw the tensors; the same seed draws the same numbers on every device."""
        generator = torch.Generator().manual_seed(seed)

        def draw(
            *shape: int, std: float = 1.0, layout: str = "contiguous", dtype: torch.dtype = dtype
        ) -> Tensor:
            return inputs.draw(shape, std, layout, dtype, device, generator)

        adapter_dtype = self.adapter_dtype or dtype
        n_in, n_out = self.in_features, self.out_features
        a_std = n_in**-0.5 if self.lora_a_std is None else self.lora_a_std
        return LoRAInputs(
            x=draw(*self.shape, n_in, std=self.x_std, layout=self.x_layout),
            weight=draw(n_out, n_in, std=n_in**-0.5, layout=self.weight_layout),
            bias=draw(n_out) if self.bias else None,
            lora_a=tuple(draw(a.rank, n_in, std=a_std, dtype=adapter_dtype) for a in self.adapters),
            lora_b=tuple(
                draw(n_out, a.rank, std=a.rank**-0.5, dtype=adapter_dtype) for a in self.adapters
            ),
            lora_bias=tuple(
                draw(n_out, dtype=adapter_dtype) if a.bias else None for a in self.adapters
            ),
            scaling=tuple(a.scaling for a in self.adapters),
            dropout_p=tuple(a.dropout_p for a in self.adapters),
            dy=draw(*self.shape, n_out, layout=self.dy_layout),
        )


def _adapters(*ranks: int, **fields: Any) -> tuple[Adapter, ...]:
    return tuple(Adapter(rank, **fields) for rank in ranks)


SHAPES = (
    Case("no_tokens", (0,), 24, 40),
    Case("one_token", (1,), 24, 40),
    Case("one_dim", (), 24, 40),
    Case("odd", (7,), 13, 29, _adapters(3)),
    Case("three_dims", (2, 5), 24, 40),
    Case("four_dims", (2, 3, 2), 24, 40),
    Case("empty_batch", (2, 0, 3), 24, 40),
    Case("all_ones", (1,), 1, 1, _adapters(1)),
    Case("few_features", (5,), 3, 2, _adapters(8)),
    Case("wide_in", (9,), 515, 6, _adapters(3)),
    Case("wide_out", (9,), 6, 515, _adapters(3)),
    Case("past_one_tile", (67,), 129, 131, _adapters(16)),
    Case("whole_tiles", (64,), 128, 192, _adapters(16)),
    Case("many_tokens", (515,), 40, 56, _adapters(8)),
)
RANKS = tuple(
    Case(f"rank_{rank}", (19,), 72, 56, _adapters(rank)) for rank in (1, 3, 8, 16, 64, 129, 256)
)
ADAPTERS = (
    Case("no_bias", (6,), 24, 40, bias=False),
    Case("lora_bias", (6,), 24, 40, _adapters(8, bias=True)),
    Case("lora_bias_alone", (6,), 24, 40, _adapters(8, bias=True), bias=False),
    Case("zero_scaling", (6,), 24, 40, _adapters(8, scaling=0.0)),
    Case("negative_scaling", (6,), 24, 40, _adapters(8, scaling=-2.0)),
    Case(
        "three_adapters",
        (11,),
        40,
        56,
        (Adapter(3, 2.0), Adapter(16, -0.25, bias=True), Adapter(129, 0.5)),
    ),
)
STRIDES = (
    *(
        Case(f"x_{layout}", (4, 6), 40, 24, x_layout=layout)
        for layout in ("sliced", "strided_rows", "transposed", "permuted", "expanded")
    ),
    *(
        Case(f"dy_{layout}", (4, 6), 40, 24, dy_layout=layout)
        for layout in ("sliced", "strided_rows", "transposed", "permuted", "expanded", "constant")
    ),
    Case("x_and_dy_expanded", (16,), 40, 24, x_layout="expanded", dy_layout="expanded"),
    Case("weight_transposed", (6,), 40, 24, weight_layout="transposed"),
    Case("weight_sliced", (6,), 40, 24, weight_layout="sliced"),
)
DROPOUT = (
    Case("dropout", (33,), 40, 24, _adapters(8, dropout_p=0.1)),
    Case("dropout_odd", (7,), 13, 29, _adapters(3, dropout_p=0.5)),
    Case("dropout_all", (7,), 24, 40, _adapters(8, dropout_p=1.0)),
    Case("dropout_strided_x", (4, 6), 30, 24, _adapters(8, dropout_p=0.3), x_layout="transposed"),
    Case(
        "dropout_each_its_own",
        (17,),
        40,
        24,
        (Adapter(8, 1.0, 0.5), Adapter(3, 0.5, 0.0, bias=True), Adapter(16, -1.0, 0.1)),
    ),
)
MIXED_DTYPE = tuple(
    replace(case, name=f"fp32_adapter_{case.name}", adapter_dtype=torch.float32)
    for case in (*SHAPES[3:5], SHAPES[11], ADAPTERS[5], DROPOUT[4])
)
# drop(x) Aᵀ passes fp16's 65504 before the scaling and is far below it after.
FP16_OVERFLOW = Case(
    "near_overflow", (9,), 64, 40, _adapters(8, scaling=2**-8), x_std=64.0, lora_a_std=200.0
)

CASES = (*SHAPES, *RANKS, *ADAPTERS, *STRIDES, *DROPOUT)
"""What every backend meets in every dtype it serves."""
