"""What the fast classes of the `adapters` library's layers have in common.

Adapters are read from the layer at each call, so that what the library does to it or adds to it is seen at once.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from adapters.composition import AdapterCompositionBlock
from adapters.context import AdapterSetup
from torch import nn

from .fast_class import Accelerated

REPORT_TOKENS = 2048  # for how many tokens a report names the backends


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
