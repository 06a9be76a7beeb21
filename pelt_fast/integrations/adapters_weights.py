"""The projections of an adapter of the library's as tensors: a linear layer's, or a ``PHMLayer``'s, which are factors.

Read from the layer at each call; what all layers share (the rule, with ``shared_phm_rule``) is in the library's context
while the model runs, and stands for itself, with values of no meaning, where a layer is only described.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from adapters.context import ForwardContext
from adapters.methods.modeling import PHMLayer
from torch import Tensor, nn

from ..functional import PHM
from .obstacles import LINEAR, parameter, tensor_obstacle

FORWARDS = (*LINEAR, PHMLayer.forward)


class Weights(NamedTuple):
    """A weight as ``functional`` takes it, and its bias."""

    weight: Any  # (out, in) or PHM
    bias: Tensor | None

    @property
    def tensors(self) -> tuple[Any, ...]:
        """All of them, with None where there is none."""
        weight = self.weight
        return (*weight, self.bias) if isinstance(weight, PHM) else (weight, self.bias)

    @property
    def features(self) -> int:
        """Of the input."""
        weight = self.weight
        return int(weight.features[0] if isinstance(weight, PHM) else weight.shape[1])

    def obstacle(self, part: str) -> str | None:
        """Why the weight is not made of ordinary tensors."""
        if not isinstance(self.weight, PHM):
            return tensor_obstacle(self.weight, part)
        for tensor in self.weight:
            reason = None if tensor is None else tensor_obstacle(tensor, part, 3)
            if reason is not None:
                return reason
        return None


def weights_of(layer: nn.Module) -> Weights:
    """The tensors of an ``nn.Linear`` or a ``PHMLayer``."""
    if not isinstance(layer, PHMLayer):
        return Weights(parameter(layer, "weight"), parameter(layer, "bias"))
    shared = _shared(layer) if layer.shared_W_phm or layer.shared_phm_rule else None
    if shared is None and (layer.shared_W_phm or layer.shared_phm_rule):
        return Weights(_stand_in(layer), parameter(layer, "b"))
    of_rule: Any = shared if layer.shared_phm_rule else layer
    of_weight: Any = shared if layer.shared_W_phm else layer
    name = f"W_{layer.position}" if layer.shared_W_phm else "W"
    if layer.factorized_phm_rule:
        rule = torch.bmm(parameter(of_rule, "phm_rule_left"), parameter(of_rule, "phm_rule_right"))
    else:
        rule = parameter(of_rule, "phm_rule")
    if layer.factorized_phm_W:
        weight = PHM(
            rule, parameter(of_weight, f"{name}_left"), parameter(of_weight, f"{name}_right")
        )
    else:
        weight = PHM(rule, parameter(of_weight, name), None)
    return Weights(weight, parameter(layer, "b"))


def _shared(layer: PHMLayer) -> Any:
    """The parameters that the adapter's layers share; None while no model runs."""
    context = ForwardContext.get_context()
    shared = None if context is None else getattr(context, "shared_parameters", None)
    return None if shared is None else shared[layer.name]


def _stand_in(layer: PHMLayer) -> PHM:
    """Tensors of the right shapes and of the dtype that the layer's own have."""
    like = next(layer.parameters(), torch.empty(0))
    n, k = layer.phm_dim, layer.phm_rank
    p, q = layer._in_feats_per_axis, layer._out_feats_per_axis
    rule = like.new_zeros(n, n, n)
    if layer.factorized_phm_W:
        return PHM(rule, like.new_zeros(n, p, k), like.new_zeros(n, k, q))
    return PHM(rule, like.new_zeros(n, p, q), None)
