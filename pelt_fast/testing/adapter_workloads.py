"""The inputs of the bottleneck adapter that tests and benchmarks share; `workloads.py` has LoRA's.

Names are those of the operator: `skip` is the second tensor of x's shape, wherever it is added. Up is
never zero: at the zero that adapters may start from, all gradients below it vanish and any backward looks right.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import inputs
from .inputs import Inputs

NAMES = (
    "x",
    "skip",
    "down",
    "down_bias",
    "up",
    "up_bias",
    "scale",
    "gate",
    "pre_weight",
    "pre_bias",
    "ln_weight",
    "ln_bias",
)
"""The tensors that may get a gradient, in the order of the operator's results."""


@dataclass(frozen=True)
class BlockInputs(Inputs):
    """What an adapter's call has besides its projections."""

    names: ClassVar[tuple[str, ...]]  # of the tensors, in the order of the operator
    skip: Tensor | None
    down_bias: Tensor | None
    up_bias: Tensor | None
    scale: Tensor | None
    gate: Tensor | None  # of x's dimensions, broadcastable to (..., 1)
    pre_weight: Tensor | None
    pre_bias: Tensor | None
    ln_weight: Tensor | None
    ln_bias: Tensor | None
    activation: str
    scaling: float
    pre_eps: float
    eps: float
    dropout_p: float
    skip_in: bool
    residual_x: bool
    residual_skip: bool

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of `functional.bottleneck_adapter`."""
        residuals = ((self.x, self.residual_x), (self.skip, self.residual_skip))
        return {
            "activation": self.activation,
            "scaling": self.scaling if self.scale is None else self.scale,
            "gate": self.gate,
            "residual": [tensor for tensor, added in residuals if added] or None,
            "skip": self.skip if self.skip_in else None,
            "pre_ln_weight": self.pre_weight,
            "pre_ln_bias": self.pre_bias,
            "pre_ln_eps": self.pre_eps,
            "ln_weight": self.ln_weight,
            "ln_bias": self.ln_bias,
            "eps": self.eps,
            "dropout_p": self.dropout_p,
            "training": self.dropout_p > 0,
        }

    @property
    def tokens(self) -> int:
        """Rows of x, all leading dimensions together."""
        return math.prod(self.x.shape[:-1])

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        """What the operator and the backends take, in the order of ``names``: x and skip as rows (T, d), gate (T,)."""
        values = {name: getattr(self, name) for name in self.names}
        for name in ("x", "skip"):
            if values[name] is not None:
                rows = values[name].reshape(self.tokens, self.x.shape[-1])
                values[name] = rows if rows.stride(1) == 1 else rows.contiguous()
        if self.gate is not None:
            values["gate"] = self.gate.expand(*self.x.shape[:-1], 1).reshape(-1)
        return tuple(values.values())

    @property
    def settings(self) -> tuple[Any, ...]:
        """What follows the tensors and the seed among the operator's arguments."""
        numbers = (self.activation, self.scaling, self.pre_eps, self.eps, self.dropout_p)
        return (*numbers, self.skip_in, self.residual_x, self.residual_skip)


@dataclass(frozen=True)
class AdapterInputs(BlockInputs):
    """The tensors of one `bottleneck_adapter` call, and the gradient that comes back to it."""

    operation = "bottleneck_adapter"
    names = NAMES
    down: Tensor
    up: Tensor

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments of `functional.bottleneck_adapter`."""
        return (self.x, self.down, self.down_bias, self.up, self.up_bias)


@dataclass(frozen=True)
class AdapterCase:
    """One `bottleneck_adapter` problem; ``shape`` is the shape of x without its last dimension."""

    name: str
    shape: tuple[int, ...]
    features: int
    bottleneck: int
    activation: str = "gelu"
    down_bias: bool = True
    up_bias: bool = True
    scaling: float = 1.0
    scale: str = ""  # a tensor in place of the number: "one" for (1,), "channel" for (d,)
    gate: str = ""  # "token", "sample"
    skip_in: bool = False
    residual_x: bool = False
    residual_skip: bool = False
    pre_ln: bool = False
    post_ln: bool = False
    ln_bias: bool = True
    pre_eps: float = 1e-5
    eps: float = 1e-5
    dropout_p: float = 0.0
    x_layout: str = "contiguous"
    skip_layout: str = "contiguous"
    dy_layout: str = "contiguous"
    weight_layout: str = "contiguous"
    param_dtype: torch.dtype | None = None  # None: the dtype of x
    x_std: float = 1.0  # of skip too
    x_mean: float = 0.0
    up_std: float | None = None  # None: 1 / sqrt(bottleneck)

    def __str__(self) -> str:
        return self.name

    @property
    def tokens(self) -> int:
        """Rows of x, all leading dimensions together."""
        return math.prod(self.shape)

    def make(
        self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
    ) -> AdapterInputs:
        """Draw the tensors; the same seed draws the same numbers on every device."""
        generator = torch.Generator().manual_seed(seed)
        d, m, shape = self.features, self.bottleneck, (*self.shape, self.features)

        def draw(
            size: tuple[int, ...], std: float = 1.0, layout: str = "contiguous", **more: Any
        ) -> Tensor:
            more = {"dtype": self.param_dtype or dtype, **more}
            return inputs.draw(size, std, layout, device=device, generator=generator, **more)

        def factors(size: tuple[int, ...]) -> Tensor:
            return draw(size, 0.25, mean=1.0)

        rows: dict[str, Any] = {"std": self.x_std, "mean": self.x_mean, "dtype": dtype}
        has_skip = self.skip_in or self.residual_skip
        up_std = m**-0.5 if self.up_std is None else self.up_std
        samples = (*self.shape[:1], *[1] * len(self.shape[1:]), 1)
        gates = {"token": (*self.shape, 1), "sample": samples}
        return AdapterInputs(
            x=draw(shape, layout=self.x_layout, **rows),
            skip=draw(shape, layout=self.skip_layout, **rows) if has_skip else None,
            down=draw((m, d), d**-0.5 / self._input_std, self.weight_layout),
            down_bias=draw((m,), 0.5) if self.down_bias else None,
            up=draw((d, m), up_std, self.weight_layout),
            up_bias=draw((d,), 0.5 * self.x_std) if self.up_bias else None,
            scale=factors((1 if self.scale == "one" else d,)) if self.scale else None,
            gate=draw(gates[self.gate]).sigmoid() if self.gate else None,
            pre_weight=factors((d,)) if self.pre_ln else None,
            pre_bias=draw((d,), 0.5) if self.pre_ln and self.ln_bias else None,
            ln_weight=factors((d,)) if self.post_ln else None,
            ln_bias=draw((d,), 0.5) if self.post_ln and self.ln_bias else None,
            dy=draw(shape, layout=self.dy_layout, dtype=dtype),
            activation=self.activation,
            scaling=self.scaling,
            pre_eps=self.pre_eps,
            eps=self.eps,
            dropout_p=self.dropout_p,
            skip_in=self.skip_in,
            residual_x=self.residual_x,
            residual_skip=self.residual_skip,
        )

    @property
    def _input_std(self) -> float:
        """Keeps q near 1 whatever x's size."""
        return 1.0 if self.pre_ln else self.x_std


def _flags(names: Iterable[str]) -> dict[str, Any]:
    return dict.fromkeys(names, True)


# The blocks of the `adapters` library; see `functional.bottleneck_adapter`.
PFEIFFER: dict[str, Any] = {
    "skip_in": True,
    "residual_x": True,
    "residual_skip": True,
    "pre_ln": True,
    "post_ln": True,
    "pre_eps": 1e-12,  # BERT's
    "eps": 1e-12,
}
HOULSBY: dict[str, Any] = {"residual_x": True, "residual_skip": True, "post_ln": True}
PARALLEL: dict[str, Any] = {**HOULSBY, "scaling": 4.0, "activation": "relu"}
T5: dict[str, Any] = {"residual_x": True, "activation": "relu"}
T5_PFEIFFER: dict[str, Any] = {"skip_in": True, "residual_x": True, "residual_skip": True}
PRE_LN: dict[str, Any] = {"pre_ln": True, "residual_x": True}
POST_LN: dict[str, Any] = {"post_ln": True, "residual_x": True}
EVERYTHING: dict[str, Any] = {**PFEIFFER, "scale": "channel", "gate": "token", "dropout_p": 0.25}

BLOCKS = (
    AdapterCase("pfeiffer", (2, 9), 40, 12, **PFEIFFER),
    AdapterCase("houlsby", (2, 9), 40, 12, **HOULSBY),
    AdapterCase("parallel", (2, 9), 40, 12, **PARALLEL),
    AdapterCase("t5", (2, 9), 40, 12, **T5),
    AdapterCase("t5_pfeiffer", (2, 9), 40, 12, **T5_PFEIFFER),
    AdapterCase("pre_ln_only", (2, 9), 40, 12, **PRE_LN),
    AdapterCase("post_ln_only", (2, 9), 40, 12, **POST_LN),
    AdapterCase("bare", (2, 9), 40, 12),
    AdapterCase("everything", (2, 9), 40, 12, **EVERYTHING),
)
SHAPES = (
    AdapterCase("no_tokens", (0,), 24, 8, **PFEIFFER, gate="token", scale="one"),
    AdapterCase("one_token", (1,), 24, 8, **PFEIFFER),
    AdapterCase("one_dim", (), 24, 8, **PFEIFFER),
    AdapterCase("odd", (7,), 37, 3, **PFEIFFER),
    AdapterCase("three_dims", (2, 5), 24, 8, **HOULSBY),
    AdapterCase("four_dims", (2, 3, 2), 24, 8, **PFEIFFER),
    AdapterCase("empty_batch", (2, 0, 3), 24, 8, **EVERYTHING),
    AdapterCase("all_ones", (1,), 1, 1, **T5),
    AdapterCase("all_ones_normalised", (1,), 1, 1, **HOULSBY),  # a variance of nothing
    AdapterCase("one_feature", (5,), 1, 16, **T5_PFEIFFER),
    AdapterCase("bottleneck_1", (9,), 37, 1, **PFEIFFER),
    AdapterCase("bottleneck_7", (9,), 64, 7, **HOULSBY),
    AdapterCase("bottleneck_wider_than_x", (9,), 8, 129, **PFEIFFER),
    AdapterCase("past_one_tile", (67,), 131, 65, **PFEIFFER),
    AdapterCase("whole_tiles", (64,), 128, 64, **PFEIFFER),
    AdapterCase("many_tokens", (515,), 40, 16, **HOULSBY),
    AdapterCase("base_model", (17,), 768, 48, **PFEIFFER),
    AdapterCase("wide", (5,), 1030, 129, **EVERYTHING),
    AdapterCase("wide_bottleneck", (9,), 100, 512, **HOULSBY),
)
ACTIVATIONS = tuple(
    AdapterCase(f"activation_{name}", (17,), 24, 16, name, **HOULSBY, x_std=1.5)
    for name in (
        *("relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid"),
        *("leaky_relu", "quick_gelu", "relu2", "relu6", "mish", "linear"),
    )
)
# every way to add x and skip, with and without each layernorm
_TERMS = ("skip_in", "residual_x", "residual_skip", "pre_ln", "post_ln")
TERMS = tuple(
    AdapterCase("adds_" + ("_".join(on) or "nothing"), (6,), 24, 8, **_flags(on))
    for n in range(len(_TERMS) + 1)
    for on in combinations(_TERMS, n)
)
BIASES = tuple(
    AdapterCase(
        f"biases_{'down' * down}{'up' * up}{'ln' * ln}" if down + up + ln else "no_bias",
        *((6,), 24, 8),
        **PFEIFFER,
        down_bias=bool(down),
        up_bias=bool(up),
        ln_bias=bool(ln),
    )
    for down, up, ln in product((0, 1), repeat=3)
)
FACTORS = (
    AdapterCase("scaling_0", (6,), 24, 8, **HOULSBY, scaling=0.0),
    AdapterCase("scaling_negative", (6,), 24, 8, **T5, scaling=-2.0),
    AdapterCase("scale_one", (2, 5), 24, 8, **PFEIFFER, scale="one"),
    AdapterCase("scale_channel", (2, 5), 24, 8, **HOULSBY, scale="channel"),
    AdapterCase("scale_one_alone", (2, 5), 24, 8, scale="one"),
    AdapterCase("scale_one_of_one", (5,), 1, 8, scale="one", residual_x=True),
    AdapterCase("gate_token", (2, 5), 24, 8, **HOULSBY, gate="token"),
    AdapterCase("gate_sample", (3, 4), 24, 8, **PFEIFFER, gate="sample"),
    AdapterCase("gate_one_dim", (), 24, 8, **T5, gate="token"),
    AdapterCase("gate_and_scale", (2, 3, 2), 24, 8, **HOULSBY, gate="sample", scale="one"),
    AdapterCase("gate_alone", (7,), 24, 8, gate="token"),
)
STRIDES = (
    *(
        AdapterCase(f"{name}_{layout}", (4, 6), 40, 12, **{**block, f"{name}_layout": layout})
        for name, block in (("x", PFEIFFER), ("skip", HOULSBY), ("dy", T5_PFEIFFER))
        for layout in ("sliced", "strided_rows", "transposed", "permuted", "expanded")
    ),
    AdapterCase("dy_constant", (4, 6), 40, 12, dy_layout="constant", **PFEIFFER),
    AdapterCase("dy_constant_alone", (16,), 40, 12, dy_layout="constant"),
    AdapterCase(
        *("all_expanded", (16,), 40, 12),
        x_layout="expanded",
        skip_layout="expanded",
        dy_layout="expanded",
        **PFEIFFER,
    ),
    AdapterCase("weight_transposed", (6,), 40, 12, weight_layout="transposed", **PFEIFFER),
    AdapterCase("weight_sliced", (6,), 40, 12, weight_layout="sliced", **HOULSBY),
)
DROPOUT = (
    AdapterCase("dropout", (33,), 40, 12, **HOULSBY, dropout_p=0.1),
    AdapterCase("dropout_odd", (7,), 37, 3, **PFEIFFER, dropout_p=0.5),
    AdapterCase("dropout_all", (7,), 24, 8, **PFEIFFER, dropout_p=1.0),
    AdapterCase("dropout_alone", (7,), 24, 8, dropout_p=0.5),
    AdapterCase("dropout_strided_x", (4, 6), 30, 8, **T5, dropout_p=0.3, x_layout="transposed"),
    AdapterCase(
        "dropout_with_factors", (5, 3), 24, 8, **HOULSBY, dropout_p=0.3, gate="sample", scale="one"
    ),
)
NUMBERS = (
    # eps is a good part of the variance of these rows
    AdapterCase(
        "small_rows",
        (9,),
        64,
        8,
        **{**PFEIFFER, "pre_eps": 1e-5, "eps": 1e-6},
        x_std=3e-3,
        up_std=1e-3,
    ),
    # deviations are small against the mean
    AdapterCase("far_from_zero", (9,), 64, 8, **PFEIFFER, x_mean=32.0),
    # everything that a row can hold is the same: dx is nearly zero, and made of large terms
    AdapterCase("two_features", (9,), 2, 8, **HOULSBY),
)
MIXED_DTYPE = tuple(
    replace(case, name=f"fp32_parameters_{case.name}", param_dtype=torch.float32)
    for case in (
        *(c for c in BLOCKS if c.name in ("pfeiffer", "houlsby", "t5", "everything")),
        *(c for c in SHAPES if c.name in ("odd", "past_one_tile", "bottleneck_1")),
        *(c for c in FACTORS if c.name in ("gate_and_scale", "scale_one")),
        *(c for c in DROPOUT if c.name == "dropout_with_factors"),
    )
)
# The squares of these rows and the sums over them pass fp16's 65504; what is stored does not.
FP16_LARGE = AdapterCase("fp16_large", (9,), 768, 16, **PFEIFFER, x_std=4e3, up_std=500.0)
# w = a Uᵀ passes it before the scaling and is far below it after.
FP16_OVERFLOW = AdapterCase("fp16_overflow", (9,), 64, 64, **HOULSBY, scaling=2.0**-10, up_std=8e3)

CASES = (*BLOCKS, *SHAPES, *ACTIVATIONS, *TERMS, *BIASES, *FACTORS, *STRIDES, *DROPOUT, *NUMBERS)
"""What every backend meets in every dtype it serves."""
