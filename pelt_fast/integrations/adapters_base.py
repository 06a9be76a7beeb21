"""Layers of the base model that stand between the `adapters` library's, where they have a faster form.

The library wraps linear layers that may get a LoRA (``adapters_lora``); those directly before its bottleneck layers
stay ``nn.Linear``. Dropout of the base model draws the masks that torch would draw.
"""

from __future__ import annotations

from adapters.methods.bottleneck import BottleneckLayer
from torch import Tensor, nn

from ..functional import frozen_linear
from ..functional.dropout import dropout
from .adapters_class import Accelerated, fast_class, library_type
from .obstacles import parameter

_MODELS = ("transformers.", "adapters.models.", "adapters.heads.")


class FastLinear(Accelerated, nn.Linear):
    """A linear layer that may be frozen."""

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Linear``'s, of a packed weight where that is faster and the weight is frozen."""
        return frozen_linear(x, parameter(self, "weight"), parameter(self, "bias"))


class FastDropout(Accelerated, nn.Dropout):
    """A dropout with torch's masks."""

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Dropout``'s, bit for bit."""
        return super().forward(x) if self.inplace else dropout(x, self.p, self.training)


def base_classes(model: nn.Module) -> dict[nn.Module, type]:
    """The fast class of each of these layers; those inside of adapters are the adapters' own affair."""
    found: dict[nn.Module, type] = {}
    for parent in model.modules():
        if not library_type(parent).__module__.startswith(_MODELS):
            continue
        for child in parent.children():
            if type(child) is nn.Dropout:
                found[child] = fast_class(FastDropout, nn.Dropout)
            elif type(child) is nn.Linear and isinstance(parent, BottleneckLayer):
                found[child] = fast_class(FastLinear, nn.Linear)
    return found
