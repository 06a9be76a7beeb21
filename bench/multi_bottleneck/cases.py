"""The rows of batched bottleneck adapters."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

from ..case import DTYPES, Case

SHAPES = ((64, 32, 768, 48), (2048, 8, 768, 48))
"""Tokens, adapters, features, width."""


@dataclass(frozen=True)
class MultiBottleneckCase(Case):
    """A stack of Houlsby adapters, each with as many tokens of the batch, in any order."""

    family: ClassVar[str] = "multi_bottleneck"

    adapters: int
    features: int
    bottleneck: int

    @property
    def label(self) -> str:
        return f"{self.tokens} × {self.features} → {self.bottleneck} {self.adapters} adapters"

    @property
    def token_adapters(self) -> list[int]:
        found = [t % self.adapters for t in range(self.tokens)]
        random.Random(0).shuffle(found)
        return found

    @property
    def order(self) -> tuple[Any, ...]:
        shape = (self.features, self.bottleneck, self.adapters, self.tokens)
        return (list(DTYPES).index(self.dtype), self.train, *shape)

    @property
    def work(self) -> tuple[int, int]:
        """Rows are gathered and added up again; each adapter is read, in training its gradient written."""
        rows, weights = 12 * self.tokens * self.features, 2 * self._weights
        return self.flops, (3 if self.train else 1) * (rows + weights) * DTYPES[self.dtype].itemsize

    @property
    def flops(self) -> int:
        """Down and up; backward twice that."""
        return (12 if self.train else 4) * self.tokens * self.features * self.bottleneck

    @property
    def bytes(self) -> int:
        """Compulsory traffic: x, skip, y, weights once; in backward dy, x, skip, dx, dskip, weights, gradients."""
        rows = self.tokens * self.features
        forward = 3 * rows + self._weights
        return (forward + (5 * rows + 2 * self._weights if self.train else 0)) * DTYPES[
            self.dtype
        ].itemsize

    @property
    def _weights(self) -> int:
        return 2 * self.adapters * self.features * self.bottleneck


def quick_cases() -> list[MultiBottleneckCase]:
    """Serving many users and training a few at once."""
    return [
        MultiBottleneckCase("fp32", *shape, mode=mode)
        for shape in SHAPES
        for mode in ("decode", "train")
    ]


def full_cases() -> list[MultiBottleneckCase]:
    """Every row."""
    return quick_cases() + [
        MultiBottleneckCase("bf16", *shape, mode=mode)
        for shape in SHAPES
        for mode in ("decode", "train")
    ]
