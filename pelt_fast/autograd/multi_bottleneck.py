"""Autograd of batched bottleneck adapters.

Saved between forward and backward: x and the residual by alias, the pre-activation q (T, M), mean and reciprocal
deviation of each row where there is a layernorm, the seed, and by alias the parameters, the plan's arrays and the
widths. Nothing of size T × d is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import multi_bottleneck_bwd, multi_bottleneck_fwd
from ..ops.multi_bottleneck import GRADIENTS
from .once import differentiable_once


class MultiBottleneckSettings(NamedTuple):
    """What is no tensor."""

    activation: str
    scaling: float
    eps: float
    dropout_p: float
    residual_x: bool
    backend: str


class MultiBottleneckFunction(torch.autograd.Function):
    """Arguments: settings, seed, the tensors in the order of ``GRADIENTS``, the widths, the plan's arrays."""

    @staticmethod
    def forward(
        ctx: Any, settings: MultiBottleneckSettings, seed: Tensor | None, *tensors: Any
    ) -> Tensor:
        *numbers, backend = settings
        n = len(GRADIENTS)
        operands, widths, plan = tensors[:n], tensors[n], list(tensors[n + 1 :])
        y, q, stats = multi_bottleneck_fwd(*operands, plan, widths, seed, *numbers, backend)
        ctx.save_for_backward(q, stats, seed, *tensors)
        ctx.settings, ctx.not_saved = settings, ""
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Sequence[Any], dy: Tensor) -> tuple[Any, ...]:
        n = len(GRADIENTS)
        q, stats, seed, *tensors = saved
        (x, residual, *parameters), widths, plan = tensors[:n], tensors[n], tensors[n + 1 :]
        *numbers, backend = ctx.settings
        needs = list(ctx.needs_input_grad[2 : 2 + n])
        wanted = list(needs)
        added_last = parameters[-2] is None  # no layernorm: the gradient of the residual is dy
        wanted[1] = needs[1] and not added_last
        grads: list[Any] = list(needs)
        if any(wanted):
            grads = multi_bottleneck_bwd(
                *(dy, x, residual, q, stats, *parameters, plan, widths, seed),
                *(*numbers, wanted, backend),
            )
        if added_last:
            grads = [grads[0], dy, *grads[2:]]
        found = [g if need else None for g, need in zip(grads, needs, strict=True)]
        return (None, None, *found, None, *[None] * len(plan))
