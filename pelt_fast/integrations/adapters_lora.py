"""The library's LoRA linears compute with ``functional.lora_linear``, gated ones with ``gated_lora_linear``.

The fast class differs in ``forward``. Served is one LoRA that acts alone, on all samples or, within
``pelt_fast.mixed_batch``, on each its own; what several make of each other (a ``Stack`` multiplies them, ``BatchSplit``
deals out samples), DoRA, VeRA, IA³ and multi-task LoRA are the library's.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from adapters.methods.lora import LoRA, LoRALayer, LoRALinear, LoRALinearTorch
from torch import Tensor, nn

from ..functional import MAX_RANK, explain, frozen_linear, gated_lora_linear, lora_linear
from .adapters_class import REPORT_TOKENS, FastLayer, methods_obstacle
from .adapters_mixed import check_recomputed, mixed_batch_at
from .adapters_mixed_lora import mixed_lora
from .adapters_operands import _context_obstacle
from .adapters_paper import current, refuse
from .base_layers import frozen_sort
from .fast_class import fast_class, library_type
from .obstacles import (
    LINEAR,
    dtype_name,
    input_obstacle,
    is_autocast,
    mixture_obstacle,
    module_obstacle,
    parameter,
    tensor_obstacle,
    type_name,
)
from .report import Idle
from .stacked_lora import forget_trained

LIBRARY = (LoRALayer,)
SORT = "LoRA linear"
# of the library, which a subclass could have replaced and the fast layer would pass by
_METHODS = ("forward", "compose", "compose_stack", "compose_single", "get_active_setup")


class _Operands(NamedTuple):
    """What a call computes with."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    gate_weight: Tensor | None
    gate_bias: Tensor | None
    scaling: float
    dropout_p: float
    name: str


class FastLoRALinear(FastLayer, LoRALinearTorch):
    """A linear layer with a fast LoRA."""

    def forward(self, input_states: Tensor) -> Tensor:
        """As the library's, which runs wherever a call is not served."""
        setup = self.get_active_setup()
        if setup is None and not (self.merged or self.fan_in_fan_out):
            check_recomputed(self)
            return frozen_linear(input_states, parameter(self, "weight"), parameter(self, "bias"))
        operands = _operands(self, input_states)
        check_recomputed(self)
        if isinstance(operands, str):
            batch = mixed_batch_at(self)
            if batch is not None:
                return mixed_lora(self, batch, input_states, functools.partial(_operands_of, self))
            if setup is not None:
                layer: Any = self
                refuse(operands, layer.loras, setup.flatten())
            theirs: Tensor = super().forward(input_states)
            return theirs
        if not torch.compiler.is_compiling():
            forget_trained(self)
        weight, bias, a, b, gate_weight, gate_bias, scaling, dropout_p, _ = operands
        if gate_weight is None:
            return lora_linear(
                input_states, weight, bias, a, b, scaling, dropout_p=dropout_p, training=True
            )
        gate, paper = (gate_weight, gate_bias), current()
        return gated_lora_linear(
            *(input_states, weight, bias, a, b, *gate),
            1.0 if paper is None else scaling,  # the library has the gate in place of it
            token_weight=None if paper is None else paper.weights(input_states),
            dropout_p=dropout_p,
            training=True,
        )

    def base_sort(self) -> str | None:
        """Without a LoRA: the product alone."""
        return None if concerns(self) or self.fan_in_fan_out else frozen_sort(self)


def accelerated_class(library_class: type) -> type:
    """The fast subclass of one of the library's layer classes."""
    return fast_class(FastLoRALinear, library_class)


def concerns(layer: LoRALayer) -> bool:
    """Whether there is any LoRA on the layer: the library wraps every linear layer of a model."""
    return len(layer.loras) > 0


def why_left(layer: LoRALayer) -> str | None:
    """Why the layer keeps the library's class."""
    if library_type(layer) is not LoRALinearTorch:
        return f"it is a {library_type(layer).__name__}"
    return methods_obstacle(layer, LoRALinear, _METHODS)


def describe(layer: LoRALinear, base_dtype: torch.dtype | None) -> list[str] | str:
    """What is computed on this layer as the model stands, in words; or why the library computes it all."""
    weight = parameter(layer, "weight")
    x = torch.zeros((), dtype=base_dtype or weight.dtype, device=weight.device)
    x = x.expand(1, REPORT_TOKENS, layer.in_features)
    operands = _operands(layer, x)
    if isinstance(operands, str):
        return operands
    weight, bias, a, b, gate_weight, gate_bias, scaling, dropout_p, _ = operands
    settings: dict[str, Any] = {"dropout_p": dropout_p, "training": True}
    if gate_weight is None:
        explanation = explain("lora_linear", x, weight, bias, a, b, scaling, **settings)
    else:
        explanation = explain(
            *("gated_lora_linear", x, weight, bias, a, b, gate_weight, gate_bias, scaling),
            **settings,
        )
    forward, backward = explanation.backends
    gated = "" if gate_weight is None else ", gated"
    return [
        f"{layer.in_features} -> {layer.out_features}, LoRA r = {a.shape[0]}{gated}, "
        f"{dtype_name(a.dtype)} over {dtype_name(weight.dtype)}, T = {REPORT_TOKENS}: "
        f"{forward or 'no backend'} forward, {backward or 'no backend'} backward"
    ]


def _operands(layer: LoRALinear, x: Any) -> _Operands | str:
    """The one LoRA that acts on this call, or the reason why the library's forward must run."""
    setup = layer.get_active_setup()
    if setup is None:
        return Idle("the active adapters are not on this layer")
    return _operands_of(layer, setup, x)


def _operands_of(layer: LoRALinear, setup: Any, x: Any) -> _Operands | str:
    """The same of a setup that acts on this layer."""
    if layer.merged:
        return f"adapter {layer.merged!r} is merged"
    loras = layer._modules["loras"]._modules
    if type(setup).__name__ != "Stack":
        return f"its adapters are in a {type_name(setup)}"
    here = [child for child in setup.children if not isinstance(child, str) or child in loras]
    if len(here) != 1 or not isinstance(here[0], str):
        return f"{setup} is more than one adapter"
    lora = loras[here[0]]
    if type(lora) is not LoRA:
        return f"adapter {here[0]!r} is a {type_name(lora)}"
    if lora.use_dora:
        return f"adapter {here[0]!r} uses DoRA"
    autocast = isinstance(x, Tensor) and is_autocast(x.device.type)
    return (
        _context_obstacle()
        or input_obstacle(x, autocast)
        or module_obstacle(lora, (LoRA.forward,), "its LoRA")
        or _read(layer, lora, here[0], x, autocast)
    )


def _read(layer: LoRALinear, lora: LoRA, name: str, x: Tensor, autocast: bool) -> _Operands | str:
    weight, bias = parameter(layer, "weight"), parameter(layer, "bias")
    a, b = parameter(lora, "lora_A"), parameter(lora, "lora_B")
    gate_weight = gate_bias = None
    if lora.use_gating:
        gate = lora._modules["gate"]
        obstacle = module_obstacle(gate, LINEAR, "its gate")
        if obstacle is not None:
            return obstacle
        gate_weight, gate_bias = parameter(gate, "weight"), parameter(gate, "bias")
        if gate_weight.shape[0] != 1 or x.dim() != 3:
            return "its gate is not one number for each sample of three-dimensional hidden states"
    matrices = ((weight, "its weight"), (a, "lora_A"), (b, "lora_B"), (gate_weight, "its gate"))
    for tensor, part in matrices:
        obstacle = None if tensor is None else tensor_obstacle(tensor, part)
        if obstacle is not None:
            return obstacle
    for tensor in (weight, bias):
        if tensor is not None and tensor.dtype is not x.dtype and not autocast:
            return f"it is {dtype_name(tensor.dtype)}, its input {dtype_name(x.dtype)}"
    for tensor in (weight, a, b, gate_weight, gate_bias):
        obstacle = None if tensor is None else mixture_obstacle(tensor, x, "its input", autocast)
        if obstacle is not None:
            return obstacle
    rank, dropout = a.shape[0], lora._modules.get("lora_dropout")
    if rank > MAX_RANK:
        return f"its rank is {rank}, above {MAX_RANK}"
    if dropout is not None and (type(dropout) is not nn.Dropout or dropout.inplace):
        return f"its dropout is a {type_name(dropout)}"
    scaling = lora.scaling
    if not math.isfinite(scaling):
        return f"its scaling is {scaling}"
    return _Operands(
        weight.t() if layer.fan_in_fan_out else weight,
        bias,
        a,
        b,
        gate_weight,
        gate_bias,
        scaling,
        dropout.p if dropout is not None and dropout.training else 0.0,
        name,
    )
