"""Backward over dY, once: dS = scalingᵢ · dY Bᵢ, dB = dYᵀ S, and the column sums of dY.

dY (T, N), B (N, R), S (T, R), N = out. A program owns BLOCK_N columns of a strip of tokens. It keeps B's tile and
dB's fp32 accumulator, walks the strip, and turns each dY tile into a partial of dS and one step of dB. Partials,
summed in order afterwards: dS [N / BLOCK_N, T, R], dB [strips, N, R], column sums [strips, N], all fp32. Every factor
has its own switch.

Bound: HBM; bytes = dY + 4 · R · (T · N / BLOCK_N + N · strips) · 2 + the results.
Past R ≈ 64 the partials outweigh a second read of dY: then dS comes from `shrink` and this kernel makes dB alone.
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

from ..common.adapters import AdapterTable
from ..common.cost import Cost, itemsize
from ..common.hardware import sm_count
from ..common.reduce import launch_ordered_sum
from ..common.tiling import cdiv, known_multiple, power_of_two, rank_alignment


@dataclass(frozen=True)
class GradBConfig:
    """Tile sizes, the tokens of one strip, and whether dS comes out of the same pass."""

    block_t: int
    block_n: int
    block_r: int
    strip: int
    with_ds: bool = True
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
def default_config(problem: Any) -> GradBConfig:
    """Strips just short enough that strips × column blocks fill the GPU once."""
    wide = itemsize(problem.dtype) == 4
    rank = sum(problem.ranks)
    block_r = power_of_two(rank, 16, 64 if wide else 128)
    # What a thread holds of dY, B and dB at once has to fit its registers.
    block_t = power_of_two(problem.tokens, 16, (16 if block_r > 32 else 32) if wide else 64)
    long_rows = block_r <= 32 and problem.out_features % 8 == 0
    widest = (64 if block_r <= 16 else 32) if wide else (256 if long_rows else 128)
    block_n = power_of_two(problem.out_features, 16, widest)
    columns = cdiv(problem.out_features, block_n) * cdiv(rank, block_r)
    strips = min(cdiv(sm_count(problem.arch), columns), cdiv(problem.tokens, block_t))
    strip = cdiv(cdiv(problem.tokens, strips), block_t) * block_t
    # Partials of dS are written and read in fp32; a second pass reads dY once more.
    extra = 8 * problem.tokens * rank * cdiv(problem.out_features, block_n)
    with_ds = extra <= itemsize(problem.dtype) * problem.tokens * problem.out_features
    warps = 8 if block_t * block_n >= 128 * 64 or (wide and block_r > 32) else 4
    return GradBConfig(block_t, block_n, block_r, strip, with_ds, warps, 3)


def candidate_configs(problem: Any) -> Iterator[GradBConfig]:
    """What an offline tuner should try."""
    base = default_config(problem)
    for block_t in (32, 64, 128):
        for block_n in (64, 128, 256):
            for strips in (1, 4, 16, 64):
                strip = cdiv(cdiv(problem.tokens, strips), block_t) * block_t
                for with_ds in (True, False):
                    for num_stages in (2, 3, 4):
                        yield replace(
                            base,
                            block_t=block_t,
                            block_n=block_n,
                            strip=strip,
                            with_ds=with_ds,
                            num_stages=num_stages,
                        )


@triton.jit(do_not_specialize=["tokens", "strip"])
def _grad_b_kernel(
    dy_ptr,
    b_ptr,
    s_ptr,
    ds_part_ptr,
    db_part_ptr,
    sum_part_ptr,
    tokens,
    columns,
    total_rank,
    strip,
    stride_dt,
    stride_dn,
    stride_bn,
    stride_br,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    total_rank = known_multiple(total_rank, RANK_ALIGN)
    tile_n, tile_strip, tile_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    live_n, live_r = cols < columns, ranks < total_rank
    long_cols = cols.to(tl.int64)
    if ds_part_ptr is not None:
        b = tl.load(
            b_ptr + long_cols[:, None] * stride_bn + ranks[None, :] * stride_br,
            mask=live_n[:, None] & live_r[None, :],
            other=0.0,
        ).to(dy_ptr.dtype.element_ty)
    db = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    sums = tl.zeros([BLOCK_N], tl.float32)
    for t in range(tile_strip * strip, min((tile_strip + 1) * strip, tokens), BLOCK_T):
        rows = (t + tl.arange(0, BLOCK_T)).to(tl.int64)
        live_t = rows < tokens
        dy = tl.load(
            dy_ptr + rows[:, None] * stride_dt + long_cols[None, :] * stride_dn,
            mask=live_t[:, None] & live_n[None, :],
            other=0.0,
        )
        live_tr = live_t[:, None] & live_r[None, :]
        if ds_part_ptr is not None:
            at = (tile_n.to(tl.int64) * tokens + rows)[:, None] * total_rank + ranks[None, :]
            tl.store(ds_part_ptr + at, tl.dot(dy, b, input_precision=PRECISION), mask=live_tr)
        if db_part_ptr is not None:
            s = tl.load(
                s_ptr + rows[:, None] * total_rank + ranks[None, :], mask=live_tr, other=0.0
            )
            db = tl.dot(tl.trans(dy), s, db, input_precision=PRECISION)
        if sum_part_ptr is not None:
            sums += tl.sum(dy.to(tl.float32), 0)
    if db_part_ptr is not None:
        at = (tile_strip.to(tl.int64) * columns + long_cols)[:, None] * total_rank + ranks[None, :]
        tl.store(db_part_ptr + at, db, mask=live_n[:, None] & live_r[None, :])
    # Every rank block has the same sums: the first one keeps them.
    if sum_part_ptr is not None and tile_r == 0:
        tl.store(sum_part_ptr + tile_strip.to(tl.int64) * columns + cols, sums, mask=live_n)


def launch_grad_b(
    dy: Tensor,
    b: Tensor,
    s: Tensor | None,
    ds: Tensor | None,
    db: list[Tensor | None],
    sums: Tensor | None,
    table: AdapterTable,
    config: GradBConfig,
    precision: str,
) -> None:
    """dy (T, out), b (out, R), s (T, R) contiguous.

    Fills what is not None of ds (T, R), db[i] (out, rᵢ) and, in fp32, sums (out,).
    """
    (tokens, columns), rank = dy.shape, b.shape[1]
    strips, tiles = cdiv(tokens, config.strip), cdiv(columns, config.block_n)

    def partial(needed: bool, *shape: int) -> Tensor | None:
        return dy.new_empty(shape, dtype=torch.float32) if needed else None

    ds_part = partial(ds is not None, tiles, tokens, rank)
    db_part = partial(s is not None, strips, columns, rank)
    sum_part = partial(sums is not None, strips, 1, columns)
    _grad_b_kernel[(tiles, strips, cdiv(rank, config.block_r))](
        dy,
        b,
        s,
        ds_part,
        db_part,
        sum_part,
        tokens,
        columns,
        rank,
        config.strip,
        *dy.stride(),
        *b.stride(),
        BLOCK_T=config.block_t,
        BLOCK_N=config.block_n,
        BLOCK_R=config.block_r,
        RANK_ALIGN=rank_alignment(rank),
        PRECISION=precision,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,  # said aloud: Triton 3.9 warns, and 3.10 changes the default
    )
    start = 0
    for end, scale, grad in zip(table.ends, table.scales, db, strict=True):
        if ds is not None and ds_part is not None:
            launch_ordered_sum(ds_part[:, :, start:end], ds[:, start:end], scale)
        if grad is not None and db_part is not None:
            launch_ordered_sum(db_part[:, :, start:end], grad, 1.0)
        start = end
    if sums is not None and sum_part is not None:
        launch_ordered_sum(sum_part, sums[None], 1.0)


def cost(problem: Any) -> Cost:
    """dS and dB: dY, B and S in, dS and dB out."""
    t, n, r = problem.tokens, problem.out_features, sum(problem.ranks)
    return Cost(4 * t * n * r, itemsize(problem.dtype) * (t * n + 2 * r * (t + n)))
