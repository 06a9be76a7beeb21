"""Layers of the base model that stand between the adapters, where they have a faster form.

Linear layers with a frozen weight compute with ``frozen_linear``; dropouts draw the masks that torch would draw. A
library wraps the layers that it changes; what is left here are ``torch.nn``'s own.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from ..functional import frozen_linear
from ..functional.dropout import dropout
from .fast_class import Accelerated, fast_class
from .obstacles import parameter, tensor_obstacle


class FastLinear(Accelerated, nn.Linear):
    """A linear layer that may be frozen."""

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Linear``'s, of a packed weight where that is faster and the weight is frozen."""
        return frozen_linear(x, parameter(self, "weight"), parameter(self, "bias"))

    def base_sort(self) -> str | None:
        """As long as it is frozen."""
        return frozen_sort(self)


class FastDropout(Accelerated, nn.Dropout):
    """A dropout with torch's masks."""

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Dropout``'s, bit for bit."""
        return super().forward(x) if self.inplace else dropout(x, self.p, self.training)

    def base_sort(self) -> str | None:
        """Always."""
        return "dropout"


FAST_BASE = (FastLinear, FastDropout)


def base_classes(modules: Iterable[nn.Module]) -> dict[nn.Module, type]:
    """The fast class of each of these modules that has one.

    A subclass of ``torch.nn``'s, a forward of the instance's own, a weight that trains, is quantized or made anew at
    each call: these stay as they are.
    """
    found: dict[nn.Module, type] = {}
    for module in modules:
        if "forward" in vars(module):
            continue
        if type(module) is nn.Dropout:
            found[module] = fast_class(FastDropout, nn.Dropout)
        elif type(module) is nn.Linear and _is_frozen(module._parameters.get("weight")):
            found[module] = fast_class(FastLinear, nn.Linear)
    return found


def frozen_sort(layer: nn.Module) -> str | None:
    """The sort of a linear layer that computes with ``frozen_linear``, in a report."""
    return None if parameter(layer, "weight").requires_grad else "frozen linear"


def _is_frozen(weight: Tensor | None) -> bool:
    return (
        weight is not None
        and not weight.requires_grad
        and tensor_obstacle(weight, "weight") is None
    )
