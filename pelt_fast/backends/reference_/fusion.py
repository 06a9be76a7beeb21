"""AdapterFusion in the bottleneck space, spelled out and differentiated by autograd. Runs only when asked for by name.

The oracle is ``pelt_fast.reference.adapter_fusion``, in the order of the definition; here are the formulas of
``pelt_fast/ops/fusion.py``, so that the re-association itself can be held to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...random import philox_mask
from ...reference.adapter import ACTIVATIONS, layernorm
from .adapter import _statistics, _wide, priority, unsupported

__all__ = ["adapter_fusion_bwd", "adapter_fusion_fwd", "priority", "unsupported"]


def adapter_fusion_fwd(
    x: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """y (T, d), q (T, M), k (T, M + N), p (T, N), mean and reciprocal deviation (T, 2) of each layernorm."""
    dtype, wide = x.dtype, _wide(x.dtype)
    tensors = [None if t is None else t.to(wide) for t in (x, *rest[:11])]
    y, q, k, p, z, s = _formula(tensors, *rest[11:])
    pre_eps, eps = rest[15:17]
    return (
        y.to(dtype),
        q.to(dtype),
        k.to(dtype),
        p,
        None if tensors[8] is None else _statistics(z, pre_eps),
        None if tensors[10] is None else _statistics(s, eps),
    )


def adapter_fusion_bwd(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    p: Tensor,
    pre_stats: Tensor | None,
    post_stats: Tensor | None,
    *rest: Any,
) -> list[Tensor | None]:
    """Gradients by autograd of the formula, each in the dtype of what it is of."""
    *arguments, needs = rest
    owners, settings = arguments[:12], arguments[12:]
    wide = _wide(dy.dtype)
    leaves = [None if t is None else t.detach().to(wide).requires_grad_() for t in owners]
    with torch.enable_grad():
        y = _formula(leaves, *settings)[0]
    wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need and leaf is not None]
    grads = torch.autograd.grad(y, wanted, dy.to(wide), allow_unused=True) if wanted else ()
    found = iter(
        [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)]
    )
    return [
        next(found).to(owner.dtype) if need and owner is not None else None
        for owner, need in zip(owners, needs, strict=True)
    ]


def _formula(
    tensors: Sequence[Tensor | None],
    seed: Tensor | None,
    activation: str,
    widths: Sequence[int],
    temperature: float,
    pre_eps: float,
    eps: float,
    dropout_p: float,
    skip_in: bool,
    residual_x: bool,
    residual_skip: bool,
) -> tuple[Tensor, ...]:
    """y, q, k, p, and what the two layernorms are of."""
    x, skip, query, down, down_bias, score, score_bias, value, *norms = tensors
    pre_weight, pre_bias, ln_weight, ln_bias = norms
    assert x is not None
    assert down is not None
    assert score is not None
    assert value is not None
    z = x + skip if skip_in and skip is not None else x
    v = z if pre_weight is None else layernorm(z, pre_weight, pre_bias, pre_eps)
    q = v @ down.T + (0 if down_bias is None else down_bias)
    k = (v if query is None else query) @ score.T + (0 if score_bias is None else score_bias)
    h, bottleneck = ACTIVATIONS[activation](q), q.shape[1]
    scores = torch.stack([t.sum(1) for t in (h * k[:, :bottleneck]).split(list(widths), 1)], 1)
    scores = scores + k[:, bottleneck:]
    if seed is not None:
        keep = philox_mask(seed, (scores.shape[0], scores.shape[1]), dropout_p)
        scores = torch.where(keep, scores, 0.0) * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
    p = torch.softmax(scores / temperature, 1)
    each = torch.cat([p[:, n : n + 1].expand(-1, m) for n, m in enumerate(widths)], 1)
    s = torch.cat((h * each, p), 1) @ value
    if residual_x:
        s = s + x
    if residual_skip and skip is not None:
        s = s + skip
    y = s if ln_weight is None else layernorm(s, ln_weight, ln_bias, eps)
    return y, q, k, p, z, s
