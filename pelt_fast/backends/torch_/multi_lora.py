"""Batched multi-LoRA out of ATen: a rank-r product for each adapter that has tokens.

It reads the segments on the host, so on a GPU it waits for the device; the kernels do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...random import keep_scale, philox_mask


def unsupported(problem: Any) -> list[str]:
    """Every problem can run."""
    return []


def priority(problem: Any) -> int:
    """What is left when no kernel of ours can run."""
    return 10


def _segments(
    plan: Sequence[Tensor], ranks: Sequence[Tensor], most: Sequence[int]
) -> Iterator[tuple[int, Tensor, list[int]]]:
    """Each adapter that has tokens: its number, the tokens, its rank in each projection."""
    perm, indptr = plan[1], plan[2].tolist()
    numbers = [rank.clamp(0, r).tolist() for rank, r in zip(ranks, most, strict=True)]
    for g in range(len(indptr) - 2):
        if indptr[g] < indptr[g + 1]:
            yield g, perm[indptr[g] : indptr[g + 1]], [number[g] for number in numbers]


def _masks(
    x: Tensor, dropout_p: float, seed: Tensor | None, n: int
) -> tuple[list[Tensor | None], float]:
    if seed is None:
        return [None] * n, 1.0
    shape = (x.shape[0], x.shape[1])
    return [philox_mask(seed, shape, dropout_p, i) for i in range(n)], keep_scale(dropout_p)


def _drop(rows: Tensor, keep: Tensor | None, tokens: Tensor) -> Tensor:
    return rows if keep is None else torch.where(keep[tokens], rows, 0.0)


def _scaled(left: Tensor, right: Tensor, factor: float) -> Tensor:
    """factor · left @ right, rounded once."""
    out = left.new_empty((left.shape[0], right.shape[1]))
    return torch.addmm(out, left, right, beta=0, alpha=factor, out=out)


def _times(rows: Tensor, row_scale: Tensor | None, tokens: Tensor) -> Tensor:
    """row_scale · rows in the wide dtype, rounded once."""
    if row_scale is None:
        return rows
    wide = torch.promote_types(rows.dtype, torch.float32)
    return (rows.to(wide) * row_scale[tokens].to(wide)[:, None]).to(rows.dtype)


def _scaled_in(dtype: torch.dtype, row_scale: Tensor | None) -> torch.dtype:
    """The dtype of what a row scale multiplies: fp16 would overflow where the result does not."""
    return torch.float32 if dtype == torch.float16 and row_scale is not None else dtype


def multi_lora_fwd(
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    base: Sequence[Tensor | None],
    plan: Sequence[Tensor],
    ranks: Sequence[Tensor],
    scaling: Sequence[Tensor],
    row_scale: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    inplace: bool,
) -> tuple[list[Tensor], Tensor]:
    """x (T, in) -> y[i] (T, out_i) and s (T, ΣR), the shrink before its scaling."""
    n, dtype, tokens = len(lora_a), x.dtype, x.shape[0]
    most, kind = [a.shape[1] for a in lora_a], _scaled_in(dtype, row_scale)
    keep, factor = _masks(x, dropout_p, seed, n)
    y = []
    for b, given in zip(lora_b, base, strict=True):
        if given is None:
            y.append(x.new_zeros((tokens, b.shape[1])))
        else:
            y.append(given if inplace else given.clone(memory_format=torch.contiguous_format))
    s = x.new_zeros((tokens, sum(most)))
    scales = [scale.tolist() for scale in scaling]
    for g, where, rank in _segments(plan, ranks, most):
        rows, offset = x[where], 0
        for i in range(n):
            if rank[i]:
                a = lora_a[i][g, : rank[i]].to(dtype)
                b = lora_b[i][g, :, : rank[i]].to(dtype).to(kind)
                part = _scaled(_drop(rows, keep[i], where), a.T, factor)
                s[where, offset : offset + rank[i]] = part
                scaled, rows_of_y = _times(part.to(kind), row_scale, where), y[i][where].to(kind)
                y[i][where] = rows_of_y.addmm_(scaled, b.T, alpha=scales[i][g]).to(dtype)
            offset += most[i]
    return y, s


def multi_lora_bwd(
    dy: Sequence[Tensor],
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    s: Tensor,
    plan: Sequence[Tensor],
    ranks: Sequence[Tensor],
    scaling: Sequence[Tensor],
    row_scale: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    need_drow_scale: bool,
) -> tuple[Tensor | None, list[Tensor], list[Tensor], Tensor | None]:
    """dy[i] (T, out_i) -> dx (T, in), dA[i] (L, R, in), dB[i] (L, out_i, R), drow_scale (T,)."""
    n, dtype, tokens = len(lora_a), x.dtype, x.shape[0]
    wide = torch.promote_types(dtype, torch.float32)
    most, kind = [a.shape[1] for a in lora_a], _scaled_in(dtype, row_scale)
    keep, factor = _masks(x, dropout_p, seed, n)
    dx = x.new_zeros(x.shape) if need_dx else None
    da = [torch.zeros_like(a) for a in lora_a] if need_da else []
    db = [torch.zeros_like(b) for b in lora_b] if need_db else []
    drow_scale = x.new_zeros(tokens, dtype=wide) if need_drow_scale else None
    scales = [scale.tolist() for scale in scaling]
    for g, where, rank in _segments(plan, ranks, most):
        rows, offset = x[where], 0
        total = rows.new_zeros(rows.shape) if need_dx else None
        for i in range(n):
            r, scale = rank[i], scales[i][g]
            if r:
                a, b = lora_a[i][g, :r].to(dtype), lora_b[i][g, :, :r].to(dtype)
                s_rows, dy_rows = s[where, offset : offset + r].to(kind), dy[i][where].to(kind)
                if need_db:
                    scaled = _times(s_rows, row_scale, where)
                    db[i][g, :, :r] = _scaled(dy_rows.T, scaled, scale).to(b.dtype)
                if need_dx or need_da or need_drow_scale:
                    ds = _scaled(dy_rows, b.to(kind), scale)
                    if drow_scale is not None:
                        drow_scale[where] += (ds.to(wide) * s_rows.to(wide)).sum(1)
                    ds = _times(ds, row_scale, where).to(dtype)
                    if total is not None and keep[i] is None:
                        total.addmm_(ds, a)
                    elif total is not None:
                        total += _drop(_scaled(ds, a, factor), keep[i], where)
                    if need_da:
                        da[i][g, :r] = _scaled(ds.T, _drop(rows, keep[i], where), factor)
            offset += most[i]
        if dx is not None and total is not None:
            dx[where] = total
    return dx, da, db, drow_scale
