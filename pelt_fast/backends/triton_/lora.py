"""LoRA linear on Triton: shrink, a GEMM whose accumulator starts with the rank-r product, and their backward.

Kernels and their maths: ``pelt_fast/kernels/lora``. Here arguments become what those launch functions take. Several
adapters run in one launch, their ranks side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.common.adapters import AdapterTable
from ...kernels.lora import choice, grad_a, grad_b, linear, shrink
from ...random import keep_scale
from .device import arch_of, device_reasons, precision_of

_MAX_RANK = 256


class _Shapes(NamedTuple):
    """What the configuration heuristics of the kernel files look at."""

    op: str
    arch: str
    dtype: torch.dtype
    tokens: int
    in_features: int
    out_features: int
    ranks: tuple[int, ...]
    dropout: bool


def unsupported(problem: Any) -> list[str]:
    """Why these kernels cannot run the problem; empty when they can."""
    reasons = list(linear.unsupported(problem))
    if max(problem.ranks) > _MAX_RANK:
        reasons.append(f"rank {max(problem.ranks)} is above {_MAX_RANK}")
    return reasons + device_reasons(problem)


def priority(problem: Any) -> int:
    """Above ``torch`` where the fused kernels are modelled to be faster, below it elsewhere; 0 off the GPU."""
    if problem.device_type != "cuda":
        return 0
    return 40 if choice.prefers_fused(problem) else 5


def _side_by_side(parts: Sequence[Tensor], dim: int, dtype: torch.dtype) -> Tensor:
    """One adapter's tensor as it is, which the kernel casts as it loads; several, cast and concatenated."""
    return parts[0] if len(parts) == 1 else torch.cat([part.to(dtype) for part in parts], dim)


def _bias(
    bias: Tensor | None, lora_bias: Sequence[Tensor | None], scaling: Sequence[float]
) -> Tensor | None:
    """b + Σ scalingᵢ · lora_biasᵢ; in fp32 where there is anything to add."""
    total = bias
    for extra, scale in zip(lora_bias, scaling, strict=True):
        if extra is not None:
            scaled = scale * extra.float()
            total = scaled if total is None else total + scaled
    return total if total is None else total.contiguous()


def lora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    lora_bias: Sequence[Tensor | None],
    scaling: Sequence[float],
    dropout_p: Sequence[float],
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """x (T, in) -> y (T, out) and s (T, R), the scaled shrink."""
    (tokens, in_features), out_features, dtype = x.shape, weight.shape[0], x.dtype
    ranks = tuple([a.shape[0] for a in lora_a])
    shapes = _Shapes(
        "lora_linear_fwd",
        arch_of(x.device),
        dtype,
        tokens,
        in_features,
        out_features,
        ranks,
        seed is not None,
    )
    scales = [s * keep_scale(p) for s, p in zip(scaling, dropout_p, strict=True)]
    table = AdapterTable.make(ranks, scales, dropout_p)
    s, y = x.new_empty((tokens, sum(ranks))), x.new_empty((tokens, out_features))
    precision = precision_of(dtype)
    with torch.cuda.device_of(x):
        a, b = _side_by_side(lora_a, 0, dtype), _side_by_side(lora_b, 1, dtype)
        shrink.launch_shrink(x, a, s, table, seed, shrink.default_config(shapes), precision)
        linear.launch_linear_fwd(
            x,
            weight.to(dtype),
            _bias(bias, lora_bias, scaling),
            s,
            b,
            y,
            linear.default_config(shapes),
            precision,
        )
    return y, s


def lora_linear_bwd(
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
) -> tuple[
    Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None], list[Tensor | None]
]:
    """dy (T, out) -> dx (T, in), dbias (out,), and per adapter dA (r, in), dB (out, r), dlora_bias (out,)."""
    (tokens, out_features), in_features, dtype = dy.shape, weight.shape[1], dy.dtype
    ranks = tuple([a.shape[0] for a in lora_a])
    shapes = _Shapes(
        "lora_linear_bwd",
        arch_of(dy.device),
        dtype,
        tokens,
        in_features,
        out_features,
        ranks,
        seed is not None,
    )
    precision = precision_of(dtype)
    need_ds, need_sums = need_dx or any(need_da), need_dbias or any(need_dlora_bias)
    ds = dy.new_empty((tokens, sum(ranks))) if need_ds else None
    sums = dy.new_empty(out_features, dtype=torch.float32) if need_sums else None
    dx = dy.new_empty((tokens, in_features)) if need_dx else None
    da = _grads(lora_a, need_da)
    db = _grads(lora_b, need_db)
    plain = AdapterTable.make(ranks, scaling, [0.0] * len(ranks))
    masked = AdapterTable.make(ranks, [keep_scale(p) for p in dropout_p], dropout_p)
    with torch.cuda.device_of(dy):
        b = _side_by_side(lora_b, 1, dtype)
        plan = grad_b.default_config(shapes)
        one_pass = any(need_db) and plan.with_ds
        if ds is not None and not one_pass:
            shrink.launch_shrink(dy, b.T, ds, plain, None, shrink.default_config(shapes), precision)
        if any(need_db) or need_sums:
            grad_b.launch_grad_b(
                dy,
                b,
                s.contiguous() if s is not None and any(need_db) else None,
                ds if one_pass else None,
                db,
                sums,
                plain,
                plan,
                precision,
            )
        if dx is not None and ds is not None:
            a = _side_by_side(lora_a, 0, dtype)
            config = linear.default_config(shapes)
            linear.launch_linear_bwd_dx(
                dy, weight.to(dtype), ds, a, dx, masked, seed, config, precision
            )
        if any(need_da) and x is not None and ds is not None:
            grad_a.launch_grad_a(x, ds, da, masked, seed, grad_a.default_config(shapes), precision)
    dbias = sums.to(dtype) if need_dbias and sums is not None else None
    dlora_bias = [
        (scale * sums).to(b_i.dtype) if need and sums is not None else None
        for b_i, scale, need in zip(lora_b, scaling, need_dlora_bias, strict=True)
    ]
    return dx, dbias, da, db, dlora_bias


def _grads(parameters: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """A contiguous gradient for each parameter that needs one."""
    return [
        torch.empty_like(p, memory_format=torch.contiguous_format) if need else None
        for p, need in zip(parameters, needed, strict=True)
    ]
