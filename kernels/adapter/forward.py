"""Bottleneck adapter, forward, in one launch: layernorm, down, activation, up, residuals, layernorm.

    z = x + skip or x;  v = LN(z) or z;  q = v Dᵀ + db;  a = act(q);  w = a Uᵀ + ub
    s = gate · scale · keep · scaling / (1 - p) · w + x + skip;  y = LN(s) or s

x, skip, y (T, d); D (m, d), U (d, m); q (T, m) in x's dtype and the statistics (T, 2) fp32 of each layernorm are kept
for backward. fp32 accumulation and statistics; v, q and a are rounded to x's dtype, y once. Masks are made in registers.

Parallelism: blocks of rows; a program walks its rows in chunks of BLOCK_D columns, three times at most: statistics of z,
q, s. s stays in registers until its statistics are known where it fits (HELD), else w is made a second time.
Bound: HBM; bytes = x + skip + D + U + y + q. Programs load x again for each walk, and D and U each for itself: these come
from L1 and L2 (a block's x is 16 to 64 rows), and L2 is the next bound, through D and U, when blocks are short.
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
from ..common.tiling import cdiv, power_of_two, rank_alignment
from .activation import activate
from .operands import (
    Operands,
    expanded_tile,
    gate_of_rows,
    input_tile,
    matrix_tile,
    normalised_input,
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
    """The longest block of rows that still gives every multiprocessor one: D and U are read once a block."""
    wide = itemsize(problem.dtype) == 4
    block_m = power_of_two(problem.bottleneck, 16, 32 if wide else 128)
    block_d = power_of_two(problem.features, 16, 32 if wide else 128)
    block_t = 16
    return ForwardConfig(block_t, block_d, block_m, False, 4, 2)


def candidate_configs(problem: Any) -> Iterator[ForwardConfig]:
    """What an offline tuner should try."""
    base = default_config(problem)
    for block_t in (16, 32, 64):
        for block_d in (32, 64, 128):
            for num_warps in (4, 8):
                for num_stages in (1, 2, 3):
                    yield replace(
                        base,
                        block_t=block_t,
                        block_d=block_d,
                        held=False,
                        num_warps=num_warps,
                        num_stages=num_stages,
                    )


@triton.jit
def _statistics_of_input(
    ops, rows, live_t, eps, BLOCK_D: tl.constexpr, SKIP_IN: tl.constexpr, NEEDED: tl.constexpr
):
    """Mean and reciprocal deviation of z; (None, None) where there is no layernorm before the adapter."""
    if NEEDED:
        mean = tl.zeros([rows.shape[0]], tl.float32)
        squares = mean
        for chunk in range(tl.cdiv(ops.features, BLOCK_D)):
            start = chunk * BLOCK_D
            columns = start + tl.arange(0, BLOCK_D)
            live_c = columns < ops.features
            z = input_tile(ops, rows, live_t, columns, live_c, SKIP_IN)
            width = min(ops.features - start, BLOCK_D)
            mean, squares = include_chunk(z, live_c, start, width, mean, squares)
        return mean, tl.rsqrt(squares / ops.features + eps)
    else:
        return None, None


@triton.jit
def _down_projection(
    ops,
    rows,
    live_t,
    mean,
    rstd,
    dtype: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,
    SKIP_IN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """V Dᵀ, a tuple of fp32 tiles."""
    q = ()
    for _ in tl.static_range(TILES):
        q = q + (tl.zeros([rows.shape[0], BLOCK_M], tl.float32),)
    for chunk in range(tl.cdiv(ops.features, BLOCK_D)):
        columns = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        live_c = columns < ops.features
        v = input_tile(ops, rows, live_t, columns, live_c, SKIP_IN)
        if ops.pre_weight is not None:
            v = normalised_input(ops, v, mean, rstd, columns, live_c)
        q = _add_products(ops, q, v.to(dtype), columns, live_c, BLOCK_M, PRECISION)
    return q


@triton.jit
def _add_products(ops, q, v, columns, live_c, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr):
    """Q + v Dᵀ of one chunk of columns."""
    out = ()
    for i in tl.static_range(len(q)):
        inner = i * BLOCK_M + tl.arange(0, BLOCK_M)
        d = matrix_tile(
            ops.down,
            columns,
            ops.stride_dd,
            live_c,
            inner,
            ops.stride_dm,
            inner < ops.bottleneck,
            v.dtype,
        )
        out = out + (tl.dot(v, d, q[i], input_precision=PRECISION),)
    return out


@triton.jit
def _activated(
    ops,
    q,
    q_ptr,
    rows,
    live_t,
    BLOCK_M: tl.constexpr,
    ALIGN: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Adds db, stores q, and gives act(q), both rounded to x's dtype."""
    a = ()
    for i in tl.static_range(len(q)):
        inner = i * BLOCK_M + tl.arange(0, BLOCK_M)
        live_m = inner < ops.bottleneck
        tile = q[i]
        if ops.down_bias is not None:
            tile += vector(ops.down_bias, inner, live_m)
        tile = tile.to(q_ptr.dtype.element_ty)
        tl.store(
            q_ptr + rows[:, None] * (ops.bottleneck // ALIGN * ALIGN) + inner[None, :],
            tile,
            mask=live_t[:, None] & live_m[None, :],
        )
        a = a + (activate(tile.to(tl.float32), ACTIVATION).to(tile.dtype),)
    return a


@triton.jit
def _store_output(
    ops, y_ptr, s, mean, rstd, rows, live_t, columns, live_c, NORMALISED: tl.constexpr
):
    if NORMALISED:
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
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,
    HELD: tl.constexpr,  # chunks of s that stay in registers; 0: w is made twice
    ACTIVATION: tl.constexpr,
    SKIP_IN: tl.constexpr,
    RESIDUAL_X: tl.constexpr,
    RESIDUAL_SKIP: tl.constexpr,
    BY_FOUR: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    live_t = rows < tokens
    features = ops.features
    gate = gate_of_rows(ops, rows, live_t)
    pre_mean, pre_rstd = _statistics_of_input(
        ops, rows, live_t, pre_eps, BLOCK_D, SKIP_IN, ops.pre_weight is not None
    )
    if ops.pre_weight is not None:
        store_pair(pre_stats_ptr, rows, live_t, pre_mean, pre_rstd)
    q = _down_projection(
        ops,
        rows,
        live_t,
        pre_mean,
        pre_rstd,
        q_ptr.dtype.element_ty,
        BLOCK_D,
        BLOCK_M,
        TILES,
        SKIP_IN,
        PRECISION,
    )
    a = _activated(ops, q, q_ptr, rows, live_t, BLOCK_M, ALIGN, ACTIVATION)

    mean = tl.zeros([BLOCK_T], tl.float32)
    squares = mean
    if ops.ln_weight is not None and HELD > 0:
        kept = ()
        for chunk in tl.static_range(HELD):
            start = chunk * BLOCK_D
            columns = start + tl.arange(0, BLOCK_D)
            live_c = columns < features
            e = expanded_tile(ops, a, rows, start, columns, live_c, BLOCK_M, BY_FOUR, PRECISION)
            s = sum_tile(ops, e, rows, live_t, columns, live_c, gate, RESIDUAL_X, RESIDUAL_SKIP)
            width = min(features - start, BLOCK_D)
            mean, squares = include_chunk(s, live_c, start, width, mean, squares)
            kept = kept + (s,)
        rstd = tl.rsqrt(squares / features + eps)
        store_pair(post_stats_ptr, rows, live_t, mean, rstd)
        for chunk in tl.static_range(HELD):
            columns = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
            live_c = columns < features
            _store_output(ops, y_ptr, kept[chunk], mean, rstd, rows, live_t, columns, live_c, True)
    else:
        if ops.ln_weight is not None:
            for chunk in range(tl.cdiv(features, BLOCK_D)):
                start = chunk * BLOCK_D
                columns = start + tl.arange(0, BLOCK_D)
                live_c = columns < features
                e = expanded_tile(ops, a, rows, start, columns, live_c, BLOCK_M, BY_FOUR, PRECISION)
                s = sum_tile(ops, e, rows, live_t, columns, live_c, gate, RESIDUAL_X, RESIDUAL_SKIP)
                width = min(features - start, BLOCK_D)
                mean, squares = include_chunk(s, live_c, start, width, mean, squares)
            rstd = tl.rsqrt(squares / features + eps)
            store_pair(post_stats_ptr, rows, live_t, mean, rstd)
        else:
            rstd = mean
        for chunk in range(tl.cdiv(features, BLOCK_D)):
            start = chunk * BLOCK_D
            columns = start + tl.arange(0, BLOCK_D)
            live_c = columns < features
            e = expanded_tile(ops, a, rows, start, columns, live_c, BLOCK_M, BY_FOUR, PRECISION)
            s = sum_tile(ops, e, rows, live_t, columns, live_c, gate, RESIDUAL_X, RESIDUAL_SKIP)
            _store_output(
                *(ops, y_ptr, s, mean, rstd, rows, live_t, columns, live_c),
                NORMALISED=ops.ln_weight is not None,
            )


def launch_forward(
    ops: Operands,
    y: Tensor,
    q: Tensor,
    pre_stats: Tensor | None,
    post_stats: Tensor | None,
    pre_eps: float,
    eps: float,
    activation: str,
    skip_in: bool,
    residual_x: bool,
    residual_skip: bool,
    config: ForwardConfig,
    precision: str,
) -> None:
    """Fills y (T, d), q (T, m) and the statistics (T, 2), all contiguous, of which absent ones are None."""
    tokens, features = y.shape
    _adapter_forward_kernel[(cdiv(tokens, config.block_t),)](
        ops,
        y,
        q,
        pre_stats,
        post_stats,
        tokens,
        pre_eps,
        eps,
        BLOCK_T=config.block_t,
        BLOCK_D=config.block_d,
        BLOCK_M=config.block_m,
        TILES=cdiv(ops.bottleneck, config.block_m),
        HELD=cdiv(features, config.block_d) if config.held else 0,
        ACTIVATION=activation,
        SKIP_IN=skip_in,
        RESIDUAL_X=residual_x,
        RESIDUAL_SKIP=residual_skip,
        BY_FOUR=features % 4 == 0,
        ALIGN=rank_alignment(ops.bottleneck),
        PRECISION=precision,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,  # said aloud: Triton 3.9 warns, and 3.10 changes the default
    )


def cost(problem: Any) -> Cost:
    """x, skip, D and U in; y and q out."""
    t, d, m = problem.tokens, problem.features, problem.bottleneck
    rows = t * d * (3 if problem.skip else 2)
    return Cost(4 * t * d * m, itemsize(problem.dtype) * (rows + 2 * d * m + t * m))
