"""Autograd of the Compacter adapter.

Saved is what the bottleneck adapter saves: x and skip by alias, the pre-activation q (T, m), statistics of rows,
the seed, the parameters by alias. What lies between the factors of a projection, n · n · rank
numbers a row, is made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import compacter_bwd, compacter_fwd
from .adapter import Settings, adapter_backward
from .once import differentiable_once


class CompacterFunction(torch.autograd.Function):
    """Arguments: settings, seed, then the tensors in the order of ``GRADIENTS`` in ``pelt_fast/ops/compacter.py``."""

    @staticmethod
    def forward(
        ctx: Any, settings: Settings, seed: Tensor | None, *tensors: Tensor | None
    ) -> Tensor:
        *numbers, backend = settings
        y, q, pre_stats, post_stats = compacter_fwd(*tensors, seed, *numbers, backend)
        ctx.save_for_backward(q, pre_stats, post_stats, seed, *tensors)
        ctx.settings, ctx.not_saved = settings, ""
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Sequence[Any], dy: Tensor) -> tuple[Any, ...]:
        return adapter_backward(compacter_bwd, ctx, saved, dy)
