"""What the fast classes of the `adapters` library's layers have in common.

A layer is made fast by giving it another class, a subclass of its own that differs in a few methods.
Adapters are read from the layer at each call, and nothing is stored on the layer, so that what the
library does to it or adds to it is seen at once.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Collection
from typing import Any

from adapters.composition import AdapterCompositionBlock
from adapters.context import AdapterSetup
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


class FastLayer(Accelerated):
    """A fast layer in which adapters of the library's live."""

    adapter_modules_name: str
    adapters_config: Any
    layer_idx: int

    def get_active_setup(self) -> AdapterCompositionBlock | None:
        """As the library's, which makes two sets to see whether they meet: a model asks a hundred times a forward."""
        if "adapters_config" not in self.__dict__:
            return None
        contexts = AdapterSetup.get_contexts()
        setup: AdapterCompositionBlock | None
        setup = contexts[-1].adapter_setup if contexts else self.adapters_config.active_setup
        if setup is None:
            return None
        held = self._modules.get(self.adapter_modules_name)
        names = getattr(self, self.adapter_modules_name) if held is None else held._modules
        if not names or not _meet(setup, names):
            return None
        skipped = self.adapters_config.skip_layers
        return None if skipped is not None and self.layer_idx in skipped else setup


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


def _meet(setup: AdapterCompositionBlock, names: Collection[str]) -> bool:
    """Whether any adapter of the setup is among ``names``; a child may be None, for no adapter."""
    return any(
        child in names if isinstance(child, str) else child is not None and _meet(child, names)
        for child in setup.children
    )


def _mixin(fast: type) -> type:
    return fast.__bases__[0]


def _new_layer(mixin: type, library_class: type) -> nn.Module:
    cls: Any = fast_class(mixin, library_class)
    layer: nn.Module = cls.__new__(cls)
    return layer
