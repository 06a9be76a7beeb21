"""Shrink: the rank-r product of every token with its own adapter, for all projections in one launch.

    forward   s = 1/(1-p) · (mask ⊙ x) A_gᵀ        x (T, in),     A_g (R, in),   unscaled
    backward  ds = c · dY_i B_g                     dY_i (T, N_i), B_g (N_i, R)   then also drow_scale

g is the token's adapter, c = scaling_g · row_scale. s (T, ΣR) in x's dtype, rounded once; 0 past the rank of g and
where there is no adapter. The reduced dimension K is cut into parts of ``part`` columns, by K alone. A program either
takes one part (few tokens: decode) and stores an fp32 partial [parts, T, ΣR], or walks over all of them; parts are
summed in order either way, and tiles are too low for anything but mma.sync: a token gets the same bits in any batch.
Partials of forward are summed by `expand` as it begins, those of backward by the second kernel here, which also
multiplies them by c and makes drow_scale = Σᵢ scaling_g · s·(dY_i B_g).

Parallelism: parts of tiles × projections × rank blocks, × parts of K in decode.
Bound: HBM; bytes = x + A of every adapter in the batch + s (+ 8 · parts · T · R in decode, in L2).
Deterministic: always.
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
from ..common.dropout import keep_mask
from ..common.hardware import sm_count
from ..common.tiling import cdiv, power_of_two
from .tiles import (
    factor_of,
    open_tile,
    rank_of,
    readable,
    scaling_of,
    side_by_side,
    starts_of,
    threshold_of,
    unsupported,
    weight_tile,
)

__all__ = ["ShrinkConfig", "candidate_configs", "cost", "default_config", "unsupported"]


@dataclass(frozen=True)
class ShrinkConfig:
    """Tile sizes. ``part``: columns that are summed before they join the total; ``split``: one program for each part.

    ``tile``: the rows of the plan's tiles, 16 or 64; ``block_t``: of a program.
    """

    tile: int
    block_t: int
    block_k: int
    block_r: int
    part: int
    split: bool
    num_warps: int = 4
    num_stages: int = 3

    def parts(self, reduced: int) -> int:
        """How many parts a reduced dimension of this size has."""
        return cdiv(reduced, self.part)


@lru_cache(maxsize=1024)
def default_config(problem: Any) -> ShrinkConfig:
    """A configuration from shapes alone; what decides about bits does not look at the number of tokens."""
    forward = problem.op.endswith("_fwd")
    reduced = problem.in_features if forward else max(problem.out_features)
    wide = itemsize(problem.dtype) == 4
    block_r = power_of_two(problem.rank, 16, 64)
    masked = problem.dropout and forward
    # What is loaded one element at a time takes more registers, and four times as many a mask whose elements each make
    # their own Philox call.
    sizes = (problem.in_features,) if forward else problem.out_features
    ragged = any(size % 8 for size in (*sizes, *problem.ranks))
    block_k = 32 if wide or ragged else (64 if masked else 128)
    block_k = min(block_k, power_of_two(reduced, 16))
    # At most sixteen parts, of two blocks or more.
    part = block_k * max(cdiv(cdiv(reduced, block_k), 16), 2)
    tile = 16 if forward and problem.tokens <= 512 else 64
    block_t = 16 if tile == 16 else 32
    programs = cdiv(problem.tokens, block_t) * len(problem.out_features)
    programs *= cdiv(problem.rank, block_r)
    # Forward, every block of columns of the expand sums the partials once more: that pays for few tokens alone.
    split = 2 * programs <= sm_count(problem.arch) and (tile == 16 or not forward)
    split = split and reduced > part
    return ShrinkConfig(tile, block_t, block_k, block_r, part, split, 8 if wide and ragged else 4)


def candidate_configs(problem: Any) -> Iterator[ShrinkConfig]:
    """What an offline tuner should try; one choice of the first three for every number of tokens."""
    base = default_config(problem)
    reduced = problem.in_features if problem.op.endswith("_fwd") else max(problem.out_features)
    for block_k in (32, 64, 128):
        for parts in (1, 4, 16):
            part = block_k * cdiv(cdiv(reduced, block_k), parts)
            for tile, block_t in ((16, 16), (64, 16), (64, 32)):
                for split in (False, True)[:parts]:
                    for num_stages in (2, 3, 4):
                        yield replace(
                            base,
                            tile=tile,
                            block_t=block_t,
                            block_k=block_k,
                            part=part,
                            split=split,
                            num_stages=num_stages,
                        )


@triton.jit
def _product(
    x_ptr,
    weight_ptr,
    seed_ptr,
    features,
    stride_xt,
    strides,
    threshold,
    first,
    last,
    adapter,
    rank,
    ranks,
    live,
    tokens,
    PROJECTION: tl.constexpr,
    WIDTH: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STEPS: tl.constexpr,
    BY_FOUR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(BLOCK_T, BLOCK_R) fp32: the blocks [first, last) of columns, in sums of STEPS of them."""
    x_rows = x_ptr + tokens[:, None] * stride_xt
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    total = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for block in range(first, last):
        k = block * BLOCK_K
        columns = k + tl.arange(0, BLOCK_K)
        live_k = columns < features
        x = tl.load(x_rows + columns[None, :], mask=live[:, None] & live_k[None, :], other=0.0)
        weight = weight_tile(
            *(weight_ptr, adapter, strides, ranks, rank, columns, live_k),
            WIDTH,
            SIDE_BY_SIDE,
            x.dtype,
        )
        if seed_ptr is not None:
            keep = keep_mask(
                *(seed, tokens, k, features, PROJECTION, threshold), BLOCK_T, BLOCK_K, BY_FOUR
            )
            x = tl.where(keep, x, 0.0)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
        ends = (block + 1) % STEPS == 0
        total += tl.where(ends, acc, 0.0)
        acc = tl.where(ends, 0.0, acc)
    return total + acc


@triton.jit(do_not_specialize=["count"])
def _shrink_kernel(
    xs,
    weights,
    out_ptr,
    seed_ptr,
    tiles_ptr,
    perm_ptr,
    ranks,
    scalings,
    row_scale_ptr,
    count,
    features,
    strides_x,
    strides,
    scale,
    threshold,
    STARTS: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    PER_TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STEPS: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    BY_FOUR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    TOTAL: tl.constexpr = STARTS[len(STARTS) - 1]
    adapter, rows, live, tokens = open_tile(tiles_ptr, perm_ptr, PER_TILE, BLOCK_T)
    if rows <= 0:
        return
    part = tl.program_id(1)
    lanes = (tl.program_id(2) % RANK_BLOCKS) * BLOCK_R + tl.arange(0, BLOCK_R)
    for i in tl.static_range(len(xs)):
        if tl.program_id(2) // RANK_BLOCKS == i:
            WIDTH: tl.constexpr = STARTS[i + 1] - STARTS[i]
            rank = rank_of(ranks[i], adapter, WIDTH)
            blocks = tl.cdiv(features[i], BLOCK_K)
            first = 0
            if SPLIT:
                first = part * STEPS
                blocks = min(first + STEPS, blocks)
            # Past the rank there is nothing to sum.
            blocks = tl.where((tl.program_id(2) % RANK_BLOCKS) * BLOCK_R < rank, blocks, first)
            total = _product(
                *(xs[i], weights[i], seed_ptr, features[i], strides_x[i], strides[i], threshold),
                *(first, blocks, adapter, rank, lanes, live, tokens),
                *(i, WIDTH, SIDE_BY_SIDE[i], BLOCK_T, BLOCK_K, BLOCK_R, STEPS, BY_FOUR, PRECISION),
            )
            if not SPLIT:
                total *= scale
                if scalings is not None:
                    total *= factor_of(scalings[i], row_scale_ptr, adapter, tokens, live)[:, None]
            # Zeros whatever x holds: infinity times the zeros of A would be NaN.
            total = tl.where((lanes < rank)[None, :], total, 0.0)
            # Whoever sums partials reads none that is not stored.
            stored = readable(lanes, rank, WIDTH) if SPLIT else lanes < WIDTH
            at = (part.to(tl.int64) * count + tokens)[:, None] * TOTAL + STARTS[i] + lanes[None, :]
            tl.store(
                out_ptr + at,
                total.to(out_ptr.dtype.element_ty),
                mask=live[:, None] & stored[None, :],
            )


@triton.jit(do_not_specialize=["count"])
def _finish_kernel(
    partial_ptr,
    s_ptr,
    out_ptr,
    drow_ptr,
    ids_ptr,
    ranks,
    scalings,
    row_scale_ptr,
    count,
    adapters,
    STARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    TOTAL: tl.constexpr = STARTS[len(STARTS) - 1]
    lane = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = lane < count
    tokens = lane.to(tl.int64)
    adapter = tl.load(ids_ptr + tokens, mask=live, other=adapters)
    adapter = tl.where(adapter < adapters, adapter, -1)
    drow = tl.zeros([BLOCK_T], tl.float32)
    for i in tl.static_range(len(ranks)):
        rank = rank_of(ranks[i], adapter, STARTS[i + 1] - STARTS[i])
        factor = factor_of(scalings[i], row_scale_ptr, adapter, tokens, live)
        dot = tl.zeros([BLOCK_T], tl.float32)
        for first in tl.static_range(0, STARTS[i + 1] - STARTS[i], BLOCK_R):
            lanes = first + tl.arange(0, BLOCK_R)
            mask = live[:, None] & readable(
                lanes[None, :], rank[:, None], STARTS[i + 1] - STARTS[i]
            )
            at = tokens[:, None] * TOTAL + STARTS[i] + lanes[None, :]
            total = sum_of_parts(partial_ptr, at, mask, count, TOTAL, SPLITS)
            if drow_ptr is not None:
                s = tl.load(s_ptr + at, mask=mask, other=0.0).to(tl.float32)
                dot += tl.sum(s * total, 1)
            if out_ptr is not None:
                scaled = tl.where(mask, total * factor[:, None], 0.0)
                within = live[:, None] & (lanes < STARTS[i + 1] - STARTS[i])[None, :]
                tl.store(out_ptr + at, scaled.to(out_ptr.dtype.element_ty), mask=within)
        drow += tl.where(rank > 0, scaling_of(scalings[i], adapter) * dot, 0.0)
    if drow_ptr is not None:
        tl.store(drow_ptr + tokens, drow, mask=live)


@triton.jit
def sum_of_parts(partial_ptr, at, mask, count, TOTAL: tl.constexpr, SPLITS: tl.constexpr):
    """Partials [SPLITS, T, TOTAL] in order; unrolled, so that all loads are under way at once."""
    total = tl.zeros(mask.shape, tl.float32)
    step = count.to(tl.int64) * TOTAL
    for part in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + part * step + at, mask=mask, other=0.0)
    return total


def launch_shrink(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    out: Tensor,
    plan: Sequence[Tensor],
    ranks: Sequence[Tensor],
    scalings: Sequence[Tensor] | None,
    row_scale: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
    config: ShrinkConfig,
    split: bool,
    precision: str,
) -> None:
    """xs[i] (T, K_i), rows of last stride 1, weights[i] (L, R_i, K_i) of any strides.

    out: (T, ΣR), times ``scale`` and c; or, where ``split``, fp32 partials (parts, T, ΣR) without factors. ``seed`` is
    None without dropout.
    """
    tokens, n = xs[0].shape[0], len(xs)
    starts = starts_of([w.shape[1] for w in weights])
    tiles = plan[3 if config.tile == 16 else 4]
    per_tile, rank_blocks = config.tile // config.block_t, _rank_blocks(weights, config)
    features = tuple([x.shape[1] for x in xs])
    parts = out.shape[0] if split else 1
    _shrink_kernel[(tiles.shape[0] * per_tile, parts, n * rank_blocks)](
        tuple(xs),
        tuple(weights),
        out,
        seed,
        tiles,
        plan[1],
        tuple(ranks),
        None if scalings is None else tuple(scalings),
        row_scale,
        tokens,
        features,
        tuple([x.stride(0) for x in xs]),
        tuple([w.stride() for w in weights]),
        scale,
        threshold_of(dropout_p),
        STARTS=starts,
        SIDE_BY_SIDE=side_by_side(weights),
        PER_TILE=per_tile,
        SPLIT=split,
        BLOCK_T=config.block_t,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        STEPS=config.part // config.block_k,
        RANK_BLOCKS=rank_blocks,
        BY_FOUR=features[0] % 4 == 0,
        PRECISION=precision,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,  # said aloud: Triton 3.9 warns, and 3.10 changes the default
    )


def launch_finish(
    partial: Tensor,
    s: Tensor,
    out: Tensor | None,
    drow_scale: Tensor | None,
    plan: Sequence[Tensor],
    ranks: Sequence[Tensor],
    widths: Sequence[int],
    scalings: Sequence[Tensor],
    row_scale: Tensor | None,
) -> None:
    """Partial (parts, T, ΣR) fp32 and s (T, ΣR) -> out (T, ΣR) = c · Σ partial, drow_scale (T,) fp32."""
    splits, tokens, _ = partial.shape
    block_r = power_of_two(max(widths), 16, 64)
    block_t = 16
    _finish_kernel[(cdiv(tokens, block_t),)](
        partial,
        s,
        out,
        drow_scale,
        plan[0],
        tuple(ranks),
        tuple(scalings),
        row_scale,
        tokens,
        ranks[0].shape[0],
        STARTS=starts_of(widths),
        SPLITS=splits,
        BLOCK_T=block_t,
        BLOCK_R=block_r,
        num_warps=4,
        enable_fp_fusion=True,
    )


def _rank_blocks(weights: Sequence[Tensor], config: ShrinkConfig) -> int:
    return cdiv(max(w.shape[1] for w in weights), config.block_r)


def cost(problem: Any) -> Cost:
    """Forward, every adapter in the batch: x and A in, s out."""
    t, k, r = problem.tokens, problem.in_features, problem.rank
    n, present = len(problem.out_features), min(problem.adapters, problem.tokens)
    size = itemsize(problem.dtype)
    return Cost(2 * t * k * r * n, size * (t * k + n * r * (present * k + t)))
