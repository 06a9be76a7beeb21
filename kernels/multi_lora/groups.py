"""Sums over an adapter's tokens: groups of chunks, and the ordered sum of their fp32 partials.

A group is up to ``chunks`` of the plan's chunks of one adapter, counted from the adapter's first: which rows it has,
and in which order they are summed, depends on that adapter's tokens alone. An adapter of one group has its gradient
written at once. Partials exist for the others: each has more tokens than a group has rows, so a group's partial has its
place by where the group begins, and there are 2 · T / rows of them, however many adapters there are.

`launch_sums`: out[g] = factor · Σ partials of g's groups in order; zeros for adapters without a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.tiling import cdiv
from .tiles import CHUNK_ROWS


def group_rows(chunks: int) -> int:
    """Rows of a group."""
    return chunks * CHUNK_ROWS


def partials(like: Tensor, tokens: int, rows: int, size: int) -> Tensor | None:
    """Room for the partials of groups, fp32 (n, size); None where every adapter is one group."""
    if tokens <= rows:
        return None
    return like.new_empty((2 * cdiv(tokens, rows), size), dtype=torch.float32)


@triton.jit
def open_group(chunks_ptr, chunk_indptr_ptr, indptr_ptr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """This program's group: adapter, where its rows begin and end in perm, is it the only one, its partial's place."""
    chunk = tl.program_id(0)
    adapter, rows = tl.load(chunks_ptr + chunk * 4), tl.load(chunks_ptr + chunk * 4 + 2)
    real = (rows > 0) & (adapter >= 0)
    index = chunk - tl.load(chunk_indptr_ptr + adapter, mask=real, other=0)
    begin = tl.load(chunks_ptr + chunk * 4 + 1)
    first = tl.load(indptr_ptr + adapter, mask=real, other=0)
    last = tl.load(indptr_ptr + adapter + 1, mask=real, other=0)
    end = tl.where(real & (index % (ROWS // CHUNK) == 0), min(begin + ROWS, last), begin)
    slot = begin // ROWS * 2 + min(index, 1)
    return adapter, begin, end, last - first <= ROWS, slot


@triton.jit
def _sums_kernel(
    partial_list,
    outs,
    factors,
    indptr_ptr,
    sizes,
    strides,
    scale,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    adapter = tl.program_id(0)
    first, last = tl.load(indptr_ptr + adapter), tl.load(indptr_ptr + adapter + 1)
    groups = tl.cdiv(last - first, ROWS)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for i in tl.static_range(len(outs)):
        if (tl.program_id(2) == i) & (groups != 1):
            live = at < sizes[i]
            total = tl.zeros([BLOCK], tl.float32)
            if partial_list[i] is not None:
                for group in range(groups):
                    slot = (first + group * ROWS) // ROWS * 2 + min(group, 1)
                    place = partial_list[i] + slot.to(tl.int64) * strides[i] + at
                    total += tl.load(place, mask=live, other=0.0)
            if factors[i] is not None:
                total = tl.where(groups > 0, total * tl.load(factors[i] + adapter), 0.0)
            else:
                total *= scale
            out = outs[i] + adapter.to(tl.int64) * sizes[i] + at
            tl.store(out, total.to(outs[i].dtype.element_ty), mask=live)


class Sum(NamedTuple):
    """One gradient of every adapter, and where its partials are."""

    partial: Tensor | None  # (slots, size) fp32
    out: Tensor  # (L, ...) contiguous, size elements an adapter
    factor: Tensor | None  # (L,) fp32; None: ``scale``


def launch_sums(sums: Sequence[Sum], indptr: Tensor, rows: int, scale: float) -> None:
    """Writes what the groups have not: adapters of several groups, and of none."""
    sizes = tuple([s.out[0].numel() for s in sums])
    _sums_kernel[(sums[0].out.shape[0], cdiv(max(sizes), 1024), len(sums))](
        tuple([s.partial for s in sums]),
        tuple([s.out for s in sums]),
        tuple([s.factor for s in sums]),
        indptr,
        sizes,
        tuple([0 if s.partial is None else s.partial.stride(0) for s in sums]),
        scale,
        ROWS=rows,
        BLOCK=1024,
        num_warps=4,
        enable_fp_fusion=True,
    )
