"""The bottleneck adapter as an ATen composition with our saved-tensor plan: the pre-activation and row statistics.

Runs wherever torch runs, and may win there: with a large bottleneck the GEMMs are all that counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .adapter_block import Block, Needs, backward, forward


def unsupported(problem: Any) -> list[str]:
    """Every problem can run."""
    return []


def priority(problem: Any) -> int:
    """What is left when no kernel of ours can run or is faster."""
    return 10


def bottleneck_adapter_fwd(
    x: Tensor,
    skip: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    scaling: float,
    pre_eps: float,
    eps: float,
    dropout_p: float,
    skip_in: bool,
    residual_x: bool,
    residual_skip: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x (T, d) -> y (T, d), q (T, m), and mean and reciprocal deviation (T, 2) of each layernorm."""
    block = Block(
        *(down_bias, up_bias, scale, gate, pre_weight, pre_bias, ln_weight, ln_bias, seed),
        *(activation, scaling, pre_eps, eps, dropout_p, skip_in, residual_x, residual_skip),
    )
    return forward(x, skip, _Dense(down.to(x.dtype)), _Dense(up.to(x.dtype)), block)


def bottleneck_adapter_bwd(
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    q: Tensor,
    pre_stats: Tensor | None,
    post_stats: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    scaling: float,
    pre_eps: float,
    eps: float,
    dropout_p: float,
    skip_in: bool,
    residual_x: bool,
    residual_skip: bool,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """dy (T, d) -> the gradients that ``needs`` asks for, in the order of ``GRADIENTS`` in ``pelt_fast/ops``."""
    block = Block(
        *(down_bias, up_bias, scale, gate, pre_weight, pre_bias, ln_weight, ln_bias, seed),
        *(activation, scaling, pre_eps, eps, dropout_p, skip_in, residual_x, residual_skip),
    )
    dense = (_Dense(down.to(x.dtype)), _Dense(up.to(x.dtype)))
    grads = backward(dy, x, skip, q, pre_stats, post_stats, *dense, block, Needs(*needs))
    owners = [x, skip, down, down_bias, up, up_bias, scale, gate]
    owners += [pre_weight, pre_bias, ln_weight, ln_bias]
    flat = [g[0] if isinstance(g, tuple) and g else g for g in grads]
    return [
        g.to(owner.dtype) if isinstance(g, Tensor) and owner is not None else None
        for g, owner in zip(flat, owners, strict=True)
    ]


class _Dense(NamedTuple):
    weight: Tensor  # (out, in)

    def linear(self, v: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(v, self.weight, bias)

    def back(self, dy: Tensor) -> Tensor:
        return dy @ self.weight

    def gradients(self, dy: Tensor, v: Tensor) -> tuple[Tensor | None, ...]:
        return (dy.T @ v,)
