"""Backward to x: dx = Σᵢ maskᵢ ⊙ (ds_i A_g) / (1-p), each row with its own adapter, zeros where there is none.

ds (T, ΣR), A_g (R_i, in) of every projection i, dx (T, in): the only tensor of x's size that backward writes. fp32
accumulation, one rounding, the mask of forward drawn again.

Parallelism: parts of tiles × blocks of columns.
Bound: HBM; bytes = dx + A of every adapter in the batch + ds.
Deterministic: yes.
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
from .tiles import (
    open_tile,
    rank_of,
    readable,
    side_by_side,
    starts_of,
    threshold_of,
    unsupported,
    weight_tile,
)

__all__ = ["GradXConfig", "candidate_configs", "cost", "default_config", "unsupported"]


@dataclass(frozen=True)
class GradXConfig:
    """Tile sizes; ``block_t`` of the 64 rows of a tile are one program's."""

    block_t: int
    block_k: int
    block_r: int
    num_warps: int = 4
    num_stages: int = 2


@lru_cache(maxsize=1024)
def default_config(problem: Any) -> GradXConfig:
    """A configuration from shapes alone."""
    wide = itemsize(problem.dtype) == 4
    block_r = power_of_two(problem.rank, 16, 32 if wide else 64)
    # Masks whose elements each make their own Philox call take four times the registers.
    narrow = wide or (problem.dropout and problem.in_features % 4)
    block_k = min(64 if narrow else 128, power_of_two(problem.in_features, 16))
    return GradXConfig(16 if problem.tokens <= 512 else 32, block_k, block_r)


def candidate_configs(problem: Any) -> Iterator[GradXConfig]:
    """What an offline tuner should try."""
    base = default_config(problem)
    for block_t in (16, 32, 64):
        for block_k in (64, 128, 256):
            for num_warps in (2, 4, 8):
                yield replace(base, block_t=block_t, block_k=block_k, num_warps=num_warps)


@triton.jit
def _grad_x_kernel(
    ds_ptr,
    weights,
    dx_ptr,
    seed_ptr,
    tiles_ptr,
    perm_ptr,
    ranks,
    features,
    strides,
    stride_dx,
    scale,
    threshold,
    STARTS: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    PER_TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BY_FOUR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    TOTAL: tl.constexpr = STARTS[len(STARTS) - 1]
    adapter, rows, live, tokens = open_tile(tiles_ptr, perm_ptr, PER_TILE, BLOCK_T)
    if rows <= 0:
        return
    begin = tl.program_id(1) * BLOCK_K
    cols = begin + tl.arange(0, BLOCK_K)
    live_k = cols < features
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    dx = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for i in tl.static_range(len(weights)):
        rank = rank_of(ranks[i], adapter, STARTS[i + 1] - STARTS[i])
        acc = tl.zeros([BLOCK_T, BLOCK_K], tl.float32) if seed_ptr is not None else dx
        for first in tl.range(0, rank, BLOCK_R, num_stages=1):
            lanes = first + tl.arange(0, BLOCK_R)
            at = tokens[:, None] * TOTAL + STARTS[i] + lanes[None, :]
            mask = live[:, None] & readable(lanes, rank, STARTS[i + 1] - STARTS[i])[None, :]
            ds = tl.load(ds_ptr + at, mask=mask, other=0.0)
            a = weight_tile(
                *(weights[i], adapter, strides[i], lanes, rank, cols, live_k),
                STARTS[i + 1] - STARTS[i],
                SIDE_BY_SIDE[i],
                ds.dtype,
            )
            acc = tl.dot(ds, tl.trans(a), acc, input_precision=PRECISION)
        if seed_ptr is not None:
            keep = keep_mask(
                *(seed, tokens, begin, features, i, threshold), BLOCK_T, BLOCK_K, BY_FOUR
            )
            dx += tl.where(keep, acc, 0.0)
        else:
            dx = acc
    out = dx_ptr + tokens[:, None] * stride_dx + cols[None, :]
    dx = (dx * scale).to(dx_ptr.dtype.element_ty)
    tl.store(out, dx, mask=live[:, None] & live_k[None, :])


def launch_grad_x(
    ds: Tensor,
    lora_a: Sequence[Tensor],
    dx: Tensor,
    plan: Sequence[Tensor],
    ranks: Sequence[Tensor],
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
    config: GradXConfig,
    precision: str,
) -> None:
    """ds (T, ΣR) contiguous, lora_a[i] (L, R_i, in) of any strides, dx (T, in); ``scale`` is 1 / (1 - p)."""
    features = dx.shape[1]
    per_tile = 64 // config.block_t
    _grad_x_kernel[(plan[4].shape[0] * per_tile, cdiv(features, config.block_k))](
        ds,
        tuple(lora_a),
        dx,
        seed,
        plan[4],
        plan[1],
        tuple(ranks),
        features,
        tuple([a.stride() for a in lora_a]),
        dx.stride(0),
        scale,
        threshold_of(dropout_p),
        STARTS=starts_of([a.shape[1] for a in lora_a]),
        SIDE_BY_SIDE=side_by_side(lora_a),
        PER_TILE=per_tile,
        BLOCK_T=config.block_t,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        BY_FOUR=features % 4 == 0,
        PRECISION=precision,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,  # said aloud: Triton 3.9 warns, and 3.10 changes the default
    )


def cost(problem: Any) -> Cost:
    """Every adapter in the batch: ds and A in, dx out."""
    t, k, r = problem.tokens, problem.in_features, problem.rank * len(problem.out_features)
    present, size = min(problem.adapters, problem.tokens), itemsize(problem.dtype)
    return Cost(2 * t * k * r, size * (t * k + present * k * r + t * r))
