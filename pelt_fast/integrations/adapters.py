"""`adapters`: its bottleneck layers compute with ``pelt_fast.nn.bottleneck_block``.

A layer is made fast by giving it another class, a subclass of its own that differs in two methods:
``bottleneck_layer_forward``, the only place that has the sub-layer's output, its residual input and
its layernorm, so that one adapter is one fused call with both; and ``compose_single``, which every
composition block calls for each of its adapters. Adapters are read from the layer at each call, and
nothing is stored on the layer, so that what the library does to it or adds to it is seen at once.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from adapters.composition import AdapterCompositionBlock
from adapters.methods.adapter_layer_base import AdapterLayerBase
from adapters.methods.bottleneck import BottleneckLayer, BottleneckState
from adapters.methods.modeling import GLOWCouplingBlock, NICECouplingBlock
from torch import Tensor, nn

from ..functional import explain
from ..nn.bottleneck_block import BottleneckSpec, bottleneck_block, bottleneck_core
from .adapters_operands import adapter_spec, block_spec, core_spec, fuses, single_adapter
from .obstacles import dtype_name, mixture_obstacle, type_name
from .report import Report

_REPORT_TOKENS = 2048  # for how many tokens a report names the backends
# of the library, which a subclass could have replaced and the fast layer would pass by
_METHODS = (
    "bottleneck_layer_forward",
    "compose",
    "compose_stack",
    "compose_fuse",
    "compose_single",
    "pre_block",
)


class _FuseState(BottleneckState):
    """The state inside a ``Fuse``, which reads what the up projection returned besides the result."""


class AcceleratedLayer(BottleneckLayer):
    """A bottleneck layer with fast adapters. ``pelt_fast.accelerate`` makes instances of subclasses."""

    library_class: type

    def bottleneck_layer_forward(
        self, hidden_states: Tensor, residual_input: Tensor | None, layer_norm: nn.Module | None
    ) -> Tensor:
        """As the library's, which runs wherever a call is not served."""
        spec = block_spec(self, hidden_states, residual_input, layer_norm)
        if isinstance(spec, str):
            return super().bottleneck_layer_forward(hidden_states, residual_input, layer_norm)
        return bottleneck_block(spec, hidden_states, residual_input, layer_norm, training=True)

    def compose_single(
        self, adapter_setup: str, state: BottleneckState, lvl: int = 0
    ) -> BottleneckState:
        """As the library's, without ``bottleneck_up`` outside a ``Fuse``: nothing else reads it."""
        if isinstance(state, _FuseState):
            return super().compose_single(adapter_setup, state, lvl)
        x, residual = state.hidden_states, state.adapter_residual
        spec = core_spec(self, adapter_setup, x, residual)
        if isinstance(spec, str):
            state = super().compose_single(adapter_setup, state, lvl)
            return state._replace(bottleneck_up=None)
        y = bottleneck_core(spec, x, residual, training=True)
        return state._replace(hidden_states=y, bottleneck_up=None, last=adapter_setup)

    def compose_fuse(
        self, adapter_setup: AdapterCompositionBlock, state: BottleneckState, lvl: int = 0
    ) -> BottleneckState:
        """The library's, whose own adapters run inside."""
        return BottleneckState(*super().compose_fuse(adapter_setup, _FuseState(*state), lvl))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made at run time, so that a pickle names the library's in its place
        _, _, *state = super().__reduce_ex__(max(protocol, 2))
        return (_new_layer, (self.library_class,), *state)


@functools.cache
def accelerated_class(library_class: type) -> type:
    """The fast subclass of one of the library's layer classes."""
    return types.new_class(
        f"Accelerated{library_class.__name__}",
        (AcceleratedLayer, library_class),
        exec_body=lambda body: body.update(library_class=library_class, __module__=__name__),
    )


def _new_layer(library_class: type) -> AcceleratedLayer:
    cls: Any = accelerated_class(library_class)
    layer: AcceleratedLayer = cls.__new__(cls)
    return layer


def has_layers(model: nn.Module) -> bool:
    """Whether there is any layer of the library's in the model."""
    return any(isinstance(module, AdapterLayerBase) for module in model.modules())


def accelerate(model: nn.Module) -> Report:
    """Gives every bottleneck layer that can be served the fast class; see ``pelt_fast.accelerate``."""
    report = Report(library="adapters")
    base_dtype = _base_dtype(model)
    for name, module in model.named_modules():
        if isinstance(module, AcceleratedLayer):
            report.already.append(name)
        elif isinstance(module, BottleneckLayer):
            reason = _why_left(module)
            if reason is not None:
                report.left[name] = reason
                continue
            library_class: type = type(module)
            module.__class__ = accelerated_class(library_class)
            report.replaced.append(name)
        else:
            reason = _other_method(module)
            if reason is not None:
                report.left[name] = reason
            continue
        state = _describe(module, base_dtype)
        if isinstance(state, str):
            report.waiting[name] = state
        for kind in () if isinstance(state, str) else state:
            report.kinds[kind] = report.kinds.get(kind, 0) + 1
    return report


def accelerated_layers(model: nn.Module) -> list[nn.Module]:
    """What ``restore`` will restore.

    Raises:
        RuntimeError: another library has put its own class over one of them.
    """
    layers: list[nn.Module] = []
    for name, module in model.named_modules():
        if isinstance(module, AcceleratedLayer):
            if "library_class" not in type(module).__dict__:
                raise RuntimeError(
                    f"cannot restore {name!r}: another library has since made it a "
                    f"{type_name(module)}; undo that first"
                )
            layers.append(module)
    return layers


def restore(layers: list[nn.Module]) -> None:
    """Gives accelerated layers the library's class back; see ``pelt_fast.restore``."""
    for module in layers:
        assert isinstance(module, AcceleratedLayer)
        module.__class__ = module.library_class


def _why_left(layer: BottleneckLayer) -> str | None:
    for method in _METHODS:
        if getattr(getattr(layer, method), "__func__", None) is not getattr(
            BottleneckLayer, method
        ):
            return f"it has a {method} of its own"
    return None


def _other_method(module: nn.Module) -> str | None:
    """Why a module of another of the library's methods is left; None where there is nothing in it."""
    if isinstance(module, (NICECouplingBlock, GLOWCouplingBlock)):
        return f"it is a {type_name(module)}, an invertible adapter"
    if not isinstance(module, AdapterLayerBase):
        return None
    # every linear layer is wrapped for LoRA, whether it has one or not
    if not len(getattr(module, module.adapter_modules_name, ())):
        return None
    return f"it is a {type_name(module)}, not a bottleneck layer"


def _base_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype that hidden states will have: that of the first parameter, an embedding in all models."""
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(dtypes, None)


def _describe(layer: BottleneckLayer, base_dtype: torch.dtype | None) -> list[str] | str:
    """What is computed on this layer as the model stands, in words; or why the library computes it all."""
    setup = layer.get_active_setup()
    if setup is None:
        return _why_idle(layer)
    if fuses(setup):
        return "its adapters are in a Fuse, which reads more of them than their results"
    single = single_adapter(layer, setup)
    kinds, reasons = [], []
    for name, adapter in layer.adapters.items():
        if name not in setup.flatten():
            continue
        first = next(adapter.parameters())
        x = torch.zeros((), dtype=base_dtype or first.dtype, device=first.device)
        x = x.expand(_REPORT_TOKENS, adapter.input_size)
        spec = adapter_spec(adapter, x)
        if isinstance(spec, str):
            reasons.append(f"adapter {name!r}: {spec}")
        else:
            inside = "" if single else f", in {type_name(setup)}"
            norm = getattr(layer, "LayerNorm", None) if single else None
            kinds.append(_kind(spec, x, inside, norm))
    return "; ".join(reasons) if reasons else kinds


def _why_idle(layer: BottleneckLayer) -> str:
    if not len(getattr(layer, "adapters", ())):
        return "no adapter is on this layer"
    if layer.layer_idx in (layer.adapters_config.skip_layers or ()):
        return "this layer is among skip_layers"
    return "the active adapters are not on this layer"


def _kind(spec: BottleneckSpec, x: Tensor, inside: str, norm: nn.Module | None) -> str:
    """Shape, form, activation, dtypes and the chosen backends, in words."""
    m, d = spec.down_weight.shape
    norms = {}
    if isinstance(norm, nn.LayerNorm) and norm.weight is not None:
        mixed = mixture_obstacle(norm.weight, x, "its input", autocast=False)
        norms = {} if mixed else {"weight": norm.weight, "bias": norm.bias}
    before, after = spec.original_ln_before and not spec.is_parallel, spec.original_ln_after
    explanation = explain(
        "bottleneck_adapter",
        x,
        *spec[:4],
        activation=spec.activation,
        scaling=spec.scaling,
        gate=None if spec.gate_weight is None else x[:, :1],
        residual=x,
        skip=x.clone() if before else None,
        dropout_p=spec.dropout,
        training=True,
        **{f"pre_ln_{key}": value for key, value in norms.items() if before},
        **{f"ln_{key}": value for key, value in norms.items() if after},
    )
    forward, backward = explanation.backends
    form = "parallel" if spec.is_parallel else "sequential"
    gated = "" if spec.gate_weight is None else ", gated"
    return (
        f"{d} -> {m}, {form}{inside}, {spec.activation}{gated}, "
        f"{dtype_name(spec.down_weight.dtype)} over {dtype_name(x.dtype)}, T = {_REPORT_TOKENS}: "
        f"{forward or 'no backend'} forward, {backward or 'no backend'} backward"
    )
