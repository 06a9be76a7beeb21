"""The Compacter adapter, slow and obvious: the oracle of every other backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .adapter import bottleneck_adapter


def phm_matrix(rule: Tensor, left: Tensor, right: Tensor | None) -> Tensor:
    """H (in, out) = Σ_i rule_i ⊗ (left_i right_i): rule (n, n, n), left (n, p, k), right (n, k, q) or None for 1."""
    matrices = left if right is None else left @ right
    products = [
        torch.kron(a.contiguous(), w.contiguous()) for a, w in zip(rule, matrices, strict=True)
    ]
    return torch.stack(products).sum(0)


def compacter(
    x: Tensor,
    down_rule: Tensor,
    down_left: Tensor,
    down_right: Tensor | None,
    down_bias: Tensor | None,
    up_rule: Tensor,
    up_left: Tensor,
    up_right: Tensor | None,
    up_bias: Tensor | None,
    **rest: Any,
) -> Tensor:
    """``bottleneck_adapter`` of x (T, d) whose projections are PHM weights; ``rest`` is its own."""
    down, up = phm_matrix(down_rule, down_left, down_right), phm_matrix(up_rule, up_left, up_right)
    return bottleneck_adapter(x, down.T, down_bias, up.T, up_bias, **rest)
