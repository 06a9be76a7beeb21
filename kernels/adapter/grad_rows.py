"""Bottleneck adapter, backward by rows: dx, dskip, dq, dgate, and two sums a row of the layernorm's backward.

    ds = LN'(dy) or dy;  dw = gate · scale · keep · scaling / (1 - p) · ds;  da = dw U;  dq = da · act'(q)
    dv = dq D;  dz = LN'(dv) or dv;  dx = dz + ds;  dskip = dz + ds;  dgateₜ = Σ_c ds · scale · e,  e as in forward

    LN'(g) = rstd · (g·γ - mean(g·γ) - n · mean(g·γ·n)),  n the normalised row: the two means are `sums` (T, 2)

dy, x, skip, dx, dskip (T, d); q, dq (T, m) in x's dtype. Every output has its own switch, None. w and s are made again from
q; dw and dq are rounded to x's dtype before they are multiplied, the results once.

Parallelism: blocks of rows; a program walks its rows four times at most: the two means of s, da, the two means of z, dx.
Bound: HBM; bytes = dy + x + skip + D + U + q + dx + dskip + dq; the walks after the first load from L1 and L2.
Deterministic: always.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..common.cost import Cost, itemsize
from ..common.tiling import cdiv, power_of_two, rank_alignment
from .activation import activate, derivative
from .forward import unsupported as unsupported
from .operands import (
    Operands,
    bottleneck_tile,
    dropped,
    expanded_tile,
    gate_of_rows,
    input_tile,
    load_pair,
    matrix_tile,
    row_tile,
    scale_of_columns,
    store_pair,
    sum_tile,
    vector,
)


@dataclass(frozen=True)
class RowsConfig:
    """Tile sizes."""

    block_t: int
    block_d: int
    block_m: int
    num_warps: int = 4
    num_stages: int = 2


@lru_cache(maxsize=1024)
def default_config(problem: Any) -> RowsConfig:
    """The longest block of rows that still gives every multiprocessor one: D and U are read once a block."""
    wide = itemsize(problem.dtype) == 4
    block_m = power_of_two(problem.bottleneck, 16, 32 if wide else 128)
    block_d = power_of_two(problem.features, 16, 32 if wide else 128)
    return RowsConfig(16, block_d, block_m, 4, 2)


def candidate_configs(problem: Any) -> Iterator[RowsConfig]:
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
                        num_warps=num_warps,
                        num_stages=num_stages,
                    )


@triton.jit
def activated_tiles(
    q_ptr,
    ops,
    rows,
    live_t,
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,
    ALIGN: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """act(q) as forward rounded it."""
    a = ()
    for i in tl.static_range(TILES):
        q = bottleneck_tile(q_ptr, ops, i, rows, live_t, BLOCK_M, ALIGN)
        a = a + (activate(q.to(tl.float32), ACTIVATION).to(q.dtype),)
    return a


@triton.jit
def through_layernorm(g, weight, normal, rstd, first, second):
    """LN'(g): ``first`` and ``second`` are the means of g·γ and g·γ·n over a row."""
    return rstd[:, None] * (g * weight - first[:, None] - normal * second[:, None])


@triton.jit
def _normalised_sum(
    ops,
    a,
    rows,
    live_t,
    start,
    columns,
    live_c,
    gate,
    mean,
    rstd,
    BLOCK_M: tl.constexpr,
    RESIDUAL_X: tl.constexpr,
    RESIDUAL_SKIP: tl.constexpr,
    BY_FOUR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """E, and the normalised s, of one chunk."""
    e = expanded_tile(ops, a, rows, start, columns, live_c, BLOCK_M, BY_FOUR, PRECISION)
    s = sum_tile(ops, e, rows, live_t, columns, live_c, gate, RESIDUAL_X, RESIDUAL_SKIP)
    return e, (s - mean[:, None]) * rstd[:, None]


@triton.jit
def expanded_and_upstream(
    ops,
    dy_ptr,
    stride_dyt,
    a,
    rows,
    live_t,
    start,
    columns,
    live_c,
    gate,
    mean,
    rstd,
    first,
    second,
    NEED_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    RESIDUAL_X: tl.constexpr,
    RESIDUAL_SKIP: tl.constexpr,
    BY_FOUR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(e, n, dy, ds) of one chunk; e is dy where nobody needs it, n where there is no layernorm."""
    dy = row_tile(dy_ptr, stride_dyt, rows, live_t, columns, live_c)
    if ops.ln_weight is not None:
        e, normal = _normalised_sum(
            ops,
            a,
            rows,
            live_t,
            start,
            columns,
            live_c,
            gate,
            mean,
            rstd,
            BLOCK_M,
            RESIDUAL_X,
            RESIDUAL_SKIP,
            BY_FOUR,
            PRECISION,
        )
        weight = vector(ops.ln_weight, columns, live_c)
        return e, normal, dy, through_layernorm(dy, weight, normal, rstd, first, second)
    elif NEED_E:
        e = expanded_tile(ops, a, rows, start, columns, live_c, BLOCK_M, BY_FOUR, PRECISION)
        return e, dy, dy, dy
    else:
        return dy, dy, dy, dy


@triton.jit
def into_expanded(ops, ds, rows, start, columns, live_c, gate, BY_FOUR: tl.constexpr):
    """dw of ds."""
    dw = ds * (gate * ops.amount) * scale_of_columns(ops, columns, live_c)
    return dropped(ops, dw, rows, start, BY_FOUR)


@triton.jit
def _add_da(ops, da, dw, columns, live_c, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr):
    """Da + dw U of one chunk."""
    out = ()
    for i in tl.static_range(len(da)):
        inner = i * BLOCK_M + tl.arange(0, BLOCK_M)
        live_m = inner < ops.bottleneck
        u = matrix_tile(
            ops.up, columns, ops.stride_ud, live_c, inner, ops.stride_um, live_m, dw.dtype
        )
        out = out + (tl.dot(dw, u, da[i], input_precision=PRECISION),)
    return out


@triton.jit
def _through_activation(
    ops,
    da,
    q_ptr,
    dq_ptr,
    rows,
    live_t,
    BLOCK_M: tl.constexpr,
    ALIGN: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """dq, stored, and as a tuple of tiles."""
    dq = ()
    for i in tl.static_range(len(da)):
        inner = i * BLOCK_M + tl.arange(0, BLOCK_M)
        q = bottleneck_tile(q_ptr, ops, i, rows, live_t, BLOCK_M, ALIGN)
        tile = (da[i] * derivative(q.to(tl.float32), ACTIVATION)).to(q.dtype)
        tl.store(
            dq_ptr + rows[:, None] * (ops.bottleneck // ALIGN * ALIGN) + inner[None, :],
            tile,
            mask=live_t[:, None] & (inner < ops.bottleneck)[None, :],
        )
        dq = dq + (tile,)
    return dq


@triton.jit
def through_down(ops, dq, columns, live_c, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr):
    """Dv = dq D of one chunk."""
    dv = tl.zeros([dq[0].shape[0], columns.shape[0]], tl.float32)
    for i in tl.static_range(len(dq)):
        inner = i * BLOCK_M + tl.arange(0, BLOCK_M)
        live_m = inner < ops.bottleneck
        d = matrix_tile(
            ops.down, inner, ops.stride_dm, live_m, columns, ops.stride_dd, live_c, dq[i].dtype
        )
        dv = tl.dot(dq[i], d, dv, input_precision=PRECISION)
    return dv


@triton.jit
def _store_rows(ptr, ops, value, rows, live_t, columns, live_c):
    tl.store(
        ptr + rows[:, None] * ops.features + columns[None, :],
        value.to(ptr.dtype.element_ty),
        mask=live_t[:, None] & live_c[None, :],
    )


@triton.jit(do_not_specialize=["begin", "end"])
def _adapter_rows_kernel(
    ops,
    dy_ptr,
    q_ptr,
    pre_stats_ptr,
    post_stats_ptr,
    dx_ptr,
    dskip_ptr,
    dq_ptr,
    dgate_ptr,
    sums_ptr,
    begin,
    end,
    stride_dyt,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SKIP_IN: tl.constexpr,
    RESIDUAL_X: tl.constexpr,
    RESIDUAL_SKIP: tl.constexpr,
    BY_FOUR: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = (begin + tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    live_t = rows < end
    features = ops.features
    chunks = tl.cdiv(features, BLOCK_D)
    gate = gate_of_rows(ops, rows, live_t)
    mean = tl.zeros([BLOCK_T], tl.float32)
    rstd, first, second = mean, mean, mean
    NEED_W: tl.constexpr = ops.ln_weight is not None or dgate_ptr is not None
    a = activated_tiles(
        q_ptr, ops, rows, live_t, BLOCK_M, TILES if NEED_W else 0, ALIGN, ACTIVATION
    )

    if ops.ln_weight is not None:
        mean, rstd = load_pair(post_stats_ptr, rows, live_t)
        for chunk in range(chunks):
            start = chunk * BLOCK_D
            columns = start + tl.arange(0, BLOCK_D)
            live_c = columns < features
            _, normal = _normalised_sum(
                ops,
                a,
                rows,
                live_t,
                start,
                columns,
                live_c,
                gate,
                mean,
                rstd,
                BLOCK_M,
                RESIDUAL_X,
                RESIDUAL_SKIP,
                BY_FOUR,
                PRECISION,
            )
            g = row_tile(dy_ptr, stride_dyt, rows, live_t, columns, live_c)
            g *= vector(ops.ln_weight, columns, live_c)
            first += tl.sum(g, 1)
            second += tl.sum(g * normal, 1)
        first, second = first / features, second / features
        if sums_ptr is not None:
            store_pair(sums_ptr, rows, live_t, first, second)

    if dq_ptr is not None or dgate_ptr is not None:
        da = ()
        for _ in tl.static_range(TILES if dq_ptr is not None else 0):
            da = da + (tl.zeros([BLOCK_T, BLOCK_M], tl.float32),)
        dgate = tl.zeros([BLOCK_T], tl.float32)
        for chunk in range(chunks):
            start = chunk * BLOCK_D
            columns = start + tl.arange(0, BLOCK_D)
            live_c = columns < features
            e, _, _, ds = expanded_and_upstream(
                ops,
                dy_ptr,
                stride_dyt,
                a,
                rows,
                live_t,
                start,
                columns,
                live_c,
                gate,
                mean,
                rstd,
                first,
                second,
                dgate_ptr is not None,
                BLOCK_M,
                RESIDUAL_X,
                RESIDUAL_SKIP,
                BY_FOUR,
                PRECISION,
            )
            if dgate_ptr is not None:
                dgate += tl.sum(ds * e * scale_of_columns(ops, columns, live_c), 1)
            if dq_ptr is not None:
                dw = into_expanded(ops, ds, rows, start, columns, live_c, gate, BY_FOUR)
                dw = dw.to(q_ptr.dtype.element_ty)
                da = _add_da(ops, da, dw, columns, live_c, BLOCK_M, PRECISION)
        if dgate_ptr is not None:
            tl.store(dgate_ptr + rows, dgate.to(dgate_ptr.dtype.element_ty), mask=live_t)

    if dq_ptr is not None:
        dq = _through_activation(
            ops, da, q_ptr, dq_ptr, rows, live_t, BLOCK_M, ALIGN, ACTIVATION
        )

    NEED_DZ: tl.constexpr = dx_ptr is not None or (dskip_ptr is not None and SKIP_IN)
    pre_mean = tl.zeros([BLOCK_T], tl.float32)
    pre_rstd, pre_first, pre_second = pre_mean, pre_mean, pre_mean
    if NEED_DZ and ops.pre_weight is not None:
        pre_mean, pre_rstd = load_pair(pre_stats_ptr, rows, live_t)
        for chunk in range(chunks):
            columns = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
            live_c = columns < features
            g = through_down(ops, dq, columns, live_c, BLOCK_M, PRECISION)
            g *= vector(ops.pre_weight, columns, live_c)
            z = input_tile(ops, rows, live_t, columns, live_c, SKIP_IN)
            pre_first += tl.sum(g, 1)
            pre_second += tl.sum(g * (z - pre_mean[:, None]) * pre_rstd[:, None], 1)
        pre_first, pre_second = pre_first / features, pre_second / features

    if dx_ptr is not None or dskip_ptr is not None:
        for chunk in range(chunks):
            start = chunk * BLOCK_D
            columns = start + tl.arange(0, BLOCK_D)
            live_c = columns < features
            dx = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
            if NEED_DZ:
                dx = through_down(ops, dq, columns, live_c, BLOCK_M, PRECISION)
                if ops.pre_weight is not None:
                    z = input_tile(ops, rows, live_t, columns, live_c, SKIP_IN)
                    normal = (z - pre_mean[:, None]) * pre_rstd[:, None]
                    weight = vector(ops.pre_weight, columns, live_c)
                    dx = through_layernorm(dx, weight, normal, pre_rstd, pre_first, pre_second)
            dskip = dx
            if not SKIP_IN:
                dskip = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
            if RESIDUAL_X or RESIDUAL_SKIP:
                _, _, _, ds = expanded_and_upstream(
                    ops,
                    dy_ptr,
                    stride_dyt,
                    a,
                    rows,
                    live_t,
                    start,
                    columns,
                    live_c,
                    gate,
                    mean,
                    rstd,
                    first,
                    second,
                    False,
                    BLOCK_M,
                    RESIDUAL_X,
                    RESIDUAL_SKIP,
                    BY_FOUR,
                    PRECISION,
                )
                if RESIDUAL_X:
                    dx += ds
                if RESIDUAL_SKIP:
                    dskip += ds
            if dx_ptr is not None:
                _store_rows(dx_ptr, ops, dx, rows, live_t, columns, live_c)
            if dskip_ptr is not None:
                _store_rows(dskip_ptr, ops, dskip, rows, live_t, columns, live_c)


def launch_grad_rows(
    ops: Operands,
    dy: Tensor,
    q: Tensor,
    pre_stats: Tensor | None,
    post_stats: Tensor | None,
    dx: Tensor | None,
    dskip: Tensor | None,
    dq: Tensor | None,
    dgate: Tensor | None,
    sums: Tensor | None,
    rows: range,
    activation: str,
    skip_in: bool,
    residual_x: bool,
    residual_skip: bool,
    config: RowsConfig,
    precision: str,
) -> None:
    """Fills the rows ``rows`` of what is not None; dq is there if dx is, or dskip and ``skip_in``."""
    _adapter_rows_kernel[(cdiv(len(rows), config.block_t),)](
        ops,
        dy,
        q,
        pre_stats,
        post_stats,
        dx,
        dskip,
        dq,
        dgate,
        sums,
        rows.start,
        rows.stop,
        dy.stride(0),
        BLOCK_T=config.block_t,
        BLOCK_D=config.block_d,
        BLOCK_M=config.block_m,
        TILES=cdiv(ops.bottleneck, config.block_m),
        ACTIVATION=activation,
        SKIP_IN=skip_in,
        RESIDUAL_X=residual_x,
        RESIDUAL_SKIP=residual_skip,
        BY_FOUR=ops.features % 4 == 0,
        ALIGN=rank_alignment(ops.bottleneck),
        PRECISION=precision,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,  # said aloud: Triton 3.9 warns, and 3.10 changes the default
    )


def cost(problem: Any) -> Cost:
    """dy, x, skip, q, D and U in; dx, dskip and dq out."""
    t, d, m = problem.tokens, problem.features, problem.bottleneck
    rows = t * d * (5 if problem.skip else 3)
    return Cost(6 * t * d * m, itemsize(problem.dtype) * (rows + 2 * d * m + 2 * t * m))
