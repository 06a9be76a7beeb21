"""Expand: every projection's output in one launch, y_i = base_i + c · (s_i B_gᵀ), each row with its own adapter.

s (T, ΣR), B_g (N_i, R_i), base_i and y_i (T, N_i), g the row's adapter, c = scaling_g · row_scale in fp32 on the fp32
accumulator; one rounding. Rows without an adapter are base's, or 0; changed in place they are not touched. y is written
once, at the rows' own places: nothing is sorted in memory. In decode s comes as fp32 partials of the shrink: each
program sums those of its rows in order, and the first block of columns stores s, rounded.

Parallelism: parts of tiles × blocks of columns of all projections.
Bound: HBM; bytes = base + y + B of every adapter in the batch + s.
Deterministic: yes; tiles are too low for anything but mma.sync, so a row gets the same bits in any batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..common.cost import Cost, itemsize
from ..common.tiling import cdiv, power_of_two
from .shrink import sum_of_parts
from .tiles import (
    open_tile,
    rank_of,
    readable,
    row_scale_of,
    scaling_of,
    side_by_side,
    starts_of,
    unsupported,
    weight_tile,
)

__all__ = ["ExpandConfig", "candidate_configs", "cost", "default_config", "unsupported"]


@dataclass(frozen=True)
class ExpandConfig:
    """Tile sizes; ``tile``: the rows of the plan's tiles, 16 or 64, ``block_t``: of a program."""

    tile: int
    block_t: int
    block_n: int
    block_r: int
    num_warps: int = 4
    num_stages: int = 2


@lru_cache(maxsize=1024)
def default_config(problem: Any) -> ExpandConfig:
    """A configuration from shapes alone; block_r, which decides about bits, from the rank alone."""
    wide = itemsize(problem.dtype) == 4
    block_r = power_of_two(problem.rank, 16, 32 if wide else 64)
    tile = 16 if problem.tokens <= 512 else 64
    block_t = 16 if tile == 16 else 32
    block_n = 64 if wide else (256 if tile == 16 and block_r <= 32 else 128)
    # Ranks whose rows begin anywhere are loaded one element at a time, and take more registers.
    ragged = any(rank % 8 for rank in problem.ranks)
    block_n = min(64 if ragged else block_n, power_of_two(max(problem.out_features), 16))
    return ExpandConfig(tile, block_t, block_n, block_r)


def candidate_configs(problem: Any) -> Iterator[ExpandConfig]:
    """What an offline tuner should try."""
    base = default_config(problem)
    for tile, block_t in ((16, 16), (64, 16), (64, 32)):
        for block_n in (64, 128, 256):
            for num_warps in (2, 4, 8):
                yield replace(
                    base, tile=tile, block_t=block_t, block_n=block_n, num_warps=num_warps
                )


@triton.jit(do_not_specialize=["count"])
def _expand_kernel(
    s_ptr,
    partial_ptr,
    weights,
    bases,
    ys,
    tiles_ptr,
    perm_ptr,
    ranks,
    scalings,
    row_scale_ptr,
    count,
    columns,
    strides,
    strides_base,
    strides_y,
    scale,
    STARTS: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    INPLACE: tl.constexpr,
    PER_TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    TOTAL: tl.constexpr = STARTS[len(STARTS) - 1]
    adapter, rows, live, tokens = open_tile(tiles_ptr, perm_ptr, PER_TILE, BLOCK_T)
    if rows <= 0:
        return
    row_scale = row_scale_of(row_scale_ptr, adapter, tokens, live)
    block = tl.program_id(1)
    for i in tl.static_range(len(ys)):
        blocks = tl.cdiv(columns[i], BLOCK_N)
        if (block >= 0) & (block < blocks):
            WIDTH: tl.constexpr = STARTS[i + 1] - STARTS[i]
            rank = rank_of(ranks[i], adapter, WIDTH)
            cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
            live_n = cols < columns[i]
            end = rank
            if SPLITS > 0:
                # The first block of columns stores s: all of it, zeros past the rank too.
                stored = tl.where(block == 0, WIDTH, 0)
                end = tl.maximum(stored, rank)
            acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
            for first in tl.range(0, end, BLOCK_R, num_stages=1):
                lanes = first + tl.arange(0, BLOCK_R)
                at = tokens[:, None] * TOTAL + STARTS[i] + lanes[None, :]
                mask = live[:, None] & readable(lanes, rank, WIDTH)[None, :]
                if SPLITS > 0:
                    total = sum_of_parts(partial_ptr, at, mask, count, TOTAL, SPLITS)
                    s = (total * scale).to(s_ptr.dtype.element_ty)
                    tl.store(s_ptr + at, s, mask=live[:, None] & (lanes < stored)[None, :])
                else:
                    s = tl.load(s_ptr + at, mask=mask, other=0.0)
                b = weight_tile(
                    *(weights[i], adapter, strides[i], lanes, rank, cols, live_n),
                    WIDTH,
                    SIDE_BY_SIDE[i],
                    s.dtype,
                )
                acc = tl.dot(s, tl.trans(b), acc, input_precision=PRECISION)
            factor = row_scale * scaling_of(scalings[i], adapter)
            y = tl.where(adapter >= 0, acc * factor[:, None], 0.0)
            if INPLACE:
                mask = live[:, None] & (cols < tl.where(adapter >= 0, columns[i], 0))[None, :]
            else:
                mask = live[:, None] & live_n[None, :]
            if bases[i] is not None:
                base = bases[i] + tokens[:, None] * strides_base[i] + cols[None, :]
                y += tl.load(base, mask=mask, other=0.0).to(tl.float32)
            out = ys[i] + tokens[:, None] * strides_y[i] + cols[None, :]
            tl.store(out, y.to(ys[i].dtype.element_ty), mask=mask)
        block -= blocks


def launch_expand(
    s: Tensor,
    partial: Tensor | None,
    lora_b: Sequence[Tensor],
    base: Sequence[Tensor | None],
    y: Sequence[Tensor],
    plan: Sequence[Tensor],
    ranks: Sequence[Tensor],
    scalings: Sequence[Tensor],
    row_scale: Tensor | None,
    scale: float,
    inplace: bool,
    config: ExpandConfig,
    precision: str,
) -> None:
    """s (T, ΣR) contiguous, lora_b[i] (L, N_i, R_i) of any strides, base[i] and y[i] (T, N_i), rows of last stride 1.

    ``partial``: fp32 (parts, T, ΣR) of the shrink, which are summed, multiplied by ``scale`` and stored to s; or None.
    ``inplace``: y[i] is base[i].
    """
    tokens = s.shape[0]
    columns = tuple([b.shape[1] for b in lora_b])
    tiles = plan[3 if config.tile == 16 else 4]
    per_tile = config.tile // config.block_t
    weights = [b.transpose(1, 2) for b in lora_b]
    _expand_kernel[(tiles.shape[0] * per_tile, sum([cdiv(n, config.block_n) for n in columns]))](
        s,
        partial,
        tuple(weights),
        tuple(base),
        tuple(y),
        tiles,
        plan[1],
        tuple(ranks),
        tuple(scalings),
        row_scale,
        tokens,
        columns,
        tuple([w.stride() for w in weights]),
        tuple([0 if b is None else b.stride(0) for b in base]),
        tuple([t.stride(0) for t in y]),
        scale,
        STARTS=starts_of([b.shape[2] for b in lora_b]),
        SIDE_BY_SIDE=side_by_side(weights),
        SPLITS=0 if partial is None else partial.shape[0],
        INPLACE=inplace,
        PER_TILE=per_tile,
        BLOCK_T=config.block_t,
        BLOCK_N=config.block_n,
        BLOCK_R=config.block_r,
        PRECISION=precision,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,  # said aloud: Triton 3.9 warns, and 3.10 changes the default
    )


def cost(problem: Any) -> Cost:
    """Every adapter in the batch: s, B and base in, y out."""
    t, n, r = problem.tokens, sum(problem.out_features), problem.rank
    present, size = min(problem.adapters, problem.tokens), itemsize(problem.dtype)
    projections = len(problem.out_features)
    return Cost(2 * t * n * r, size * (2 * t * n + present * n * r + projections * t * r))
