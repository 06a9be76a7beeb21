"""Operators of the LoRA linear. Functional: no hidden state, no output aliases an input or another output.

Here tensors of any number of dimensions become rows (T, features) with a unit last stride, T = 0 ends,
and a backend is chosen. Shapes and dtypes were checked by ``pelt_fast.functional``.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ..dispatch import LoRAProblem, arch_of, asked_for, select
from .library import define
from .rows import from_rows, to_rows


def problem_of(
    op: str,
    rows: Tensor,
    weight: Tensor,
    lora_a: Sequence[Tensor],
    dropout_p: Sequence[float],
    tokens: int,
) -> LoRAProblem:
    """Describes a call; ``rows`` is x or dy."""
    device = rows.device
    return LoRAProblem(
        op=op,
        device_type=device.type,
        arch=arch_of(device.type, device.index),
        dtype=rows.dtype,
        weight_dtype=weight.dtype,
        adapter_dtypes=tuple([a.dtype for a in lora_a]),
        tokens=tokens,
        in_features=weight.shape[1],
        out_features=weight.shape[0],
        ranks=tuple([a.shape[0] for a in lora_a]),
        dropout=any(dropout_p),
        weight_requires_grad=weight.requires_grad,
        weight_is_inference=weight.is_inference(),
    )


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    lora_bias: Sequence[Tensor | None],
    scaling: Sequence[float],
    dropout_p: Sequence[float],
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    rows = to_rows(x)
    tokens = rows.shape[0]
    shape = (*x.shape[:-1], weight.shape[0])
    if tokens == 0:
        return x.new_empty(shape), x.new_empty((0, sum([a.shape[0] for a in lora_a])))
    problem = problem_of("lora_linear_fwd", rows, weight, lora_a, dropout_p, tokens)
    run = select(problem, backend or asked_for()).module
    y, s = run.lora_linear_fwd(
        rows, weight, bias, lora_a, lora_b, lora_bias, scaling, dropout_p, seed
    )
    return from_rows(y, shape), s


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    lora_bias: Sequence[Tensor | None],
    scaling: Sequence[float],
    dropout_p: Sequence[float],
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    tokens = prod(x.shape[:-1])
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, x.new_empty((tokens, sum([a.shape[0] for a in lora_a])))


def _backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    s: Tensor | None,
    scaling: Sequence[float],
    dropout_p: Sequence[float],
    seed: Tensor | None,
    need_dx: bool,
    need_dbias: bool,
    need_da: Sequence[bool],
    need_db: Sequence[bool],
    need_dlora_bias: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    if dy.layout is not torch.strided:  # gather(sparse_grad=True) gives such ones
        dy = dy.to_dense()
    rows = to_rows(dy)
    tokens = rows.shape[0]
    dx_shape = (*dy.shape[:-1], weight.shape[1])
    if tokens == 0:
        needs = (need_dx, need_dbias, need_da, need_db, need_dlora_bias)
        return _noto_rows(dy, weight, lora_a, lora_b, dx_shape, *needs)
    problem = problem_of("lora_linear_bwd", rows, weight, lora_a, dropout_p, tokens)
    run = select(problem, backend or asked_for()).module
    dx, dbias, da, db, dlora_bias = run.lora_linear_bwd(
        rows,
        None if x is None else to_rows(x),
        weight,
        lora_a,
        lora_b,
        s,
        scaling,
        dropout_p,
        seed,
        need_dx,
        need_dbias,
        need_da,
        need_db,
        need_dlora_bias,
    )
    return (
        dy.new_empty(0) if dx is None else from_rows(dx, dx_shape),
        dy.new_empty(0) if dbias is None else dbias,
        [dy.new_empty(0) if d is None else d for d in da],
        [dy.new_empty(0) if d is None else d for d in db],
        [dy.new_empty(0) if d is None else d for d in dlora_bias],
    )


def _noto_rows(
    dy: Tensor,
    weight: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    dx_shape: tuple[int, ...],
    need_dx: bool,
    need_dbias: bool,
    need_da: Sequence[bool],
    need_db: Sequence[bool],
    need_dlora_bias: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """The gradients of a call with T = 0: sums of nothing."""

    def zeros(params: Sequence[Tensor], needs: Sequence[bool], dims: int) -> list[Tensor]:
        pairs = zip(params, needs, strict=True)
        return [p.new_zeros(p.shape[:dims] if need else 0) for p, need in pairs]

    return (
        dy.new_empty(dx_shape if need_dx else 0),
        dy.new_zeros(weight.shape[0] if need_dbias else 0),
        zeros(lora_a, need_da, 2),
        zeros(lora_b, need_db, 2),
        zeros(lora_b, need_dlora_bias, 1),
    )


def _backward_fake(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    s: Tensor | None,
    scaling: Sequence[float],
    dropout_p: Sequence[float],
    seed: Tensor | None,
    need_dx: bool,
    need_dbias: bool,
    need_da: Sequence[bool],
    need_db: Sequence[bool],
    need_dlora_bias: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    def like(param: Tensor, shape: Sequence[int], need: bool) -> Tensor:
        return param.new_empty(shape) if need else dy.new_empty(0)

    return (
        like(dy, (*dy.shape[:-1], weight.shape[1]), need_dx),
        like(dy, (weight.shape[0],), need_dbias),
        [like(a, a.shape, need) for a, need in zip(lora_a, need_da, strict=True)],
        [like(b, b.shape, need) for b, need in zip(lora_b, need_db, strict=True)],
        [like(b, (b.shape[0],), need) for b, need in zip(lora_b, need_dlora_bias, strict=True)],
    )


lora_linear_fwd = define(
    "lora_linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor[] lora_a, Tensor[] lora_b, Tensor?[] lora_bias, "
    "float[] scaling, float[] dropout_p, Tensor? seed, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
lora_linear_bwd = define(
    "lora_linear_bwd(Tensor dy, Tensor? x, Tensor weight, Tensor[] lora_a, Tensor[] lora_b, Tensor? s, "
    "float[] scaling, float[] dropout_p, Tensor? seed, bool need_dx, bool need_dbias, bool[] need_da, bool[] need_db, "
    "bool[] need_dlora_bias, str backend) -> (Tensor, Tensor, Tensor[], Tensor[], Tensor[])",
    _backward,
    _backward_fake,
)
