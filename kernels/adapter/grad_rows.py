"""Bottleneck adapter, backward by rows: dx, dskip, dq, dgate, and two sums a row of the layernorm's backward.

    ds = LN'(dy) or dy;  dw = gate · scale · keep · scaling / (1 - p) · ds;  da = dw U;  dq = da · act'(q)
    dv = dq D;  dz = LN'(dv) or dv;  dx = dz + ds;  dskip = dz + ds;  dgateₜ = Σ_c ds · scale · e,  e as in forward

    LN'(g) = rstd · (g·γ - mean(g·γ) - n · mean(g·γ·n)),  n the normalised row: the two means are `sums` (T, 2)

dy, x, skip, dx, dskip (T, d); q, a, dq (T, m) in x's dtype. Every output has its own switch, None. w and s are made
again from q; dw and dq are rounded to x's dtype before they are multiplied, the results once. a and dq are for
`grad_columns`.

Parallelism: blocks of 16 or 32 rows; a program walks its rows in chunks of block_d columns, up to four times: the
means of s, da, the means of z, dx.
Bound: HBM; bytes = dy + x + skip + D + U + q + dx + dskip + a + dq. The walks after the first find their rows in L1 or
L2; D and U come out of L2 once for each product of each block.
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
from ..common.tiling import cdiv
from .activation import activate_backward
from .forward import chunk_of_columns, columns_of_tile, rows_of_block
from .forward import unsupported as unsupported
from .operands import (
    Form,
    Operands,
    activated_tile,
    bottleneck_columns,
    bottleneck_tile,
    chunk_columns,
    dropped,
    expanded_tile,
    gate_of_rows,
    input_tile,
    load_pair,
    matrix_tile,
    row_of_up,
    row_tile,
    scale_of_columns,
    store_bottleneck_tile,
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
    """The longest blocks of rows that still give every multiprocessor one: each block reads D and U from L2."""
    wide = itemsize(problem.dtype) == 4
    block_m = columns_of_tile(problem)
    tiles = cdiv(problem.bottleneck, block_m)
    if tiles > 1 and problem.bottleneck % 8:
        block_m = 32  # less padding, which stands in registers too
    # da of a wide bottleneck, or a mask, leaves no registers for more rows.
    block_t = rows_of_block(problem, 16 if problem.bottleneck > 64 or problem.dropout else 32)
    # Rows that begin anywhere are loaded one element at a time, each with its pointer.
    alone = problem.features % 8 != 0
    masked = wide and problem.dropout and not alone
    # 16 rows of 64 columns, or 32 of 32, are 16 bytes a thread.
    roomy = block_t == 16 and tiles == 1 and not problem.dropout and not alone
    most = 16 if masked or tiles > 2 else 64 if roomy else 32
    warps = 4 if tiles == 1 and (masked or not (wide or alone)) else 8
    return RowsConfig(block_t, chunk_of_columns(problem, most), block_m, warps)


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
def normalised_sum(
    ops, a, rows, live_t, start, columns, live_c, gate, mean, rstd, FORM: tl.constexpr
):
    """E, and s normalised, of one chunk."""
    e = expanded_tile(ops, a, rows, start, columns, live_c, FORM)
    s = sum_tile(ops, e, rows, live_t, columns, live_c, gate, FORM)
    return e, (s - mean[:, None]) * rstd[:, None]


@triton.jit
def through_layernorm(g, normal, rstd, first, second):
    """LN' of g, which has γ in it: ``first`` and ``second`` are the means of g and g · normal over a row."""
    return rstd[:, None] * (g - first[:, None] - normal * second[:, None])


@triton.jit
def expanded_and_upstream(
    ops,
    a,
    dy,
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
    FORM: tl.constexpr,
):
    """(e, n, ds) of one chunk; dy stands in for e where nobody needs it, and for n where there is no layernorm."""
    if ops.ln_weight is not None:
        e, normal = normalised_sum(
            ops, a, rows, live_t, start, columns, live_c, gate, mean, rstd, FORM
        )
        g = dy * vector(ops.ln_weight, columns, live_c)
        return e, normal, through_layernorm(g, normal, rstd, first, second)
    elif NEED_E:
        return expanded_tile(ops, a, rows, start, columns, live_c, FORM), dy, dy
    else:
        return dy, dy, dy


@triton.jit
def into_expanded(ops, ds, rows, start, columns, live_c, gate, FORM: tl.constexpr):
    """dw of ds."""
    dw = ds * (gate * ops.amount) * scale_of_columns(ops, columns, live_c)
    return dropped(ops, dw, rows, start, FORM)


@triton.jit
def through_down(ops, dq, columns, live_c, FORM: tl.constexpr):
    """Dv = dq D of one chunk."""
    dv = tl.zeros([FORM.block_t, FORM.block_d], tl.float32)
    TILES: tl.constexpr = FORM.tiles
    for i in tl.static_range(TILES):
        inner, live_m = bottleneck_columns(ops, i, FORM)
        d = matrix_tile(
            *(ops.down, inner, ops.stride_dm, live_m, columns, ops.stride_dd, live_c),
            dtype=dq[i].dtype,
        )
        dv = tl.dot(dq[i], d, dv, input_precision=FORM.precision)
    return dv


@triton.jit
def _add_da(ops, da, dw, columns, live_c, FORM: tl.constexpr):
    """Da + dw U of one chunk."""
    out = ()
    TILES: tl.constexpr = FORM.tiles
    for i in tl.static_range(TILES):
        inner, live_m = bottleneck_columns(ops, i, FORM)
        u = matrix_tile(
            *(ops.up, columns, row_of_up(ops, FORM), live_c, inner, ops.stride_um, live_m),
            dtype=dw.dtype,
        )
        out = out + (tl.dot(dw, u, da[i], input_precision=FORM.precision),)
    return out


@triton.jit
def _output_means(ops, a, dy_ptr, stride_dyt, rows, live_t, gate, mean, rstd, FORM: tl.constexpr):
    """The means of dy · γ and dy · γ · n over each row."""
    first = tl.zeros([FORM.block_t], tl.float32)
    second = first
    for chunk in tl.range(tl.cdiv(ops.features, FORM.block_d), disable_licm=FORM.lean):
        start, columns, live_c = chunk_columns(ops, chunk, FORM)
        _e, normal = normalised_sum(
            ops, a, rows, live_t, start, columns, live_c, gate, mean, rstd, FORM
        )
        g = row_tile(dy_ptr, stride_dyt, rows, live_t, columns, live_c)
        g *= vector(ops.ln_weight, columns, live_c)
        first += tl.sum(g, 1)
        second += tl.sum(g * normal, 1)
    return first / ops.features, second / ops.features


@triton.jit
def _into_bottleneck(
    ops,
    a,
    dy_ptr,
    stride_dyt,
    rows,
    live_t,
    gate,
    mean,
    rstd,
    first,
    second,
    dtype: tl.constexpr,
    NEED_DA: tl.constexpr,
    NEED_DGATE: tl.constexpr,
    FORM: tl.constexpr,
):
    """da, a tuple of tiles, and dgate (BLOCK_T,)."""
    da = ()
    TILES: tl.constexpr = FORM.tiles
    for _ in tl.static_range(TILES):
        da = da + (tl.zeros([FORM.block_t, FORM.block_m], tl.float32),)
    dgate = tl.zeros([FORM.block_t], tl.float32)
    for chunk in tl.range(tl.cdiv(ops.features, FORM.block_d), disable_licm=FORM.lean):
        start, columns, live_c = chunk_columns(ops, chunk, FORM)
        dy = row_tile(dy_ptr, stride_dyt, rows, live_t, columns, live_c)
        e, _normal, ds = expanded_and_upstream(
            *(ops, a, dy, rows, live_t, start, columns, live_c, gate, mean, rstd, first, second),
            NEED_E=NEED_DGATE,
            FORM=FORM,
        )
        if NEED_DGATE:
            dgate += tl.sum(ds * e * scale_of_columns(ops, columns, live_c), 1)
        if NEED_DA:
            dw = into_expanded(ops, ds, rows, start, columns, live_c, gate, FORM)
            da = _add_da(ops, da, dw.to(dtype), columns, live_c, FORM)
    return da, dgate


@triton.jit
def _activated_again(ops, q_ptr, a_ptr, rows, live_t, FORM: tl.constexpr):
    """a, a tuple of tiles, stored where the columns need it: there every block would make it again."""
    a = ()
    TILES: tl.constexpr = FORM.tiles
    for i in tl.static_range(TILES):
        tile = activated_tile(bottleneck_tile(q_ptr, ops, i, rows, live_t, FORM), FORM)
        if a_ptr is not None:
            store_bottleneck_tile(a_ptr, ops, i, tile, rows, live_t, FORM)
        a = a + (tile,)
    return a


@triton.jit
def _through_activation(ops, da, q_ptr, dq_ptr, rows, live_t, FORM: tl.constexpr):
    """dq, stored, and as a tuple of tiles."""
    dq = ()
    TILES: tl.constexpr = FORM.tiles
    for i in tl.static_range(TILES):
        q = bottleneck_tile(q_ptr, ops, i, rows, live_t, FORM)
        tile = activate_backward(da[i], q.to(tl.float32), FORM.activation).to(q.dtype)
        store_bottleneck_tile(dq_ptr, ops, i, tile, rows, live_t, FORM)
        dq = dq + (tile,)
    return dq


@triton.jit
def _input_means(ops, dq, rows, live_t, mean, rstd, FORM: tl.constexpr):
    """The means of dv · γ and dv · γ · n over each row, of the layernorm before the adapter."""
    first = tl.zeros([FORM.block_t], tl.float32)
    second = first
    for chunk in tl.range(tl.cdiv(ops.features, FORM.block_d), disable_licm=FORM.lean):
        _start, columns, live_c = chunk_columns(ops, chunk, FORM)
        g = through_down(ops, dq, columns, live_c, FORM) * vector(ops.pre_weight, columns, live_c)
        z = input_tile(ops, rows, live_t, columns, live_c, FORM)
        first += tl.sum(g, 1)
        second += tl.sum(g * (z - mean[:, None]) * rstd[:, None], 1)
    return first / ops.features, second / ops.features


@triton.jit
def _into_input(
    ops, dq, rows, live_t, columns, live_c, mean, rstd, first, second, FORM: tl.constexpr
):
    """dz of one chunk."""
    dz = through_down(ops, dq, columns, live_c, FORM)
    if ops.pre_weight is not None:
        z = input_tile(ops, rows, live_t, columns, live_c, FORM)
        normal = (z - mean[:, None]) * rstd[:, None]
        g = dz * vector(ops.pre_weight, columns, live_c)
        return through_layernorm(g, normal, rstd, first, second)
    else:
        return dz


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
    a_ptr,
    dq_ptr,
    dgate_ptr,
    sums_ptr,
    begin,
    end,
    stride_dyt,
    FORM: tl.constexpr,
):
    rows = (begin + tl.program_id(0) * FORM.block_t + tl.arange(0, FORM.block_t)).to(tl.int64)
    live_t = rows < end
    gate = gate_of_rows(ops, rows, live_t)
    mean = tl.zeros([FORM.block_t], tl.float32)
    rstd, first, second = mean, mean, mean
    pre_mean, pre_rstd, pre_first, pre_second = mean, mean, mean, mean
    NEED_DZ: tl.constexpr = dx_ptr is not None or (dskip_ptr is not None and FORM.skip_in)
    NEED_DS: tl.constexpr = (dx_ptr is not None and FORM.residual_x) or (
        dskip_ptr is not None and FORM.residual_skip
    )
    NEED_DA: tl.constexpr = dq_ptr is not None or dgate_ptr is not None

    a = ()
    if ops.ln_weight is not None or dgate_ptr is not None or a_ptr is not None:
        a = _activated_again(ops, q_ptr, a_ptr, rows, live_t, FORM)
    if ops.ln_weight is not None and (NEED_DA or NEED_DS or sums_ptr is not None):
        mean, rstd = load_pair(post_stats_ptr, rows, live_t)
        first, second = _output_means(
            ops, a, dy_ptr, stride_dyt, rows, live_t, gate, mean, rstd, FORM
        )
        if sums_ptr is not None:
            store_pair(sums_ptr, rows, live_t, first, second)

    if NEED_DA:
        da, dgate = _into_bottleneck(
            *(ops, a, dy_ptr, stride_dyt, rows, live_t, gate, mean, rstd, first, second),
            dtype=q_ptr.dtype.element_ty,
            NEED_DA=dq_ptr is not None,
            NEED_DGATE=dgate_ptr is not None,
            FORM=FORM,
        )
        if dgate_ptr is not None:
            tl.store(dgate_ptr + rows, dgate.to(dgate_ptr.dtype.element_ty), mask=live_t)
    if dq_ptr is not None:
        dq = _through_activation(ops, da, q_ptr, dq_ptr, rows, live_t, FORM)

    if NEED_DZ and ops.pre_weight is not None:
        pre_mean, pre_rstd = load_pair(pre_stats_ptr, rows, live_t)
        pre_first, pre_second = _input_means(ops, dq, rows, live_t, pre_mean, pre_rstd, FORM)
    if dx_ptr is not None or dskip_ptr is not None:
        for chunk in tl.range(tl.cdiv(ops.features, FORM.block_d), disable_licm=FORM.lean):
            start, columns, live_c = chunk_columns(ops, chunk, FORM)
            dz = tl.zeros([FORM.block_t, FORM.block_d], tl.float32)
            ds = dz
            if NEED_DZ:
                dz = _into_input(
                    *(ops, dq, rows, live_t, columns, live_c),
                    *(pre_mean, pre_rstd, pre_first, pre_second, FORM),
                )
            if NEED_DS:
                dy = row_tile(dy_ptr, stride_dyt, rows, live_t, columns, live_c)
                _e, _n, ds = expanded_and_upstream(
                    *(ops, a, dy, rows, live_t, start, columns, live_c),
                    *(gate, mean, rstd, first, second),
                    NEED_E=False,
                    FORM=FORM,
                )
            if dx_ptr is not None:
                dx = dz + ds if FORM.residual_x else dz
                _store_rows(dx_ptr, ops, dx, rows, live_t, columns, live_c)
            if dskip_ptr is not None:
                dskip = ds if FORM.residual_skip else tl.zeros_like(ds)
                if FORM.skip_in:
                    dskip += dz
                _store_rows(dskip_ptr, ops, dskip, rows, live_t, columns, live_c)


def launch_grad_rows(
    ops: Operands,
    dy: Tensor,
    q: Tensor,
    pre_stats: Tensor | None,
    post_stats: Tensor | None,
    dx: Tensor | None,
    dskip: Tensor | None,
    a: Tensor | None,
    dq: Tensor | None,
    dgate: Tensor | None,
    sums: Tensor | None,
    rows: range,
    form: Form,
    config: RowsConfig,
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
        a,
        dq,
        dgate,
        sums,
        rows.start,
        rows.stop,
        dy.stride(0),
        FORM=form.tiled(ops, config),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,  # said aloud: Triton 3.9 warns, and 3.10 changes the default
    )


def cost(problem: Any) -> Cost:
    """dy, x, skip, q, D and U in; dx, dskip, a and dq out."""
    t, d, m = problem.tokens, problem.features, problem.bottleneck
    rows = t * d * (5 if problem.skip else 3)
    return Cost(6 * t * d * m, itemsize(problem.dtype) * (rows + 2 * d * m + 3 * t * m))
