"""The inputs of AdapterFusion that tests and benchmarks share; `adapter_workloads.py` has the bottleneck adapter's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import inputs
from .adapter_workloads import HOULSBY, PFEIFFER, PRE_LN, T5, T5_PFEIFFER
from .inputs import Inputs


@dataclass(frozen=True)
class FusionInputs(Inputs):
    """The tensors of one `adapter_fusion` call, and the gradient that comes back to it."""

    operation = "adapter_fusion"
    skip: Tensor | None
    query: Tensor | None
    value_residual: Tensor | None
    down: tuple[Tensor, ...]
    down_bias: tuple[Tensor | None, ...]
    up: tuple[Tensor, ...]
    up_bias: tuple[Tensor | None, ...]
    scaling: tuple[Tensor | float, ...]
    query_weight: Tensor | None
    query_bias: Tensor | None
    key_weight: Tensor | None
    key_bias: Tensor | None
    value_weight: Tensor | None
    pre_weight: Tensor | None
    pre_bias: Tensor | None
    ln_weight: Tensor | None
    ln_bias: Tensor | None
    activation: str
    temperature: float
    pre_eps: float
    eps: float
    dropout_p: float
    skip_in: bool
    residual_x: bool
    residual_skip: bool

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments of `functional.adapter_fusion`."""
        return (self.x, self.down, self.down_bias, self.up, self.up_bias)

    @property
    def attention(self) -> dict[str, Tensor | None]:
        """The attention's matrices, under the names of both the function and the reference."""
        names = ("query_weight", "query_bias", "key_weight", "key_bias", "value_weight")
        return {name: getattr(self, name) for name in names}

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of `functional.adapter_fusion`."""
        residuals = ((self.x, self.residual_x), (self.skip, self.residual_skip))
        return {
            **self.attention,
            "query": self.query,
            "value_residual": self.value_residual,
            "activation": self.activation,
            "scaling": self.scaling,
            "temperature": self.temperature,
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
    def widths(self) -> tuple[int, ...]:
        """The adapters' bottlenecks."""
        return tuple(down.shape[0] for down in self.down)


@dataclass(frozen=True)
class FusionCase:
    """One `adapter_fusion` problem; ``shape`` is the shape of x without its last dimension."""

    name: str
    shape: tuple[int, ...]
    features: int
    widths: tuple[int, ...]
    activation: str = "gelu"
    attention: str = "qkv"  # which matrices there are
    biases: bool = True
    scaling: str = ""  # "one" for (1,), "channel" for (d,), else the number 1; of the first adapter
    query: bool = False
    value_residual: bool = False
    temperature: float = 1.0
    skip_in: bool = False
    residual_x: bool = False
    residual_skip: bool = False
    pre_ln: bool = False
    post_ln: bool = False
    pre_eps: float = 1e-5
    eps: float = 1e-5
    dropout_p: float = 0.0
    layout: str = "contiguous"  # of x, skip, query
    dy_layout: str = "contiguous"
    weight_layout: str = "contiguous"
    param_dtype: torch.dtype | None = None  # None: the dtype of x

    def __str__(self) -> str:
        return self.name

    def make(
        self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
    ) -> FusionInputs:
        """Draw the tensors; the same seed draws the same numbers on every device."""
        generator = torch.Generator().manual_seed(seed)
        d, shape = self.features, (*self.shape, self.features)

        def draw(
            size: tuple[int, ...], std: float = 1.0, layout: str = "contiguous", **more: Any
        ) -> Tensor:
            more = {"dtype": self.param_dtype or dtype, **more}
            return inputs.draw(size, std, layout, device=device, generator=generator, **more)

        def rows(wanted: bool) -> Any:
            return draw(shape, layout=self.layout, dtype=dtype) if wanted else None

        def bias(size: int, wanted: bool = True) -> Any:
            return draw((size,), 0.5) if wanted and self.biases else None

        def factors(size: int, wanted: bool = True) -> Any:
            return draw((size,), 0.25, mean=1.0) if wanted else None

        def matrix(letter: str) -> Any:
            # scores of a few units: an attention that is neither flat nor one
            std = {"q": d**-0.75, "k": d**-0.75, "v": d**-0.5}[letter]
            return draw((d, d), std, self.weight_layout) if letter in self.attention else None

        first = {"one": 1, "channel": d}.get(self.scaling)
        scaling: list[Tensor | float] = [1.0] * len(self.widths)
        if first is not None:
            scaling[0] = factors(first)
        return FusionInputs(
            x=draw(shape, layout=self.layout, dtype=dtype),
            skip=rows(self.skip_in or self.residual_skip),
            query=rows(self.query),
            value_residual=rows(self.value_residual),
            down=tuple(draw((m, d), d**-0.5, self.weight_layout) for m in self.widths),
            down_bias=tuple(bias(m) for m in self.widths),
            up=tuple(draw((d, m), m**-0.5, self.weight_layout) for m in self.widths),
            up_bias=tuple(bias(d) for _ in self.widths),
            scaling=tuple(scaling),
            query_weight=matrix("q"),
            query_bias=bias(d, "q" in self.attention),
            key_weight=matrix("k"),
            key_bias=bias(d, "k" in self.attention),
            value_weight=matrix("v"),
            pre_weight=factors(d, self.pre_ln),
            pre_bias=bias(d, self.pre_ln),
            ln_weight=factors(d, self.post_ln),
            ln_bias=bias(d, self.post_ln),
            dy=draw(shape, layout=self.dy_layout, dtype=dtype),
            activation=self.activation,
            temperature=self.temperature,
            pre_eps=self.pre_eps,
            eps=self.eps,
            dropout_p=self.dropout_p,
            skip_in=self.skip_in,
            residual_x=self.residual_x,
            residual_skip=self.residual_skip,
        )


EVERYTHING: dict[str, Any] = {
    **PFEIFFER,
    "query": True,
    "scaling": "channel",
    "temperature": 2.0,
    "dropout_p": 0.25,
}
# more tokens than the bottlenecks have columns, so that matrices are folded; few do without
BLOCKS = (
    FusionCase("pfeiffer", (3, 13), 40, (8, 8, 8), **PFEIFFER),
    FusionCase("houlsby", (3, 13), 40, (8, 8, 8), **HOULSBY),
    FusionCase("t5", (3, 13), 40, (8, 8, 8), **T5),
    FusionCase("t5_pfeiffer", (3, 13), 40, (8, 8), **T5_PFEIFFER),
    FusionCase("pre_ln_only", (3, 13), 40, (8, 8), **PRE_LN),
    FusionCase("bare", (31,), 40, (8, 8)),
    FusionCase("everything", (3, 13), 40, (12, 3, 8), **EVERYTHING),
    FusionCase("few_tokens", (2, 5), 40, (12, 3, 8), **EVERYTHING),
    FusionCase("few_tokens_static", (5,), 40, (8, 8, 8), attention="qk", **PFEIFFER),
    FusionCase("value_residual", (3, 13), 40, (8, 8), value_residual=True, **EVERYTHING),
)
SHAPES = (
    FusionCase("no_tokens", (0,), 24, (4, 4), **PFEIFFER),
    FusionCase("one_token", (1,), 24, (4, 4), **PFEIFFER),
    FusionCase("one_dim", (), 24, (4, 4), attention="", **PFEIFFER),
    FusionCase("odd", (19,), 37, (3, 1, 5, 2), **PFEIFFER),
    FusionCase("one_adapter", (19,), 24, (8,), **PFEIFFER),
    FusionCase("many_adapters", (50,), 24, (1, 2, 3, 4, 5, 6, 7, 8), **HOULSBY),
    FusionCase("four_dims", (2, 3, 2, 3), 24, (4, 4), **HOULSBY),
    FusionCase("past_one_tile", (133,), 72, (33, 16), **PFEIFFER),
)
FLAGS = (
    FusionCase("static", (3, 13), 40, (8, 8), attention="qk", **PFEIFFER),
    FusionCase("no_query", (3, 13), 40, (8, 8), attention="kv", **PFEIFFER),
    FusionCase("no_key", (3, 13), 40, (8, 8), attention="qv", **PFEIFFER),
    FusionCase("no_matrix", (3, 13), 40, (8, 8), attention="", **PFEIFFER),
    FusionCase("no_biases", (3, 13), 40, (8, 8), biases=False, **PFEIFFER),
    FusionCase("scaling_one", (3, 13), 40, (8, 8), scaling="one", **HOULSBY),
    FusionCase("relu", (3, 13), 40, (8, 8), "relu", **HOULSBY),
    FusionCase("warm", (3, 13), 40, (8, 8), temperature=50.0, **HOULSBY),
    FusionCase("dropout", (3, 13), 40, (8, 8), dropout_p=0.5, **HOULSBY),
    FusionCase("dropout_all", (3, 13), 40, (8, 8), dropout_p=1.0, **HOULSBY),
)
STRIDES = tuple(
    FusionCase(
        f"{layout}_rows", (3, 8), 40, (8, 3), **{**PFEIFFER, "query": True, "layout": layout}
    )
    for layout in ("sliced", "strided_rows", "transposed", "permuted", "expanded")
) + (
    FusionCase("dy_transposed", (3, 8), 40, (8, 3), dy_layout="transposed", **PFEIFFER),
    FusionCase("dy_constant", (3, 8), 40, (8, 3), dy_layout="constant", **PFEIFFER),
    FusionCase("weight_transposed", (3, 8), 40, (8, 3), weight_layout="transposed", **PFEIFFER),
    FusionCase("weight_sliced", (3, 8), 40, (8, 3), weight_layout="sliced", **PFEIFFER),
)
MIXED_DTYPE = tuple(
    FusionCase(f"fp32_parameters_{name}", (3, 13), 40, (8, 3), param_dtype=torch.float32, **block)
    for name, block in (("pfeiffer", PFEIFFER), ("everything", EVERYTHING))
)

CASES = (*BLOCKS, *SHAPES, *FLAGS, *STRIDES)
"""What every backend meets in every dtype it serves."""
