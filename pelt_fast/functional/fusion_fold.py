"""The matrices with which an attention over adapters is computed in their bottlenecks, and when they are worth it.

Adapter n gives r_n = U_n h_n + b_n; the query is q = W_q u + b_q, the key k_n = W_k r_n + b_k, the value W_v r_n.
With R = [U_1ᵀ; ...; U_Nᵀ; b_1; ...; b_N] (M + N, d) and K = R W_kᵀ (+ b_k on the last N rows)

    q · k_n = Σ_j (K q)_j h_j + (K q)_{M+n},     K q = (K W_q) u + K b_q = E u + e
    Σ_n p_n W_v r_n = Vᵀ [p ⊙ h; p],             V = R W_vᵀ

so that no token meets a d × d matrix and no result of an adapter is ever made. E, e and V cost (M + N) · d² products
for each of W_q, W_k and W_v that there is. A call of fewer tokens than M + N is cheaper when the tokens themselves go
through W_q and W_kᵀ, and the context through W_v: ``scores_of`` and R are its matrices, T · d² products for each.

Folding is plain differentiable torch on thin matrices, in fp32 at least, so that W_q, W_k, W_v and the adapters get
their gradients through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Attention(NamedTuple):
    """The attention's matrices (d, d) and biases (d,); None where a flag of the library's leaves one out."""

    query_weight: Tensor | None
    query_bias: Tensor | None
    key_weight: Tensor | None
    key_bias: Tensor | None
    value_weight: Tensor | None


class Adapters(NamedTuple):
    """N adapters: down (m_n, d), up (d, m_n), biases or None, and what each one's result is multiplied by."""

    down: Sequence[Tensor]
    down_bias: Sequence[Tensor | None]
    up: Sequence[Tensor]
    up_bias: Sequence[Tensor | None]
    scaling: Sequence[float | Tensor]

    @property
    def widths(self) -> list[int]:
        """The bottlenecks."""
        return [down.shape[0] for down in self.down]


NO_ATTENTION = Attention(None, None, None, None, None)


class Stacked(NamedTuple):
    """The adapters, one below the other: down (M, d), its biases (M,), and R (M + N, d)."""

    down: Tensor
    down_bias: Tensor | None
    results: Tensor


class Folded(NamedTuple):
    """What the operator takes: down (M, d), score = E (M + N, d), value = V (M + N, d), and the biases."""

    down: Tensor
    down_bias: Tensor | None
    score: Tensor
    score_bias: Tensor | None
    value: Tensor


def trains(adapters: Adapters, attention: Attention) -> bool:
    """Whether anything of them wants a gradient."""
    if not torch.is_grad_enabled():
        return False
    groups = (*adapters, attention)
    return any(isinstance(t, Tensor) and t.requires_grad for group in groups for t in group)


def wide_dtype(tensors: Sequence[Tensor | None]) -> torch.dtype:
    """What thin matrices are multiplied in."""
    dtype = torch.float32
    for t in tensors:
        if t is not None:
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def stack(adapters: Adapters, dtype: torch.dtype) -> Stacked:
    """down in a dtype that holds all of it, R in this one."""
    return Stacked(*_stacked_down(adapters), _results(adapters, dtype))


def _stacked_down(adapters: Adapters) -> tuple[Tensor, Tensor | None]:
    dtype = adapters.down[0].dtype
    for t in (*adapters.down, *adapters.down_bias):
        if t is not None:
            dtype = torch.promote_types(dtype, t.dtype)
    down = torch.cat([t.to(dtype) for t in adapters.down])
    if all(b is None for b in adapters.down_bias):
        return down, None
    biases = [
        w.new_zeros(w.shape[0]) if b is None else b
        for w, b in zip(adapters.down, adapters.down_bias, strict=True)
    ]
    return down, torch.cat([b.to(dtype) for b in biases])


def _results(adapters: Adapters, dtype: torch.dtype) -> Tensor:
    """The up projections' columns, then their biases, each times its adapter's scaling."""
    columns, biases = [], []
    for up, bias, scaling in zip(adapters.up, adapters.up_bias, adapters.scaling, strict=True):
        b = up.new_zeros(up.shape[0]) if bias is None else bias
        factor = scaling.to(dtype) if isinstance(scaling, Tensor) else scaling
        one = isinstance(factor, float) and factor == 1.0
        columns.append(up.to(dtype).T if one else up.to(dtype).T * factor)
        biases.append(b.to(dtype)[None] if one else b.to(dtype)[None] * factor)
    return torch.cat((*columns, *biases))


def fold(stacked: Stacked, attention: Attention, shift: bool) -> Folded:
    """E, e and V; ``shift``: with what adds the same to every score, which a softmax alone would not see."""
    down, down_bias, r = stacked
    w_q, b_q, w_k, b_k, w_v = (None if t is None else t.to(r.dtype) for t in attention)
    keys = r if w_k is None else r @ w_k.T
    if shift and b_k is not None:
        keys = torch.cat((keys[: len(down)], keys[len(down) :] + b_k))
    return Folded(
        down,
        down_bias,
        keys if w_q is None else keys @ w_q,
        None if b_q is None else keys @ b_q,
        r if w_v is None else r @ w_v.T,
    )


def folds(tokens: int, adapters: Adapters, attention: Attention) -> bool:
    """Whether folding costs less than the d × d products of the tokens, or there is nothing to fold."""
    products = (attention.query_weight, attention.key_weight, attention.value_weight)
    matrices = sum(w is not None for w in products)
    return matrices == 0 or sum(adapters.widths) + len(adapters.up) <= tokens
