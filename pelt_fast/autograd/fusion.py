"""Autograd of AdapterFusion in the bottleneck space.

Saved between forward and backward: x, skip and query by alias, the pre-activation q (T, M), the scores' source k
(T, M + N), the attention p (T, N), mean and reciprocal deviation of each row for each layernorm, the seed, and the
parameters by alias. Nothing of size T × d is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import adapter_fusion_bwd, adapter_fusion_fwd
from .once import differentiable_once


class FusionSettings(NamedTuple):
    """What is no tensor."""

    activation: str
    widths: list[int]
    temperature: float
    pre_eps: float
    eps: float
    dropout_p: float
    skip_in: bool
    residual_x: bool
    residual_skip: bool
    backend: str


class AdapterFusionFunction(torch.autograd.Function):
    """Arguments: settings, seed, then the tensors in the order of ``GRADIENTS`` in ``pelt_fast/ops/fusion.py``.

    Results: y, and the attention p (T, N) in fp32 (fp64 for fp64), which no gradient passes.
    """

    @staticmethod
    def forward(
        ctx: Any, settings: FusionSettings, seed: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        *numbers, backend = settings
        y, q, k, p, pre_stats, post_stats = adapter_fusion_fwd(*tensors, seed, *numbers, backend)
        ctx.save_for_backward(q, k, p, pre_stats, post_stats, seed, *tensors)
        ctx.mark_non_differentiable(p)
        ctx.settings, ctx.not_saved = settings, ""
        return y, p

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Sequence[Any], dy: Tensor, _: Any) -> tuple[Any, ...]:
        q, k, p, pre_stats, post_stats, seed, *tensors = saved
        settings: FusionSettings = ctx.settings
        *numbers, backend = settings
        needs = list(ctx.needs_input_grad[2:])
        wanted = list(needs)
        # where x and skip enter alike, one gradient is both; where skip is added last, its gradient is dy
        alike = settings.skip_in and settings.residual_x == settings.residual_skip
        added_last = settings.residual_skip and not settings.skip_in and tensors[-2] is None
        if alike:
            wanted[0] = needs[0] or needs[1]
        if alike or added_last:
            wanted[1] = False
        grads: list[Any] = list(needs)
        if any(wanted):
            grads = adapter_fusion_bwd(
                *(dy, q, k, p, pre_stats, post_stats, *tensors, seed),
                *(*numbers, wanted, backend),
            )
        if alike or added_last:
            grads = [grads[0], grads[0] if alike else dy, *grads[2:]]
        return (None, None, *[g if need else None for g, need in zip(grads, needs, strict=True)])
