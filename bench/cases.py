"""The rows of the kernel table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from pelt_fast.testing.workloads import Adapter
from pelt_fast.testing.workloads import Case as Workload

RANK = 8
SCALING = 2.0
DROPOUT = 0.1
SHAPES = ((768, 768), (768, 3072), (3072, 768), (1024, 1024))
TOKENS = (1, 8, 16, 512, 2048, 8192)
DECODE_TOKENS = (1, 2, 4, 8, 16)
DECODE_SHAPE = (4096, 4096)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One row: a training step (forward, backward), or a decoding step (forward, no gradient)."""

    dtype: str
    tokens: int
    in_features: int
    out_features: int
    mode: str = "train"  # | "decode"
    compiled: bool = False  # torch.compile is a contender here

    def __str__(self) -> str:
        return f"{self.dtype}-{self.mode}-T{self.tokens}-{self.in_features}x{self.out_features}"

    @property
    def train(self) -> bool:
        return self.mode == "train"

    @property
    def passes(self) -> tuple[str, ...]:
        return ("forward", "backward", "both") if self.train else ("forward",)

    @property
    def workload(self) -> Workload:
        adapter = Adapter(RANK, SCALING)
        return Workload(str(self), (self.tokens,), self.in_features, self.out_features, (adapter,))

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


def quick_cases() -> list[Case]:
    """Representative rows, the short ones first, so that a spent budget cuts off few."""
    both = ("fp32", "bf16")
    rows = [Case(dtype, t, 768, 768) for t in (1, 16) for dtype in both]
    rows += [Case("fp16", 16, 768, 768)]
    rows += [Case(dtype, t, *DECODE_SHAPE, mode="decode") for t in (1, 16) for dtype in both]
    rows += [Case(dtype, t, *shape) for t in (512, 2048) for shape in SHAPES for dtype in both]
    rows += [Case(dtype, 8192, 768, 768) for dtype in both]
    return _with_compile(
        rows, lambda case: case.tokens == 512 and case.in_features == 768 == case.out_features
    )


def full_cases() -> list[Case]:
    """Every row."""
    rows = [
        Case(dtype, tokens, *shape)
        for dtype in ("fp32", "bf16")
        for shape in SHAPES
        for tokens in TOKENS
    ]
    rows += [Case("fp16", tokens, 768, 768) for tokens in TOKENS]
    rows += [
        Case(dtype, tokens, *DECODE_SHAPE, mode="decode")
        for dtype in ("fp32", "bf16", "fp16")
        for tokens in DECODE_TOKENS
    ]
    return _with_compile(rows, lambda case: case.tokens in (16, 512, 2048))


def _with_compile(rows: list[Case], wanted: Callable[[Case], bool]) -> list[Case]:
    return [replace(case, compiled=case.train and wanted(case)) for case in rows]


def sort_key(case: Case) -> tuple[int, bool, int, int, int]:
    """The order in which rows are shown."""
    dtypes = list(DTYPES)
    return (
        dtypes.index(case.dtype),
        not case.train,
        case.in_features,
        case.out_features,
        case.tokens,
    )
