"""Backward over x: dAᵢ = dSᵢᵀ dropᵢ(x), with the mask drawn again in registers.

x (T, K), dS (T, R), K = in, dA (R, K). A program owns BLOCK_K columns of a strip of tokens and a block of ranks, and
keeps their fp32 accumulator. Partials [strips, R, K] are summed in order and multiplied by 1 / (1 - p) there.

Bound: HBM; bytes = x + dS · K / BLOCK_K + 8 · R · K · strips + dA.
Deterministic: yes.
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

from ..common.adapters import AdapterTable, rank_start
from ..common.cost import Cost, itemsize
from ..common.dropout import keep_mask
from ..common.hardware import sm_count
from ..common.reduce import launch_ordered_sum
from ..common.tiling import cdiv, known_multiple, power_of_two, rank_alignment


@dataclass(frozen=True)
class GradAConfig:
    """Tile sizes, and the tokens of one strip."""

    block_t: int
    block_k: int
    block_r: int
    strip: int
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
def default_config(problem: Any) -> GradAConfig:
    """Strips just short enough that strips × column blocks × rank blocks fill the GPU once."""
    wide = itemsize(problem.dtype) == 4
    block_r = power_of_two(sum(problem.ranks), 16, 64 if wide else 128)
    block_t = power_of_two(problem.tokens, 16, 32 if wide else 64)
    block_k = power_of_two(problem.in_features, 16, 64 if wide else 128)
    if problem.dropout and problem.in_features % 4:
        # Each element makes its own Philox call, which takes four times the registers.
        block_t, block_k = min(block_t, 32), min(block_k, 32)
    columns = cdiv(problem.in_features, block_k) * cdiv(sum(problem.ranks), block_r)
    strips = min(cdiv(sm_count(problem.arch), columns), cdiv(problem.tokens, block_t))
    strip = cdiv(cdiv(problem.tokens, strips), block_t) * block_t
    # A wide accumulator, or several masks at once, need more warps to keep within their registers.
    several = problem.dropout and len(problem.ranks) > 1
    return GradAConfig(block_t, block_k, block_r, strip, 8 if block_r >= 64 or several else 4, 3)


def candidate_configs(problem: Any) -> Iterator[GradAConfig]:
    """What an offline tuner should try."""
    base = default_config(problem)
    for block_t in (32, 64, 128):
        for block_k in (64, 128, 256):
            for strips in (1, 4, 16, 64):
                strip = cdiv(cdiv(problem.tokens, strips), block_t) * block_t
                for num_stages in (2, 3, 4):
                    yield replace(
                        base, block_t=block_t, block_k=block_k, strip=strip, num_stages=num_stages
                    )


@triton.jit(do_not_specialize=["tokens", "strip"])
def _grad_a_kernel(
    x_ptr,
    ds_ptr,
    part_ptr,
    seed_ptr,
    tokens,
    features,
    total_rank,
    strip,
    stride_xt,
    stride_xk,
    ends,
    thresholds,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr,
    BY_FOUR: tl.constexpr,
    RANK_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    total_rank = known_multiple(total_rank, RANK_ALIGN)
    tile_k, tile_strip, tile_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    columns = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    ranks = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    live_k, live_r = columns < features, ranks < total_rank
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for t in range(tile_strip * strip, min((tile_strip + 1) * strip, tokens), BLOCK_T):
        rows = t + tl.arange(0, BLOCK_T)
        live_t = rows < tokens
        long_rows = rows.to(tl.int64)[:, None]
        x = tl.load(
            x_ptr + long_rows * stride_xt + columns.to(tl.int64)[None, :] * stride_xk,
            mask=live_t[:, None] & live_k[None, :],
            other=0.0,
        )
        ds = tl.load(
            ds_ptr + long_rows * total_rank + ranks[None, :],
            mask=live_t[:, None] & live_r[None, :],
            other=0.0,
        )
        if DROPOUT:
            for i in tl.static_range(len(ends)):
                keep = keep_mask(
                    seed,
                    rows,
                    tile_k * BLOCK_K,
                    features,
                    i,
                    thresholds[i],
                    BLOCK_T,
                    BLOCK_K,
                    BY_FOUR,
                )
                kept = tl.where(keep, x, 0.0)
                # Rank columns of other adapters are zeroed in dS's tile, so one accumulator serves them all.
                if len(ends) == 1:
                    own = ds
                else:
                    own = tl.where(
                        ((ranks >= rank_start(ends, i)) & (ranks < ends[i]))[None, :], ds, 0.0
                    )
                acc = tl.dot(tl.trans(own), kept, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(tl.trans(ds), x, acc, input_precision=PRECISION)
    at = (tile_strip.to(tl.int64) * total_rank + ranks)[:, None] * features + columns[None, :]
    tl.store(part_ptr + at, acc, mask=live_r[:, None] & live_k[None, :])


def launch_grad_a(
    x: Tensor,
    ds: Tensor,
    da: list[Tensor | None],
    table: AdapterTable,
    seed: Tensor | None,
    config: GradAConfig,
    precision: str,
) -> None:
    """x (T, in), ds (T, R) contiguous; fills da[i] (rᵢ, in), those that are not None; scales are 1 / (1 - p)."""
    (tokens, features), rank = x.shape, ds.shape[1]
    strips = cdiv(tokens, config.strip)
    part = x.new_empty((strips, rank, features), dtype=torch.float32)
    _grad_a_kernel[(cdiv(features, config.block_k), strips, cdiv(rank, config.block_r))](
        x,
        ds,
        part,
        seed,
        tokens,
        features,
        rank,
        config.strip,
        *x.stride(),
        table.ends,
        table.thresholds,
        BLOCK_T=config.block_t,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        DROPOUT=seed is not None,
        BY_FOUR=features % 4 == 0,
        RANK_ALIGN=rank_alignment(rank),
        PRECISION=precision,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,  # said aloud: Triton 3.9 warns, and 3.10 changes the default
    )
    start = 0
    for end, scale, grad in zip(table.ends, table.scales, da, strict=True):
        if grad is not None:
            launch_ordered_sum(part[:, start:end], grad, scale)
        start = end


def cost(problem: Any) -> Cost:
    """x and dS in, dA out."""
    t, k, r = problem.tokens, problem.in_features, sum(problem.ranks)
    return Cost(2 * t * k * r, itemsize(problem.dtype) * (t * k + r * (t + k)))
