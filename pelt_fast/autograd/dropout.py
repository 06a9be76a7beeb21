"""Autograd of a mask that is a byte an element; any derivative of it is the same thing again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import cpp_extension


class MaskedFunction(torch.autograd.Function):
    """x · mask / keep; x float32, mask (number of x's elements,) in the order of a contiguous x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, keep: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.keep = keep
        y: Tensor = cpp_extension().masked(x, mask, keep)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (mask,) = ctx.saved_tensors
        if cpp_extension().is_direct(dy):
            return MaskedFunction.apply(dy, mask, ctx.keep), None, None
        # a transform's or a subclass's
        return dy * (mask.view(dy.shape).to(dy.dtype) / ctx.keep), None, None
