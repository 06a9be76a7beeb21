"""Attention of the `adapters` library without copies of queries, keys and values, and with our dropout in training.

For ``Parallel``, whose samples stand in the batch several times, the library repeats what has too few; where nothing
has, it repeats each once, which copies it, in each attention layer of each forward. The fast class runs the same
``forward``, in which that one function is another: what is large enough already comes back as it is. In training the
queries come back as ``deferred.Query``, whose ``scaled_dot_product_attention`` draws its dropout faster.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn

from .deferred import Query
from .fast_class import Accelerated, fast_class

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
        library: Any = cls.library_class
        evaluates = _with(library.forward, _matched)
        trains = _with(library.forward, _matched_in_training)

        @functools.wraps(evaluates)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            chosen = trains if self.training and not torch.compiler.is_compiling() else evaluates
            return chosen(self, *args, **kwargs)

        cls.forward = forward

    def base_sort(self) -> str | None:
        """Always."""
        return "attention layer"


def accelerated_class(library_class: type) -> type:
    """The fast subclass of one of the library's attention classes."""
    return fast_class(FastAttention, library_class)


def _with(forward: types.FunctionType, matched: Any) -> types.FunctionType:
    """The same function, which finds ``matched`` under the name of the library's."""
    names = {**forward.__globals__, _COPIES: matched}
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


def _matched_in_training(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """The same, with queries whose attention is ours."""
    query, key, value = _matched(query, key, value)
    return Query.of(query) if type(query) is Tensor else query, key, value
