"""Bottleneck adapter, forward, in one launch: layernorm, down, activation, up, residuals, layernorm.

    z = x + skip or x;  v = LN(z) or z;  q = v Dᵀ + db;  a = act(q);  w = a Uᵀ + ub
    s = gate · scale · keep · scaling / (1 - p) · w + x + skip;  y = LN(s) or s

x, skip, y (T, d); D (m, d), U (d, m); q (T, m) in x's dtype and the statistics (T, 2) fp32 of each layernorm are
kept for backward. fp32 accumulation and statistics; v, q and a are rounded to x's dtype, y once. Masks are made in
registers.

Parallelism: blocks of 16 to 64 rows; a program walks its rows in chunks of block_d columns, up to four times: the
statistics of z, q, the statistics of s, y. Where a block fits into registers (HELD) s stays there between the last two;
elsewhere w is made a second time, which costs a product of rank m and U out of L2, no byte of HBM.
Bound: HBM; bytes = x + skip + D + U + y + q. What programs load is several times that: x once for each walk, which a
block finds in L1 or L2, and D and U once for each block, out of L2, the next bound when blocks are short.
Deterministic: always.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.cost import Cost, itemsize
from ..common.hardware import sm_count
from ..common.layernorm import include_chunk
from ..common.tiling import cdiv, power_of_two
from .operands import (
    Form,
    Operands,
    activated_tile,
    bottleneck_columns,
    chunk_columns,
    expanded_tile,
    gate_of_rows,
    input_tile,
    matrix_tile,
    normalised_input,
    store_bottleneck_tile,
    store_pair,
    sum_tile,
    vector,
)

MAX_FEATURES = 8192
MAX_BOTTLENECK = 512


@dataclass(frozen=True)
class ForwardConfig:
    """Tile sizes; ``held``: a block's rows stay in registers between their statistics and their store."""

    block_t: int
    block_d: int
    block_m: int
    held: bool
    num_warps: int = 4
    num_stages: int = 2


def unsupported(problem: Any) -> list[str]:
    """Why these kernels cannot run the problem; empty when they can."""
    reasons = []
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reasons.append(f"{problem.dtype} is not one of float32, bfloat16, float16")
    if problem.features > MAX_FEATURES:
        reasons.append(f"{problem.features} features are above {MAX_FEATURES}")
    if problem.bottleneck > MAX_BOTTLENECK:
        reasons.append(f"a bottleneck of {problem.bottleneck} is above {MAX_BOTTLENECK}")
    return reasons


@lru_cache(maxsize=1024)
def default_config(problem: Any) -> ForwardConfig:
    """The longest blocks of rows that still give every multiprocessor one: each block reads D and U from L2."""
    wide = itemsize(problem.dtype) == 4
    block_m = columns_of_tile(problem)
    tiles = cdiv(problem.bottleneck, block_m)
    crowded = wide and tiles > (1 if problem.dropout else 2)
    block_d = chunk_of_columns(problem, 128 if tiles == 1 else 16 if crowded else 64)
    longest = {1: 64, 2: 32}.get(tiles, 16) if problem.features % 8 == 0 else 16
    block_t = rows_of_block(problem, longest)
    # s: 96 of a thread's 255 registers, in a dozen chunks of straight-line code at most
    few = block_t * problem.features <= 24576 and problem.features % 8 == 0
    held = problem.post_ln and not wide and block_m <= 64 and few
    warps = 8 if held or wide or tiles > 1 or block_t > 16 else 4
    # All tiles of a chunk of D, or of U, are staged in shared memory.
    return ForwardConfig(block_t, block_d, block_m, held, warps, 2 if wide or tiles <= 2 else 1)


def columns_of_tile(problem: Any) -> int:
    """Of the bottleneck: 128, or 64 where they are loaded one element at a time, or wide, and take more registers."""
    narrow = itemsize(problem.dtype) == 4 or problem.bottleneck % 8
    return power_of_two(problem.bottleneck, 16, 64 if narrow else 128)


def rows_of_block(problem: Any, most: int) -> int:
    """A power of two from 16 to ``most``; 16 in fp32, whose operands stand in registers."""
    if itemsize(problem.dtype) == 4:
        return 16
    return power_of_two(problem.tokens // sm_count(problem.arch) // 2 + 1, 16, most)


def chunk_of_columns(problem: Any, most: int) -> int:
    """A power of two from 16 to ``most``, less where registers are short."""
    wide = itemsize(problem.dtype) == 4
    # A mask whose elements each make their own Philox call takes four times the registers.
    alone = problem.dropout and problem.features % 4
    return power_of_two(problem.features, 16, min(most, 32) if wide or alone else most)


def candidate_configs(problem: Any) -> Iterator[ForwardConfig]:
    """What an offline tuner should try."""
    base = default_config(problem)
    for block_t in (16, 32, 64):
        for block_d in (32, 64, 128):
            for held in (False, True):
                for num_warps in (4, 8):
                    yield replace(
                        base, block_t=block_t, block_d=block_d, held=held, num_warps=num_warps
                    )


@triton.jit
def _input_statistics(ops, rows, live_t, eps, FORM: tl.constexpr):
    """Mean and reciprocal deviation of z."""
    mean = tl.zeros([FORM.block_t], tl.float32)
    squares = mean
    for chunk in range(tl.cdiv(ops.features, FORM.block_d)):
        start, columns, live_c = chunk_columns(ops, chunk, FORM)
        z = input_tile(ops, rows, live_t, columns, live_c, FORM)
        width = min(ops.features - start, FORM.block_d)
        mean, squares = include_chunk(z, live_c, start, width, mean, squares)
    return mean, tl.rsqrt(squares / ops.features + eps)


@triton.jit
def _add_down(ops, q, v, columns, live_c, FORM: tl.constexpr):
    """Q + v Dᵀ of one chunk of columns."""
    out = ()
    TILES: tl.constexpr = FORM.tiles
    for i in tl.static_range(TILES):
        inner, live_m = bottleneck_columns(ops, i, FORM)
        d = matrix_tile(
            *(ops.down, columns, ops.stride_dd, live_c, inner, ops.stride_dm, live_m), dtype=v.dtype
        )
        out = out + (tl.dot(v, d, q[i], input_precision=FORM.precision),)
    return out


@triton.jit
def _down_projection(ops, rows, live_t, mean, rstd, dtype: tl.constexpr, FORM: tl.constexpr):
    """V Dᵀ, fp32, a tuple of tiles."""
    q = ()
    TILES: tl.constexpr = FORM.tiles
    for _ in tl.static_range(TILES):
        q = q + (tl.zeros([FORM.block_t, FORM.block_m], tl.float32),)
    for chunk in range(tl.cdiv(ops.features, FORM.block_d)):
        _start, columns, live_c = chunk_columns(ops, chunk, FORM)
        z = input_tile(ops, rows, live_t, columns, live_c, FORM)
        v = normalised_input(ops, z, mean, rstd, columns, live_c)
        q = _add_down(ops, q, v.to(dtype), columns, live_c, FORM)
    return q


@triton.jit
def _activated(ops, q, q_ptr, rows, live_t, FORM: tl.constexpr):
    """Adds db, stores q, and gives act(q), both rounded to x's dtype."""
    a = ()
    TILES: tl.constexpr = FORM.tiles
    for i in tl.static_range(TILES):
        tile = q[i]
        inner, live_m = bottleneck_columns(ops, i, FORM)
        if FORM.ragged:
            # Infinite v times the zeros of D's padding is NaN, and would be in every column of w.
            tile = tl.where(live_m[None, :], tile, 0.0)
        if ops.down_bias is not None:
            tile += vector(ops.down_bias, inner, live_m)
        tile = tile.to(q_ptr.dtype.element_ty)
        store_bottleneck_tile(q_ptr, ops, i, tile, rows, live_t, FORM)
        a = a + (activated_tile(tile, FORM),)
    return a


@triton.jit
def _sum_of_chunk(ops, a, rows, live_t, chunk, gate, FORM: tl.constexpr):
    """S of one chunk."""
    start, columns, live_c = chunk_columns(ops, chunk, FORM)
    e = expanded_tile(ops, a, rows, start, columns, live_c, FORM)
    return sum_tile(ops, e, rows, live_t, columns, live_c, gate, FORM)


@triton.jit
def _include(ops, s, chunk, mean, squares, FORM: tl.constexpr):
    start, _columns, live_c = chunk_columns(ops, chunk, FORM)
    width = min(ops.features - start, FORM.block_d)
    return include_chunk(s, live_c, start, width, mean, squares)


@triton.jit
def _statistics(ops, a, rows, live_t, gate, eps, HELD: tl.constexpr, FORM: tl.constexpr):
    """Mean and reciprocal deviation of s, and its first HELD chunks."""
    mean = tl.zeros([FORM.block_t], tl.float32)
    squares = mean
    kept = ()
    if HELD > 0:
        for held in tl.static_range(HELD):
            s = _sum_of_chunk(ops, a, rows, live_t, held, gate, FORM)
            mean, squares = _include(ops, s, held, mean, squares, FORM)
            kept = kept + (s,)
    else:
        for chunk in range(tl.cdiv(ops.features, FORM.block_d)):
            s = _sum_of_chunk(ops, a, rows, live_t, chunk, gate, FORM)
            mean, squares = _include(ops, s, chunk, mean, squares, FORM)
    return mean, tl.rsqrt(squares / ops.features + eps), kept


@triton.jit
def _store_output(ops, y_ptr, s, mean, rstd, rows, live_t, chunk, FORM: tl.constexpr):
    _start, columns, live_c = chunk_columns(ops, chunk, FORM)
    if ops.ln_weight is not None:
        s = (s - mean[:, None]) * rstd[:, None] * vector(ops.ln_weight, columns, live_c)
        if ops.ln_bias is not None:
            s += vector(ops.ln_bias, columns, live_c)
    tl.store(
        y_ptr + rows[:, None] * ops.features + columns[None, :],
        s.to(y_ptr.dtype.element_ty),
        mask=live_t[:, None] & live_c[None, :],
    )


@triton.jit(do_not_specialize=["tokens"])
def _adapter_forward_kernel(
    ops,
    y_ptr,
    q_ptr,
    pre_stats_ptr,
    post_stats_ptr,
    tokens,
    pre_eps,
    eps,
    HELD: tl.constexpr,  # chunks of s that stay in registers; 0: w is made twice
    FORM: tl.constexpr,
):
    rows = (tl.program_id(0) * FORM.block_t + tl.arange(0, FORM.block_t)).to(tl.int64)
    live_t = rows < tokens
    gate = gate_of_rows(ops, rows, live_t)
    mean = tl.zeros([FORM.block_t], tl.float32)
    rstd = mean
    if ops.pre_weight is not None:
        mean, rstd = _input_statistics(ops, rows, live_t, pre_eps, FORM)
        store_pair(pre_stats_ptr, rows, live_t, mean, rstd)
    q = _down_projection(ops, rows, live_t, mean, rstd, q_ptr.dtype.element_ty, FORM)
    a = _activated(ops, q, q_ptr, rows, live_t, FORM)
    if ops.ln_weight is not None:
        mean, rstd, kept = _statistics(ops, a, rows, live_t, gate, eps, HELD, FORM)
        store_pair(post_stats_ptr, rows, live_t, mean, rstd)
    if ops.ln_weight is not None and HELD > 0:
        for held in tl.static_range(HELD):
            _store_output(ops, y_ptr, kept[held], mean, rstd, rows, live_t, held, FORM)
    else:
        for chunk in range(tl.cdiv(ops.features, FORM.block_d)):
            s = _sum_of_chunk(ops, a, rows, live_t, chunk, gate, FORM)
            _store_output(ops, y_ptr, s, mean, rstd, rows, live_t, chunk, FORM)


def launch_forward(
    ops: Operands,
    y: Tensor,
    q: Tensor,
    pre_stats: Tensor | None,
    post_stats: Tensor | None,
    pre_eps: float,
    eps: float,
    form: Form,
    config: ForwardConfig,
) -> None:
    """Fills y (T, d), q (T, m) and the statistics (T, 2), all contiguous, of which absent ones are None."""
    _adapter_forward_kernel[(cdiv(y.shape[0], config.block_t),)](
        ops,
        y,
        q,
        pre_stats,
        post_stats,
        y.shape[0],
        pre_eps,
        eps,
        HELD=cdiv(ops.features, config.block_d) if config.held else 0,
        FORM=form.tiled(ops, config),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,  # said aloud: Triton 3.9 warns, and 3.10 changes the default
    )


def cost(problem: Any) -> Cost:
    """x, skip, D and U in; y and q out."""
    t, d, m = problem.tokens, problem.features, problem.bottleneck
    rows = t * d * (3 if problem.skip else 2)
    return Cost(4 * t * d * m, itemsize(problem.dtype) * (rows + 2 * d * m + t * m))
