"""Autograd of the LoRA linear.

Saved between forward and backward: x by alias (only if an A trains), s = scaling · drop(x) Aᵀ (T, R) (only if a B
trains), the seed, and the parameters by alias. Nothing of size T × in or T × out is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import lora_linear_bwd, lora_linear_fwd
from .once import differentiable_once


class LoRALinearFunction(torch.autograd.Function):
    """Arguments: x, weight, bias, seed, scaling, dropout_p, backend, then every A, every B, every lora_bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        scaling: tuple[float, ...],
        dropout_p: tuple[float, ...],
        backend: str,
        *adapters: Tensor | None,
    ) -> Tensor:
        n = len(scaling)
        lora_a, lora_b, lora_bias = adapters[:n], adapters[n : 2 * n], adapters[2 * n :]
        y, s = lora_linear_fwd(
            x, weight, bias, lora_a, lora_b, lora_bias, scaling, dropout_p, seed, backend
        )
        needs = ctx.needs_input_grad
        keep_x = needs[1] or any(needs[7 : 7 + n])
        keep_s = any(needs[7 + n : 7 + 2 * n])
        ctx.save_for_backward(
            x if keep_x else None, s if keep_s else None, weight, seed, *lora_a, *lora_b
        )
        ctx.not_saved = "x" if needs[0] and keep_s and not keep_x else ""  # dB is computed from x
        ctx.scaling, ctx.dropout_p, ctx.backend = scaling, dropout_p, backend
        ctx.bias_dtypes = [None if b is None else b.dtype for b in (bias, *lora_bias)]
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Sequence[Any], dy: Tensor) -> tuple[Any, ...]:
        x, s, weight, seed, *adapters = saved
        n = len(ctx.scaling)
        lora_a, lora_b = adapters[:n], adapters[n:]
        needs = ctx.needs_input_grad
        need_da, need_db, need_dlora_bias = (
            needs[7 : 7 + n],
            needs[7 + n : 7 + 2 * n],
            needs[7 + 2 * n :],
        )
        dx, dbias, da, db, dlora_bias = lora_linear_bwd(
            dy,
            x if any(need_da) else None,
            weight,
            lora_a,
            lora_b,
            s,
            ctx.scaling,
            ctx.dropout_p,
            seed,
            needs[0],
            needs[2],
            need_da,
            need_db,
            need_dlora_bias,
            ctx.backend,
        )
        dweight = None
        if needs[1]:
            dweight = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])
            dweight = dweight.to(weight.dtype)
        bias_dtype, *lora_bias_dtypes = ctx.bias_dtypes
        return (
            dx if needs[0] else None,
            dweight,
            dbias.to(bias_dtype) if needs[2] else None,
            None,
            None,
            None,
            None,
            *[g if need else None for g, need in zip(da, need_da, strict=True)],
            *[g if need else None for g, need in zip(db, need_db, strict=True)],
            *[
                g.to(dtype) if need else None
                for g, need, dtype in zip(
                    dlora_bias, need_dlora_bias, lora_bias_dtypes, strict=True
                )
            ],
        )
