"""The oracle as a backend: slow; it runs only when asked for by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import reference


def unsupported(problem: Any) -> list[str]:
    """Every problem can run."""
    return []


def priority(problem: Any) -> int:
    """Never chosen automatically."""
    return 0


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
    """query (B, H, L, D) -> (B, L, H, D)."""
    wide = torch.promote_types(query.dtype, torch.float32)
    out = reference.prefix_attention(
        *[t.to(wide) for t in (query, key, value, prefix_key, prefix_value)],
        scale=scale,
        mask=None if mask is None else mask.to(wide),
        is_causal=is_causal,
    )
    return out.transpose(1, 2).to(query.dtype).contiguous()
