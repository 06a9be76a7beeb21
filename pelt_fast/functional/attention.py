"""``scaled_dot_product_attention`` with dropout where torch composes it, with our draw of its masks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import dropout
from .ordinary import short_way


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention``: the same result, bit for bit.

    On a CPU torch has no fused attention with dropout, and spends a third of the composed one to draw masks. In
    float32 this composes the same operators around ``functional.dropout``; anything else is torch's.

    Args:
        query: (B, H, L, D).
        key: (B, H, S, D).
        value: (B, H, S, D).
        attn_mask: as torch takes it; composed here where it is None or float32.
        dropout_p: probability in [0, 1] that an attention probability is dropped.
        is_causal: torch's.
        scale: torch's.
        enable_gqa: torch's.

    Returns:
        (B, H, L, D).
    """
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    if (
        not 0.0 < dropout_p < 1.0
        or is_causal
        or enable_gqa
        or scale is not None
        or short_way(None) is None
        or any(t.dtype is not torch.float32 or t.device.type != "cpu" for t in tensors)
        or any(t.dim() != 4 or t.numel() == 0 for t in tensors)
        or query.shape[:2] != key.shape[:2]
        or torch.is_autocast_enabled("cpu")
    ):
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    factor = math.sqrt(1.0 / math.sqrt(query.shape[-1]))
    scores = torch.matmul(query * factor, key.transpose(-2, -1) * factor)
    if attn_mask is not None:
        scores += attn_mask
    found: Tensor = torch.ops.aten._safe_softmax(scores, -1)
    return torch.matmul(dropout(found, dropout_p, True), value)
