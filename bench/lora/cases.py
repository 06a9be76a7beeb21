"""The rows of the LoRA linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pelt_fast.testing.workloads import Adapter
from pelt_fast.testing.workloads import Case as Workload

from ..case import DTYPES, Case, with_compile

RANK = 8
SCALING = 2.0
DROPOUT = 0.1
SHAPES = ((768, 768), (768, 3072), (3072, 768), (1024, 1024))
TOKENS = (1, 8, 16, 512, 2048, 8192)
DECODE_TOKENS = (1, 2, 4, 8, 16)
DECODE_SHAPE = (4096, 4096)


@dataclass(frozen=True)
class LoRACase(Case):
    """One linear with one adapter of rank `RANK`."""

    family: ClassVar[str] = "lora"

    in_features: int
    out_features: int

    @property
    def label(self) -> str:
        return f"{self.tokens} × {self.in_features} → {self.out_features}"

    @property
    def workload(self) -> Workload:
        adapter = Adapter(RANK, SCALING)
        return Workload(str(self), (self.tokens,), self.in_features, self.out_features, (adapter,))

    @property
    def order(self) -> tuple[Any, ...]:
        shape = (self.in_features, self.out_features, self.tokens)
        return (list(DTYPES).index(self.dtype), not self.train, *shape)

    @property
    def work(self) -> tuple[int, int]:
        """The frozen linear is nearly all of it."""
        return self.frozen_flops, 0

    @property
    def frozen_flops(self) -> int:
        """Forward, and in training dX."""
        return (4 if self.train else 2) * self.tokens * self.in_features * self.out_features

    @property
    def flops(self) -> int:
        """With LoRA: shrink and expand; in training dS, dB, dA and LoRA's part of dX too."""
        lora = self.tokens * RANK * (self.in_features + self.out_features)
        return self.frozen_flops + (6 if self.train else 2) * lora

    @property
    def bytes(self) -> int:
        """Compulsory traffic: x, W, A, B, y once; in training dy, W, x, dx, A, B, dA, dB too."""
        weight = self.in_features * self.out_features
        adapters = RANK * (self.in_features + self.out_features)
        rows = self.tokens * (self.in_features + self.out_features)
        forward = rows + weight + adapters
        backward = rows + self.tokens * self.in_features + weight + 2 * adapters
        return (forward + (backward if self.train else 0)) * DTYPES[self.dtype].itemsize


def quick_cases() -> list[LoRACase]:
    """Representative rows, the short ones first, so that a spent budget cuts off few."""
    both = ("fp32", "bf16")
    rows = [LoRACase(dtype, t, 768, 768) for t in (1, 16) for dtype in both]
    rows += [LoRACase("fp16", 16, 768, 768)]
    rows += [LoRACase(dtype, t, *DECODE_SHAPE, mode="decode") for t in (1, 16) for dtype in both]
    rows += [LoRACase(dtype, t, *shape) for t in (512, 2048) for shape in SHAPES for dtype in both]
    rows += [LoRACase(dtype, 8192, 768, 768) for dtype in both]
    return with_compile(
        rows, lambda case: case.tokens == 512 and case.in_features == 768 == case.out_features
    )


def full_cases() -> list[LoRACase]:
    """Every row."""
    rows = [
        LoRACase(dtype, tokens, *shape)
        for dtype in ("fp32", "bf16")
        for shape in SHAPES
        for tokens in TOKENS
    ]
    rows += [LoRACase("fp16", tokens, 768, 768) for tokens in TOKENS]
    rows += [
        LoRACase(dtype, tokens, *DECODE_SHAPE, mode="decode")
        for dtype in ("fp32", "bf16", "fp16")
        for tokens in DECODE_TOKENS
    ]
    return with_compile(rows, lambda case: case.tokens in (16, 512, 2048))
