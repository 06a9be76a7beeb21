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


def gated_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    scaling: float,
    *,
    token_weight: Tensor | None,
    dropout_p: float,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The LoRA linear whose term is gated for each sample, as ``adapters.methods.lora.LoRA`` with ``use_gating``.

    x (samples, tokens, in), gate_weight (1, in), gate_bias (1,), token_weight (samples, tokens), keep as x
    -> y (samples, tokens, out) and the gates (samples,).
    """
    y = x @ weight.T
    if bias is not None:
        y = y + bias
    opened = x @ gate_weight.T
    if gate_bias is not None:
        opened = opened + gate_bias
    opened = torch.sigmoid(opened).squeeze(-1)
    if token_weight is None:
        token_weight = torch.full_like(opened, 1.0 / opened.shape[1])
    gate = torch.where(token_weight == 0, 0.0, token_weight * opened).sum(1)
    dropped = x
    if keep is not None:
        dropped = torch.where(keep, x / (1.0 - dropout_p) if dropout_p < 1.0 else x, 0.0)
    return y + gate.view(-1, 1, 1) * scaling * (dropped @ lora_a.T @ lora_b.T), gate
