"""The dropout mask, made in registers: Philox4x32-10 keyed on (seed, element index), independent of the tiling.

Element e = t · in + k of adapter i is kept iff word e % 4 of philox(seed, (lo32(e // 4), hi32(e // 4), i, 0)) is at
least the threshold. Forward and both backward kernels draw the same bits for the same element, whatever their tiles.
Where rows start on a multiple of four, one Philox call serves four neighbours; otherwise each element makes its own.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep_mask(
    seed,
    rows,
    first_column,
    in_features,
    adapter: tl.constexpr,
    threshold,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BY_FOUR: tl.constexpr,
):
    """bool (BLOCK_T, BLOCK_K) for the rows (BLOCK_T,) and BLOCK_K columns from ``first_column``, a multiple of four."""
    limit = tl.full([1, 1], threshold, tl.int32).to(tl.uint32, bitcast=True)
    if BY_FOUR:
        columns = first_column // 4 + tl.arange(0, BLOCK_K // 4)
        w0, w1, w2, w3 = _words(
            seed, rows.to(tl.int64)[:, None] * (in_features // 4) + columns[None, :], adapter
        )
        pairs = tl.join(tl.join(w0 >= limit, w2 >= limit), tl.join(w1 >= limit, w3 >= limit))
        return tl.reshape(pairs, [BLOCK_T, BLOCK_K])
    else:
        columns = first_column + tl.arange(0, BLOCK_K)
        element = rows.to(tl.int64)[:, None] * in_features + columns[None, :]
        w0, w1, w2, w3 = _words(seed, element // 4, adapter)
        lane = element % 4
        word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
        return word >= limit


@triton.jit
def _words(seed, counter, adapter: tl.constexpr):
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, tl.zeros_like(low) + adapter, tl.zeros_like(low))
