"""Calls of ``prefix_attention`` that every backend must survive; a case's name says what it guards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrefixInputs:
    """The arguments of one call."""

    operation: ClassVar[str] = "prefix_attention"
    query: Tensor
    key: Tensor
    value: Tensor
    prefix_key: Tensor
    prefix_value: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments."""
        return (self.query, self.key, self.value, self.prefix_key, self.prefix_value)

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments."""
        return self.options


@dataclass(frozen=True)
class PrefixCase:
    """Sizes and layout; ``make`` draws the numbers."""

    name: str
    batch: int
    heads: int
    queries: int
    keys: int
    prefix: int
    head_dim: int
    mask: str | None = None  # "causal", "bool", "float", "rows", "matrix", "none_seen", "infinite"
    shared: bool = True  # one prefix for the batch
    gate: int = 0  # gates of each sample
    layout: str = (
        "model"  # (B, L, H, D) seen as (B, H, L, D), as models have it; "dense"; "strided"
    )
    size: float = 1.0  # of queries: large ones make one key take all

    def __str__(self) -> str:
        return self.name

    def make(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> PrefixInputs:
        """Draws the tensors."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def states(batch: int, length: int) -> Tensor:
            if self.layout == "dense":
                return normal(batch, self.heads, length, self.head_dim).to(device, dtype)
            if self.layout == "strided":
                wide = normal(batch, self.heads, length, 2 * self.head_dim).to(device, dtype)
                return wide[..., ::2]
            return (
                normal(batch, length, self.heads, self.head_dim).to(device, dtype).transpose(1, 2)
            )

        batch, queries, keys = self.batch, self.queries, self.keys
        query = states(batch, queries) * self.size
        options: dict[str, Any] = {}
        shapes = {"rows": (batch, 1, 1, keys), "matrix": (queries, keys)}
        shape = shapes.get(self.mask or "", (batch, 1, queries, keys))
        if self.mask == "causal":
            options["is_causal"] = True
        elif self.mask == "bool":
            options["attn_mask"] = (normal(*shape) > 0).to(device)
        elif self.mask in ("float", "rows", "matrix"):
            options["attn_mask"] = normal(*shape).to(device, dtype)
        elif self.mask == "none_seen":
            options["attn_mask"] = torch.zeros(shape, dtype=torch.bool, device=device)
        elif self.mask == "infinite":
            lowest = torch.full(shape, float("-inf"), dtype=dtype, device=device)
            options["attn_mask"] = torch.where(normal(*shape).to(device) > 0.5, 0.0, lowest)
        if self.gate:
            options["gate"] = torch.sigmoid(normal(batch, self.gate)).to(device, dtype)
        of = 1 if self.shared else batch
        return PrefixInputs(
            query,
            states(batch, keys),
            states(batch, keys),
            states(of, self.prefix),
            states(of, self.prefix),
            options,
        )


CASES = (
    PrefixCase("encoder", 2, 3, 7, 7, 10, 16),
    PrefixCase("rows_of_three_blocks", 2, 2, 130, 70, 30, 64, "rows"),
    PrefixCase("decoding", 2, 2, 1, 40, 30, 64),
    PrefixCase("one_of_each", 1, 1, 1, 1, 1, 1),
    PrefixCase("odd_sizes", 3, 2, 5, 9, 33, 5, "float", shared=False),
    PrefixCase("causal", 2, 2, 70, 70, 3, 24, "causal"),
    PrefixCase("bool_mask", 2, 2, 6, 11, 4, 8, "bool"),
    PrefixCase("mask_of_two_dimensions", 2, 2, 6, 11, 4, 8, "matrix"),
    PrefixCase("nothing_but_the_prefix_seen", 2, 2, 6, 5, 4, 8, "none_seen"),
    PrefixCase("some_rows_see_nothing", 4, 2, 6, 2, 4, 8, "infinite"),
    PrefixCase("one_gate", 3, 2, 8, 8, 10, 16, gate=1),
    PrefixCase("two_gates", 3, 2, 8, 8, 10, 16, gate=2, shared=False),
    PrefixCase("dense", 2, 2, 8, 12, 6, 16, layout="dense"),
    PrefixCase("strided_features", 2, 2, 8, 12, 6, 16, "float", layout="strided"),
    PrefixCase("one_key_takes_all", 2, 2, 8, 12, 6, 16, size=100.0),
)
