"""Batched multi-LoRA: every token its own adapter. Each row is PEFT's ``lora.Linear`` of that row's adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def multi_lora(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ids: Sequence[int],
    ranks: Sequence[int],
    scaling: Sequence[float],
    *,
    base: Tensor | None,
    row_scale: Tensor | None,
    dropout_p: float,
    keep: Tensor | None,
) -> Tensor:
    """x (T, in), lora_a (L, R, in), lora_b (L, out, R), base (T, out), row_scale (T,) -> y (T, out), of one dtype.

    Token t goes through the first ranks[g] ranks of adapter g = ids[t]; outside [0, L) it goes through none. ``keep``
    is the mask (T, in), True where an element is kept, or None without dropout.
    """
    rows = []
    for t, g in enumerate(ids):
        if not 0 <= g < lora_a.shape[0]:
            rows.append(x.new_zeros(lora_b.shape[1]) if base is None else base[t])
            continue
        dropped = x[t]
        if keep is not None:
            dropped = torch.where(
                keep[t], x[t] / (1.0 - dropout_p) if dropout_p < 1.0 else x[t], 0.0
            )
        rank = ranks[g]
        delta = scaling[g] * (dropped @ lora_a[g, :rank].T @ lora_b[g, :, :rank].T)
        if row_scale is not None:
            delta = row_scale[t] * delta
        rows.append(delta if base is None else base[t] + delta)
    return torch.stack(rows)
