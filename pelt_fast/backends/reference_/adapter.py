"""The oracle as a backend: ``pelt_fast.reference`` with autograd. Slow; it runs only when asked for by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...random import philox_mask
from ...reference.adapter import ACTIVATIONS, layernorm


def unsupported(problem: Any) -> list[str]:
    """Why the formulas here cannot run this problem; empty when they can."""
    if problem.activation not in ACTIVATIONS:
        return [f"no formula for the activation {problem.activation!r}"]
    return []


def priority(problem: Any) -> int:
    """Never chosen automatically."""
    return 0


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
    """y (T, d), q (T, m), and mean and reciprocal deviation (T, 2) of each layernorm."""
    dtype, wide = x.dtype, _wide(x.dtype)
    x, skip = x.to(wide), None if skip is None else skip.to(wide)
    tensors = (down, down_bias, up, up_bias, scale, gate, pre_weight, pre_bias, ln_weight, ln_bias)
    cast = [None if t is None else t.to(wide) for t in tensors]
    factors = (activation, scaling, dropout_p, seed, skip_in, residual_x, residual_skip)
    y = _formula(x, skip, cast, *factors, pre_eps, eps)
    # the same without the last layernorm is what its statistics are of
    s = _formula(x, skip, [*cast[:8], None, None], *factors, pre_eps, eps)
    v = z = x + skip if skip_in and skip is not None else x
    if cast[6] is not None:
        v = layernorm(z, cast[6], cast[7], pre_eps)
    q = v @ down.to(wide).T
    q = q if cast[1] is None else q + cast[1]
    return (
        y.to(dtype),
        q.to(dtype),
        None if pre_weight is None else _statistics(z, pre_eps),
        None if ln_weight is None else _statistics(s, eps),
    )


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
    """Gradients by autograd of the formula, each in the dtype of what it is of."""
    owners = [x, skip, down, down_bias, up, up_bias, scale, gate]
    owners += [pre_weight, pre_bias, ln_weight, ln_bias]
    wide = _wide(x.dtype)
    leaves = [None if t is None else t.detach().to(wide).requires_grad_() for t in owners]
    with torch.enable_grad():
        factors = (activation, scaling, dropout_p, seed, skip_in, residual_x, residual_skip)
        assert leaves[0] is not None
        y = _formula(leaves[0], leaves[1], leaves[2:], *factors, pre_eps, eps)
    wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need and leaf is not None]
    found = iter(torch.autograd.grad(y, wanted, dy.to(wide)) if wanted else ())
    return [
        next(found).to(owner.dtype) if need and owner is not None else None
        for owner, need in zip(owners, needs, strict=True)
    ]


def _formula(
    x: Tensor,
    skip: Tensor | None,
    parameters: Sequence[Tensor | None],
    activation: str,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    skip_in: bool,
    residual_x: bool,
    residual_skip: bool,
    pre_eps: float,
    eps: float,
) -> Tensor:
    down, down_bias, up, up_bias, scale, gate, pre_weight, pre_bias, ln_weight, ln_bias = parameters
    assert down is not None
    assert up is not None
    keep = None if seed is None else philox_mask(seed, (x.shape[0], x.shape[1]), dropout_p)
    return reference.bottleneck_adapter(
        x,
        down,
        down_bias,
        up,
        up_bias,
        activation=activation,
        scaling=scaling,
        scale=scale,
        gate=gate,
        skip=skip,
        skip_in=skip_in,
        residual_x=residual_x,
        residual_skip=residual_skip,
        pre_weight=pre_weight,
        pre_bias=pre_bias,
        pre_eps=pre_eps,
        ln_weight=ln_weight,
        ln_bias=ln_bias,
        eps=eps,
        dropout_p=dropout_p,
        keep=keep,
    )


def _statistics(x: Tensor, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    rstd = torch.rsqrt((x - mean).square().mean(-1, keepdim=True) + eps)
    return torch.cat((mean, rstd), 1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: a layernorm of which every step is rounded to a half overflows, or is of no use."""
    return torch.promote_types(dtype, torch.float32)
