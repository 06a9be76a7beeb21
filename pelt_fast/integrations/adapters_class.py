"""What the fast classes of the `adapters` library's layers have in common.

A layer is made fast by giving it another class, a subclass of its own that differs in a few methods.
Adapters are read from the layer at each call, and nothing is stored on the layer, so that what the
library does to it or adds to it is seen at once.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn

REPORT_TOKENS = 2048  # for how many tokens a report names the backends


class Accelerated(nn.Module):
    """A fast layer; comes before the library's class. ``fast_class`` makes subclasses."""

    library_class: type
    serves = True
    """Whether it computes anything but mixed batches."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made at run time, so that a pickle names the library's in its place
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        _, _, *state = reduced
        return (_new_layer, (_mixin(type(self)), self.library_class), *state)


@functools.cache
def fast_class(mixin: type, library_class: type) -> type:
    """The subclass of both; the same each time."""
    return types.new_class(
        f"Accelerated{library_class.__name__}",
        (mixin, library_class),
        exec_body=lambda body: body.update(
            library_class=library_class, __module__=mixin.__module__
        ),
    )


def is_fast(module: nn.Module) -> bool:
    """Whether the module's class is one of ``fast_class``, and not another library's over it."""
    return "library_class" in type(module).__dict__


def is_served(module: nn.Module) -> bool:
    """Whether the module computes itself what is not a mixed batch."""
    return isinstance(module, Accelerated) and module.serves


def library_type(module: nn.Module) -> type:
    """The library's class of a module, whether it has a fast one or not."""
    found: type = getattr(type(module), "library_class", type(module))
    return found


def methods_obstacle(layer: nn.Module, library: type, methods: tuple[str, ...]) -> str | None:
    """Which of the library's methods a subclass or the instance has replaced: the fast layer would pass it by."""
    for method in methods:
        if getattr(getattr(layer, method), "__func__", None) is not getattr(library, method):
            return f"it has a {method} of its own"
    return None


def _mixin(fast: type) -> type:
    return fast.__bases__[0]


def _new_layer(mixin: type, library_class: type) -> nn.Module:
    cls: Any = fast_class(mixin, library_class)
    layer: nn.Module = cls.__new__(cls)
    return layer
