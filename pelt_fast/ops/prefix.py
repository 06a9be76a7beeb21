"""The operator of attention over a prefix; see ``pelt_fast/ops/lora.py`` for what an operator does here.

It has no backward: with gradients PyTorch composes the call, see ``pelt_fast/functional/prefix.py``.
"""

from __future__ import annotations

from torch import Tensor

from ..dispatch import PrefixProblem, arch_of, asked_for, select
from .library import define


def problem_of(
    query: Tensor, key: Tensor, prefix_key: Tensor, *, mask: bool, is_causal: bool
) -> PrefixProblem:
    """Describes a call."""
    batch, heads, queries, head_dim = query.shape
    return PrefixProblem(
        op="prefix_attention",
        device_type=query.device.type,
        arch=arch_of(query.device.type, query.device.index),
        dtype=query.dtype,
        batch=batch,
        heads=heads,
        queries=queries,
        keys=key.shape[2],
        prefix=prefix_key.shape[2],
        head_dim=head_dim,
        mask=mask,
        is_causal=is_causal,
    )


def _dense(t: Tensor) -> Tensor:
    """Features side by side; the other strides are anything."""
    return t if t.stride(3) == 1 else t.contiguous()


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    backend: str,
) -> Tensor:
    problem = problem_of(query, key, prefix_key, mask=mask is not None, is_causal=is_causal)
    run = select(problem, backend or asked_for()).module
    tensors = [_dense(t) for t in (query, key, value, prefix_key, prefix_value)]
    out: Tensor = run.prefix_attention(*tensors, mask, is_causal, scale)
    return out


def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    backend: str,
) -> Tensor:
    batch, heads, queries, head_dim = query.shape
    return query.new_empty((batch, queries, heads, head_dim))


prefix_attention = define(
    "prefix_attention(Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value, "
    "Tensor? mask, bool is_causal, float scale, str backend) -> Tensor",
    _forward,
    _forward_fake,
)
