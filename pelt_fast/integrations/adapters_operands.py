"""A layer of the `adapters` library as a ``BottleneckSpec``, or the reason why its own forward must run.

``block_spec`` is about a call in which one adapter is all that acts on the layer, ``core_spec`` about
one adapter inside a composition, ``adapter_spec`` about what an adapter is made of. All read the
layer as it is at that moment, and give the first reason that they find.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from adapters.composition import AdapterCompositionBlock, Fuse, Stack
from adapters.context import ForwardContext
from adapters.methods.bottleneck import BottleneckLayer
from adapters.methods.modeling import Activation_Function_Class, Adapter, ParallelAdapter, PHMLayer
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import ACT2FN

from ..functional import activation_name
from ..nn.bottleneck_block import BottleneckSpec
from .adapters_weights import FORWARDS, Weights, weights_of
from .obstacles import (
    LINEAR,
    input_obstacle,
    is_autocast,
    mixture_obstacle,
    module_obstacle,
    parameter,
    type_name,
)

_LAYERNORM = (nn.LayerNorm.forward,)
_DROPOUT = (nn.Dropout.forward,)
_LEAKY_SLOPE = 0.01  # of the kernels' leaky_relu


def single_adapter(layer: BottleneckLayer, setup: Any) -> str | None:
    """The adapter that is all that ``setup`` has on this layer; None where it has more."""
    if type(setup) is not Stack:
        return None
    adapters = layer._modules["adapters"]._modules
    here = [child for child in setup.children if not isinstance(child, str) or child in adapters]
    return here[0] if len(here) == 1 and isinstance(here[0], str) else None


def block_spec(
    layer: BottleneckLayer, hidden_states: Tensor, residual: Tensor | None, layer_norm: Any
) -> BottleneckSpec | str:
    """The adapter of ``layer.bottleneck_layer_forward``, if ``bottleneck_block`` computes that call."""
    setup = layer.get_active_setup()
    if setup is None:
        return "no adapter is active here"
    name = single_adapter(layer, setup)
    if name is None:
        return f"{setup} is more than one adapter"
    adapter = layer._modules["adapters"]._modules[name]
    autocast = _is_autocast(hidden_states)
    obstacle = (
        _context_obstacle()
        or _flags_obstacle(adapter, residual, layer_norm)
        or _tensors_obstacle(adapter, hidden_states, residual, autocast)
    )
    if obstacle is None and isinstance(layer_norm, nn.LayerNorm):
        weight = parameter(layer_norm, "weight")
        if weight is not None:
            obstacle = mixture_obstacle(weight, hidden_states, "hidden_states", autocast)
    x = residual if isinstance(adapter, ParallelAdapter) else hidden_states
    return obstacle or adapter_spec(adapter, x, autocast, factored=True)


def core_spec(layer: BottleneckLayer, name: str, x: Any, residual: Any) -> BottleneckSpec | str:
    """The adapter of ``layer.compose_single``, if ``bottleneck_core`` computes that call."""
    adapter = layer._modules["adapters"]._modules[name]
    autocast = _is_autocast(x)
    return (
        _context_obstacle()
        or _tensors_obstacle(adapter, x, residual, autocast)
        or adapter_spec(adapter, x, autocast, factored=True)
    )


def adapter_spec(
    adapter: Adapter, x: Tensor | None = None, autocast: bool = False, factored: bool = False
) -> BottleneckSpec | str:
    """The adapter's own parameters and its settings of this moment.

    Args:
        adapter: one of the library's.
        x: its input. None asks about an input that goes with the parameters.
        autocast: whether autocast is on for x.
        factored: whether the caller takes projections that are factors, ``PHM``.

    Returns:
        The specification, with training settled: its dropout and stochastic depth are those that act
        now. Or the reason why the adapter's own forward must run.
    """
    parts = _parts(adapter)
    if isinstance(parts, str):
        return parts
    _, _, gate, norm_before, norm_after = parts.learned
    if isinstance(parts.learned[0], PHMLayer) and not factored:
        return "its down projection is a PHMLayer"
    down, up = weights_of(parts.learned[0]), weights_of(parts.learned[1])
    obstacle = (
        down.obstacle("its down projection")
        or up.obstacle("its up projection")
        or (None if x is None else _mixture_obstacle(parts, down, up, adapter.scaling, x, autocast))
    )
    if obstacle is not None:
        return obstacle
    if not isinstance(adapter.scaling, Tensor) and not math.isfinite(adapter.scaling):
        return f"its scaling is {adapter.scaling}"
    return BottleneckSpec(
        down.weight,
        down.bias,
        up.weight,
        up.bias,
        parts.activation,
        adapter.scaling,
        None if gate is None else parameter(gate, "weight"),
        None if gate is None else parameter(gate, "bias"),
        norm_before,
        norm_after,
        dropout=parts.dropout,
        stochastic_depth=parts.stochastic_depth,
        is_parallel=isinstance(adapter, ParallelAdapter),
        original_ln_before=adapter.original_ln_before,
        original_ln_after=adapter.original_ln_after,
        residual_before_ln=adapter.residual_before_ln,
        adapter_residual_before_ln=adapter.adapter_residual_before_ln,
    )


def fuses(setup: AdapterCompositionBlock) -> bool:
    """Whether there is a ``Fuse`` in the setup."""
    return isinstance(setup, Fuse) or any(
        isinstance(child, AdapterCompositionBlock) and fuses(child) for child in setup
    )


class _Parts(NamedTuple):
    """What an adapter is made of."""

    learned: tuple[Any, ...]  # down and up projection; gate, norm before, norm after: or None
    activation: str
    dropout: float  # what acts now: the modules' own modes count, which may differ from the layer's
    stochastic_depth: float


def _parts(adapter: Adapter) -> _Parts | str:
    kind = type(adapter)
    if kind not in (Adapter, ParallelAdapter):
        return f"it is a {type_name(adapter)}"
    modules = adapter._modules
    sequence, up, dropout = modules["adapter_down"], modules["adapter_up"], modules["dropout"]
    *before, down, non_linearity = sequence._modules.values()
    norm_before, norm_after = before[0] if before else None, modules.get("adapter_norm_after")
    gate = modules.get("gate")
    # the library's parallel forward passes it by
    drop_path = None if kind is ParallelAdapter else modules.get("DropPath")
    for part, linear in (("down", down), ("up", up)):
        if not isinstance(linear, PHMLayer if isinstance(down, PHMLayer) else nn.Linear):
            return f"its {part} projection is a {type_name(linear)}"
    activation = kernel_activation(non_linearity)
    if activation is None:
        return f"its activation is a {type_name(getattr(non_linearity, 'f', non_linearity))}"
    if drop_path is not None and (
        type_name(drop_path) != "StochasticDepth" or drop_path.mode != "row"
    ):
        return f"its DropPath is {drop_path}"
    obstacle = (
        module_obstacle(adapter, (kind.forward,), "it")
        or module_obstacle(sequence, (nn.Sequential.forward,), "adapter_down")
        or module_obstacle(down, FORWARDS, "its down projection")
        or module_obstacle(up, FORWARDS, "its up projection")
        or module_obstacle(dropout, _DROPOUT, "its dropout")
    )
    optional = (
        (gate, "gate", LINEAR),
        (norm_before, "adapter_norm_before", _LAYERNORM),
        (norm_after, "adapter_norm_after", _LAYERNORM),
        (drop_path, "DropPath", (type(drop_path).forward,) if drop_path is not None else ()),
    )
    for module, part, forwards in optional:
        if obstacle is None and module is not None:
            obstacle = module_obstacle(module, forwards, f"its {part}")
    if obstacle is None and dropout.inplace:
        obstacle = "its dropout works in place"
    return obstacle or _Parts(
        (down, up, gate, norm_before, norm_after),
        activation,
        dropout.p if dropout.training else 0.0,
        drop_path.p if drop_path is not None and drop_path.training else 0.0,
    )


def _mixture_obstacle(
    parts: _Parts,
    down: Weights,
    up: Weights,
    scaling: float | Tensor,
    x: Tensor,
    autocast: bool,
) -> str | None:
    """Why the adapter's parameters do not go with its input."""
    tensors = [scaling, *down.tensors, *up.tensors]
    for module in parts.learned[2:]:
        if module is not None:
            tensors += [parameter(module, "weight"), parameter(module, "bias")]
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            obstacle = mixture_obstacle(tensor, x, "its input", autocast)
            if obstacle is not None:
                return obstacle
    return None if x.shape[-1] == down.features else f"its input has {x.shape[-1]} features"


def kernel_activation(non_linearity: nn.Module) -> str | None:
    """The kernels' name of what the module computes, or None."""
    if module_obstacle(non_linearity, (Activation_Function_Class.forward,), "") is not None:
        return None
    function = non_linearity.f
    if function is nn.functional.leaky_relu:
        return "leaky_relu"
    if type(function) is nn.LeakyReLU and function.negative_slope != _LEAKY_SLOPE:
        return None
    if isinstance(function, nn.Module) and module_obstacle(function, (type(function).forward,), ""):
        return None
    return _ACTIVATIONS.get(type(function))


def _known_activations() -> dict[type, str]:
    """Classes of activations to kernels' names: an adapter keeps the object, and not the name."""
    known = {}
    for alias in ACT2FN:
        try:
            name = activation_name(alias)
        except ValueError:
            continue
        known[type(ACT2FN[alias])] = name
    return known


_ACTIVATIONS = _known_activations()


def _context_obstacle() -> str | None:
    if _has_any_global_hook():
        return "a global module hook is registered"
    context = ForwardContext.get_context()
    if context is not None and context.output_adapter_gating_scores:
        return "its gating scores are wanted"
    return None


def _flags_obstacle(adapter: Adapter, residual: Tensor | None, layer_norm: Any) -> str | None:
    """Flags with which the library fails, in words of its own."""
    parallel, before = isinstance(adapter, ParallelAdapter), adapter.original_ln_before
    if residual is None and (
        parallel or adapter.original_ln_after or (before and layer_norm is not None)
    ):
        return "there is no residual input"
    if parallel or adapter.residual_before_ln in (True, False):
        return None
    if adapter.residual_before_ln == "post_add" and before and layer_norm is not None:
        return None
    return f"residual_before_ln is {adapter.residual_before_ln!r}"


def _is_autocast(x: Any) -> bool:
    return isinstance(x, Tensor) and is_autocast(x.device.type)


def _tensors_obstacle(
    adapter: Adapter, hidden_states: Any, residual: Any, autocast: bool
) -> str | None:
    obstacle = input_obstacle(hidden_states, autocast, "hidden_states")
    if obstacle is None and residual is not None:
        obstacle = input_obstacle(residual, autocast, "its residual")
        if obstacle is None and hidden_states.shape != residual.shape:
            return "hidden_states and residual differ in shape"
    if obstacle is None and adapter.use_gating and hidden_states.dim() != 3:
        return "a gate takes the mean of three-dimensional hidden_states"
    return obstacle
