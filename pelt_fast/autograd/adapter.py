"""Autograd of the bottleneck adapter.

Saved between forward and backward: x and skip by alias, the pre-activation q (T, m), mean and reciprocal deviation
of each row for each layernorm, the seed, and the parameters by alias. Nothing of size T × d is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import bottleneck_adapter_bwd, bottleneck_adapter_fwd
from .once import differentiable_once


class Settings(NamedTuple):
    """What is no tensor."""

    activation: str
    scaling: float
    pre_eps: float
    eps: float
    dropout_p: float
    skip_in: bool
    residual_x: bool
    residual_skip: bool
    backend: str


class BottleneckAdapterFunction(torch.autograd.Function):
    """Arguments: settings, seed, then the tensors in the order of ``GRADIENTS`` in ``pelt_fast/ops/adapter.py``."""

    @staticmethod
    def forward(
        ctx: Any, settings: Settings, seed: Tensor | None, *tensors: Tensor | None
    ) -> Tensor:
        *numbers, backend = settings
        y, q, pre_stats, post_stats = bottleneck_adapter_fwd(*tensors, seed, *numbers, backend)
        ctx.save_for_backward(q, pre_stats, post_stats, seed, *tensors)
        ctx.settings, ctx.not_saved = settings, ""
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Sequence[Any], dy: Tensor) -> tuple[Any, ...]:
        return adapter_backward(bottleneck_adapter_bwd, ctx, saved, dy)


def adapter_backward(operator: Any, ctx: Any, saved: Sequence[Any], dy: Tensor) -> tuple[Any, ...]:
    """What a Function returns whose arguments and saved tensors are in the order of ``BottleneckAdapterFunction``'s."""
    q, pre_stats, post_stats, seed, x, skip, *parameters = saved
    settings: Settings = ctx.settings
    *numbers, backend = settings
    needs = list(ctx.needs_input_grad[2:])
    wanted = list(needs)
    # where x and skip enter alike, one gradient is both; where skip is added last, its gradient is dy
    alike = settings.skip_in and settings.residual_x == settings.residual_skip
    added_last = settings.residual_skip and not settings.skip_in and parameters[-2] is None
    if alike:
        wanted[0] = needs[0] or needs[1]
    if alike or added_last:
        wanted[1] = False
    grads = list(needs)
    if any(wanted):
        grads = operator(
            *(dy, x, skip, q, pre_stats, post_stats, *parameters, seed),
            *(*numbers, wanted, backend),
        )
    if alike or added_last:
        grads = [grads[0], grads[0] if alike else dy, *grads[2:]]
    return (None, None, *[g if need else None for g, need in zip(grads, needs, strict=True)])
