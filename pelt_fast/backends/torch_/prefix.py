"""Attention over a prefix as PyTorch has it: keys, values and mask are concatenated."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def unsupported(problem: Any) -> list[str]:
    """Every problem can run."""
    return []


def priority(problem: Any) -> int:
    """What is left when no kernel of ours can run or is faster."""
    return 10


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """query (B, H, L, D) -> (B, L, H, D), contiguous."""
    tensors = (query, key, value, prefix_key, prefix_value)
    return concatenated(*tensors, mask, is_causal, scale).transpose(1, 2).contiguous()


def concatenated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """(B, H, L, D), differentiable; key may have fewer heads than query; any of the sizes may be 0."""
    if is_causal:
        shape = (query.shape[2], key.shape[2])
        mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        if mask.dtype is not torch.bool:
            mask = mask.to(query.dtype)
        # one column for all keys becomes one for each, so that the prefix gets its own
        mask = mask.expand(*mask.shape[:-1], key.shape[2])
        mask = F.pad(mask, (prefix_key.shape[2], 0), value=float(mask.dtype is torch.bool))
    return F.scaled_dot_product_attention(
        query,
        torch.cat([prefix_key, key], 2),
        torch.cat([prefix_value, value], 2),
        mask,
        dropout_p,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
