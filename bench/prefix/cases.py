"""The rows of attention over a prefix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..case import DTYPES, Case

HEADS, HEAD_DIM = 12, 64  # of BERT-base and GPT-2


@dataclass(frozen=True)
class PrefixCase(Case):
    """One attention layer; ``tokens`` are the queries of all samples."""

    family: ClassVar[str] = "prefix"

    batch: int
    keys: int
    prefix: int
    mode: str = field(default="decode", kw_only=True)  # forward, without gradients
    masked: bool = field(default=False, kw_only=True)

    @property
    def queries(self) -> int:
        return self.tokens // self.batch

    @property
    def label(self) -> str:
        mask = " masked" if self.masked else ""
        return f"{self.batch} × {self.queries} → {self.prefix}+{self.keys}{mask}"

    @property
    def order(self) -> tuple[Any, ...]:
        return (list(DTYPES).index(self.dtype), self.batch, self.queries, self.keys, self.prefix)

    @property
    def work(self) -> tuple[int, int]:
        return self.flops, 3 * self.bytes

    @property
    def flops(self) -> int:
        """Scores and their product with the values."""
        return 4 * self.tokens * (self.prefix + self.keys) * HEADS * HEAD_DIM

    @property
    def bytes(self) -> int:
        """Queries, keys and values once, the result once."""
        rows = 2 * self.tokens + 2 * self.batch * self.keys + 2 * self.prefix
        return rows * HEADS * HEAD_DIM * DTYPES[self.dtype].itemsize


def quick_cases() -> list[PrefixCase]:
    """BERT-base with adapters' and with UniPELT's prefix, a short sentence, and a decoding step over a cache."""
    return [
        PrefixCase("fp32", 1024, 8, 128, 30),
        PrefixCase("fp32", 1024, 8, 128, 10, masked=True),
        PrefixCase("fp32", 32, 1, 32, 30),
        PrefixCase("fp32", 8, 8, 512, 30),
    ]


def full_cases() -> list[PrefixCase]:
    """Every row."""
    return [
        *quick_cases(),
        PrefixCase("fp32", 1024, 2, 512, 30),
        PrefixCase("fp32", 1, 1, 2048, 30),
        PrefixCase("bf16", 1024, 8, 128, 30),
    ]
