"""LoRA linear: y = x Wᵀ + b + Σᵢ scalingᵢ · (dropᵢ(x) Aᵢᵀ Bᵢᵀ + lora_biasᵢ). Semantics of PEFT's ``lora.Linear``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
    *,
    lora_bias: Sequence[Tensor | None],
    dropout_p: Sequence[float],
    keep: Sequence[Tensor | None],
) -> Tensor:
    """x (T, in), weight (out, in), lora_a[i] (r, in), lora_b[i] (out, r) -> y (T, out), all of one dtype.

    keep[i] is the mask (T, in) of adapter i, True where an element is kept, or None without dropout.
    """
    y = x @ weight.T
    if bias is not None:
        y = y + bias
    for a, b, s, b_bias, p, kept in zip(
        lora_a, lora_b, scaling, lora_bias, dropout_p, keep, strict=True
    ):
        dropped = x
        if kept is not None:
            # where, not a product: a dropped inf or nan is gone
            dropped = torch.where(kept, x / (1.0 - p) if p < 1.0 else x, 0.0)
        delta = dropped @ a.T @ b.T
        if b_bias is not None:
            delta = delta + b_bias
        y = y + s * delta
    return y
