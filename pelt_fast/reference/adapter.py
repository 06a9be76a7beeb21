"""The bottleneck adapter, slow and obvious: the oracle of every other backend."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# The forms of `transformers.activations.ACT2FN`, each under one name.
ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda q: (
        0.5 * q * (1 + torch.tanh(math.sqrt(2 / math.pi) * (q + 0.044715 * q**3)))
    ),
    "silu": lambda q: q * torch.sigmoid(q),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": lambda q: torch.where(q > 0, q, 0.01 * q),
    "quick_gelu": lambda q: q * torch.sigmoid(1.702 * q),
    "relu2": lambda q: torch.relu(q) ** 2,
    "relu6": F.relu6,
    "mish": lambda q: q * torch.tanh(F.softplus(q)),
    "linear": lambda q: q,
}


def bottleneck_adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    activation: str,
    scaling: float = 1.0,
    scale: Tensor | None = None,
    gate: Tensor | None = None,
    skip: Tensor | None = None,
    skip_in: bool = False,
    residual_x: bool = False,
    residual_skip: bool = False,
    pre_weight: Tensor | None = None,
    pre_bias: Tensor | None = None,
    pre_eps: float = 1e-5,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    keep: Tensor | None = None,
) -> Tensor:
    """y (T, d) of x (T, d), in the dtype of its arguments; every intermediate is an ordinary tensor of autograd.

    Args:
        x: (T, d).
        down_weight: (m, d).
        down_bias: (m,) or None.
        up_weight: (d, m).
        up_bias: (d,) or None.
        activation: a key of ``ACTIVATIONS``.
        scaling: a number.
        scale: (1,) or (d,), or None.
        gate: (T,) or None.
        skip: (T, d) or None.
        skip_in: ``skip`` is added to what goes into the adapter.
        residual_x: x is added to what comes out of it.
        residual_skip: ``skip`` is.
        pre_weight: (d,); a layernorm goes before the adapter where it is given.
        pre_bias: (d,) or None.
        pre_eps: added to the variance.
        ln_weight: (d,); a layernorm comes last where it is given.
        ln_bias: (d,) or None.
        eps: added to the variance.
        dropout_p: the rate that ``keep`` was drawn with.
        keep: the dropout mask (T, d), True where an element is kept.
    """
    v = x + skip if skip_in and skip is not None else x
    if pre_weight is not None:
        v = layernorm(v, pre_weight, pre_bias, pre_eps)
    q = v @ down_weight.T
    if down_bias is not None:
        q = q + down_bias
    y = ACTIVATIONS[activation](q) @ up_weight.T
    if up_bias is not None:
        y = y + up_bias
    y = scaling * y if scale is None else scaling * scale * y
    if keep is not None:
        y = torch.where(keep, y, 0.0) * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
    if gate is not None:
        y = gate[:, None] * y
    if residual_x:
        y = y + x
    if residual_skip and skip is not None:
        y = y + skip
    return y if ln_weight is None else layernorm(y, ln_weight, ln_bias, eps)


def layernorm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Over the last dimension, with the biased variance, as ``torch.nn.LayerNorm``."""
    centred = x - x.mean(-1, keepdim=True)
    normal = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps) * weight
    return normal if bias is None else normal + bias
