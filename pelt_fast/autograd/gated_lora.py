"""Autograd of the LoRA linear with UniPELT's gate.

Saved between forward and backward: x by alias, s = scaling · drop(x) Aᵀ and the gate's logits (T, r + 1), the gates
(samples,), the seed, and the parameters by alias. Nothing of size T × in or T × out is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import gated_lora_linear_bwd, gated_lora_linear_fwd
from .once import differentiable_once


class GatedLoRALinearFunction(torch.autograd.Function):
    """Arguments: x, weight, bias, A, B, gate_weight, gate_bias, token_weight, then what is no parameter.

    Returns y and the gates, which the caller detaches: their own gradient is not passed on.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        gate_weight: Tensor,
        gate_bias: Tensor | None,
        token_weight: Tensor | None,
        seed: Tensor | None,
        scaling: float,
        dropout_p: float,
        samples: int,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        adapter = (lora_a, lora_b, gate_weight, gate_bias, token_weight, scaling, dropout_p, seed)
        y, s, gate = gated_lora_linear_fwd(x, weight, bias, *adapter, samples, backend)
        needs = ctx.needs_input_grad
        keep_x = needs[1] or needs[3] or needs[5]
        ctx.save_for_backward(
            *(x if keep_x else None, weight, lora_a, lora_b, gate_weight, gate_bias),
            *(token_weight, seed, s, gate),
        )
        ctx.not_saved = "x" if needs[0] and not keep_x else ""  # the gate is made from x
        ctx.scaling, ctx.dropout_p, ctx.backend = scaling, dropout_p, backend
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y, gate

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Sequence[Any], dy: Tensor, _: Any) -> tuple[Any, ...]:
        x, weight, lora_a, lora_b, gate_weight, gate_bias, token_weight, seed, s, gate = saved
        needs = ctx.needs_input_grad
        wanted = [needs[0], *needs[2:7]]
        grads = gated_lora_linear_bwd(
            *(dy, x, weight, lora_a, lora_b, gate_weight, gate_bias, token_weight),
            *(ctx.scaling, ctx.dropout_p, seed, s, gate, wanted, ctx.backend),
        )
        dx, dbias, *rest = (g if need else None for g, need in zip(grads, wanted, strict=True))
        dweight = None
        if needs[1]:
            dweight = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])
            dweight = dweight.to(weight.dtype)
        dbias = None if dbias is None else dbias.to(ctx.bias_dtype)
        return (dx, dweight, dbias, *rest, None, None, None, None, None, None)
