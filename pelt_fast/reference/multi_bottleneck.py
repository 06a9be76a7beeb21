"""Batched bottleneck adapters: every token its own. Each row is ``bottleneck_adapter`` of that row's adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .adapter import ACTIVATIONS, layernorm


def multi_bottleneck(
    x: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    ids: Sequence[int],
    widths: Sequence[int],
    *,
    activation: str,
    scaling: float,
    scale: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    residual_x: bool,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    dropout_p: float,
    keep: Tensor | None,
) -> Tensor:
    """y (T, d) of x (T, d), in the dtype of its arguments; every intermediate is an ordinary tensor of autograd.

    Args:
        x: (T, d).
        down: (L, M, d).
        down_bias: (L, M) or None.
        up: (L, d, M).
        up_bias: (L, d) or None.
        ids: of T tokens; token t goes through the first widths[g] units of adapter g = ids[t]. Outside [0, L), or
            where the width is 0, it goes through none.
        widths: of L adapters.
        activation: a key of ``ACTIVATIONS``.
        scaling: a number.
        scale: (L,) or None.
        gate: (T,) or None.
        residual: (T, d) or None.
        residual_x: x is added to what comes out of the adapter.
        ln_weight: (d,); a layernorm comes last where it is given.
        ln_bias: (d,) or None.
        eps: added to the variance.
        dropout_p: the rate that ``keep`` was drawn with.
        keep: the dropout mask (T, d), True where an element is kept.
    """
    rows = []
    for t, g in enumerate(ids):
        width = widths[g] if 0 <= g < down.shape[0] else 0
        u = torch.zeros_like(x[t])
        if width:
            q = down[g, :width] @ x[t]
            if down_bias is not None:
                q = q + down_bias[g, :width]
            u = up[g, :, :width] @ ACTIVATIONS[activation](q)
            if up_bias is not None:
                u = u + up_bias[g]
            u = scaling * u if scale is None else scaling * scale[g] * u
            if keep is not None:
                u = torch.where(keep[t], u, 0.0) * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
            if gate is not None:
                u = gate[t] * u
        if residual_x:
            u = u + x[t]
        rows.append(u if residual is None else u + residual[t])
    y = torch.stack(rows)
    return y if ln_weight is None else layernorm(y, ln_weight, ln_bias, eps)
