"""Several active adapters in one launch: their ranks stand side by side, each with its own scale and mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl


class AdapterTable(NamedTuple):
    """The adapters as a kernel sees them, in run-time scalars; rank columns [ends[i-1], ends[i]) are adapter i's."""

    ends: tuple[int, ...]
    scales: tuple[float, ...]
    # int32 with the bits of the uint32 threshold, so that its type never changes
    thresholds: tuple[int, ...]

    @classmethod
    def make(
        cls, ranks: Sequence[int], scales: Sequence[float], dropout_p: Sequence[float]
    ) -> AdapterTable:
        """The table of adapters with these ranks; ``scales`` multiply what each contributes."""
        ends, end = [], 0
        for rank in ranks:
            end += rank
            ends.append(end)
        bits = [min(round(p * 2**32), 2**32 - 1) for p in dropout_p]
        signed = tuple(b - 2**32 if b >= 2**31 else b for b in bits)
        return cls(tuple(ends), tuple(map(float, scales)), signed)


@triton.jit
def scale_of_rank(ranks, ends, scales):
    """The scale of the adapter that each rank column belongs to, fp32."""
    result = tl.zeros(ranks.shape, tl.float32)
    for i in tl.static_range(len(ends)):
        result = tl.where((ranks < ends[i]) & (ranks >= rank_start(ends, i)), scales[i], result)
    return result


@triton.jit
def rank_start(ends, i: tl.constexpr):
    """The first rank column of adapter i."""
    if i == 0:
        return 0
    else:
        return ends[i - 1]
