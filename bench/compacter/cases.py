"""The rows of the Compacter adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pelt_fast.testing import compacter_workloads
from pelt_fast.testing.adapter_workloads import HOULSBY

from ..case import DTYPES, Case

PRODUCTS = 4  # of the library's configs, with rank 1
EAGER_PASSES = 34
"""About as many tensors of T × d does an eager step read or write."""


@dataclass(frozen=True)
class CompacterCase(Case):
    """One adapter with residual and layernorm, LN(o + up(gelu(down(o))) + x), everything trained."""

    family: ClassVar[str] = "compacter"

    features: int
    bottleneck: int

    @property
    def label(self) -> str:
        decode = "" if self.train else ", forward alone"
        return f"{self.tokens} × {self.features} → {self.bottleneck}{decode}"

    @property
    def workload(self) -> compacter_workloads.CompacterCase:
        sizes = ((self.tokens,), self.features, self.bottleneck, "gelu")
        return compacter_workloads.CompacterCase(str(self), *sizes, phm_dim=PRODUCTS, **HOULSBY)

    @property
    def order(self) -> tuple[Any, ...]:
        return (list(DTYPES).index(self.dtype), self.train, self.features, self.tokens)

    @property
    def work(self) -> tuple[int, int]:
        """The library's, with dense products."""
        flops = (12 if self.train else 4) * self.tokens * self.features * self.bottleneck
        return flops, EAGER_PASSES * self.tokens * self.features * DTYPES[self.dtype].itemsize

    @property
    def flops(self) -> int:
        """Through the factors: both projections; backward twice that."""
        width = 2 * PRODUCTS
        products = self.tokens * width * (self.features + PRODUCTS * self.bottleneck)
        return 2 * products * (3 if self.train else 1)

    @property
    def bytes(self) -> int:
        """Compulsory traffic: x, skip and y; in backward dy, x, skip, dx and dskip."""
        return self.tokens * self.features * (8 if self.train else 3) * DTYPES[self.dtype].itemsize


def quick_cases() -> list[CompacterCase]:
    """BERT-base's sizes: one short sample and eight of 128 tokens."""
    rows = [CompacterCase("fp32", tokens, 768, 24, mode="decode") for tokens in (32, 1024)]
    return rows + [CompacterCase(dtype, 1024, 768, 24) for dtype in ("fp32", "bf16")]


def full_cases() -> list[CompacterCase]:
    """Every row."""
    rows = quick_cases()
    for dtype in DTYPES:
        rows += [
            CompacterCase(dtype, tokens, d, d // 32) for tokens in (512, 8192) for d in (768, 1024)
        ]
    return rows
