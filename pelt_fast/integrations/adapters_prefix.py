"""The library's prefix tuning: the MLP runs once for all samples, and attention does not concatenate.

``PrefixTuning``, the module that makes a prefix, runs its MLP on one row for each token of it, where the library has as
many equal rows as there are samples; without gradients the result is kept while its parameters do not change.

``PrefixTuningLayer`` stands in every attention layer and returns keys, values and mask with the prefix in front of
them. The fast class returns them as ``Deferred`` tensors where that pays: ``scaled_dot_product_attention`` takes such
tensors in parts, and for anything else that looks at them they are what the library returns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from adapters.composition import Stack, adjust_tensors_for_parallel
from adapters.context import ForwardContext
from adapters.methods.modeling import Activation_Function_Class
from adapters.methods.prefix_tuning import PrefixTuning, PrefixTuningLayer, PrefixTuningState
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..dispatch import FEW_KEYS
from ..nn.kept import keep
from ..nn.prefix import by_layer, for_batch
from .adapters_class import FastLayer, methods_obstacle
from .adapters_mixed import mixed_batch_at
from .adapters_mixed_prefix import mixed_prefix
from .adapters_paper import gate_of
from .deferred import PrefixedMask, PrefixedStates
from .fast_class import Accelerated, fast_class
from .obstacles import LINEAR, dtype_name, module_obstacle, parameter, type_name
from .report import Idle

LIBRARY = (PrefixTuningLayer, PrefixTuning)
SORT = "prefix layer"  # and the MLP that makes prefixes
# of the library, which a subclass could have replaced and the fast layer would pass by
_METHODS = (
    "forward",
    "compose",
    "compose_stack",
    "compose_single",
    "pre_block",
    "get_active_setup",
)


class FastPrefixTuning(Accelerated, PrefixTuning):
    """A prefix made by an MLP."""

    def forward(self, batch_size: int) -> tuple[Tensor, ...]:
        """As the library's, of tensors that are expanded to the batch."""
        if _mlp_obstacle(self) is not None:
            slow: tuple[Tensor, ...] = super().forward(batch_size)
            return slow
        module: Any = self
        tokens, mlp = module.wte.weight, module.control_trans
        config = module.config
        shape = (config.prefix_length, module.n_layers * 2, module.n_heads, module.n_embd_per_head)
        parameters = (tokens, mlp[0].weight, mlp[0].bias, mlp[2].weight, mlp[2].bias)
        states = keep(self, parameters, lambda: by_layer(mlp(tokens), shape))
        return for_batch(states, batch_size, module.dropout if _drops(module) else None)


class FastPrefixTuningLayer(FastLayer, PrefixTuningLayer):
    """The prefixes of one attention layer."""

    def forward(
        self,
        key_states: Tensor,
        value_states: Tensor,
        residual_input: Tensor,
        attention_mask: Tensor | None = None,
        invert_mask: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As the library's; keys, values and mask may come ``Deferred``."""
        layer: Any = self
        setup = layer.get_active_setup()
        name = None if setup is None else _single(self, setup)
        batch = None if name is not None else mixed_batch_at(self)
        if name is None and batch is None:
            states: tuple[Tensor, Tensor, Tensor | None] = super().forward(
                key_states, value_states, residual_input, attention_mask, invert_mask
            )
            return states
        state = PrefixTuningState(
            key_states, value_states, residual_input, attention_mask, invert_mask
        )
        if name is not None:
            state = self.compose_single(name, state)
        elif batch is not None:
            state = mixed_prefix(self, batch, state)
        return state.key_states, state.value_states, state.attention_mask

    def compose_single(
        self, adapter_setup: str, state: PrefixTuningState, lvl: int = 0
    ) -> PrefixTuningState:
        """As the library's, which every composition block calls for each of its prefixes."""
        keys, values = self._prefix(adapter_setup, state)
        mask = state.attention_mask
        if _deferral_obstacle(self, state, keys, values) is None:
            key_states: Tensor = PrefixedStates.of(keys, state.key_states)
            value_states: Tensor = PrefixedStates.of(values, state.value_states)
            mask = None if mask is None else PrefixedMask.of(mask, keys.shape[2])
        else:
            key_states = torch.cat([keys, state.key_states], 2)
            value_states = torch.cat([values, state.value_states], 2)
            if mask is not None:
                mask = F.pad(mask, (keys.shape[2], 0), value=float(not state.invert_mask))
        return state._replace(key_states=key_states, value_states=value_states, attention_mask=mask)

    def _prefix(self, name: str, state: PrefixTuningState) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, P, D) of the prefix for the samples of ``state``, gated."""
        layer: Any = self
        states = ForwardContext.get_context().prefix_states[name][layer.location_key]
        keys, values = states[layer.prefixes[name]]
        # slices past the end are those of Parallel, whose states are repeated; empty ones stay empty
        part = state.idx_slice  # a tensor: the samples of a group
        if isinstance(part, Tensor) or (
            part is not None and (part.start < len(keys) or part.start == part.stop == len(keys))
        ):
            keys, values = keys[part], values[part]
        if name in layer.prefix_gates:
            gate = gate_of(layer.prefix_gates[name](state.residual_input))
            layer._store_gating_score(name, gate)
            keys = keys * gate[:, 0].view(-1, 1, 1, 1)
            values = values * gate[:, -1].view(-1, 1, 1, 1)
        keys, values = adjust_tensors_for_parallel(state.key_states, keys, values)
        return keys, values


def accelerated_class(library_class: type) -> type:
    """The fast subclass of one of the library's classes."""
    layer = issubclass(library_class, PrefixTuningLayer)
    return fast_class(FastPrefixTuningLayer if layer else FastPrefixTuning, library_class)


def concerns(module: nn.Module) -> bool:
    """Whether the report speaks of the module: there is a layer in every attention layer, mostly empty."""
    return isinstance(module, PrefixTuning) or bool(module.prefixes)


def why_left(module: nn.Module) -> str | None:
    """Why the module keeps the library's class."""
    if isinstance(module, PrefixTuningLayer):
        return methods_obstacle(module, PrefixTuningLayer, _METHODS)
    return methods_obstacle(module, PrefixTuning, ("forward",))


def describe(module: nn.Module, base_dtype: torch.dtype | None) -> list[str] | str:
    """What is computed on this module as the model stands, in words; or why the library computes it all."""
    if isinstance(module, PrefixTuning):
        return _mlp_obstacle(module) or [_mlp_kind(module)]
    assert isinstance(module, PrefixTuningLayer)
    setup = module.get_active_setup()
    if setup is None:
        if module.layer_idx in (module.adapters_config.skip_layers or ()):
            return Idle("this layer is among skip_layers")
        return Idle("the active adapters are not on this layer")
    obstacle = _config_obstacle(module)
    if obstacle is not None:
        return obstacle
    names = [name for name in module.prefixes if name in setup.flatten()]
    gated = ", gated" if any(name in module.prefix_gates for name in names) else ""
    inside = "" if type(setup) is Stack else f", in {type_name(setup)}"
    return [
        f"attention over a prefix{gated}{inside}: folded in without gradients from {FEW_KEYS} elements of keys on, "
        "concatenated otherwise"
    ]


def _mlp_kind(module: PrefixTuning) -> str:
    first, last = module.control_trans[0], module.control_trans[2]
    return (
        f"prefix {module.config.prefix_length} x {first.in_features} -> {first.out_features} -> {last.out_features}, "
        f"{dtype_name(first.weight.dtype)}: once for all samples"
    )


def _drops(module: PrefixTuning) -> bool:
    return bool(module.dropout.training and module.dropout.p > 0)


def _mlp_obstacle(module: PrefixTuning) -> str | None:
    """Why the module's own forward must run."""
    if _has_any_global_hook():
        return "a global module hook is registered"
    mlp: Any = module.control_trans
    tokens: Any = module.wte
    if type(mlp) is not nn.Sequential or len(mlp) != 3:
        return f"its control_trans is a {type_name(mlp)}"
    obstacle = (
        module_obstacle(tokens, (nn.Embedding.forward,), "wte")
        or module_obstacle(mlp, (nn.Sequential.forward,), "control_trans")
        or module_obstacle(mlp[0], LINEAR, "control_trans[0]")
        or module_obstacle(mlp[1], (Activation_Function_Class.forward,), "its activation")
        or module_obstacle(mlp[2], LINEAR, "control_trans[2]")
        or module_obstacle(module.dropout, (nn.Dropout.forward,), "its dropout")
    )
    if obstacle is None and tokens.max_norm is not None:
        obstacle = "its embedding has max_norm"
    if obstacle is None and any(parameter(mlp[i], "bias") is None for i in (0, 2)):
        obstacle = "its MLP has a layer without bias"
    if obstacle is None and any(True for _ in mlp[1].parameters()):
        obstacle = "its activation has parameters"
    return obstacle


def _config_obstacle(layer: PrefixTuningLayer) -> str | None:
    """Why attention must get concatenated tensors, as the model is configured."""
    config = layer.model_config
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return "its attention is not scaled_dot_product_attention"
    heads = getattr(config, "num_attention_heads", None)
    if getattr(config, "num_key_value_heads", heads) != heads:
        return "its keys have fewer heads than its queries"
    return None


def _single(layer: PrefixTuningLayer, setup: Any) -> str | None:
    """The prefix that is all that ``setup`` has on this layer; None where it has more."""
    if type(setup) is not Stack:
        return None
    here = [c for c in setup.children if not isinstance(c, str) or c in layer.prefixes]
    return here[0] if len(here) == 1 and isinstance(here[0], str) else None


_PLAIN: tuple[Any, ...] = (Tensor, PrefixedStates)
_MASKS: tuple[Any, ...] = (Tensor, PrefixedMask, type(None))


def _deferral_obstacle(
    layer: PrefixTuningLayer, state: PrefixTuningState, keys: Tensor, values: Tensor
) -> str | None:
    """Why attention must get concatenated tensors, at this call."""
    key_states, value_states, mask = state.key_states, state.value_states, state.attention_mask
    if key_states.numel() < FEW_KEYS or key_states.device.type != "cpu":
        return "concatenating costs less"
    if torch.is_grad_enabled() and any(
        t.requires_grad for t in (keys, values, key_states, value_states)
    ):
        return "a gradient is needed"
    if type(key_states) not in _PLAIN or type(value_states) not in _PLAIN:
        return "a state is a tensor of another kind"
    if keys.dtype != key_states.dtype or keys.shape[1] != key_states.shape[1]:
        return "the prefix does not go with the keys"
    if mask is not None and (
        type(mask) not in _MASKS
        or mask.dim() != 4
        or not mask.is_floating_point()
        or not state.invert_mask
    ):
        return "its mask is not an additive one of four dimensions"
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "it is compiled or traced"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    return _config_obstacle(layer)
