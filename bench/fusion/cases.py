"""The rows of AdapterFusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pelt_fast.testing.adapter_workloads import PFEIFFER
from pelt_fast.testing.fusion_workloads import FusionCase as Workload

from ..case import DTYPES, Case


@dataclass(frozen=True)
class FusionCase(Case):
    """N Pfeiffer adapters of one width and their attention, the attention trained and the adapters frozen."""

    family: ClassVar[str] = "fusion"

    features: int
    bottleneck: int
    adapters: int

    @property
    def label(self) -> str:
        return f"{self.tokens} × {self.features} → {self.adapters} × {self.bottleneck}"

    @property
    def workload(self) -> Workload:
        widths = (self.bottleneck,) * self.adapters
        return Workload(str(self), (self.tokens,), self.features, widths, "relu", **PFEIFFER)

    @property
    def order(self) -> tuple[Any, ...]:
        shape = (self.features, self.bottleneck, self.adapters, self.tokens)
        return (list(DTYPES).index(self.dtype), *shape)

    @property
    def work(self) -> tuple[int, int]:
        """Eager's: 2 N + 1 products with d × d matrices, 80 passes over T × d and 36 for each further adapter."""
        d, n, tokens = self.features, self.adapters, self.tokens
        flops = 6 * tokens * d * (d * (2 * n + 1) + 2 * n * self.bottleneck)
        return flops, (200 + 60 * n) * tokens * d * DTYPES[self.dtype].itemsize

    @property
    def flops(self) -> int:
        """In the bottlenecks: 3 M + 2 N columns for each token, 3 of M + N to fold; backward twice that."""
        columns = self.adapters * (self.bottleneck + 1)
        return 18 * columns * self.features * (self.tokens + self.features)

    @property
    def bytes(self) -> int:
        """o, x, y and their gradients once, and the matrices."""
        rows, matrices = 8 * self.tokens * self.features, 9 * self.features**2
        return (rows + matrices) * DTYPES[self.dtype].itemsize


def quick_cases() -> list[FusionCase]:
    """BERT-base with three adapters: a training batch, and a short sentence, which is cheaper unfolded."""
    return [FusionCase("fp32", tokens, 768, 48, 3) for tokens in (32, 1024)]


def full_cases() -> list[FusionCase]:
    """Every row."""
    more = [("bf16", 1024, 768, 48, 3), ("fp32", 1024, 768, 48, 8), ("fp32", 4096, 768, 48, 3)]
    return quick_cases() + [FusionCase(*row) for row in more]
