"""MAD-X's invertible adapters (NICE couplings) of `adapters` compute with ``functional.bottleneck_adapter``.

Behind the embeddings y1 = x1 + F(x2), y2 = x2 + G(y1), and before the language model's head back again: F and G are
bottleneck adapters over one half of the features whose residual is the other half, so that each is one call. The halves
are views. The library's GLOW couplings are left to it: of three-dimensional hidden states its own forward makes a list.

Pfeiffer et al., "MAD-X" (EMNLP 2020); Dinh et al., "NICE" (2014).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from adapters.context import AdapterSetup
from adapters.methods.modeling import GLOWCouplingBlock, NICECouplingBlock
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..functional import bottleneck_adapter, explain
from .adapters_class import REPORT_TOKENS, methods_obstacle
from .adapters_mixed import MixedBatch, by_setup, mixed_batch_now
from .adapters_operands import kernel_activation
from .fast_class import Accelerated, fast_class
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

LIBRARY = (NICECouplingBlock, GLOWCouplingBlock)
SORT = "invertible adapter"


class FastCoupling(Accelerated, NICECouplingBlock):
    """A NICE coupling in two fused calls."""

    def forward(self, x: Tensor, c: Any = (), rev: bool = False) -> Tensor:
        """As the library's, which runs wherever a call is not served."""
        batch = mixed_batch_now()
        if batch is not None:
            return _of_each(batch, x, rev)
        subnets = _subnets(self, x)
        if isinstance(subnets, str) or len(c):
            y: Tensor = super().forward(x, list(c), rev)
            return y
        f, g = subnets
        x1, x2 = x[..., : self.split_len1], x[..., self.split_len1 :]
        if rev:
            y2 = g(x1, x2, -1.0)
            y1 = f(y2, x1, -1.0)
        else:
            y1 = f(x2, x1, 1.0)
            y2 = g(y1, x2, 1.0)
        return torch.cat((y1, y2), -1)


class _Couplings(NamedTuple):
    """The invertible adapters of a model, as a layer has them."""

    adapter_modules: dict[str, nn.Module]


def _of_each(batch: MixedBatch, x: Tensor, rev: bool) -> Tensor:
    """Each sample through the coupling of its own setup: the library calls one, for all samples."""

    def compute(part: Tensor) -> Tensor:
        setup = AdapterSetup.get_context_adapter_setup()
        coupling = None if setup is None else batch.couplings.get(setup.first())
        y: Tensor = part if coupling is None else coupling(part, rev=rev)
        return y

    return by_setup(_Couplings(batch.couplings), batch, compute, x)


class _Subnet(NamedTuple):
    """F or G as tensors."""

    down: Tensor
    down_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    activation: str

    def __call__(self, x: Tensor, residual: Tensor, sign: float) -> Tensor:
        """residual + sign · up(act(down(x)))."""
        return bottleneck_adapter(
            *(x, self.down, self.down_bias, self.up, self.up_bias),
            activation=self.activation,
            scaling=sign,
            residual=residual,
        )


def accelerated_class(library_class: type) -> type:
    """The fast subclass of the library's coupling."""
    return fast_class(FastCoupling, library_class)


def concerns(module: nn.Module) -> bool:
    """Each of them is an adapter's."""
    return True


def why_left(module: nn.Module) -> str | None:
    """Why the module keeps the library's class."""
    if not isinstance(module, NICECouplingBlock):
        return f"it is a {type_name(module)}, whose own forward does not take hidden states"
    if module.split_len1 != module.split_len2:
        return f"its halves are of {module.split_len1} and {module.split_len2} features"
    return methods_obstacle(module, NICECouplingBlock, ("forward",))


def describe(module: NICECouplingBlock, base_dtype: torch.dtype | None) -> list[str] | str:
    """What is computed as the model stands, in words; or why the library computes it all."""
    like = parameter(module.F[0], "weight")
    x = torch.zeros((), dtype=base_dtype or like.dtype, device=like.device)
    x = x.expand(REPORT_TOKENS, module.split_len1 + module.split_len2)
    subnets = _subnets(module, x)
    if isinstance(subnets, str):
        return subnets
    down, down_bias, up, up_bias, activation = subnets[0]
    half = x[:, : module.split_len2]
    forward, backward = explain(
        *("bottleneck_adapter", half, down, down_bias, up, up_bias),
        activation=activation,
        residual=x[:, module.split_len1 :],
    ).backends
    return [
        f"invertible, halves {half.shape[1]} -> {down.shape[0]}, {activation}, {dtype_name(down.dtype)} over "
        f"{dtype_name(x.dtype)}, T = {REPORT_TOKENS}: {forward or 'no backend'} forward, "
        f"{backward or 'no backend'} backward"
    ]


def _subnets(module: NICECouplingBlock, x: Any) -> tuple[_Subnet, _Subnet] | str:
    """F and G; or why the library's forward must run."""
    if _has_any_global_hook():
        return "a global module hook is registered"
    autocast = isinstance(x, Tensor) and is_autocast(x.device.type)
    obstacle = input_obstacle(x, autocast, "hidden_states")
    if obstacle is not None:
        return obstacle
    if x.shape[-1] != module.split_len1 + module.split_len2:
        return f"its input has {x.shape[-1]} features"
    found = []
    for name in ("F", "G"):
        subnet = _subnet(module._modules[name], name, x, autocast)
        if isinstance(subnet, str):
            return subnet
        found.append(subnet)
    return found[0], found[1]


def _subnet(sequence: Any, name: str, x: Tensor, autocast: bool) -> _Subnet | str:
    layers = list(sequence._modules.values())
    if len(layers) != 3 or not all(isinstance(layer, nn.Linear) for layer in layers[::2]):
        return f"its {name} is not two linear layers and an activation"
    obstacle = module_obstacle(sequence, (nn.Sequential.forward,), f"its {name}")
    tensors: list[Any] = []
    for layer in layers[::2]:
        weight, bias = parameter(layer, "weight"), parameter(layer, "bias")
        obstacle = (
            obstacle
            or module_obstacle(layer, LINEAR, f"a layer of its {name}")
            or tensor_obstacle(weight, f"a weight of its {name}")
        )
        for tensor in (weight, bias):
            if obstacle is None and tensor is not None:
                obstacle = mixture_obstacle(tensor, x, "its input", autocast)
        tensors += [weight, bias]
    if obstacle is not None:
        return obstacle
    activation = kernel_activation(layers[1])
    if activation is None:
        return f"its activation is a {type_name(getattr(layers[1], 'f', layers[1]))}"
    return _Subnet._make((*tensors, activation))
