"""LoRA linear as an ATen composition with our saved-tensor plan: one GEMM, and rank-r ``addmm`` around it.

Runs wherever torch runs, and may win there: on a GPU at large T, cuBLAS plus addmm is hard to beat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...random import keep_scale, philox_mask


def unsupported(problem: Any) -> list[str]:
    """Every problem can run."""
    return []


def priority(problem: Any) -> int:
    """What is left when no kernel of ours can run or is faster."""
    return 10


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale · left @ right, rounded once."""
    out = left.new_empty((left.shape[0], right.shape[1]))
    return torch.addmm(out, left, right, beta=0, alpha=scale, out=out)


def _keep(
    seed: Tensor | None, tokens: int, in_features: int, p: float, index: int
) -> Tensor | None:
    return None if seed is None or p == 0 else philox_mask(seed, (tokens, in_features), p, index)


def _drop(x: Tensor, keep: Tensor | None) -> Tensor:
    """x where it is kept, else 0; the factor 1/(1-p) is applied to the accumulated product."""
    return x if keep is None else torch.where(keep, x, 0.0)


def lora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    lora_bias: Sequence[Tensor | None],
    scaling: Sequence[float],
    dropout_p: Sequence[float],
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """x (T, in) -> y (T, out) and s (T, R), the scaled shrink."""
    dtype = x.dtype
    for scale, extra in zip(scaling, lora_bias, strict=True):
        if extra is not None:
            wide = torch.promote_types(extra.dtype, torch.float32)
            extra = scale * extra.to(wide)
            bias = extra if bias is None else bias.to(wide) + extra
    y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
    parts = []
    for i, (a, b, scale, p) in enumerate(zip(lora_a, lora_b, scaling, dropout_p, strict=True)):
        keep = _keep(seed, x.shape[0], x.shape[1], p, i)
        factor = 1.0 if keep is None else keep_scale(p)
        part = _scaled_product(_drop(x, keep), a.to(dtype).T, scale * factor)
        y.addmm_(part, b.to(dtype).T)
        parts.append(part)
    return y, parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def lora_linear_bwd(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    s: Tensor | None,
    scaling: Sequence[float],
    dropout_p: Sequence[float],
    seed: Tensor | None,
    need_dx: bool,
    need_dbias: bool,
    need_da: Sequence[bool],
    need_db: Sequence[bool],
    need_dlora_bias: Sequence[bool],
) -> tuple[
    Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None], list[Tensor | None]
]:
    """dy (T, out) -> dx (T, in), dbias (out,), and per adapter dA (r, in), dB (out, r), dlora_bias (out,)."""
    dtype, adapters = dy.dtype, range(len(lora_a))
    dx = dy @ weight.to(dtype) if need_dx else None
    column_sums = None
    if need_dbias or any(need_dlora_bias):
        column_sums = dy.sum(0, dtype=torch.promote_types(dtype, torch.float32))
    da: list[Tensor | None] = [None for _ in adapters]
    db: list[Tensor | None] = [None for _ in adapters]
    dlora_bias: list[Tensor | None] = [None for _ in adapters]
    offset = 0
    for i in adapters:
        a, b, scale, p = lora_a[i], lora_b[i], scaling[i], dropout_p[i]
        rank = a.shape[0]
        if need_dx or need_da[i]:
            ds = _scaled_product(dy, b.to(dtype), scale)
            keep = _keep(seed, dy.shape[0], weight.shape[1], p, i)
            factor = 1.0 if keep is None else keep_scale(p)
            if dx is not None and keep is None:
                dx.addmm_(ds, a.to(dtype))
            elif dx is not None:
                dx += _drop(_scaled_product(ds, a.to(dtype), factor), keep)
            if need_da[i]:
                assert x is not None
                da[i] = _scaled_product(ds.T, _drop(x, keep), factor).to(a.dtype)
        if need_db[i]:
            assert s is not None
            db[i] = (dy.T @ s[:, offset : offset + rank]).to(b.dtype)
        if need_dlora_bias[i]:
            assert column_sums is not None
            dlora_bias[i] = (scale * column_sums).to(b.dtype)
        offset += rank
    dbias = column_sums.to(dtype) if need_dbias and column_sums is not None else None
    return dx, dbias, da, db, dlora_bias
