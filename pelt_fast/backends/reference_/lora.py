"""The oracle as a backend: ``pelt_fast.reference`` with autograd. Slow; it runs only when asked for by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...random import keep_scale, philox_mask


def unsupported(problem: Any) -> list[str]:
    """Every problem can run."""
    return []


def priority(problem: Any) -> int:
    """Never chosen automatically."""
    return 0


def _masks(x: Tensor, dropout_p: Sequence[float], seed: Tensor | None) -> list[Tensor | None]:
    shape = (x.shape[0], x.shape[1])
    return [
        philox_mask(seed, shape, p, index) if seed is not None and p > 0 else None
        for index, p in enumerate(dropout_p)
    ]


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
    """y (T, out) and s (T, R)."""
    dtype = x.dtype
    keep = _masks(x, dropout_p, seed)
    y = reference.lora_linear(
        x,
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        [a.to(dtype) for a in lora_a],
        [b.to(dtype) for b in lora_b],
        scaling,
        lora_bias=[None if v is None else v.to(dtype) for v in lora_bias],
        dropout_p=dropout_p,
        keep=keep,
    )
    parts = []
    for a, scale, p, kept in zip(lora_a, scaling, dropout_p, keep, strict=True):
        dropped = x if kept is None else torch.where(kept, x, 0.0)
        parts.append(dropped @ a.to(dtype).T * (scale if kept is None else scale * keep_scale(p)))
    return y, torch.cat(parts, dim=1)


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
    """Gradients, each by its formula, in x's dtype and then in the parameter's."""
    tokens, dtype = dy.shape[0], dy.dtype
    in_features = weight.shape[1]
    keep = _masks(dy.new_empty((tokens, in_features)), dropout_p, seed)
    dx = dy @ weight.to(dtype) if need_dx else None
    da: list[Tensor | None] = []
    db: list[Tensor | None] = []
    dlora_bias: list[Tensor | None] = []
    offset = 0
    for i, (a, b, scale, p, kept) in enumerate(
        zip(lora_a, lora_b, scaling, dropout_p, keep, strict=True)
    ):
        ds = scale * (dy @ b.to(dtype))
        factor = 1.0 if kept is None else keep_scale(p)
        if dx is not None:
            through = ds @ a.to(dtype) * factor
            dx = dx + (through if kept is None else torch.where(kept, through, 0.0))
        rank = a.shape[0]
        da.append(None)
        if need_da[i]:
            assert x is not None
            dropped = x if kept is None else torch.where(kept, x, 0.0)
            da[i] = (ds.T @ dropped * factor).to(a.dtype)
        db.append(None)
        if need_db[i]:
            assert s is not None
            db[i] = (dy.T @ s[:, offset : offset + rank]).to(b.dtype)
        dlora_bias.append((scale * dy.sum(0)).to(b.dtype) if need_dlora_bias[i] else None)
        offset += rank
    return dx, dy.sum(0) if need_dbias else None, da, db, dlora_bias
