"""``LoRALinear``: a frozen linear with LoRA adapters, under the parameter names of PEFT's ``lora.Linear``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from .. import functional


class LoRALinear(nn.Module):
    """A linear layer with a frozen weight and trainable low-rank adapters.

    ``state_dict`` has PEFT's keys (``base_layer.weight``, ``lora_A.<name>.weight``, ``lora_B.<name>.weight``), so a
    checkpoint of ``peft.tuners.lora.Linear`` loads here and the other way round.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        r: rank of the first adapter, 1 to 256.
        lora_alpha: scaling is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``.
        lora_dropout: probability in [0, 1] that an input element is dropped on its way into A, in training.
        bias: whether the frozen layer has a bias.
        lora_bias: whether B has a bias.
        use_rslora: see ``lora_alpha``.
        adapter_name: name of the first adapter.
        device: where the parameters live.
        dtype: dtype of the frozen weight.
        adapter_dtype: dtype of the adapters; None: as ``dtype``. ``torch.float32`` over a half-precision weight is
            allowed.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        *,
        lora_alpha: float = 8.0,
        lora_dropout: float = 0.0,
        bias: bool = True,
        lora_bias: bool = False,
        use_rslora: bool = False,
        adapter_name: str = "default",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._init_base(nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype))
        self.add_adapter(
            adapter_name,
            r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            lora_bias=lora_bias,
            use_rslora=use_rslora,
            dtype=adapter_dtype,
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, r: int = 8, **adapter: object) -> LoRALinear:
        """Wraps an existing linear, sharing and freezing its parameters; keywords as ``add_adapter``'s.

        ``adapter_name`` names the adapter ("default").
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear is a {type(linear).__name__}; expected a torch.nn.Linear")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._init_base(linear)
        name = str(adapter.pop("adapter_name", "default"))
        layer.add_adapter(name, r, **adapter)  # type: ignore[arg-type]
        return layer

    def _init_base(self, linear: nn.Linear) -> None:
        self.base_layer = linear.requires_grad_(False)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # to the type checker what it is to us: the linears by name
        self.lora_A = cast("dict[str, nn.Linear]", nn.ModuleDict())
        self.lora_B = cast("dict[str, nn.Linear]", nn.ModuleDict())
        self.scaling: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.active_adapters: list[str] = []

    def add_adapter(
        self,
        name: str,
        r: int,
        *,
        lora_alpha: float = 8.0,
        lora_dropout: float = 0.0,
        lora_bias: bool = False,
        use_rslora: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Adds an adapter and makes it active beside those that are; arguments as the class's. B starts at zero."""
        if name in self.scaling:
            raise ValueError(f"adapter {name!r} exists already; present: {', '.join(self.scaling)}")
        _check_number("r", r, int)
        _check_number("lora_alpha", lora_alpha, (int, float))
        _check_number("lora_dropout", lora_dropout, (int, float))
        if not 1 <= r <= functional.MAX_RANK:
            raise ValueError(f"r is {r}; expected a rank of 1 to {functional.MAX_RANK}")
        if not 0.0 <= lora_dropout <= 1.0:
            raise ValueError(
                f"lora_dropout is {lora_dropout}; expected a probability between 0 and 1"
            )
        if not math.isfinite(lora_alpha):
            raise ValueError(f"lora_alpha is {lora_alpha}; expected a finite number")
        weight = self.base_layer.weight
        dtype = weight.dtype if dtype is None else dtype
        # both are made before either is kept: a failure leaves the layer as it was
        a = nn.Linear(self.in_features, r, bias=False, device=weight.device, dtype=dtype)
        b = nn.Linear(r, self.out_features, bias=lora_bias, device=weight.device, dtype=dtype)
        self.lora_A[name], self.lora_B[name] = a, b
        self.scaling[name] = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.lora_dropout[name] = lora_dropout
        self.reset_adapter(name)
        self.active_adapters.append(name)

    def reset_adapter(self, name: str) -> None:
        """Draws A again as PEFT does (Kaiming uniform, a = √5) and sets B to zero."""
        nn.init.kaiming_uniform_(self.lora_A[name].weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B[name].weight)
        if self.lora_B[name].bias is not None:
            nn.init.zeros_(self.lora_B[name].bias)

    def set_adapter(self, names: str | Sequence[str]) -> None:
        """Makes exactly these adapters active; their outputs are summed. None active: the frozen linear."""
        names = [names] if isinstance(names, str) else list(names)
        for name in names:
            if name not in self.scaling:
                raise ValueError(
                    f"adapter {name!r} is not known; present: {', '.join(self.scaling)}"
                )
        self.active_adapters = names

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        names = self.active_adapters
        if not names:
            out: Tensor = self.base_layer(x)
            return out
        lora_a = [self.lora_A[name] for name in names]
        lora_b = [self.lora_B[name] for name in names]
        return functional.lora_linear(
            x,
            self.base_layer.weight,
            self.base_layer.bias,
            [a.weight for a in lora_a],
            [b.weight for b in lora_b],
            [self.scaling[name] for name in names],
            lora_bias=[b.bias for b in lora_b],
            dropout_p=[self.lora_dropout[name] for name in names],
            training=self.training,
        )

    def extra_repr(self) -> str:
        """Sizes, and the active adapters with their ranks."""
        ranks = ", ".join(
            f"{name}: r={self.lora_A[name].weight.shape[0]}" for name in self.active_adapters
        )
        return f"in_features={self.in_features}, out_features={self.out_features}, active: {ranks or 'none'}"


def _check_number(name: str, value: object, kind: type | tuple[type, ...]) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        expected = "an integer" if kind is int else "a number"
        raise TypeError(f"{name} is a {type(value).__name__}; expected {expected}")
