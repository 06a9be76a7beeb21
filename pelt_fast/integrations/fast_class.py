"""What all fast classes have in common that are made at run time.

A layer is made fast by giving it another class, a subclass of its own that differs in a few methods. Nothing is stored
on the layer, so that what its library does to it is seen at once.
"""

from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from .stacked_lora import forget


class Accelerated(nn.Module):
    """A fast layer; comes before the library's class. ``fast_class`` makes subclasses."""

    library_class: type
    serves = True
    """Whether it computes anything but mixed batches."""

    def base_sort(self) -> str | None:
        """What it is in the base model, in the singular, as a report counts it; None: an adapter's, or torch's."""
        return None

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


def sorts_of(modules: Iterable[nn.Module]) -> Counter[str]:
    """How many fast layers of the base model there are of each sort."""
    sorts = (m.base_sort() for m in dict.fromkeys(modules) if isinstance(m, Accelerated))
    return Counter(sort for sort in sorts if sort is not None)


def check_on_top(name: str, module: nn.Module) -> None:
    """Raises RuntimeError where another library has put its own class over a fast one."""
    if not is_fast(module):
        raise RuntimeError(
            f"cannot restore {name!r}: another library has since made it a {type(module).__name__}; undo that first"
        )


def give_back(modules: Iterable[nn.Module]) -> None:
    """Gives fast layers the library's class; one may stand there twice."""
    for module in modules:
        if not isinstance(module, Accelerated):
            continue
        forget(module)
        # transformers leaves the bound method on a layer whose outputs it recorded
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del module.forward
        module.__class__ = module.library_class


def _mixin(fast: type) -> type:
    return fast.__bases__[0]


def _new_layer(mixin: type, library_class: type) -> nn.Module:
    cls: Any = fast_class(mixin, library_class)
    layer: nn.Module = cls.__new__(cls)
    return layer
