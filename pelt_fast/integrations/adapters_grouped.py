"""Layers of the `adapters` library that stay its own, but for mixed batches, where each group of samples has its call.

Invertible adapters choose one adapter for all samples; the projection of GPT-2's queries, keys and values takes no
composition at all.
"""

from __future__ import annotations

from typing import Any

from adapters.methods.invertible import InvertibleAdapterLayer
from adapters.methods.lora import LoRAMergedLinear
from torch import Tensor, nn

from .adapters_mixed import by_setup, mixed_batch_at
from .fast_class import Accelerated, fast_class


class Grouped(Accelerated):
    """A layer whose forward takes the samples in its first argument, and gives them row by row."""

    serves = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the library's, of each group of a mixed batch by itself."""
        batch = mixed_batch_at(self)
        theirs = super().forward
        if batch is None:
            y: Tensor = theirs(x, *args, **kwargs)
            return y
        return by_setup(self, batch, lambda part: theirs(part, *args, **kwargs), x)


class GroupedInvertible(Grouped):
    """The invertible adapters of a model."""

    def get_invertible_adapter(self) -> nn.Module | None:
        """As the library's; for a mixed batch all of them, as a head applies what it gets to all samples."""
        if mixed_batch_at(self) is not None:
            return self
        theirs: Any = super()
        adapter: nn.Module | None = theirs.get_invertible_adapter()
        return adapter


_MIXINS: dict[type, type] = {LoRAMergedLinear: Grouped, InvertibleAdapterLayer: GroupedInvertible}


def grouped_class(module: nn.Module) -> type | None:
    """The class that knows mixed batches, if the module is one of these."""
    library_class: type = type(module)
    mixin = _MIXINS.get(library_class)
    return None if mixin is None else fast_class(mixin, library_class)
