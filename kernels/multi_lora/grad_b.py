"""Backward to every B: dB_i[g] = scaling_g · Σ dY_iᵀ (row_scale · s_i) over the tokens of adapter g.

dY_i (T, N_i), s (T, ΣR), dB_i (L, N_i, R_i). A program owns BLOCK_N columns of one projection and a block of its ranks,
of one group of an adapter's rows (`groups`), walks over those rows in order, and keeps an fp32 accumulator, which
scaling multiplies at the end. With a row scale both multiply s in fp32, before it is rounded.

Parallelism: groups × blocks of columns of all projections × blocks of ranks.
Bound: HBM; bytes = dY + dB of every adapter + s · N / BLOCK_N, and partials of adapters of several groups.
Deterministic: yes, and an adapter's gradient has the same bits alone, in a mixture and in any order of others' tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..common.cost import Cost, itemsize
from ..common.tiling import cdiv, power_of_two
from .groups import Sum, group_rows, open_group, partials
from .tiles import CHUNK_ROWS, factor_of, rank_of, starts_of, unsupported

__all__ = ["GradBConfig", "candidate_configs", "cost", "default_config", "unsupported"]


@dataclass(frozen=True)
class GradBConfig:
    """Tile sizes, and how many chunks of the plan are a group; never a function of the number of tokens."""

    block_t: int
    block_n: int
    block_r: int
    chunks: int
    num_warps: int = 4
    num_stages: int = 5  # two of them for the tokens, by which rows are found


@lru_cache(maxsize=1024)
def default_config(problem: Any) -> GradBConfig:
    """A configuration from all shapes but the number of tokens, on which no bit may depend."""
    wide = itemsize(problem.dtype) == 4
    block_r = power_of_two(problem.rank, 16, 64 if wide else 128)
    block_t = (16 if block_r > 32 else 32) if wide else 64
    block_n = power_of_two(max(problem.out_features), 16, 64 if wide or block_r > 32 else 128)
    chunks = 1 if problem.rank <= 32 else 2
    return GradBConfig(block_t, block_n, block_r, chunks, 8 if block_r > 32 else 4)


def candidate_configs(problem: Any) -> Iterator[GradBConfig]:
    """What an offline tuner should try; one choice for every number of tokens."""
    base = default_config(problem)
    for block_t in (32, 64, 128):
        for block_n in (32, 64, 128, 256):
            for chunks in (1, 2, 4):
                for num_stages in (3, 5, 7):
                    yield replace(
                        base, block_t=block_t, block_n=block_n, chunks=chunks, num_stages=num_stages
                    )


@triton.jit
def _grad_b_kernel(
    dys,
    s_ptr,
    dbs,
    partial_list,
    chunks_ptr,
    chunk_indptr_ptr,
    indptr_ptr,
    perm_ptr,
    ranks,
    scalings,
    row_scale_ptr,
    columns,
    strides_dy,
    stride_partial,
    STARTS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    TOTAL: tl.constexpr = STARTS[len(STARTS) - 1]
    adapter, begin, end, alone, slot = open_group(
        chunks_ptr, chunk_indptr_ptr, indptr_ptr, ROWS, CHUNK
    )
    if end <= begin:
        return
    block = tl.program_id(1)
    lanes = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    for i in tl.static_range(len(dys)):
        blocks = tl.cdiv(columns[i], BLOCK_N)
        if (block >= 0) & (block < blocks):
            WIDTH: tl.constexpr = STARTS[i + 1] - STARTS[i]
            cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
            live_n, live_r = cols < columns[i], lanes < WIDTH
            # Transposed: the large operand, dY, then goes to the tensor cores as it lies in memory.
            acc = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
            for t in range(begin, end, BLOCK_T):
                position = t + tl.arange(0, BLOCK_T)
                live = position < end
                tokens = tl.load(perm_ptr + position, mask=live, other=0).to(tl.int64)
                dy = tl.load(
                    dys[i] + tokens[:, None] * strides_dy[i] + cols[None, :],
                    mask=live[:, None] & live_n[None, :],
                    other=0.0,
                )
                s = tl.load(
                    s_ptr + tokens[:, None] * TOTAL + STARTS[i] + lanes[None, :],
                    mask=live[:, None] & live_r[None, :],
                    other=0.0,
                )
                if row_scale_ptr is not None:
                    factor = factor_of(scalings[i], row_scale_ptr, adapter, tokens, live)
                    s = (s.to(tl.float32) * factor[:, None]).to(dy.dtype)
                acc = tl.dot(tl.trans(s), dy, acc, input_precision=PRECISION)
            # Columns past the rank are zeros whatever dY holds: infinity times the zeros of s would be NaN.
            rank = rank_of(ranks[i], adapter, WIDTH)
            db = tl.where((lanes < rank)[None, :], tl.trans(acc), 0.0)
            mask = live_n[:, None] & live_r[None, :]
            at = cols.to(tl.int64)[:, None] * WIDTH + lanes[None, :]
            if partial_list[i] is None or alone:
                if row_scale_ptr is None:
                    scaling = tl.load(scalings[i] + adapter)
                    db = tl.where((lanes < rank)[None, :], db * scaling, 0.0)
                slab = dbs[i] + adapter.to(tl.int64) * columns[i] * WIDTH
                tl.store(slab + at, db.to(dbs[i].dtype.element_ty), mask=mask)
            else:
                tl.store(partial_list[i] + slot.to(tl.int64) * stride_partial + at, db, mask=mask)
        block -= blocks


def launch_grad_b(
    dy: Sequence[Tensor],
    s: Tensor,
    db: Sequence[Tensor],
    plan: Sequence[Tensor],
    ranks: Sequence[Tensor],
    scalings: Sequence[Tensor],
    row_scale: Tensor | None,
    config: GradBConfig,
    precision: str,
) -> list[Sum]:
    """dy[i] (T, N_i), rows of last stride 1, s (T, ΣR) contiguous, db[i] (L, N_i, R_i) contiguous.

    Fills adapters of one group and returns what `groups.launch_sums` has to do for the others.
    """
    tokens = s.shape[0]
    rows = group_rows(config.chunks)
    columns = tuple([d.shape[1] for d in dy])
    places = starts_of([grad[0].numel() for grad in db])
    partial = partials(s, tokens, rows, places[-1])
    parts = [
        None if partial is None else partial[:, first:last] for first, last in pairwise(places)
    ]
    widest = max([grad.shape[2] for grad in db])
    _grad_b_kernel[
        (
            plan[5].shape[0],
            sum([cdiv(n, config.block_n) for n in columns]),
            cdiv(widest, config.block_r),
        )
    ](
        tuple(dy),
        s,
        tuple(db),
        tuple(parts),
        plan[5],
        plan[6],
        plan[2],
        plan[1],
        tuple(ranks),
        tuple(scalings),
        row_scale,
        columns,
        tuple([d.stride(0) for d in dy]),
        places[-1],
        STARTS=starts_of([grad.shape[2] for grad in db]),
        ROWS=rows,
        CHUNK=CHUNK_ROWS,
        BLOCK_T=config.block_t,
        BLOCK_N=config.block_n,
        BLOCK_R=config.block_r,
        PRECISION=precision,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,  # said aloud: Triton 3.9 warns, and 3.10 changes the default
    )
    factors = scalings if row_scale is None else [None] * len(db)
    return [Sum(p, grad, factor) for p, grad, factor in zip(parts, db, factors, strict=True)]


def cost(problem: Any) -> Cost:
    """Dy and s in, dB of all adapters out."""
    t, n, r = problem.tokens, sum(problem.out_features), problem.rank
    size, projections = itemsize(problem.dtype), len(problem.out_features)
    return Cost(2 * t * n * r, size * (t * n + t * r * projections + problem.adapters * r * n))
