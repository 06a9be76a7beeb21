"""Operators of the LoRA linear with UniPELT's gate; see ``pelt_fast/ops/lora.py`` for what an operator does here."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ..dispatch import LoRAProblem, arch_of, asked_for, select
from .library import define
from .rows import from_rows, to_rows

GRADIENTS = ("x", "bias", "lora_a", "lora_b", "gate_weight", "gate_bias")
"""What backward returns, in this order."""


def problem_of(
    op: str, rows: Tensor, weight: Tensor, lora_a: Tensor, dropout: bool, tokens: int
) -> LoRAProblem:
    """Describes a call; ``rows`` is x or dy."""
    return LoRAProblem(
        op=op,
        device_type=rows.device.type,
        arch=arch_of(rows.device.type, rows.device.index),
        dtype=rows.dtype,
        weight_dtype=weight.dtype,
        adapter_dtypes=(lora_a.dtype,),
        tokens=tokens,
        in_features=weight.shape[1],
        out_features=weight.shape[0],
        ranks=(lora_a.shape[0],),
        dropout=dropout,
        weight_requires_grad=weight.requires_grad,
        weight_is_inference=weight.is_inference(),
    )


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    token_weight: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    samples: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = to_rows(x)
    tokens = rows.shape[0]
    if tokens == 0:
        y, s, gate = _forward_fake(
            *(x, weight, bias, lora_a, lora_b, gate_weight, gate_bias, token_weight),
            *(scaling, dropout_p, seed, samples, backend),
        )
        return y, s, gate.zero_()
    problem = problem_of("gated_lora_linear_fwd", rows, weight, lora_a, seed is not None, tokens)
    run = select(problem, backend or asked_for()).module
    y, s, gate = run.gated_lora_linear_fwd(
        *(rows, weight, bias, lora_a, lora_b, gate_weight, gate_bias, token_weight),
        *(scaling, dropout_p, seed, samples),
    )
    return from_rows(y, (*x.shape[:-1], weight.shape[0])), s, gate


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    token_weight: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    samples: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty((*x.shape[:-1], weight.shape[0])),
        x.new_empty((prod(x.shape[:-1]), lora_a.shape[0] + 1)),
        x.new_empty((samples,), dtype=torch.promote_types(x.dtype, torch.float32)),
    )


def _backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    token_weight: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    s: Tensor,
    gate: Tensor,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    if dy.layout is not torch.strided:  # gather(sparse_grad=True) gives such ones
        dy = dy.to_dense()
    rows = to_rows(dy)
    if rows.shape[0] == 0:  # sums of nothing
        empty = _gradients_like(dy, weight, lora_a, lora_b, gate_weight, gate_bias, needs)
        return [g.zero_() for g in empty]
    problem = problem_of(
        "gated_lora_linear_bwd", rows, weight, lora_a, seed is not None, rows.shape[0]
    )
    run = select(problem, backend or asked_for()).module
    grads = run.gated_lora_linear_bwd(
        *(rows, None if x is None else to_rows(x), weight, lora_a, lora_b, gate_weight),
        *(gate_bias, token_weight, scaling, dropout_p, seed, s, gate, needs),
    )
    dx, *rest = [dy.new_empty(0) if g is None else g for g in grads]
    return [from_rows(dx, (*dy.shape[:-1], weight.shape[1])) if needs[0] else dx, *rest]


def _gradients_like(
    dy: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Uninitialised gradients; empty where not needed."""
    likes = (
        (dy, (*dy.shape[:-1], weight.shape[1])),
        (dy, (weight.shape[0],)),
        (lora_a, lora_a.shape),
        (lora_b, lora_b.shape),
        (gate_weight, gate_weight.shape),
        (gate_weight if gate_bias is None else gate_bias, (1,)),
    )
    return [
        like.new_empty(shape if need else 0)
        for (like, shape), need in zip(likes, needs, strict=True)
    ]


def _backward_fake(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    token_weight: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    s: Tensor,
    gate: Tensor,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    return _gradients_like(dy, weight, lora_a, lora_b, gate_weight, gate_bias, needs)


_ADAPTER = (
    "Tensor lora_a, Tensor lora_b, Tensor gate_weight, Tensor? gate_bias, Tensor? token_weight, "
    "float scaling, float dropout_p, Tensor? seed"
)

gated_lora_linear_fwd = define(
    f"gated_lora_linear_fwd(Tensor x, Tensor weight, Tensor? bias, {_ADAPTER}, int samples, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
gated_lora_linear_bwd = define(
    f"gated_lora_linear_bwd(Tensor dy, Tensor? x, Tensor weight, {_ADAPTER}, Tensor s, Tensor gate, bool[] needs, "
    "str backend) -> Tensor[]",
    _backward,
    _backward_fake,
)
