"""A backward that has no backward of its own, and says so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_MESSAGE = b"trying to differentiate twice a function that was marked with @once_differentiable"


def differentiable_once(
    backward: Callable[..., tuple[Any, ...]],
) -> Callable[..., tuple[Any, ...]]:
    """Make ``backward(ctx, saved_tensors, *dy)`` a Function's backward whose results raise when differentiated.

    torch's own ``once_differentiable`` ties the results to the incoming gradient alone, so a second derivative with
    respect to what was saved (a gradient penalty's, by a weight) would silently miss a term. Here the node that raises
    stands between the results and every tensor that they are computed from. ``ctx.not_saved`` names one of them that
    the Function did not keep: then ``create_graph=True`` raises at once.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *dy: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: unpacking may run hooks
        with torch.no_grad():
            found = backward(ctx, saved, *dy)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return found
        if ctx.not_saved:
            raise RuntimeError(
                f"{ctx.not_saved} was not kept for a second derivative; expected backward without create_graph=True"
            )
        sources = [t for t in (*dy, *saved) if t is not None and t.requires_grad]
        # no elements, but the graph of every source; one of its own, so that it always has a graph
        link = torch.zeros((), requires_grad=True)
        for source in sources:
            link = link + source.unsqueeze(0)[:0].sum().to(link)
        raising: Any = torch._C._functions.DelayedError(_MESSAGE, len(found) + 1)
        results = [None if g is None else g.detach() for g in found]
        return tuple(raising(*results, link)[:-1])

    return wrapper
