"""Ordered sum of fp32 partials: out = scale · Σₛ partial[s], s in order, rounded once.

partial [S, rows, columns] fp32 -> out (rows, columns), any dtype and strides. It is what makes split reductions
deterministic without atomics. Bound: HBM; bytes = partial + out.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .tiling import cdiv, power_of_two


@triton.jit(do_not_specialize=["splits"])
def _ordered_sum_kernel(
    partial_ptr,
    out_ptr,
    splits,
    rows,
    columns,
    stride_ps,
    stride_pr,
    stride_pc,
    stride_or,
    stride_oc,
    scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    live = (row[:, None] < rows) & (column[None, :] < columns)
    at = partial_ptr + row[:, None] * stride_pr + column[None, :] * stride_pc
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for _ in range(splits):
        total += tl.load(at, mask=live, other=0.0)
        at += stride_ps
    out = out_ptr + row[:, None] * stride_or + column[None, :] * stride_oc
    tl.store(out, (total * scale).to(out_ptr.dtype.element_ty), mask=live)


def launch_ordered_sum(partial: Tensor, out: Tensor, scale: float) -> None:
    """partial (S, rows, columns) fp32, out (rows, columns)."""
    splits, rows, columns = partial.shape
    block_columns = power_of_two(columns, 1, 128)
    block_rows = 1024 // block_columns  # eight elements a thread: 16 bytes of bfloat16
    grid = (cdiv(rows, block_rows), cdiv(columns, block_columns))
    _ordered_sum_kernel[grid](
        partial,
        out,
        splits,
        rows,
        columns,
        *partial.stride(),
        *out.stride(),
        scale,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        num_warps=4,
        enable_fp_fusion=True,
    )


@triton.jit(do_not_specialize=["splits"])
def _ordered_sums_kernel(partials, outs, sizes, splits, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for i in tl.static_range(len(outs)):
        if tl.program_id(1) == i:
            live = at < sizes[i]
            total = tl.zeros([BLOCK], tl.float32)
            place = partials[i] + at
            for _ in range(splits):
                total += tl.load(place, mask=live, other=0.0)
                place += stride
            tl.store(outs[i] + at, total.to(outs[i].dtype.element_ty), mask=live)


def launch_ordered_sums(partials: Sequence[Tensor], outs: Sequence[Tensor], splits: int) -> None:
    """Several sums in one launch: partials[i] (splits, ...) fp32, all with one first stride, outs[i] contiguous."""
    sizes = tuple([out.numel() for out in outs])
    _ordered_sums_kernel[(cdiv(max(sizes), 1024), len(outs))](
        tuple(partials),
        tuple(outs),
        sizes,
        splits,
        partials[0].stride(0),
        BLOCK=1024,
        num_warps=4,
        enable_fp_fusion=True,
    )
