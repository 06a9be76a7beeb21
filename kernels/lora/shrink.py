"""Shrink: S = scaleᵢ · dropᵢ(x) Aᵢᵀ, every adapter in one pass over x.

x (T, K), A (R, K) with the adapters' ranks side by side, S (T, R) in x's dtype; fp32 accumulation, one rounding.
Forward: K = in, the scale is scaling / (1 - p), the mask is made in registers. Backward without dropout: dS, where
x is dY (T, out) and A is Bᵀ seen through its strides.

Parallelism: token tiles × rank blocks, × split-K when those are too few for the GPU: fp32 partials, summed in order.
Bound: HBM; bytes = x + A + S (+ 2 · split_k · S in fp32).
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

from ..common.adapters import AdapterTable, rank_start, scale_of_rank
from ..common.cost import Cost, itemsize
from ..common.dropout import keep_mask
from ..common.hardware import sm_count
from ..common.reduce import launch_ordered_sum
from ..common.tiling import cdiv, known_multiple, power_of_two, rank_alignment


@dataclass(frozen=True)
class ShrinkConfig:
    """Tile sizes, and into how many parts the reduced dimension is split."""

    block_t: int
    block_k: int
    block_r: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3


def unsupported(problem: Any) -> list[str]:
    """Why these kernels cannot run the problem; empty when they can."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return (
        []
        if problem.dtype in dtypes
        else [f"{problem.dtype} is not one of float32, bfloat16, float16"]
    )


@lru_cache(maxsize=1024)
def default_config(problem: Any) -> ShrinkConfig:
    """A configuration from shapes alone; the reduced dimension is `in` forward and `out` backward."""
    forward = problem.op.endswith("_fwd")
    reduced = problem.in_features if forward else problem.out_features
    wide = itemsize(problem.dtype) == 4
    block_r = power_of_two(sum(problem.ranks), 16, 64 if wide else 128)
    block_t = power_of_two(problem.tokens, 16, 32 if wide else 64)
    masks = len(problem.ranks) if problem.dropout and forward else 0
    # A mask whose elements each make their own Philox call takes four times the registers.
    block_k = 32 if wide or (masks and reduced % 4) else (64 if masks else 128)
    tiles = cdiv(problem.tokens, block_t) * cdiv(sum(problem.ranks), block_r)
    # Each part should still loop a few times, or the pipeline never fills.
    most = max(reduced // (4 * block_k), 1)
    split_k = min(
        power_of_two(cdiv(sm_count(problem.arch), tiles)), power_of_two(most + 1) // 2, 16
    )
    # Below half the GPU's width a split pays for its second launch, above it does not.
    split_k = split_k if 2 * tiles <= sm_count(problem.arch) else 1
    # A wide accumulator, or several masks at once, need more warps to keep within their registers.
    return ShrinkConfig(
        block_t, block_k, block_r, split_k, 8 if block_r >= 64 or masks > 1 else 4, 3
    )


def candidate_configs(problem: Any) -> Iterator[ShrinkConfig]:
    """What an offline tuner should try."""
    base = default_config(problem)
    for block_t in (16, 32, 64, 128):
        for block_k in (32, 64, 128):
            for split_k in (1, 2, 4, 8):
                for num_stages in (2, 3, 4):
                    yield replace(
                        base,
                        block_t=block_t,
                        block_k=block_k,
                        split_k=split_k,
                        num_stages=num_stages,
                    )


@triton.jit(do_not_specialize=["tokens", "steps"])
def _shrink_kernel(
    x_ptr,
    a_ptr,
    out_ptr,
    seed_ptr,
    tokens,
    features,
    total_rank,
    stride_xt,
    stride_xk,
    stride_ar,
    stride_ak,
    steps,
    ends,
    scales,
    thresholds,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr,
    BY_FOUR: tl.constexpr,
    SCALED: tl.constexpr,
    RANK_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    total_rank = known_multiple(total_rank, RANK_ALIGN)
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    live_t, live_r = rows < tokens, ranks < total_rank
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * stride_xt
    a_rows = a_ptr + ranks.to(tl.int64)[None, :] * stride_ar
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    # In whole blocks, so that the compiler knows k to be a multiple of BLOCK_K: loads are as wide as they can be.
    for block in range(split * steps, min((split + 1) * steps, tl.cdiv(features, BLOCK_K))):
        k = block * BLOCK_K
        columns = k + tl.arange(0, BLOCK_K)
        live_k = columns < features
        x = tl.load(
            x_rows + columns[None, :] * stride_xk, mask=live_t[:, None] & live_k[None, :], other=0.0
        )
        a = tl.load(
            a_rows + columns.to(tl.int64)[:, None] * stride_ak,
            mask=live_k[:, None] & live_r[None, :],
            other=0.0,
        ).to(x.dtype)
        if DROPOUT:
            for i in tl.static_range(len(ends)):
                keep = keep_mask(
                    seed, rows, k, features, i, thresholds[i], BLOCK_T, BLOCK_K, BY_FOUR
                )
                kept = tl.where(keep, x, 0.0)
                # Rank columns of other adapters are zeroed in A's tile, so one accumulator serves them all.
                if len(ends) == 1:
                    own = a
                else:
                    own = tl.where(
                        ((ranks >= rank_start(ends, i)) & (ranks < ends[i]))[None, :], a, 0.0
                    )
                acc = tl.dot(kept, own, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, a, acc, input_precision=PRECISION)
    if SCALED:
        acc *= scale_of_rank(ranks, ends, scales)[None, :]
    out = out_ptr + (split.to(tl.int64) * tokens + rows)[:, None] * total_rank + ranks[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=live_t[:, None] & live_r[None, :])


def launch_shrink(
    x: Tensor,
    a: Tensor,
    out: Tensor,
    table: AdapterTable,
    seed: Tensor | None,
    config: ShrinkConfig,
    precision: str,
) -> None:
    """x (T, K), a (R, K), out (T, R) contiguous; ``seed`` is None without dropout."""
    tokens, features = x.shape
    rank = a.shape[0]
    steps = cdiv(cdiv(features, config.split_k), config.block_k)
    splits = cdiv(features, steps * config.block_k)
    target = out if splits == 1 else out.new_empty((splits, tokens, rank), dtype=torch.float32)
    grid = (cdiv(tokens, config.block_t), cdiv(rank, config.block_r), splits)
    _shrink_kernel[grid](
        x,
        a,
        target,
        seed,
        tokens,
        features,
        rank,
        *x.stride(),
        *a.stride(),
        steps,
        *table,
        BLOCK_T=config.block_t,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        DROPOUT=seed is not None,
        BY_FOUR=features % 4 == 0,
        SCALED=splits == 1,
        RANK_ALIGN=rank_alignment(rank),
        PRECISION=precision,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,  # said aloud: Triton 3.9 warns, and 3.10 changes the default
    )
    if splits > 1:
        start = 0
        for end, scale in zip(table.ends, table.scales, strict=True):
            launch_ordered_sum(target[:, :, start:end], out[:, start:end], scale)
            start = end


def cost(problem: Any) -> Cost:
    """Forward: x and A in, S out."""
    t, k, r = problem.tokens, problem.in_features, sum(problem.ranks)
    return Cost(2 * t * k * r, itemsize(problem.dtype) * (t * k + r * k + t * r))
