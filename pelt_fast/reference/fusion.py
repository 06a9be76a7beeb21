"""AdapterFusion in the order of its definition, slow and obvious: the oracle of every re-association."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .adapter import ACTIVATIONS, layernorm


def adapter_fusion(
    x: Tensor,
    down_weights: Sequence[Tensor],
    down_biases: Sequence[Tensor | None],
    up_weights: Sequence[Tensor],
    up_biases: Sequence[Tensor | None],
    *,
    activation: str,
    scalings: Sequence[float | Tensor],
    query_weight: Tensor | None = None,
    query_bias: Tensor | None = None,
    key_weight: Tensor | None = None,
    key_bias: Tensor | None = None,
    value_weight: Tensor | None = None,
    query: Tensor | None = None,
    temperature: float = 1.0,
    value_residual: Tensor | None = None,
    skip: Tensor | None = None,
    pre_weight: Tensor | None = None,
    pre_bias: Tensor | None = None,
    pre_eps: float = 1e-5,
    residual: Tensor | None = None,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y (T, d) and the attention (T, N) of x (T, d) and N adapters, in the dtype of its arguments.

    Args:
        x: (T, d).
        down_weights: N of (m_n, d).
        down_biases: N of (m_n,) or None.
        up_weights: N of (d, m_n).
        up_biases: N of (d,) or None.
        activation: a key of ``ACTIVATIONS``.
        scalings: N numbers or tensors (1,) or (d,), factors of what an adapter gives.
        query_weight: (d, d), or None: the query is taken as it is; likewise key and value.
        query_bias: (d,) or None.
        key_weight: (d, d) or None.
        key_bias: (d,) or None.
        value_weight: (d, d) or None.
        query: (T, d), or None: the adapters' input.
        temperature: what scores are divided by.
        value_residual: (T, d), added to what every adapter gives, or None.
        skip: (T, d), added to what goes into the adapters, or None.
        pre_weight: (d,); a layernorm goes before the adapters where it is given.
        pre_bias: (d,) or None.
        pre_eps: added to the variance.
        residual: (T, d), added to the result, or None.
        ln_weight: (d,); a layernorm comes last where it is given.
        ln_bias: (d,) or None.
        eps: added to the variance.
        dropout_p: the rate that ``keep`` was drawn with.
        keep: the dropout mask (T, N) of the scores, True where one is kept.
    """
    v = x if skip is None else x + skip
    if pre_weight is not None:
        v = layernorm(v, pre_weight, pre_bias, pre_eps)
    ups = []
    for down, down_bias, up, up_bias, scaling in zip(
        down_weights, down_biases, up_weights, up_biases, scalings, strict=True
    ):
        q = _linear(v, down, down_bias)
        u = _linear(ACTIVATIONS[activation](q), up, up_bias) * scaling
        ups.append(u if value_residual is None else u + value_residual)
    results = torch.stack(ups, 1)  # (T, N, d)
    queries = _linear(v if query is None else query, query_weight, query_bias)
    keys = _linear(results, key_weight, key_bias)
    values = _linear(results, value_weight, None)
    scores = (keys * queries[:, None]).sum(-1)
    if keep is not None:
        scores = torch.where(keep, scores, 0.0) * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
    attention = torch.softmax(scores / temperature, -1)
    y = (attention[:, :, None] * values).sum(1)
    if residual is not None:
        y = y + residual
    return (y if ln_weight is None else layernorm(y, ln_weight, ln_bias, eps)), attention


def _linear(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = x if weight is None else x @ weight.T
    return y if bias is None else y + bias
