"""A ``Fuse`` on a layer of the `adapters` library as a ``FusionSpec``, or the reason why the library must run it."""

from __future__ import annotations

import math
from typing import Any

from adapters.composition import AdapterCompositionBlock, Fuse, Stack
from adapters.context import ForwardContext
from adapters.methods.bottleneck import BottleneckLayer
from adapters.methods.modeling import BertFusion, ParallelAdapter
from torch import Tensor, nn

from ..functional.fusion_fold import Attention
from ..nn.fusion_block import FusionSpec
from .adapters_operands import _context_obstacle, _flags_obstacle, _tensors_obstacle, adapter_spec
from .obstacles import (
    LINEAR,
    is_autocast,
    mixture_obstacle,
    module_obstacle,
    parameter,
    tensor_obstacle,
    type_name,
)

_FORWARD = (BertFusion.forward,)
_DROPOUT = (nn.Dropout.forward,)


def single_fuse(layer: BottleneckLayer) -> Fuse | None:
    """The ``Fuse`` that is all that acts on this layer; None where something else does."""
    setup = layer.get_active_setup()
    if type(setup) is Fuse:
        return setup
    if type(setup) is not Stack:
        return None
    adapters = layer._modules["adapters"]._modules
    here = [child for child in setup.children if not isinstance(child, str) or child in adapters]
    return here[0] if len(here) == 1 and type(here[0]) is Fuse else None


def leave_behind(layer: BottleneckLayer, setup: Fuse, attention: Tensor) -> None:
    """What a forward of the library's ``Fuse`` changes besides its result: the temperature, and what was asked for."""
    fusion = _module(layer, setup)
    if fusion is not None and fusion.T != 1.0:
        fusion.T = max(fusion.T - fusion.reduction, 1.0)
    context = ForwardContext.get_context()
    if context is not None and context.output_adapter_fusion_attentions:
        layer._store_fusion_attentions(setup.name, attention.detach().cpu().numpy())


def fusion_spec(
    layer: BottleneckLayer, setup: Fuse, hidden_states: Any, residual: Any, layer_norm: Any
) -> FusionSpec | str:
    """The ``Fuse``, if ``fusion_block`` computes it on this call; else the reason why the library must."""
    adapters = layer._modules["adapters"]._modules
    last = adapters.get(setup.last())
    if last is None:
        return f"the last adapter of {setup} is not on this layer"
    autocast = isinstance(hidden_states, Tensor) and is_autocast(hidden_states.device.type)
    obstacle = (
        _context_obstacle()
        or _flags_obstacle(last, residual, layer_norm)
        or _tensors_obstacle(last, hidden_states, residual, autocast)
    )
    mixed = residual is not None and not autocast and residual.dtype is not hidden_states.dtype
    if obstacle is None and mixed:
        obstacle = "hidden_states and residual differ in dtype"
    if obstacle is None and isinstance(layer_norm, nn.LayerNorm):
        weight = parameter(layer_norm, "weight")
        if weight is not None:
            obstacle = mixture_obstacle(weight, hidden_states, "hidden_states", autocast)
    if obstacle is not None:
        return obstacle
    x = residual if isinstance(last, ParallelAdapter) else hidden_states
    return fuse_spec(layer, setup, x, autocast)


def fuse_spec(
    layer: BottleneckLayer, setup: Fuse, x: Tensor, autocast: bool = False
) -> FusionSpec | str:
    """What the adapters and the attention are made of, with an input like ``x``."""
    adapters = layer._modules["adapters"]._modules
    config, _ = layer.adapters_config.get_fusion(setup.name)
    fusion = _module(layer, setup)
    if fusion is None or config is None:
        return f"no fusion {setup.name!r} is on this layer"
    specs = []
    for child in setup.children:
        if isinstance(child, AdapterCompositionBlock):
            return f"{child} is inside the Fuse"
        if child not in adapters:
            continue
        spec = adapter_spec(adapters[child], x, autocast)
        if isinstance(spec, str):
            return f"adapter {child!r}: {spec}"
        if spec.norm_before is not None:
            return f"adapter {child!r} has a layernorm before it, which the others do not share"
        if spec.stochastic_depth > 0.0:
            return f"adapter {child!r} has stochastic depth"
        specs.append(spec)
    activations = {spec.activation for spec in specs}
    if len(activations) != 1:
        return f"its adapters' activations are {', '.join(sorted(map(str, activations)))}"
    parts = _attention(fusion, x, autocast)
    if isinstance(parts, str):
        return f"fusion {setup.name!r}: {parts}"
    last = specs[-1]
    return FusionSpec(
        down_weights=[spec.down_weight for spec in specs],
        down_biases=[spec.down_bias for spec in specs],
        up_weights=[spec.up_weight for spec in specs],
        up_biases=[spec.up_bias for spec in specs],
        scaling=[spec.scaling for spec in specs],
        activation=str(last.activation),
        attention=parts,
        temperature=fusion.T,
        dropout=fusion.dropout.p if fusion.dropout.training else 0.0,
        query_before_ln=bool(config["query_before_ln"]),
        residual_before=bool(fusion.config["residual_before"]),
        is_parallel=last.is_parallel,
        original_ln_before=last.original_ln_before,
        original_ln_after=last.original_ln_after,
        residual_before_ln=last.residual_before_ln,
    )


def _module(layer: BottleneckLayer, setup: Fuse) -> BertFusion | None:
    found: BertFusion | None = layer._modules["adapter_fusion_layer"]._modules.get(setup.name)
    return found


def _attention(fusion: BertFusion, x: Tensor, autocast: bool) -> Attention | str:
    """The matrices that the flags name."""
    if type(fusion) is not BertFusion:
        return f"it is a {type_name(fusion)}"
    modules = fusion._modules
    dropout = modules["dropout"]
    obstacle = module_obstacle(fusion, _FORWARD, "it") or module_obstacle(
        dropout, _DROPOUT, "its dropout"
    )
    if obstacle is None and not (math.isfinite(fusion.T) and fusion.T > 0):
        obstacle = f"its temperature is {fusion.T}"
    found: list[Tensor | None] = []
    for part in ("query", "key", "value"):
        linear = modules[part] if fusion.config[part] and obstacle is None else None
        weight = bias = None
        if linear is not None:
            weight, bias = parameter(linear, "weight"), parameter(linear, "bias")
            obstacle = (
                f"its {part} is a {type_name(linear)}"
                if not isinstance(linear, nn.Linear)
                else None
            )
            obstacle = obstacle or module_obstacle(linear, LINEAR, f"its {part}")
            obstacle = obstacle or tensor_obstacle(weight, f"its {part}")
            obstacle = obstacle or mixture_obstacle(weight, x, "its input", autocast)
            if obstacle is None and bias is not None:
                obstacle = mixture_obstacle(bias, x, "its input", autocast)
            if obstacle is None and tuple(weight.shape) != (x.shape[-1], x.shape[-1]):
                obstacle = f"its {part} has the shape {tuple(weight.shape)}"
            if obstacle is None and part == "value" and bias is not None:
                obstacle = "its value has a bias"
        found += [weight] if part == "value" else [weight, bias]
    return Attention(*found) if obstacle is None else obstacle
