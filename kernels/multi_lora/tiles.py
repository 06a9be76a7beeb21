"""What every kernel of the family reads of a plan: tiles of rows of one adapter, and the adapter's rank and factor.

A plan is made once for a batch (``MultiAdapterPlan`` of the package): `perm` (T,) has the tokens by adapter, `tiles16`
and `tiles64` (n, 4) have rows of (adapter or -1, first position in perm, rows, 0), n from capacities alone, rows = 0
where unused. Tiles start where adapters start, so whatever is computed for an adapter never depends on its neighbours.
A tile may be served by several programs, each with a part of its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.tiling import known_multiple, rank_alignment

CHUNK_ROWS = 512
"""Rows of a chunk of a sum over an adapter's tokens; the last one of an adapter has fewer."""


def unsupported(problem: Any) -> list[str]:
    """Why the kernels of this family cannot run the problem; empty when they can."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return (
        []
        if problem.dtype in dtypes
        else [f"{problem.dtype} is not one of float32, bfloat16, float16"]
    )


@triton.jit
def open_tile(tiles_ptr, perm_ptr, PER_TILE: tl.constexpr, BLOCK_T: tl.constexpr):
    """This program's rows of its tile: adapter (-1: none), their number (<= 0: none), which are live, their tokens."""
    tile = tl.program_id(0) // PER_TILE
    before = (tl.program_id(0) % PER_TILE) * BLOCK_T
    at = tiles_ptr + tile * 4
    rows = tl.load(at + 2) - before
    lane = tl.arange(0, BLOCK_T)
    live = lane < rows
    tokens = tl.load(perm_ptr + tl.load(at + 1) + before + lane, mask=live, other=0)
    return tl.load(at), rows, live, tokens.to(tl.int64)


@triton.jit
def rank_of(ranks_ptr, adapter, width):
    """The adapter's rank, at most ``width``; 0 where there is no adapter."""
    rank = tl.load(ranks_ptr + adapter, mask=adapter >= 0, other=0)
    return tl.minimum(tl.maximum(rank, 0), width)


@triton.jit
def row_scale_of(row_scale_ptr, adapter, tokens, live):
    """The factor of each row in fp32; 0 where there is no adapter, 1 where no factors are given."""
    if row_scale_ptr is not None:
        named = tl.zeros(tokens.shape, tl.int32) + adapter >= 0
        return tl.load(row_scale_ptr + tokens, mask=live & named, other=0.0).to(tl.float32)
    else:
        return tl.full(tokens.shape, 1.0, tl.float32)


@triton.jit
def scaling_of(scaling_ptr, adapter):
    """The adapter's scaling in fp32; 0 where there is no adapter."""
    return tl.load(scaling_ptr + adapter, mask=adapter >= 0, other=0.0).to(tl.float32)


@triton.jit
def factor_of(scaling_ptr, row_scale_ptr, adapter, tokens, live):
    """c of each row, scaling · row_scale in fp32; 0 where there is no adapter."""
    return row_scale_of(row_scale_ptr, adapter, tokens, live) * scaling_of(scaling_ptr, adapter)


@triton.jit
def readable(lanes, rank, WIDTH: tl.constexpr):
    """Which rank columns are read: those below the rank, and as many more as make whole vectors of eight.

    A mask that may end anywhere would load element by element. Whoever reads more than the rank selects it away.
    """
    whole = lanes < tl.cdiv(rank, 8) * 8
    return whole if WIDTH % 8 == 0 else whole & (lanes < WIDTH)


@triton.jit
def weight_tile(
    ptr,
    adapter,
    strides,
    lanes,
    rank,
    inner,
    live_inner,
    WIDTH: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    dtype: tl.constexpr,
):
    """[inner, lanes] of an adapter's A or B, seen through strides of (adapter, rank, inner); 0 past its rank.

    SIDE_BY_SIDE: where ranks are neighbours in memory, so that vectors are along them, what their rows are aligned to.
    """
    slot = ptr + adapter.to(tl.int64) * strides[0]
    row = known_multiple(strides[2], SIDE_BY_SIDE) if SIDE_BY_SIDE > 1 else strides[2]
    at = inner.to(tl.int64)[:, None] * row + lanes.to(tl.int64)[None, :] * strides[1]
    if SIDE_BY_SIDE > 0:
        mask = live_inner[:, None] & readable(lanes, rank, WIDTH)[None, :]
        tile = tl.load(slot + at, mask=mask, other=0.0)
        tile = tl.where((lanes < rank)[None, :], tile, 0.0)
    else:
        mask = live_inner[:, None] & (lanes < rank)[None, :]
        tile = tl.load(slot + at, mask=mask, other=0.0)
    return tile.to(dtype)


def side_by_side(weights: Sequence[Tensor]) -> tuple[int, ...]:
    """Of each (L, R, inner) whose ranks are neighbours a power of two that divides the stride of inner; else 0."""
    return tuple(
        [
            rank_alignment(w.stride(2)) if w.stride(1) == 1 and w.stride(2) > 1 else 0
            for w in weights
        ]
    )


def starts_of(widths: Sequence[int]) -> tuple[int, ...]:
    """Columns of s at which the projections begin, and where the last one ends."""
    return tuple(accumulate(widths, initial=0))


def threshold_of(dropout_p: float) -> int:
    """Bits of the uint32 that the random bits of a kept element reach, as an int32."""
    bits = min(round(dropout_p * 2**32), 2**32 - 1)
    return bits - 2**32 if bits >= 2**31 else bits
