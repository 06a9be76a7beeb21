"""The library's bottleneck layers compute with ``pelt_fast.nn.bottleneck_block``.

The fast class differs in three methods: ``bottleneck_layer_forward``, the only place that has the
sub-layer's output, its residual input and its layernorm, so that one adapter, or one ``Fuse`` of plain
adapters, is one fused call with both; ``compose_single``, which every composition block calls for each
of its adapters; and ``compose_fuse`` for a ``Fuse`` inside another block.
"""

from __future__ import annotations

import torch
from adapters.composition import AdapterCompositionBlock, Fuse
from adapters.methods.bottleneck import BottleneckLayer, BottleneckState
from torch import Tensor, nn

from ..functional import PHM, explain
from ..nn.bottleneck_block import BottleneckSpec, bottleneck_block, bottleneck_core
from ..nn.fusion_block import FusionSpec, fusion_block
from .adapters_class import REPORT_TOKENS, FastLayer, methods_obstacle
from .adapters_fusion_operands import fuse_spec, fusion_spec, leave_behind, single_fuse
from .adapters_mixed import by_setup, check_recomputed, mixed_batch_at
from .adapters_operands import adapter_spec, block_spec, core_spec, fuses, single_adapter
from .adapters_paper import current, refuse
from .fast_class import fast_class
from .obstacles import dtype_name, mixture_obstacle, type_name
from .report import Idle

LIBRARY = (BottleneckLayer,)
SORT = "bottleneck layer"
# of the library, which a subclass could have replaced and the fast layer would pass by
_METHODS = (
    "bottleneck_layer_forward",
    "compose",
    "compose_stack",
    "compose_fuse",
    "compose_single",
    "pre_block",
    "get_active_setup",
)


class _FuseState(BottleneckState):
    """The state inside a ``Fuse``, which reads what the up projection returned besides the result."""


class FastBottleneckLayer(FastLayer, BottleneckLayer):
    """A bottleneck layer with fast adapters."""

    def bottleneck_layer_forward(
        self, hidden_states: Tensor, residual_input: Tensor | None, layer_norm: nn.Module | None
    ) -> Tensor:
        """As the library's, which runs wherever a call is not served."""
        check_recomputed(self)
        fuse = single_fuse(self)
        if fuse is not None:
            fusion = fusion_spec(self, fuse, hidden_states, residual_input, layer_norm)
            if isinstance(fusion, FusionSpec):
                return self._fuse(fuse, fusion, hidden_states, residual_input, layer_norm)
            return super().bottleneck_layer_forward(hidden_states, residual_input, layer_norm)
        spec = block_spec(self, hidden_states, residual_input, layer_norm)
        if isinstance(spec, str):
            batch = mixed_batch_at(self)
            if batch is not None:
                return by_setup(
                    *(self, batch, lambda o, x: self.bottleneck_layer_forward(o, x, layer_norm)),
                    *(hidden_states, residual_input),
                )
            return super().bottleneck_layer_forward(hidden_states, residual_input, layer_norm)
        spec = _gated(spec, hidden_states)
        return bottleneck_block(spec, hidden_states, residual_input, layer_norm, training=True)

    def compose_single(
        self, adapter_setup: str, state: BottleneckState, lvl: int = 0
    ) -> BottleneckState:
        """As the library's, without ``bottleneck_up`` outside a ``Fuse``: nothing else reads it."""
        if isinstance(state, _FuseState):
            refuse("it is in a Fuse", self.adapters, (adapter_setup,))
            return super().compose_single(adapter_setup, state, lvl)
        x, residual = state.hidden_states, state.adapter_residual
        spec = core_spec(self, adapter_setup, x, residual)
        if isinstance(spec, str):
            refuse(spec, self.adapters, (adapter_setup,))
            state = super().compose_single(adapter_setup, state, lvl)
            return state._replace(bottleneck_up=None)
        y = bottleneck_core(_gated(spec, x), x, residual, training=True)
        return state._replace(hidden_states=y, bottleneck_up=None, last=adapter_setup)

    def compose_fuse(
        self, adapter_setup: Fuse, state: BottleneckState, lvl: int = 0
    ) -> BottleneckState:
        """As the library's, whose own adapters run inside where a ``Fuse`` is not served."""
        o, x, norm = state.hidden_states, state.input_tensor, state.layer_norm
        spec = fusion_spec(self, adapter_setup, o, x, norm)
        if isinstance(spec, str):
            return BottleneckState(*super().compose_fuse(adapter_setup, _FuseState(*state), lvl))
        y = self._fuse(adapter_setup, spec, o, x, norm, after=False)
        return state._replace(hidden_states=y, last=adapter_setup.last())

    def _fuse(
        self,
        setup: Fuse,
        spec: FusionSpec,
        hidden_states: Tensor,
        residual_input: Tensor | None,
        layer_norm: nn.Module | None,
        after: bool = True,
    ) -> Tensor:
        """``fusion_block``, and what the library's own forward leaves behind."""
        y, attention = fusion_block(
            spec, hidden_states, residual_input, layer_norm, training=True, after=after
        )
        leave_behind(self, setup, attention)
        return y


def _gated(spec: BottleneckSpec, x: Tensor) -> BottleneckSpec:
    """With the paper's mean in the gate, where that is wanted."""
    paper = None if spec.gate_weight is None else current()
    return spec if paper is None else spec._replace(token_weight=paper.weights(x))


def accelerated_class(library_class: type) -> type:
    """The fast subclass of one of the library's layer classes."""
    return fast_class(FastBottleneckLayer, library_class)


def concerns(layer: nn.Module) -> bool:
    """Whether the report speaks of the layer: of each, an adapter can be added at any time."""
    return True


def why_left(layer: nn.Module) -> str | None:
    """Why the layer keeps the library's class."""
    return methods_obstacle(layer, BottleneckLayer, _METHODS)


def describe(layer: BottleneckLayer, base_dtype: torch.dtype | None) -> list[str] | str:
    """What is computed on this layer as the model stands, in words; or why the library computes it all."""
    setup = layer.get_active_setup()
    if setup is None:
        return _why_idle(layer)
    if fuses(setup):
        return _describe_fuse(layer, setup, base_dtype)
    single = single_adapter(layer, setup)
    kinds, reasons = [], []
    for name, adapter in layer.adapters.items():
        if name not in setup.flatten():
            continue
        first = next(adapter.parameters())
        x = torch.zeros((), dtype=base_dtype or first.dtype, device=first.device)
        x = x.expand(REPORT_TOKENS, adapter.input_size)
        spec = adapter_spec(adapter, x, factored=True)
        if isinstance(spec, str):
            reasons.append(f"adapter {name!r}: {spec}")
        else:
            inside = "" if single else f", in {type_name(setup)}"
            norm = getattr(layer, "LayerNorm", None) if single else None
            kinds.append(_kind(spec, x, inside, norm))
    return "; ".join(reasons) if reasons else kinds


def _describe_fuse(
    layer: BottleneckLayer, setup: AdapterCompositionBlock, base_dtype: torch.dtype | None
) -> list[str] | str:
    """A ``Fuse`` and nothing else is described; of others, that the library composes them."""
    fuse = single_fuse(layer)
    if fuse is None:
        return f"a Fuse inside {type_name(setup)}: decided at each call"
    first = next(layer.adapters.parameters())
    x = torch.zeros((), dtype=base_dtype or first.dtype, device=first.device)
    x = x.expand(REPORT_TOKENS, layer.model_config.hidden_size)
    spec = fuse_spec(layer, fuse, x)
    if isinstance(spec, str):
        return spec
    forward, backward = explain(
        "adapter_fusion",
        x,
        *spec[:4],
        activation=spec.activation,
        skip=x.clone() if spec.original_ln_before and not spec.is_parallel else None,
        dropout_p=spec.dropout,
        training=True,
    ).backends
    widths = "+".join(str(w.shape[0]) for w in spec.down_weights)
    return [
        f"{x.shape[-1]} -> {widths}, fusion of {len(spec.down_weights)}, {spec.activation}, "
        f"{dtype_name(spec.down_weights[0].dtype)} over {dtype_name(x.dtype)}, T = {REPORT_TOKENS}: "
        f"{forward or 'no backend'} forward, {backward or 'no backend'} backward"
    ]


def _why_idle(layer: BottleneckLayer) -> Idle:
    if not len(getattr(layer, "adapters", ())):
        return Idle("no adapter is on this layer")
    if layer.layer_idx in (layer.adapters_config.skip_layers or ()):
        return Idle("this layer is among skip_layers")
    return Idle("the active adapters are not on this layer")


def _kind(spec: BottleneckSpec, x: Tensor, inside: str, norm: nn.Module | None) -> str:
    """Shape, form, activation, dtypes and the chosen backends, in words."""
    down, function, factored = spec.down_weight, "bottleneck_adapter", ""
    if isinstance(down, PHM):
        (d, m), dtype = down.features, down.left.dtype
        function, factored = "compacter", f", {down.rule.shape[0]} Kronecker products"
    else:
        (m, d), dtype = down.shape, down.dtype
    norms = {}
    if isinstance(norm, nn.LayerNorm) and norm.weight is not None:
        mixed = mixture_obstacle(norm.weight, x, "its input", autocast=False)
        norms = {} if mixed else {"weight": norm.weight, "bias": norm.bias}
    before, after = spec.original_ln_before and not spec.is_parallel, spec.original_ln_after
    explanation = explain(
        function,
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
        f"{d} -> {m}{factored}, {form}{inside}, {spec.activation}{gated}, "
        f"{dtype_name(dtype)} over {dtype_name(x.dtype)}, T = {REPORT_TOKENS}: "
        f"{forward or 'no backend'} forward, {backward or 'no backend'} backward"
    )
