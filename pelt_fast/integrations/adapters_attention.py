"""Attention of the `adapters` library without copies of queries, keys and values.

For ``Parallel``, whose samples stand in the batch several times, the library repeats what has too few; where nothing
has, it repeats each once, which copies it, in each attention layer of each forward. The fast class runs the same
``forward``, in which that one function is another: what is large enough already comes back as it is.
"""

from __future__ import annotations

import types
from typing import Any

from torch import Tensor, nn

from .adapters_class import Accelerated, fast_class

_COPIES = "match_attn_matrices_for_parallel"


def serves(module: nn.Module) -> bool:
    """Whether the module's forward is the library's and would copy."""
    forward: Any = type(module).forward
    return (
        isinstance(forward, types.FunctionType)
        and "forward" not in module.__dict__
        and forward.__module__.startswith("adapters.")
        and _COPIES in forward.__code__.co_names
        and forward.__globals__[_COPIES].__module__.startswith("adapters.")
    )


class FastAttention(Accelerated):
    """An attention layer."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Gives the subclass, which stands for one of the library's classes, that class's forward."""
        super().__init_subclass__(**kwargs)
        cls.forward = _without_copies(cls.library_class.forward)  # type: ignore[attr-defined]


def accelerated_class(library_class: type) -> type:
    """The fast subclass of one of the library's attention classes."""
    return fast_class(FastAttention, library_class)


def _without_copies(forward: types.FunctionType) -> types.FunctionType:
    """The same function, which finds our ``_matched`` under the name of the library's."""
    names = {**forward.__globals__, _COPIES: _matched}
    # no module holds these names: torch.compile would look them up there
    del names["__name__"]
    made = types.FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    made.__kwdefaults__, made.__doc__ = forward.__kwdefaults__, forward.__doc__
    made.__module__, made.__qualname__ = forward.__module__, forward.__qualname__
    return made


def _matched(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """All with as many samples as the largest has."""
    samples = max(query.shape[0], key.shape[0], value.shape[0])
    return tuple(
        t if t.shape[0] == samples else t.repeat(samples // t.shape[0], *[1] * (t.dim() - 1))
        for t in (query, key, value)
    )
