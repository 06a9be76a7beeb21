"""Bottleneck adapter, backward by columns: every gradient that is a sum over tokens.

    dU = dwᵀ a;  dub = Σ dw;  dscale = Σ ds · gate · e;  dγ = Σ dy · n;  dβ = Σ dy           (n: s normalised)
    dD = dqᵀ v;  ddb = Σ dq;  dγ' = Σ dv · n';  dβ' = Σ dv,  dv = dq D                        (n': z normalised)

dy, x, skip (T, d); a, dq (T, m) and `sums` (T, 2) from `grad_rows`. A program owns block_d columns of a strip of tokens
and a tile of the bottleneck; what it needs of w, s, ds and dw it makes again. Every output has its own switch, None.

Accumulators are fp32. One strip: a program writes its gradients in the parameters' dtypes. Several, or several slabs of
rows: partials [strips, ...], into which a later slab adds, summed in order by `common.reduce` afterwards.

Bound: HBM; bytes = dy + x + skip + a + dq + D + U + the gradients + 8 · strips · (2 · d · m + vectors). Narrow column
blocks rather than many strips fill the GPU, so that partials stay a small part of the bytes; every column block reads a
and dq, out of L2. Called slab by slab after `grad_rows`, it finds dy, x and skip in L2 too.
Deterministic: always.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.cost import Cost, itemsize
from ..common.hardware import l2_cache, sm_count
from ..common.reduce import launch_ordered_sums
from ..common.tiling import cdiv, power_of_two
from .forward import columns_of_tile
from .forward import unsupported as unsupported
from .grad_rows import expanded_and_upstream, into_expanded, through_down
from .operands import (
    Form,
    Operands,
    bottleneck_columns,
    bottleneck_tile,
    bottleneck_tiles,
    chunk_columns,
    gate_of_rows,
    input_tile,
    load_pair,
    normalised_input,
    row_tile,
)


@dataclass(frozen=True)
class ColumnsConfig:
    """Tile sizes, the strips of tokens of one slab; ``apart``: one launch for D's side, one for U's."""

    block_t: int
    block_d: int
    block_m: int
    strips: int
    apart: bool = False
    num_warps: int = 4
    num_stages: int = 2


class ColumnGrads(NamedTuple):
    """What the kernel fills, None where it is not wanted: gradients, or their fp32 partials [strips, ...]."""

    down: Tensor | None
    down_bias: Tensor | None
    up: Tensor | None
    up_bias: Tensor | None
    scale: Tensor | None  # (d,), also for a scale of one element
    pre_weight: Tensor | None
    pre_bias: Tensor | None
    ln_weight: Tensor | None
    ln_bias: Tensor | None

    def sides(self) -> list[ColumnGrads]:
        """D's side and U's side; one of which nothing is wanted is left out."""
        nothing = ColumnGrads(*[None] * len(self))
        below = ("down", "down_bias", "pre_weight", "pre_bias")
        found = [
            nothing._replace(**{k: v for k, v in self._asdict().items() if (k in below) == side})
            for side in (True, False)
        ]
        return [side for side in found if any(grad is not None for grad in side)]


@lru_cache(maxsize=1024)
def default_config(problem: Any) -> ColumnsConfig:
    """Column blocks as narrow as a sector of 32 bytes; strips to fill the GPU, if their partials are few bytes."""
    wide = itemsize(problem.dtype) == 4
    t, d, m = problem.tokens, problem.features, problem.bottleneck
    block_m = columns_of_tile(problem)
    block_t = power_of_two(t, 16, 16 if wide or m % 8 else 32)
    size = itemsize(problem.dtype)
    # Beyond compulsory bytes a tenth may move: a, dq and the sums of `grad_rows`, then partials, here up to a twelfth.
    allowed = size * (t * d * (5 if problem.skip else 3) + 4 * d * m) // 12
    allowed -= 2 * size * t * m + 8 * t
    strips = cdiv(2 * sm_count(problem.arch), cdiv(d, 16) * cdiv(m, block_m))
    # Partials are written once, and for every further slab read and written again.
    slabs = cdiv(t, slab_rows(problem, 5 if problem.skip else 3))
    partial = 4 * (2 * d * m + 6 * d) * (2 * slabs - 1)
    strips = min(strips, allowed // partial, cdiv(t, block_t))
    # A layernorm before the adapter adds two sums and a product, for which registers do not suffice.
    return ColumnsConfig(block_t, 16, block_m, max(strips, 1), problem.pre_ln, 4, 2)


def slab_rows(problem: Any, streams: int) -> int:
    """Rows that backward by rows and by columns take in turn, ``streams`` tensors (T, d) wide.

    So many that what the one has read is still in L2 when the other reads it again; but never so few that
    half of the multiprocessors are without a block.
    """
    row = itemsize(problem.dtype) * problem.features * streams
    fit = max(l2_cache(problem.arch) * 3 // 4 // row, 8 * sm_count(problem.arch))
    slabs = cdiv(problem.tokens, fit)
    return cdiv(cdiv(problem.tokens, slabs), 64) * 64


def candidate_configs(problem: Any) -> Iterator[ColumnsConfig]:
    """What an offline tuner should try."""
    base = default_config(problem)
    for block_t in (32, 64, 128):
        for block_d in (16, 32, 64):
            for strips in (1, 2, 4, 8):
                for num_stages in (1, 2, 3):
                    yield replace(
                        base,
                        block_t=block_t,
                        block_d=block_d,
                        strips=strips,
                        num_stages=num_stages,
                    )


@triton.jit
def _add_to(ptr, stride, strip, at, value, live, earlier):
    """Stores a sum over this strip's rows at its place, on top of what earlier slabs left there."""
    if ptr is not None:
        place = ptr + strip * stride + at
        if earlier:
            value += tl.load(place, mask=live, other=0.0).to(tl.float32)
        tl.store(place, value.to(ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["begin", "end", "strip_rows"])
def _adapter_columns_kernel(
    ops,
    grads,
    dy_ptr,
    a_ptr,
    dq_ptr,
    pre_stats_ptr,
    post_stats_ptr,
    sums_ptr,
    begin,
    end,
    strip_rows,
    stride_dyt,
    stride_partial,
    FORM: tl.constexpr,
):
    strip, tile = tl.program_id(1), tl.program_id(2)
    start, columns, live_c = chunk_columns(ops, tl.program_id(0), FORM)
    inner, live_m = bottleneck_columns(ops, tile, FORM)
    NEED_E: tl.constexpr = grads.scale is not None
    NEED_DS: tl.constexpr = (
        NEED_E or grads.up is not None or grads.up_bias is not None or grads.ln_weight is not None
    )
    NEED_W: tl.constexpr = NEED_E or (NEED_DS and ops.ln_weight is not None)
    NEED_DQ: tl.constexpr = (
        grads.down is not None
        or grads.down_bias is not None
        or grads.pre_weight is not None
        or grads.pre_bias is not None
    )

    d_up = tl.zeros([FORM.block_d, FORM.block_m], tl.float32)
    d_down = tl.zeros([FORM.block_d, FORM.block_m], tl.float32)
    d_down_bias = tl.zeros([FORM.block_m], tl.float32)
    # These are summed over tokens once, at the end: a tile of sums costs less than a reduction in every step.
    d_up_bias = tl.zeros([FORM.block_t, FORM.block_d], tl.float32)
    d_scale, d_ln_weight, d_ln_bias = d_up_bias, d_up_bias, d_up_bias
    d_pre_weight, d_pre_bias = d_up_bias, d_up_bias

    first_row = begin + strip * strip_rows
    for t in range(first_row, min(first_row + strip_rows, end), FORM.block_t):
        rows = (t + tl.arange(0, FORM.block_t)).to(tl.int64)
        live_t = rows < end  # strips are whole blocks
        if NEED_DS or grads.ln_bias is not None:
            dy = row_tile(dy_ptr, stride_dyt, rows, live_t, columns, live_c)
            if grads.ln_bias is not None:
                d_ln_bias += dy
        if NEED_DS:
            gate = gate_of_rows(ops, rows, live_t)
            mean = tl.zeros([FORM.block_t], tl.float32)
            rstd, first, second = mean, mean, mean
            if ops.ln_weight is not None:
                mean, rstd = load_pair(post_stats_ptr, rows, live_t)
            if sums_ptr is not None:
                first, second = load_pair(sums_ptr, rows, live_t)
            a = ()
            if NEED_W:
                a = bottleneck_tiles(a_ptr, ops, rows, live_t, FORM)
            e, normal, ds = expanded_and_upstream(
                *(ops, a, dy, rows, live_t, start, columns, live_c),
                *(gate, mean, rstd, first, second, NEED_E, FORM),
            )
            if grads.ln_weight is not None:
                d_ln_weight += dy * normal
            if grads.scale is not None:
                d_scale += ds * gate * e
            if grads.up is not None or grads.up_bias is not None:
                dw = into_expanded(ops, ds, rows, start, columns, live_c, gate, FORM)
                if grads.up_bias is not None:
                    d_up_bias += dw
                if grads.up is not None:
                    own = bottleneck_tile(a_ptr, ops, tile, rows, live_t, FORM)
                    dw = tl.trans(dw.to(own.dtype))
                    d_up = tl.dot(dw, own, d_up, input_precision=FORM.precision)
        if NEED_DQ:
            own_dq = bottleneck_tile(dq_ptr, ops, tile, rows, live_t, FORM)
            if grads.down_bias is not None:
                d_down_bias += tl.sum(own_dq.to(tl.float32), 0)
            if grads.down is not None or grads.pre_weight is not None:
                z = input_tile(ops, rows, live_t, columns, live_c, FORM)
                pre_mean = tl.zeros([FORM.block_t], tl.float32)
                pre_rstd = pre_mean
                if ops.pre_weight is not None:
                    pre_mean, pre_rstd = load_pair(pre_stats_ptr, rows, live_t)
            if grads.down is not None:
                v = normalised_input(ops, z, pre_mean, pre_rstd, columns, live_c)
                v = tl.trans(v.to(own_dq.dtype))
                d_down = tl.dot(v, own_dq, d_down, input_precision=FORM.precision)
            if grads.pre_weight is not None or grads.pre_bias is not None:
                dq = bottleneck_tiles(dq_ptr, ops, rows, live_t, FORM)
                dv = through_down(ops, dq, columns, live_c, FORM)
                if grads.pre_bias is not None:
                    d_pre_bias += dv
                if grads.pre_weight is not None:
                    d_pre_weight += dv * (z - pre_mean[:, None]) * pre_rstd[:, None]

    earlier = begin > 0
    live = live_c[:, None] & live_m[None, :]
    of_up = columns[:, None] * ops.bottleneck + inner[None, :]
    of_down = columns[:, None] + inner[None, :] * ops.features
    # 64 bits: partials of many strips
    strip = strip.to(tl.int64)
    _add_to(grads.up, stride_partial, strip, of_up, d_up, live, earlier)
    _add_to(grads.down, stride_partial, strip, of_down, d_down, live, earlier)
    if start == 0:
        _add_to(grads.down_bias, stride_partial, strip, inner, d_down_bias, live_m, earlier)
    # Every tile of the bottleneck has the same vectors: the first one keeps them.
    if tile == 0:
        _add_to(
            grads.up_bias, stride_partial, strip, columns, tl.sum(d_up_bias, 0), live_c, earlier
        )
        _add_to(grads.scale, stride_partial, strip, columns, tl.sum(d_scale, 0), live_c, earlier)
        _add_to(
            grads.pre_weight,
            stride_partial,
            strip,
            columns,
            tl.sum(d_pre_weight, 0),
            live_c,
            earlier,
        )
        _add_to(
            grads.pre_bias, stride_partial, strip, columns, tl.sum(d_pre_bias, 0), live_c, earlier
        )
        _add_to(
            grads.ln_weight, stride_partial, strip, columns, tl.sum(d_ln_weight, 0), live_c, earlier
        )
        _add_to(
            grads.ln_bias, stride_partial, strip, columns, tl.sum(d_ln_bias, 0), live_c, earlier
        )


class Partials(NamedTuple):
    """Where the kernel adds up: the gradients themselves, or slices of one fp32 buffer [strips, total]."""

    places: ColumnGrads
    stride: int
    buffer: Tensor | None

    @classmethod
    def make(cls, grads: ColumnGrads, strips: int, slabs: int) -> Partials:
        """Straight into the gradients where one program makes all of a sum."""
        wanted = [g for g in grads if g is not None]
        if strips == slabs == 1 or not wanted:
            return cls(grads, 0, None)
        # each slice begins at 16 bytes, so that it can be stored by 16
        sizes = [0 if g is None else cdiv(g.numel(), 4) * 4 for g in grads]
        buffer = wanted[0].new_empty((strips, sum(sizes)), dtype=torch.float32)
        places = [
            None if grad is None else part[:, : grad.numel()]
            for grad, part in zip(grads, buffer.split(sizes, 1), strict=True)
        ]
        return cls(ColumnGrads(*places), buffer.stride(0), buffer)

    def finish(self, grads: ColumnGrads) -> None:
        """Sums the partials, in order, into the gradients."""
        if self.buffer is not None:
            pairs = [(p, g) for p, g in zip(self.places, grads, strict=True) if g is not None]
            partials, outs = zip(*pairs, strict=True)
            launch_ordered_sums(partials, outs, self.buffer.shape[0])


def launch_grad_columns(
    ops: Operands,
    partials: Partials,
    dy: Tensor,
    a: Tensor | None,
    dq: Tensor | None,
    pre_stats: Tensor | None,
    post_stats: Tensor | None,
    sums: Tensor | None,
    rows: range,
    form: Form,
    config: ColumnsConfig,
) -> None:
    """Adds the sums over ``rows`` to the partials; the first slab, which begins at row 0, overwrites them."""
    strip_rows = cdiv(cdiv(len(rows), config.strips), config.block_t) * config.block_t
    grid = (
        cdiv(ops.features, config.block_d),
        config.strips,
        cdiv(ops.bottleneck, config.block_m),
    )
    for places in partials.places.sides() if config.apart else [partials.places]:
        _adapter_columns_kernel[grid](
            ops,
            places,
            dy,
            a,
            dq,
            pre_stats,
            post_stats,
            sums,
            rows.start,
            rows.stop,
            strip_rows,
            dy.stride(0),
            partials.stride,
            FORM=form.tiled(ops, config),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,  # said aloud: Triton 3.9 warns, and 3.10 changes the default
        )


def cost(problem: Any) -> Cost:
    """dy, x, skip, a, dq, D and U in; dU and dD out."""
    t, d, m = problem.tokens, problem.features, problem.bottleneck
    rows = t * d * (3 if problem.skip else 2)
    return Cost(6 * t * d * m, itemsize(problem.dtype) * (rows + 4 * d * m + 2 * t * m))
