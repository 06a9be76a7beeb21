"""Backward to every A: dA_i[g] = 1/(1-p) · Σ ds_iᵀ (maskᵢ ⊙ x) over the tokens of adapter g.

x (T, K), ds (T, ΣR), K = in; dA_i (L, R_i, K). The projections' ranks stand side by side, so x is read once for all of
them. A program owns BLOCK_K columns and a block of ranks of one group of an adapter's rows (`groups`), walks over those
rows in order, and keeps an fp32 accumulator. The mask of forward is drawn again.

Parallelism: groups × blocks of columns × blocks of ranks.
Bound: HBM; bytes = x + dA of every adapter + ds · K / BLOCK_K, and partials of adapters of several groups.
Deterministic: yes, and an adapter's gradient has the same bits alone, in a mixture and in any order of others' tokens.
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
from ..common.tiling import cdiv, power_of_two
from .groups import Sum, group_rows, open_group, partials
from .tiles import CHUNK_ROWS, rank_of, starts_of, threshold_of, unsupported

__all__ = ["GradAConfig", "candidate_configs", "cost", "default_config", "unsupported"]


@dataclass(frozen=True)
class GradAConfig:
    """Tile sizes, and how many chunks of the plan are a group; never a function of the number of tokens."""

    block_t: int
    block_k: int
    block_r: int
    chunks: int
    num_warps: int = 4
    num_stages: int = 5  # two of them for the tokens, by which rows are found


@lru_cache(maxsize=1024)
def default_config(problem: Any) -> GradAConfig:
    """A configuration from all shapes but the number of tokens, on which no bit may depend."""
    wide = itemsize(problem.dtype) == 4
    rank = problem.rank * len(problem.out_features)
    block_r = power_of_two(rank, 16, 64 if wide else 128)
    block_t = 32 if wide else 64
    block_k = power_of_two(problem.in_features, 16, 64 if wide or block_r > 32 else 128)
    if problem.dropout and problem.in_features % 4:
        # Each element makes its own Philox call, which takes four times the registers.
        block_t, block_k = 32, min(block_k, 32)
    # Partials are 8 · R · K bytes a group, against 2 · rows · K of x.
    chunks = 1 if block_r <= 32 else 2
    several = problem.dropout and len(problem.out_features) > 1
    return GradAConfig(block_t, block_k, block_r, chunks, 8 if block_r >= 64 or several else 4)


def candidate_configs(problem: Any) -> Iterator[GradAConfig]:
    """What an offline tuner should try; one choice for every number of tokens."""
    base = default_config(problem)
    for block_t in (32, 64, 128):
        for block_k in (32, 64, 128, 256):
            for chunks in (1, 2, 4):
                for num_stages in (3, 5, 7):
                    yield replace(
                        base, block_t=block_t, block_k=block_k, chunks=chunks, num_stages=num_stages
                    )


@triton.jit
def _grad_a_kernel(
    x_ptr,
    ds_ptr,
    das,
    partial_ptr,
    seed_ptr,
    chunks_ptr,
    chunk_indptr_ptr,
    indptr_ptr,
    perm_ptr,
    ranks,
    features,
    stride_xt,
    scale,
    threshold,
    STARTS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BY_FOUR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    TOTAL: tl.constexpr = STARTS[len(STARTS) - 1]
    adapter, begin, end, alone, slot = open_group(
        chunks_ptr, chunk_indptr_ptr, indptr_ptr, ROWS, CHUNK
    )
    if end <= begin:
        return
    first = tl.program_id(1) * BLOCK_K
    columns = first + tl.arange(0, BLOCK_K)
    lanes = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    live_k, live_r = columns < features, lanes < TOTAL
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for t in range(begin, end, BLOCK_T):
        position = t + tl.arange(0, BLOCK_T)
        live = position < end
        tokens = tl.load(perm_ptr + position, mask=live, other=0).to(tl.int64)
        x = tl.load(
            x_ptr + tokens[:, None] * stride_xt + columns[None, :],
            mask=live[:, None] & live_k[None, :],
            other=0.0,
        )
        ds = tl.load(
            ds_ptr + tokens[:, None] * TOTAL + lanes[None, :],
            mask=live[:, None] & live_r[None, :],
            other=0.0,
        )
        if seed_ptr is not None:
            for i in tl.static_range(len(das)):
                keep = keep_mask(
                    *(seed, tokens, first, features, i, threshold), BLOCK_T, BLOCK_K, BY_FOUR
                )
                kept = tl.where(keep, x, 0.0)
                # Rank columns of other projections are zeroed in ds' tile, so one accumulator serves them all.
                if len(das) == 1:
                    own = ds
                else:
                    own = tl.where(
                        ((lanes >= STARTS[i]) & (lanes < STARTS[i + 1]))[None, :], ds, 0.0
                    )
                acc = tl.dot(tl.trans(own), kept, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(tl.trans(ds), x, acc, input_precision=PRECISION)
    for i in tl.static_range(len(das)):
        rank = lanes - STARTS[i]
        # Rows past the rank are zeros whatever x holds: infinity times the zeros of ds would be NaN.
        da = tl.where(
            (rank < rank_of(ranks[i], adapter, STARTS[i + 1] - STARTS[i]))[:, None], acc, 0.0
        )
        mask = ((rank >= 0) & (rank < STARTS[i + 1] - STARTS[i]))[:, None] & live_k[None, :]
        if partial_ptr is None or alone:
            slab = das[i] + adapter.to(tl.int64) * (STARTS[i + 1] - STARTS[i]) * features
            at = rank.to(tl.int64)[:, None] * features + columns[None, :]
            tl.store(slab + at, (da * scale).to(das[i].dtype.element_ty), mask=mask)
        else:
            at = (slot.to(tl.int64) * TOTAL + lanes)[:, None] * features + columns[None, :]
            tl.store(partial_ptr + at, da, mask=mask)


def launch_grad_a(
    x: Tensor,
    ds: Tensor,
    da: Sequence[Tensor],
    plan: Sequence[Tensor],
    ranks: Sequence[Tensor],
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
    config: GradAConfig,
    precision: str,
) -> list[Sum]:
    """x (T, in), rows of last stride 1, ds (T, ΣR) contiguous, da[i] (L, R_i, in) contiguous; ``scale`` is 1 / (1 - p).

    Fills adapters of one group and returns what `groups.launch_sums` has to do for the others.
    """
    (tokens, features), total = x.shape, ds.shape[1]
    rows = group_rows(config.chunks)
    starts = starts_of([grad.shape[1] for grad in da])
    partial = partials(x, tokens, rows, total * features)
    _grad_a_kernel[(plan[5].shape[0], cdiv(features, config.block_k), cdiv(total, config.block_r))](
        x,
        ds,
        tuple(da),
        partial,
        seed,
        plan[5],
        plan[6],
        plan[2],
        plan[1],
        tuple(ranks),
        features,
        x.stride(0),
        scale,
        threshold_of(dropout_p),
        STARTS=starts,
        ROWS=rows,
        CHUNK=CHUNK_ROWS,
        BLOCK_T=config.block_t,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        BY_FOUR=features % 4 == 0,
        PRECISION=precision,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,  # said aloud: Triton 3.9 warns, and 3.10 changes the default
    )
    return [
        Sum(None if partial is None else partial[:, first * features : last * features], grad, None)
        for grad, first, last in zip(da, starts, starts[1:], strict=False)
    ]


def cost(problem: Any) -> Cost:
    """x and ds in, dA of all adapters out."""
    t, k, r = problem.tokens, problem.in_features, problem.rank * len(problem.out_features)
    size = itemsize(problem.dtype)
    return Cost(2 * t * k * r, size * (t * k + t * r + problem.adapters * r * k))
