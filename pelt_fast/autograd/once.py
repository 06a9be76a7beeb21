"""A backward that has no backward of its own, and says so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_MESSAGE = b"trying to differentiate twice a function that was marked with @once_differentiable"


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Like torch's ``once_differentiable``, which marks results only where an incoming gradient requires one.

    With ``create_graph=True`` every result is marked: the gradient of a sum reaches backward as ones that require
    nothing, and a penalty on what comes out would otherwise vanish without an error.
    """
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx: Any, dy: Tensor) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or dy.requires_grad:
            return once(ctx, dy)
        with torch.no_grad():
            found = backward(ctx, dy)
        raising: Any = torch._C._functions.DelayedError(_MESSAGE, len(found))
        return raising(*[None if g is None else g.detach().requires_grad_() for g in found])

    return wrapper
