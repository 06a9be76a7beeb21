"""The oracle of batched bottleneck adapters as a backend: row by row, with autograd. Only when asked for by name.

Half precision is computed in fp32: a layernorm of which every step is rounded to a half overflows, or is of no use.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import reference
from ...random import philox_mask
from .adapter import _statistics, _wide, priority, unsupported

__all__ = ["multi_bottleneck_bwd", "multi_bottleneck_fwd", "priority", "unsupported"]


def multi_bottleneck_fwd(
    x: Tensor,
    residual: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    plan: Sequence[Tensor],
    widths: Tensor,
    seed: Tensor | None,
    activation: str,
    scaling: float,
    eps: float,
    dropout_p: float,
    residual_x: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y (T, d), q (T, M), and mean and reciprocal deviation (T, 2) of the layernorm."""
    wide = _wide(x.dtype)
    owners = (x, residual, down, down_bias, up, up_bias, scale, gate, ln_weight, ln_bias)
    cast = [None if t is None else t.to(wide) for t in owners]
    factors = (plan, widths, seed, activation, scaling, eps, dropout_p, residual_x)
    y = _formula(cast, *factors)
    # the same without the layernorm is what its statistics are of
    stats = (
        None if ln_weight is None else _statistics(_formula([*cast[:8], None, None], *factors), eps)
    )
    q = x.new_zeros((x.shape[0], down.shape[1]))
    for t, g in enumerate(plan[0][: x.shape[0]].tolist()):
        if g < down.shape[0]:
            width = int(widths[g].clamp(0, down.shape[1]))
            q[t, :width] = down[g, :width].to(wide) @ x[t].to(wide) + (
                0 if down_bias is None else down_bias[g, :width].to(wide)
            )
    return y.to(x.dtype), q, stats


def multi_bottleneck_bwd(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    q: Tensor,
    stats: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    plan: Sequence[Tensor],
    widths: Tensor,
    seed: Tensor | None,
    activation: str,
    scaling: float,
    eps: float,
    dropout_p: float,
    residual_x: bool,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients by autograd of the formula, each in the dtype of what it is of."""
    owners = [x, residual, down, down_bias, up, up_bias, scale, gate, ln_weight, ln_bias]
    wide = _wide(x.dtype)
    leaves = [None if t is None else t.detach().to(wide).requires_grad_() for t in owners]
    with torch.enable_grad():
        y = _formula(leaves, plan, widths, seed, activation, scaling, eps, dropout_p, residual_x)
        if not y.requires_grad and leaves[0] is not None:  # no token has an adapter
            y = y + 0 * leaves[0]
    wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need and leaf is not None]
    found = iter(
        torch.autograd.grad(y, wanted, dy.to(wide), allow_unused=True, materialize_grads=True)
        if wanted
        else ()
    )
    return [
        next(found).to(owner.dtype) if need and owner is not None else None
        for owner, need in zip(owners, needs, strict=True)
    ]


def _formula(
    tensors: Sequence[Tensor | None],
    plan: Sequence[Tensor],
    widths: Tensor,
    seed: Tensor | None,
    activation: str,
    scaling: float,
    eps: float,
    dropout_p: float,
    residual_x: bool,
) -> Tensor:
    x, residual, down, down_bias, up, up_bias, scale, gate, ln_weight, ln_bias = tensors
    assert x is not None
    assert down is not None
    assert up is not None
    tokens = x.shape[0]
    return reference.multi_bottleneck(
        *(x, down, down_bias, up, up_bias, plan[0][:tokens].tolist()),
        widths.clamp(0, down.shape[1]).tolist(),
        activation=activation,
        scaling=scaling,
        scale=scale,
        gate=gate,
        residual=residual,
        residual_x=residual_x,
        ln_weight=ln_weight,
        ln_bias=ln_bias,
        eps=eps,
        dropout_p=dropout_p,
        keep=None if seed is None else philox_mask(seed, (tokens, x.shape[1]), dropout_p),
    )
