"""Attention over a prefix, and UniPELT's gates, by their formulas."""

from __future__ import annotations

import torch
from torch import Tensor


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """softmax(scale · query [prefix_key; key]ᵀ + mask) [prefix_value; value]; the mask is that of the sequence.

    Args:
        query: (B, H, L, D).
        key: (B, H, S, D).
        value: (B, H, S, D).
        prefix_key: (B, H, P, D), seen by every query.
        prefix_value: (B, H, P, D).
        scale: of the products.
        mask: broadcastable to (B, H, L, S), added.
        is_causal: query i sees keys 0 to i of the sequence.

    Returns:
        (B, H, L, D).
    """
    scores = scale * (query @ key.mT)
    if mask is not None:
        scores = scores + mask
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    scores = torch.cat([scale * (query @ prefix_key.mT), scores], -1)
    values = torch.cat([prefix_value, value], -2)
    return torch.softmax(scores, -1) @ values


def prefix_gate(
    x: Tensor, weight: Tensor, bias: Tensor | None, attention_mask: Tensor | None = None
) -> Tensor:
    """Mean over the tokens of σ(x weightᵀ + bias): x (B, T, d), weight (g, d) -> (B, g)."""
    scores = x @ weight.mT
    scores = torch.sigmoid(scores if bias is None else scores + bias)
    return _mean(scores, attention_mask)


def central_gate(
    x: Tensor, weight: Tensor, bias: Tensor | None, attention_mask: Tensor | None = None
) -> Tensor:
    """softmax over n of the mean over the tokens of relu(x weightᵀ + bias): weight (n, d) -> (B, n)."""
    scores = x @ weight.mT
    scores = torch.relu(scores if bias is None else scores + bias)
    return torch.softmax(_mean(scores, attention_mask), -1)


def _mean(scores: Tensor, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is None:
        return scores.mean(1)
    real = (attention_mask != 0)[..., None]
    return torch.where(real, scores, 0.0).sum(1) / real.to(scores.dtype).sum(1)
