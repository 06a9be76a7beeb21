"""``PHMLinear`` and ``Compacter``: PHM layers of the `adapters` library, under its parameter names, without the H."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import PHM, phm_linear
from ..functional.checks import check_finite, number
from .adapter import BottleneckAdapter, seeded

_C_INITS = ("normal", "uniform")
_OWN_RANGE = 0.01  # of a rule that a projection has to itself, in the library


class PHMLinear(nn.Module):
    """y = x Σ_i rule_i ⊗ (left_i right_i) + b: the ``PHMLayer`` of `adapters`, with the keys of its ``state_dict``.

    Keys: ``W_left`` (n, in / n, k) and ``W_right`` (n, k, out / n), or ``W`` (n, in / n, out / n); ``phm_rule``
    (n, n, n), or ``phm_rule_left`` (n, n, 1) and ``phm_rule_right`` (n, 1, n), unless the rule is shared; ``b`` (out,).

    Args:
        in_features: a multiple of phm_dim.
        out_features: likewise.
        phm_dim: n, how many Kronecker products are summed.
        phm_rank: k, the rank of each second factor.
        factorized_phm_W: whether the second factors are products of rank phm_rank, and not matrices.
        shared_phm_rule: the rule is somebody else's, who gives it to ``forward``.
        factorized_phm_rule: whether each first factor is a product of rank 1.
        learn_phm: whether the rule gets a gradient.
        phm_c_init: "normal" or "uniform": how a rule starts, within 0.01.
        phm_bias: whether there is a bias.
        device: where the parameters live.
        dtype: their dtype.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: sizes are no multiples of phm_dim, or a value is not known.
    """

    phm_rule: Tensor
    phm_rule_left: Tensor
    phm_rule_right: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        phm_dim: int = 4,
        phm_rank: int = 1,
        factorized_phm_W: bool = True,
        shared_phm_rule: bool = False,
        factorized_phm_rule: bool = False,
        learn_phm: bool = True,
        phm_c_init: str = "normal",
        phm_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"in_features": in_features, "out_features": out_features}
        for name, size in {**sizes, "phm_dim": phm_dim, "phm_rank": phm_rank}.items():
            if type(size) is not int:
                raise TypeError(f"{name} is a {type(size).__name__}; expected an integer")
            if size < 1:
                raise ValueError(f"{name} is {size}; expected 1 or more")
        for name, size in sizes.items():
            if size % phm_dim:
                raise ValueError(f"{name} is {size}; expected a multiple of phm_dim = {phm_dim}")
        check_c_init(phm_c_init)
        self.in_features, self.out_features = in_features, out_features
        self.phm_dim, self.phm_c_init = phm_dim, phm_c_init
        self.shared_phm_rule, self.factorized_phm_rule = shared_phm_rule, factorized_phm_rule
        n, p, q = phm_dim, in_features // phm_dim, out_features // phm_dim

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        if not shared_phm_rule and factorized_phm_rule:
            self.phm_rule_left = empty(n, n, 1).requires_grad_(learn_phm)
            self.phm_rule_right = empty(n, 1, n).requires_grad_(learn_phm)
        elif not shared_phm_rule:
            self.phm_rule = empty(n, n, n).requires_grad_(learn_phm)
        if factorized_phm_W:
            self.W_left, self.W_right = empty(n, p, phm_rank), empty(n, phm_rank, q)
        else:
            self.W = empty(n, p, q)
        self.b = empty(out_features) if phm_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The library's: Glorot's normal numbers for each second factor, whatever is configured; the bias zero."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("W"):
                for matrix in parameter.data:
                    nn.init.xavier_normal_(matrix)
            elif name == "b":
                nn.init.zeros_(parameter)
            else:
                init_rule(parameter, self.phm_c_init, _OWN_RANGE, _OWN_RANGE)

    def weight(self, rule: Tensor | None = None) -> PHM:
        """The factors; ``rule``: the shared one."""
        if rule is None and self.shared_phm_rule:
            raise ValueError(
                "rule is None; expected the rule (n, n, n), since shared_phm_rule is set"
            )
        if rule is None and self.factorized_phm_rule:
            rule = torch.bmm(self.phm_rule_left, self.phm_rule_right)
        elif rule is None:
            rule = self.phm_rule
        if "W" in self._parameters:
            return PHM(rule, self.W, None)
        return PHM(rule, self.W_left, self.W_right)

    def forward(self, x: Tensor, rule: Tensor | None = None) -> Tensor:
        """x (..., in) -> (..., out); ``rule`` (n, n, n): the shared one."""
        return phm_linear(x, self.weight(rule), self.b)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, phm_dim={self.phm_dim}"


class Compacter(BottleneckAdapter):
    """``BottleneckAdapter`` whose projections are ``PHMLinear`` layers: Compacter as `adapters` has it, in fused calls.

    ``state_dict`` has the keys of the library's ``Adapter`` (``adapter_down.0.W_left``, ``adapter_up.b``, ...). A rule
    that layers share is one more, ``phm_rule``, here; there it is the model's, ``shared_parameters.{name}.phm_rule``.

    Args:
        input_size: d, a multiple of phm_dim.
        bottleneck_size: m, a multiple of phm_dim.
        phm_rule: the rule (n, n, n) that this layer shares with others, for both of its projections: one
            ``nn.Parameter``, whose gradient is the sum over all of them. ``Compacter.new_rule`` makes one. None: each
            projection has its own.
        phm_dim: as in ``PHMLinear``, and so what follows.
        phm_rank: likewise.
        factorized_phm_W: likewise.
        factorized_phm_rule: likewise, for rules of its own.
        learn_phm: likewise.
        phm_c_init: likewise.
        phm_bias: likewise.
        activation: as in ``BottleneckAdapter``.
        init_weights_seed: likewise.
        device: likewise.
        dtype: likewise.
        **options: what else ``BottleneckAdapter`` takes, but for ``bias`` and ``init_weights``.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: an argument has a value that is not possible.
    """

    _IS_PHM = True

    def __init__(
        self,
        input_size: int,
        bottleneck_size: int,
        *,
        phm_rule: nn.Parameter | None = None,
        phm_dim: int = 4,
        phm_rank: int = 1,
        factorized_phm_W: bool = True,
        factorized_phm_rule: bool = False,
        learn_phm: bool = True,
        phm_c_init: str = "normal",
        phm_bias: bool = True,
        activation: Any = "gelu",
        init_weights_seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        for name in ("bias", "init_weights"):
            if name in options:
                raise TypeError(f"{name} is given; expected none, phm_bias says it or there is one")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            input_size, bottleneck_size, activation=activation, bias=False, **where, **options
        )
        if phm_rule is not None and not isinstance(phm_rule, nn.Parameter):
            raise TypeError(
                f"phm_rule is a {type(phm_rule).__name__}; expected an nn.Parameter or None"
            )
        if phm_rule is not None and tuple(phm_rule.shape) != (phm_dim,) * 3:
            raise ValueError(
                f"phm_rule has shape {tuple(phm_rule.shape)}; expected (n, n, n) with n = phm_dim = {phm_dim}"
            )
        arguments: dict[str, Any] = {
            "phm_dim": phm_dim,
            "phm_rank": phm_rank,
            "factorized_phm_W": factorized_phm_W,
            "shared_phm_rule": phm_rule is not None,
            "factorized_phm_rule": factorized_phm_rule,
            "learn_phm": learn_phm,
            "phm_c_init": phm_c_init,
            "phm_bias": phm_bias,
            **where,
        }
        self.phm_rule = phm_rule
        with seeded(init_weights_seed, self.adapter_up.weight.device):
            self.adapter_down[-2] = PHMLinear(input_size, bottleneck_size, **arguments)
            self.adapter_up = PHMLinear(bottleneck_size, input_size, **arguments)  # type: ignore[assignment]

    @staticmethod
    def new_rule(
        phm_dim: int = 4,
        *,
        phm_c_init: str = "normal",
        phm_init_range: float = 0.0001,
        learn_phm: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Parameter:
        """A rule (n, n, n) for layers to share: N(0, phm_init_range), or with "uniform" within 1."""
        check_c_init(phm_c_init)
        check_finite("phm_init_range", number("phm_init_range", phm_init_range))
        rule = nn.Parameter(torch.empty((phm_dim,) * 3, device=device, dtype=dtype), learn_phm)
        init_rule(rule, phm_c_init, phm_init_range, 1.0)
        return rule

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any] | str,
        input_size: int,
        *,
        layer: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Compacter:
        """As ``BottleneckAdapter.from_config``, of a config with ``phm_layer``, such as "compacter".

        A rule that is shared is made anew: give all layers one by ``layer.phm_rule = first.phm_rule``.
        """
        made = super().from_config(config, input_size, layer=layer, device=device, dtype=dtype)
        assert isinstance(made, Compacter)
        rule = made.phm_rule
        if rule is not None:
            made.phm_rule = nn.Parameter(rule.data.to(device, dtype), rule.requires_grad)
        return made

    @staticmethod
    def _arguments_of(fields: Mapping[str, Any]) -> dict[str, Any]:
        if fields.get("shared_W_phm"):
            raise ValueError(
                "config has shared_W_phm; expected weights that each layer has to itself"
            )
        found = BottleneckAdapter._arguments_of(fields)
        found.pop("init_weights", None)
        names = ("phm_dim", "phm_rank", "factorized_phm_W", "factorized_phm_rule", "learn_phm")
        found.update({n: fields[n] for n in (*names, "phm_c_init", "phm_bias") if n in fields})
        if fields.get("shared_phm_rule", True):
            keys = ("phm_dim", "phm_c_init", "phm_init_range", "learn_phm")
            found["phm_rule"] = Compacter.new_rule(**{k: fields[k] for k in keys if k in fields})
        return found

    def reset_parameters(self, seed: int | None = None) -> None:
        """Draws the projections and the gate again; a rule that is shared stays."""
        super().reset_parameters(seed)

    def _draw(self, seed: int | None) -> None:
        down: Any = self._down
        up: Any = self.adapter_up
        if not isinstance(down, PHMLinear) or not isinstance(up, PHMLinear):
            return super()._draw(seed)  # the base class's, before ours take their places
        with seeded(seed, up.W_left.device if "W_left" in up._parameters else up.W.device):
            down.reset_parameters()
            up.reset_parameters()
            if self.gate is not None:
                nn.init.normal_(self.gate.weight, std=0.02)
                nn.init.zeros_(self.gate.bias)
        return None

    def _weights(self) -> tuple[Tensor | PHM, Tensor | None, Tensor | PHM, Tensor | None]:
        down: Any = self._down
        up: Any = self.adapter_up
        return down.weight(self.phm_rule), down.b, up.weight(self.phm_rule), up.b


def check_c_init(value: Any) -> None:
    """``value`` names one of the distributions that a rule starts from."""
    if value not in _C_INITS:
        expected = " or ".join(map(repr, _C_INITS))
        raise ValueError(f"phm_c_init is {value!r}; expected {expected}")


def init_rule(rule: Tensor, distribution: str, std: float, bound: float) -> None:
    """Draws a rule, or a factor of one."""
    if distribution == "normal":
        nn.init.normal_(rule, std=std)
    else:
        nn.init.uniform_(rule, -bound, bound)
