"""``BottleneckAdapter``: one adapter of the `adapters` library, under its parameter names, in fused calls."""

from __future__ import annotations

import contextlib
import math
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import activations
from ..functional import PHM
from ..functional.checks import check_finite, check_probability, number
from .bottleneck_block import Activation, BottleneckSpec, bottleneck_block, resolve_activation

INIT_WEIGHTS = ("bert", "mam_adapter", "houlsby")
# fields of BnConfig that are arguments of BottleneckAdapter
_CONFIGURED = (
    "scaling",
    "use_gating",
    "dropout",
    "stochastic_depth",
    "is_parallel",
    "original_ln_before",
    "original_ln_after",
    "ln_before",
    "ln_after",
    "residual_before_ln",
    "adapter_residual_before_ln",
    "init_weights",
    "init_weights_seed",
)
# fields of BnConfig that say where adapters are, and of what kind
_PLACES = ("mh_adapter", "output_adapter", "cross_adapter", "phm_layer")
_SIZES = 2**31  # one more than the largest


class BottleneckAdapter(nn.Module):
    """A bottleneck adapter with the residuals and layernorms around it, as ``adapters`` 1.3.0 computes it.

    ``state_dict`` has the keys of the library's ``Adapter`` and ``ParallelAdapter`` (``adapter_down.0.weight``, or
    ``.1`` behind ``ln_before``; ``adapter_up.weight``, ``scaling``, ``gate.weight``, ``adapter_norm_before.weight``,
    ...), and a seed draws the weights that it draws there. Defaults and names are those of ``BnConfig``;
    ``nn/bottleneck_block.py`` has the formulas.

    Args:
        input_size: d, the last size of the hidden states.
        bottleneck_size: m, the width between down and up projection.
        activation: a name that kernels know (``functional.ACTIVATIONS`` and aliases) or that transformers knows
            (its ``get_activation``); or a callable on tensors, elementwise. What kernels do not know is composed of
            PyTorch's operators.
        scaling: a number, "learned" (one parameter) or "channel" (a parameter for each feature, both start at 1).
        use_gating: a factor for each sample, the mean over its tokens of σ(w·h + b).
        dropout: probability in [0, 1] that an element of the scaled output is dropped, in training.
        stochastic_depth: probability in [0, 1] that a sample's adapter is left out, in training; not for parallel ones.
        is_parallel: the adapter reads ``input_tensor`` instead of ``hidden_states``.
        original_ln_before: ``hidden_states + input_tensor`` and the model's layernorm come before the adapter, too.
        original_ln_after: ``+ input_tensor`` and the model's layernorm come after the adapter.
        ln_before: a layernorm of the adapter's own before the down projection.
        ln_after: one after the up projection.
        residual_before_ln: the residual around the adapter is taken before the model's first layernorm (True),
            after it (False), or between ``+ input_tensor`` and that layernorm ("post_add").
        adapter_residual_before_ln: that residual is added before ``ln_after``, instead of after it.
        bias: whether the projections have biases; in the library they do.
        init_weights: "bert" (N(0, 0.02)), "mam_adapter" (Kaiming uniform down, zero up) or "houlsby" (N(0, 0.01), cut
            off at two deviations). Biases start at zero.
        init_weights_seed: the weights' own seed; the global generator stays as it is. None, or 0 as in the library:
            the weights come from the global generator.
        device: where the parameters live.
        dtype: the parameters' dtype; float32 parameters over half-precision hidden states are allowed.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: an argument has a value that is not possible.
    """

    scaling: float | Tensor
    _IS_PHM = False  # of the configs that describe such a layer

    def __init__(
        self,
        input_size: int,
        bottleneck_size: int,
        *,
        activation: Activation = "relu",
        scaling: float | str = 1.0,
        use_gating: bool = False,
        dropout: float = 0.0,
        stochastic_depth: float = 0.0,
        is_parallel: bool = False,
        original_ln_before: bool = False,
        original_ln_after: bool = True,
        ln_before: bool = False,
        ln_after: bool = False,
        residual_before_ln: bool | str = True,
        adapter_residual_before_ln: bool = False,
        bias: bool = True,
        init_weights: str = "bert",
        init_weights_seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_size("input_size", input_size)
        _check_size("bottleneck_size", bottleneck_size)
        _check_scaling(scaling)
        _check_seed("init_weights_seed", init_weights_seed)
        _check_choice("init_weights", init_weights, INIT_WEIGHTS)
        if not isinstance(residual_before_ln, bool):
            _check_choice("residual_before_ln", residual_before_ln, ("post_add",), "True, False")
        flags = {
            "use_gating": use_gating,
            "is_parallel": is_parallel,
            "original_ln_before": original_ln_before,
            "original_ln_after": original_ln_after,
            "ln_before": ln_before,
            "ln_after": ln_after,
            "adapter_residual_before_ln": adapter_residual_before_ln,
            "bias": bias,
        }
        for name, flag in flags.items():
            _check_flag(name, flag)
        self.input_size = input_size
        self.bottleneck_size = bottleneck_size
        self.dropout = _probability("dropout", dropout)
        self.stochastic_depth = _probability("stochastic_depth", stochastic_depth)
        self.is_parallel = is_parallel
        self.original_ln_before = original_ln_before
        self.original_ln_after = original_ln_after
        self.residual_before_ln = residual_before_ln
        self.adapter_residual_before_ln = adapter_residual_before_ln
        self.use_gating = use_gating
        self.init_weights = init_weights

        # Made and drawn in the library's order, so that one seed gives the same weights.
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.adapter_norm_before = nn.LayerNorm(input_size, **where) if ln_before else None
        down = nn.Linear(input_size, bottleneck_size, bias=bias, **where)
        self.non_linearity = _Activation(activation, where)
        norms = [] if self.adapter_norm_before is None else [self.adapter_norm_before]
        self.adapter_down = nn.Sequential(*norms, down, self.non_linearity)
        self.adapter_up = nn.Linear(bottleneck_size, input_size, bias=bias, **where)
        if isinstance(scaling, str):
            learned = 1 if scaling == "learned" else input_size
            self.scaling = nn.Parameter(torch.ones(learned, **where))
        else:
            self.scaling = number("scaling", scaling)
        self.adapter_norm_after = nn.LayerNorm(input_size, **where) if ln_after else None
        self.gate = nn.Linear(input_size, 1, **where) if use_gating else None
        self._draw(init_weights_seed)

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any] | str,
        input_size: int,
        *,
        layer: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> BottleneckAdapter:
        """The adapter that the library makes of a bottleneck config.

        Args:
            config: a ``BnConfig`` of the library; the same as a dict, where what is missing has ``BnConfig``'s default;
                or the name of one ("seq_bn", "double_seq_bn", "par_bn", ...), which needs the library installed.
            input_size: the model's hidden size. The bottleneck is ``int(input_size // reduction_factor)``, 1 at least.
            layer: index of the layer, for a ``reduction_factor`` that is a dict by layer ({"1": 16, "default": 8}).
            device: where the parameters live.
            dtype: the parameters' dtype.

        Raises:
            TypeError: config is none of these, or a value in it has a wrong type.
            ValueError: it describes no plain bottleneck adapter, or none for this layer.
        """
        fields = fields_of(config, cls._IS_PHM)
        if layer is not None and layer in (fields.get("leave_out") or ()):
            raise ValueError(
                f"layer is {layer}, which is in leave_out: config has no adapter there"
            )
        _check_size("input_size", input_size)
        factor = _reduction_factor(fields["reduction_factor"], layer)
        bottleneck_size = input_size // factor
        if not bottleneck_size < _SIZES:
            raise ValueError(
                f"reduction_factor is {factor}; expected one that leaves a bottleneck below {_SIZES}"
            )
        return cls(
            input_size,
            max(1, int(bottleneck_size)),
            **cls._arguments_of(fields),
            device=device,
            dtype=dtype,
        )

    @staticmethod
    def _arguments_of(fields: Mapping[str, Any]) -> dict[str, Any]:
        return _arguments(fields)

    def reset_parameters(self, seed: int | None = None) -> None:
        """Draws the projections and the gate again, as ``init_weights`` says; ``seed``: their own."""
        _check_seed("seed", seed)
        if self.gate is not None:
            self.gate.reset_parameters()
        self._draw(seed)

    def _draw(self, seed: int | None) -> None:
        """The library's initialisation: with "houlsby" the gate stays as ``nn.Linear`` made it."""
        down, up = self._down, self.adapter_up
        with seeded(seed, down.weight.device):
            if self.init_weights == "bert":
                nn.init.normal_(down.weight, std=0.02)
                nn.init.normal_(up.weight, std=0.02)
            elif self.init_weights == "mam_adapter":
                nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
                nn.init.zeros_(up.weight)
            else:
                nn.init.trunc_normal_(down.weight, std=0.01, a=-0.02, b=0.02)
                nn.init.trunc_normal_(up.weight, std=0.01, a=-0.02, b=0.02)
            drawn = [down, up]
            if self.gate is not None and self.init_weights != "houlsby":
                nn.init.normal_(self.gate.weight, std=0.02)
                drawn.append(self.gate)
        for linear in drawn:
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(
        self,
        hidden_states: Tensor,
        input_tensor: Tensor | None = None,
        layer_norm: nn.Module | None = None,
    ) -> Tensor:
        """The sub-layer's end: adapter, residuals and the model's layernorm, as the flags say.

        Args:
            hidden_states: (..., d), the sub-layer's output; (batch, tokens, d) with ``use_gating``.
            input_tensor: (..., d), the residual stream before the sub-layer. Needed by ``original_ln_after``,
                ``is_parallel``, and ``original_ln_before`` with a layer_norm.
            layer_norm: the model's norm behind the sub-layer; None where there is none (T5, Llama) or where it is
                applied elsewhere.

        Returns:
            (..., d).

        Raises:
            ValueError: the flags ask for an input_tensor or a layer_norm that is None.
        """
        return bottleneck_block(self.spec(), hidden_states, input_tensor, layer_norm, self.training)

    def spec(self) -> BottleneckSpec:
        """The tensors and flags of this moment, for ``bottleneck_block``."""
        gate = self.gate
        return BottleneckSpec(
            *self._weights(),
            self.non_linearity.activation,
            self.scaling,
            None if gate is None else gate.weight,
            None if gate is None else gate.bias,
            self.adapter_norm_before,
            self.adapter_norm_after,
            self.dropout,
            self.stochastic_depth,
            self.is_parallel,
            self.original_ln_before,
            self.original_ln_after,
            self.residual_before_ln,
            self.adapter_residual_before_ln,
        )

    def _weights(self) -> tuple[Tensor | PHM, Tensor | None, Tensor | PHM, Tensor | None]:
        """Weight and bias of the down projection, and of the up projection."""
        down, up = self._down, self.adapter_up
        return down.weight, down.bias, up.weight, up.bias

    @property
    def _down(self) -> nn.Linear:
        return self.adapter_down[-2]  # type: ignore[return-value]

    def extra_repr(self) -> str:
        """Sizes, activation and what is no submodule."""
        scaling = self.scaling if isinstance(self.scaling, float) else "learned"
        text = f"input_size={self.input_size}, bottleneck_size={self.bottleneck_size}, scaling={scaling}"
        flags = ("is_parallel", "original_ln_before", "original_ln_after")
        return ", ".join([text, *(f"{name}={getattr(self, name)}" for name in flags)])


class _Activation(nn.Module):
    """``f``: the name of an activation, or a callable; one with parameters has the library's names for them."""

    def __init__(self, activation: Any, where: dict[str, Any]) -> None:
        super().__init__()
        if not isinstance(activation, str) and not callable(activation):
            kind = type(activation).__name__
            raise TypeError(f"activation is a {kind}; expected a name or a callable")
        f = resolve_activation(activation) if isinstance(activation, str) else activation
        if isinstance(activation, str) and isinstance(f, nn.Module):
            f = f.to(**where)
        self.f = f

    @property
    def activation(self) -> Activation:
        return self.f

    def forward(self, x: Tensor) -> Tensor:
        return activations.activate(x, self.f) if isinstance(self.f, str) else self.f(x)

    def extra_repr(self) -> str:
        return "" if isinstance(self.f, nn.Module) else str(self.f)


def arguments_of(config: Mapping[str, Any] | str) -> dict[str, Any]:
    """``BottleneckAdapter``'s arguments but for its sizes, out of a config as ``from_config`` takes it."""
    return _arguments(fields_of(config))


def _arguments(fields: Mapping[str, Any]) -> dict[str, Any]:
    arguments = {name: fields[name] for name in _CONFIGURED if name in fields}
    return {"activation": fields["non_linearity"], **arguments}


def fields_of(config: Mapping[str, Any] | str, phm: bool = False) -> dict[str, Any]:
    """The config as a dict with at least ``non_linearity`` and ``reduction_factor``; ``phm``: Compacter's."""
    found: Any = _named_config(config) if isinstance(config, str) else config
    if not isinstance(found, Mapping):
        kind = type(found).__name__
        raise TypeError(f"config is a {kind}; expected a BnConfig, a dict or a config's name")
    fields = dict(found)
    architecture = fields.get("architecture", getattr(found, "architecture", None))
    if architecture is not None:
        raise ValueError(
            f"config has architecture {_shown(architecture)}; expected one bottleneck adapter, which has None"
        )
    for name in ("non_linearity", "reduction_factor"):
        if name not in fields:
            raise ValueError(f"config has no {name!r}; expected the fields of a BnConfig")
    for name in _PLACES:
        _check_flag(name, fields.get(name, False))
    if fields.get("phm_layer") and not phm:
        raise ValueError("config has phm_layer (Compacter); expected plain linear projections")
    if phm and not fields.get("phm_layer"):
        raise ValueError("config has no phm_layer; expected Compacter's")
    if not isinstance(fields["non_linearity"], str) and not callable(fields["non_linearity"]):
        kind = type(fields["non_linearity"]).__name__
        raise TypeError(f"non_linearity is a {kind}; expected the name of an activation")
    factors = fields["reduction_factor"]
    if isinstance(factors, Mapping) and not factors:
        raise ValueError("reduction_factor is empty; expected factors by layer")
    for factor in factors.values() if isinstance(factors, Mapping) else [factors]:
        _check_reduction_factor(factor)
    _check_layers("leave_out", fields.get("leave_out"))
    return fields


def _named_config(name: str) -> Mapping[str, Any]:
    try:
        from adapters.configuration import ADAPTER_CONFIG_MAP
    except ImportError as error:
        raise ValueError(
            f"config is the name {name!r}, which needs the package adapters; expected a config as a dict without it"
        ) from error
    if name not in ADAPTER_CONFIG_MAP:
        known = ", ".join(map(repr, ADAPTER_CONFIG_MAP))
        raise ValueError(f"config={name!r} is not known; expected one of {known}")
    config: Mapping[str, Any] = ADAPTER_CONFIG_MAP[name]
    return config


def _reduction_factor(factor: Any, layer: int | None) -> float:
    if isinstance(factor, Mapping):
        known = ", ".join(map(str, factor))
        if str(layer) not in factor and "default" not in factor:
            raise ValueError(
                f"reduction_factor is for layers {known}; expected one of them as layer, or a 'default', not {layer}"
            )
        factor = factor.get(str(layer), factor.get("default"))
    return number("reduction_factor", factor)


@contextlib.contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """The global generator at ``seed``, and afterwards where it was. None, 0 or nothing to draw: untouched."""
    if not seed or device.type == "meta":
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # torch.manual_seed is for all devices
        else:
            torch.manual_seed(seed)
        yield


def _check_size(name: str, value: object) -> None:
    if type(value) is not int:
        raise TypeError(f"{name} is a {type(value).__name__}; expected an integer")
    if value < 1:
        raise ValueError(f"{name} is {_shown(value)}; expected 1 or more")
    if value >= _SIZES:
        raise ValueError(f"{name} is {_shown(value)}; expected less than {_SIZES}")


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is a {type(value).__name__}; expected True or False")


def _check_seed(name: str, value: object) -> None:
    if value is None:
        return
    if type(value) is not int:
        raise TypeError(f"{name} is a {type(value).__name__}; expected an integer or None")
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"{name} is {_shown(value)}; expected an integer of 64 bits")


def _check_layers(name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, (list, tuple, range, set, frozenset)):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a list of layers")
    for layer in value:
        if type(layer) is not int:
            raise TypeError(f"{name} has a {type(layer).__name__}; expected indices of layers")


def _check_reduction_factor(value: Any) -> None:
    factor = number("reduction_factor", value)
    if not 0.0 < factor < math.inf:
        raise ValueError(f"reduction_factor is {_shown(value)}; expected a positive number")


def _check_scaling(value: Any) -> None:
    if isinstance(value, str):
        _check_choice("scaling", value, ("learned", "channel"), "a number")
    else:
        check_finite("scaling", number("scaling", value, "a number, 'learned' or 'channel'"))


def _probability(name: str, value: Any) -> float:
    found = number(name, value)
    check_probability(name, found)
    return found


def _check_choice(name: str, value: object, choices: tuple[str, ...], others: str = "") -> None:
    expected = " or ".join([*([others] if others else []), *map(repr, choices)])
    if not isinstance(value, str):
        raise TypeError(f"{name} is a {type(value).__name__}; expected {expected}")
    if value not in choices:
        raise ValueError(f"{name} is {_shown(value)}; expected {expected}")


def _shown(value: object) -> str:
    """A value as a message can hold it: short, and of a type that is not nested."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    known = isinstance(value, (str, int, float))
    return reprlib.repr(value) if known else f"a {type(value).__name__}"
