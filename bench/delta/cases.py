"""The rows of diff pruning and masking."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..case import DTYPES, Case

KINDS = ("diff pruning", "masking")
EAGER_PASSES = {"diff pruning": 45, "masking": 12}
"""About as many tensors of the weight's size does an eager step read or write beside the products."""


@dataclass(frozen=True)
class DeltaCase(Case):
    """A linear with gates for each entry of its weight."""

    family: ClassVar[str] = "delta"

    in_features: int
    out_features: int
    kind: str = field(default="diff pruning", kw_only=True)

    @property
    def label(self) -> str:
        return f"{self.tokens} × {self.in_features} → {self.out_features} {self.kind}"

    @property
    def order(self) -> tuple[Any, ...]:
        shape = (self.in_features, self.out_features, self.tokens)
        return (list(DTYPES).index(self.dtype), KINDS.index(self.kind), *shape)

    @property
    def work(self) -> tuple[int, int]:
        return self.flops, EAGER_PASSES[self.kind] * self._weight + self._rows

    @property
    def flops(self) -> int:
        """Forward, dX and the weight's gradient."""
        return 6 * self.tokens * self.in_features * self.out_features

    @property
    def bytes(self) -> int:
        """Rows once; in each pass the parameters and what is made of them."""
        weights = 11 if self.kind == "diff pruning" else 8
        return weights * self._weight + self._rows

    @property
    def _weight(self) -> int:
        return self.in_features * self.out_features * DTYPES[self.dtype].itemsize

    @property
    def _rows(self) -> int:
        return (
            3 * self.tokens * (self.in_features + self.out_features) * DTYPES[self.dtype].itemsize
        )


def quick_cases() -> list[DeltaCase]:
    """BERT-base's linears, with a training batch and with a short sentence."""
    shapes = ((32, 768, 768), (1024, 768, 768), (1024, 768, 3072))
    return [DeltaCase("fp32", *shape, kind=kind) for kind in KINDS for shape in shapes]


def full_cases() -> list[DeltaCase]:
    """Every row."""
    more = [
        DeltaCase(dtype, *shape, kind=kind)
        for kind in KINDS
        for dtype, *shape in (("fp32", 1024, 3072, 768), ("bf16", 1024, 768, 768))
    ]
    return quick_cases() + more
