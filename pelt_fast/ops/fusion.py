"""Operators of AdapterFusion in the bottleneck space; see ``pelt_fast/ops/lora.py`` for what an operator does here.

With v = LN_pre(x + skip), or what is left of it; N segments of widths m_n, M their sum, n(j) the segment of j:

    q = v Dᵀ + b_D (T, M);  h = act(q);  k = u Eᵀ + e (T, M + N), u = query or v
    score_n = Σ_{j in n} h_j k_j + k_{M+n};  p = softmax(keep · score / (1 - dropout) / temperature)
    s = [p_{n(j)} h_j, p_n] V (+ x) (+ skip);  y = LN(s) or s

``pelt_fast/functional/fusion_fold.py`` makes E, e and V of the adapters and the attention's matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..dispatch import FusionProblem, arch_of, asked_for, select
from .library import define
from .rows import from_rows, to_rows

GRADIENTS = (
    "x",
    "skip",
    "query",
    "down",
    "down_bias",
    "score",
    "score_bias",
    "value",
    "pre_weight",
    "pre_bias",
    "ln_weight",
    "ln_bias",
)
"""What backward returns, in this order."""
_ROWS = 3  # of them are of size T


def problem_of(
    op: str,
    rows: Tensor,
    tokens: int,
    parameters: Sequence[Tensor],
    *,
    widths: Sequence[int],
    activation: str,
    query: bool,
    pre_ln: bool,
    post_ln: bool,
    skip: bool,
    dropout: bool,
) -> FusionProblem:
    """Describes a call; ``rows`` is x or dy, ``parameters`` are down (M, d), score and value."""
    device = rows.device
    return FusionProblem(
        op=op,
        device_type=device.type,
        arch=arch_of(device.type, device.index),
        dtype=rows.dtype,
        param_dtypes=tuple([p.dtype for p in parameters]),
        tokens=tokens,
        features=parameters[0].shape[1],
        widths=tuple(widths),
        activation=activation,
        query=query,
        pre_ln=pre_ln,
        post_ln=post_ln,
        skip=skip,
        dropout=dropout,
    )


def _backend(op: str, rows: Tensor, arguments: Sequence[Any], backend: str) -> Any:
    """The module that runs a call; ``arguments`` as the schema has them from x on, without what backward adds."""
    _, skip, query, down, _, score, _, value, pre_weight, _, ln_weight, _, seed = arguments[:13]
    activation, widths = arguments[13:15]
    problem = problem_of(
        op,
        rows,
        rows.shape[0],
        (down, score, value),
        widths=widths,
        activation=activation,
        query=query is not None,
        pre_ln=pre_weight is not None,
        post_ln=ln_weight is not None,
        skip=skip is not None,
        dropout=seed is not None,
    )
    return select(problem, backend or asked_for()).module


def _rows(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else to_rows(tensor)


def _forward(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *arguments, backend = x, *rest
    rows = to_rows(x)
    if rows.shape[0] == 0:
        return _forward_fake(x, *rest)
    run = _backend("adapter_fusion_fwd", rows, arguments, backend)
    skip, query = map(_rows, arguments[1:_ROWS])
    y, *saved, pre_stats, post_stats = run.adapter_fusion_fwd(rows, skip, query, *arguments[_ROWS:])
    stats = [_no_stats(x) if t is None else t for t in (pre_stats, post_stats)]
    return (from_rows(y, x.shape), *saved, *stats)


def _no_stats(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))


def _forward_fake(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    down, score, pre_weight, ln_weight = rest[2], rest[4], rest[7], rest[9]
    tokens, bottleneck, columns = prod(x.shape[:-1]), down.shape[0], score.shape[0]
    stats = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(x.shape),
        x.new_empty((tokens, bottleneck)),
        x.new_empty((tokens, columns)),
        x.new_empty((tokens, columns - bottleneck), dtype=stats),
        x.new_empty((tokens, 2), dtype=stats) if pre_weight is not None else _no_stats(x),
        x.new_empty((tokens, 2), dtype=stats) if ln_weight is not None else _no_stats(x),
    )


def _backward(dy: Tensor, *rest: Any) -> list[Tensor]:
    q, k, p, pre_stats, post_stats, *arguments, needs, backend = rest
    if dy.layout is not torch.strided:  # gather(sparse_grad=True) gives such ones
        dy = dy.to_dense()
    rows = to_rows(dy)
    tensors = arguments[: len(GRADIENTS)]
    if rows.shape[0] == 0:  # sums of nothing
        return [g.zero_() for g in _gradients_like(dy, tensors, needs)]
    run = _backend("adapter_fusion_bwd", rows, arguments, backend)
    saved = (
        *(q, k, p),
        pre_stats if arguments[8] is not None else None,
        post_stats if arguments[10] is not None else None,
    )
    grads = run.adapter_fusion_bwd(
        rows, *saved, *map(_rows, arguments[:_ROWS]), *arguments[_ROWS:], needs
    )
    found = [dy.new_empty(0) if g is None else g for g in grads]
    for i in range(_ROWS):
        if needs[i]:
            found[i] = from_rows(found[i], tensors[i].shape)
    return found


def _gradients_like(
    dy: Tensor, tensors: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """Uninitialised gradients in the shapes of what they are of; empty where not needed."""
    return [
        t.new_empty(t.shape) if need and t is not None else dy.new_empty(0)
        for t, need in zip(tensors, needs, strict=True)
    ]


def _backward_fake(dy: Tensor, *rest: Any) -> list[Tensor]:
    tensors, needs = rest[5 : 5 + len(GRADIENTS)], rest[-2]
    return _gradients_like(dy, tensors, needs)


_CALL = (
    "Tensor x, Tensor? skip, Tensor? query, Tensor down, Tensor? down_bias, Tensor score, Tensor? score_bias, "
    "Tensor value, Tensor? pre_weight, Tensor? pre_bias, Tensor? ln_weight, Tensor? ln_bias, Tensor? seed, "
    "str activation, int[] widths, float temperature, float pre_eps, float eps, float dropout_p, "
    "bool skip_in, bool residual_x, bool residual_skip"
)

adapter_fusion_fwd = define(
    f"adapter_fusion_fwd({_CALL}, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
adapter_fusion_bwd = define(
    "adapter_fusion_bwd(Tensor dy, Tensor q, Tensor k, Tensor p, Tensor? pre_stats, Tensor? post_stats, "
    f"{_CALL}, bool[] needs, str backend) -> Tensor[]",
    _backward,
    _backward_fake,
)
