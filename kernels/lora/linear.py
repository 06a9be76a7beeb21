"""A GEMM whose accumulator starts with the rank-r product, forward and backward.

    forward   Y  = S Bᵀ + x Wᵀ + b                              x (T, in),  S (T, R),  B (out, R)
    backward  dX = Σᵢ maskᵢ ⊙ (dSᵢ Aᵢ) / (1 - pᵢ) + dY W        dY (T, out), dS (T, R), A (R, in)

W (out, in) is seen through its strides, so the two are one kernel: C (T, N) = X (T, K) Wop (K, N) + low-rank term + b.
The low-rank term comes first: it costs one or two extra steps of the pipeline, Y is written once and never read, and a
`tl.dot` after a warp-specialised loop would not compile on sm_100. fp32 accumulation, one rounding. Masks are
made in registers.

Parallelism: output tiles, in groups of rows that share W's columns in L2.
Bound: tensor cores at T > ~300; below, HBM through W. bytes = X + W + C + R · (T + N).
Deterministic: yes, each output element belongs to one program.
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
from ..common.hardware import capability, sm_count
from ..common.tiling import cdiv, grouped_tile, known_multiple, power_of_two, rank_alignment


@dataclass(frozen=True)
class LinearConfig:
    """Tile sizes; ``group_t`` row tiles run next to each other."""

    block_t: int
    block_n: int
    block_k: int
    block_r: int
    group_t: int = 8
    num_warps: int = 8
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
def default_config(problem: Any) -> LinearConfig:
    """A configuration from shapes alone: the largest tile that still gives every multiprocessor one."""
    forward = problem.op.endswith("_fwd")
    columns = problem.out_features if forward else problem.in_features
    # Masks are drawn per output element before the loop, and rows that start anywhere are loaded one element at a time:
    # smaller tiles leave both their registers.
    masks = 0 if forward or not problem.dropout else len(problem.ranks)
    block_r = power_of_two(max(problem.ranks), 16, 32 if itemsize(problem.dtype) == 4 else 64)
    if itemsize(problem.dtype) == 4:
        tiles = [
            LinearConfig(64, 64, 32, block_r, 8, 4, 3),
            LinearConfig(32, 64, 32, block_r, 8, 4, 3),
        ]
    elif capability(problem.arch) >= 90:
        tiles = [
            LinearConfig(128, 256, 64, block_r, 8, 8, 3),
            LinearConfig(128, 128, 64, block_r, 8, 8, 4),
            LinearConfig(64, 128, 64, block_r, 8, 4, 4),
            LinearConfig(64, 64, 64, block_r, 8, 4, 4),
        ]
    else:
        tiles = [
            LinearConfig(128, 128, 64, block_r, 8, 8, 3),
            LinearConfig(64, 128, 64, block_r, 8, 4, 3),
            LinearConfig(64, 64, 64, block_r, 8, 4, 3),
        ]
    if masks > 1 or problem.in_features % 8 or problem.out_features % 8:
        tiles = [replace(tiles[-1], num_warps=8)]
    elif masks:
        tiles = [tile for tile in tiles if tile.block_n <= 128]
    few = replace(tiles[-1], block_t=16)
    tiles += [replace(few, block_n=64, num_warps=4), replace(few, block_n=32, num_warps=2)]
    for tile in tiles:
        fits = tile.block_t <= power_of_two(problem.tokens, 16)
        if fits and cdiv(problem.tokens, tile.block_t) * cdiv(columns, tile.block_n) >= sm_count(
            problem.arch
        ):
            return tile
    fitting = [tile for tile in tiles if tile.block_t <= power_of_two(problem.tokens, 16)]
    return max(fitting, key=lambda t: cdiv(problem.tokens, t.block_t) * cdiv(columns, t.block_n))


def candidate_configs(problem: Any) -> Iterator[LinearConfig]:
    """What an offline tuner should try."""
    base = default_config(problem)
    for block_t, block_n in (
        (16, 32),
        (16, 64),
        (64, 64),
        (64, 128),
        (128, 128),
        (128, 256),
        (256, 128),
    ):
        for block_k in (32, 64, 128):
            for num_warps in (4, 8):
                for num_stages in (2, 3, 4, 5):
                    yield replace(
                        base,
                        block_t=block_t,
                        block_n=block_n,
                        block_k=block_k,
                        num_warps=num_warps,
                        num_stages=num_stages,
                    )


@triton.jit
def _low_rank_tile(
    acc,
    s_rows,
    b_rows,
    first,
    last,
    live_t,
    live_n,
    stride_br,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + S[:, first:last] B[:, first:last]ᵀ, a block of ranks at a time."""
    for r in tl.range(first, last, BLOCK_R, num_stages=1):
        ranks = r + tl.arange(0, BLOCK_R)
        live_r = ranks < last
        s = tl.load(s_rows + ranks[None, :], mask=live_t[:, None] & live_r[None, :], other=0.0)
        b = tl.load(
            b_rows + ranks.to(tl.int64)[:, None] * stride_br,
            mask=live_r[:, None] & live_n[None, :],
            other=0.0,
        ).to(s.dtype)
        acc = tl.dot(s, b, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["tokens"])
def _linear_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    s_ptr,
    b_ptr,
    out_ptr,
    seed_ptr,
    tokens,
    columns,
    features,
    total_rank,
    stride_xt,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bn,
    stride_br,
    stride_ot,
    ends,
    scales,
    thresholds,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_T: tl.constexpr,
    DROPOUT: tl.constexpr,
    BY_FOUR: tl.constexpr,
    RANK_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    total_rank = known_multiple(total_rank, RANK_ALIGN)
    tile_t, tile_n = grouped_tile(tl.cdiv(tokens, BLOCK_T), tl.cdiv(columns, BLOCK_N), GROUP_T)
    rows = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    live_t, live_n = rows < tokens, cols < columns
    long_rows, long_cols = rows.to(tl.int64), cols.to(tl.int64)
    s_rows = s_ptr + long_rows[:, None] * total_rank
    b_rows = b_ptr + long_cols[None, :] * stride_bn

    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    if DROPOUT:
        seed = tl.load(seed_ptr)
        for i in tl.static_range(len(ends)):
            part = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
            part = _low_rank_tile(
                part,
                s_rows,
                b_rows,
                rank_start(ends, i),
                ends[i],
                live_t,
                live_n,
                stride_br,
                BLOCK_R,
                PRECISION,
            )
            keep = keep_mask(
                seed, rows, tile_n * BLOCK_N, columns, i, thresholds[i], BLOCK_T, BLOCK_N, BY_FOUR
            )
            acc += tl.where(keep, part * scales[i], 0.0)
    else:
        acc = _low_rank_tile(
            acc, s_rows, b_rows, 0, total_rank, live_t, live_n, stride_br, BLOCK_R, PRECISION
        )

    x_rows = x_ptr + long_rows[:, None] * stride_xt
    w_cols = w_ptr + long_cols[None, :] * stride_wn
    for k in range(0, features, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        live_k = inner < features
        x = tl.load(
            x_rows + inner[None, :] * stride_xk, mask=live_t[:, None] & live_k[None, :], other=0.0
        )
        w = tl.load(
            w_cols + inner.to(tl.int64)[:, None] * stride_wk,
            mask=live_k[:, None] & live_n[None, :],
            other=0.0,
        )
        acc = tl.dot(x, w, acc, input_precision=PRECISION)

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=live_n, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + long_rows[:, None] * stride_ot + cols[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=live_t[:, None] & live_n[None, :])


def launch_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor,
    b: Tensor,
    out: Tensor,
    config: LinearConfig,
    precision: str,
) -> None:
    """x (T, in), weight (out, in) of x's dtype, bias (out,), s (T, R) contiguous, b (out, R), out (T, out)."""
    _launch(
        x,
        weight,
        bias,
        s,
        b,
        out,
        AdapterTable((s.shape[1],), (1.0,), (0,)),
        None,
        config,
        precision,
    )


def launch_linear_bwd_dx(
    dy: Tensor,
    weight: Tensor,
    ds: Tensor,
    a: Tensor,
    out: Tensor,
    table: AdapterTable,
    seed: Tensor | None,
    config: LinearConfig,
    precision: str,
) -> None:
    """dy (T, out), weight (out, in) in dy's dtype, ds (T, R) contiguous, a (R, in), out (T, in); scales 1 / (1 - p)."""
    _launch(dy, weight.T, None, ds, a.T, out, table, seed, config, precision)


def _launch(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    s: Tensor,
    b: Tensor,
    out: Tensor,
    table: AdapterTable,
    seed: Tensor | None,
    config: LinearConfig,
    precision: str,
) -> None:
    tokens, features = x.shape
    columns, rank = b.shape
    grid = (cdiv(tokens, config.block_t) * cdiv(columns, config.block_n),)
    _linear_kernel[grid](
        x,
        w,
        bias,
        s,
        b,
        out,
        seed,
        tokens,
        columns,
        features,
        rank,
        *x.stride(),
        *w.stride(),
        *b.stride(),
        out.stride(0),
        *table,
        BLOCK_T=config.block_t,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        GROUP_T=config.group_t,
        DROPOUT=seed is not None,
        BY_FOUR=columns % 4 == 0,
        RANK_ALIGN=rank_alignment(rank),
        PRECISION=precision,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,  # said aloud: Triton 3.9 warns, and 3.10 changes the default
    )


def cost(problem: Any) -> Cost:
    """Either pass: the base GEMM and the rank-r product; X, W, C and the rank-r factors."""
    t, k, n, r = problem.tokens, problem.in_features, problem.out_features, sum(problem.ranks)
    side = n if problem.op.endswith("_fwd") else k
    return Cost(
        2 * t * k * n + 2 * t * side * r,
        itemsize(problem.dtype) * (t * k + k * n + t * n + r * (t + side)),
    )
