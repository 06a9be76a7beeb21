"""The inputs of batched multi-LoRA that tests and benchmarks share; `workloads.py` has LoRA's.

The outputs of several projections, and the gradient that comes back to them, lie side by side in one tensor
(..., out_0 + out_1 + ...). Where adapters have ranks of their own, what A and B hold beyond them is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..segments import MultiAdapterPlan
from . import inputs
from .inputs import Inputs

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class MultiLoRAInputs(Inputs):
    """The tensors of one `multi_lora` call, and the gradient that comes back to it; one entry for each projection."""

    operation = "multi_lora"
    lora_a: tuple[Tensor, ...]
    lora_b: tuple[Tensor, ...]
    base: tuple[Tensor | None, ...]
    row_scale: Tensor | None
    plan: MultiAdapterPlan
    ids: tuple[int, ...]  # as the plan was given them
    ranks: tuple[tuple[int, ...] | None, ...]  # None: R; else as they are passed, some beyond R
    scaling: tuple[Numbers, ...]
    dropout_p: float

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments of `functional.multi_lora`."""
        wide = torch.promote_types(self.x.dtype, torch.float32)
        scaling = [torch.tensor(s, dtype=wide, device=self.x.device) for s in self.scaling]
        return (self.x, self.lora_a, self.lora_b, self.plan, scaling)

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of `functional.multi_lora`."""
        ranks = [None if r is None else torch.tensor(r, device=self.x.device) for r in self.ranks]
        return {
            "ranks": None if self.ranks == (None,) * len(self.ranks) else ranks,
            "base_out": None if None in self.base else self.base,
            "row_scale": self.row_scale,
            "dropout_p": self.dropout_p,
            "training": self.dropout_p > 0,
        }

    @property
    def tokens(self) -> int:
        """Rows of x, all leading dimensions together."""
        return math.prod(self.x.shape[:-1])

    @property
    def outs(self) -> list[int]:
        """The features of each output."""
        return [b.shape[1] for b in self.lora_b]

    @property
    def used_ranks(self) -> list[list[int]]:
        """The rank of each adapter in each projection, within [0, R]."""
        found = []
        for a, ranks in zip(self.lora_a, self.ranks, strict=True):
            most = a.shape[1]
            given = (most,) * a.shape[0] if ranks is None else ranks
            found.append([min(max(r, 0), most) for r in given])
        return found

    @property
    def row_scales(self) -> Tensor | None:
        """One for each row, (T,)."""
        if self.row_scale is None:
            return None
        return self.row_scale.expand(*self.x.shape[:-1], 1).reshape(-1)

    def with_ids(self, ids: tuple[int, ...]) -> MultiLoRAInputs:
        """The same tensors, every token with another adapter."""
        plan = MultiAdapterPlan(ids, self.plan.num_adapters, device=self.x.device)
        return replace(self, plan=plan, ids=ids)

    def rows(self, index: list[int]) -> MultiLoRAInputs:
        """The call of these rows alone, in this order; x (n, in)."""
        where = torch.tensor(index, dtype=torch.int64, device=self.x.device)

        def pick(t: Tensor) -> Tensor:
            return t.reshape(self.tokens, t.shape[-1])[where]

        scales = self.row_scales
        found = replace(
            self,
            x=pick(self.x),
            dy=pick(self.dy),
            base=tuple(None if b is None else pick(b) for b in self.base),
            row_scale=None if scales is None else scales[where, None],
        )
        return found.with_ids(tuple(self.ids[t] for t in index))


def _fp32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def _cycle(values: list[int], tokens: int) -> list[int]:
    return [values[t % len(values)] for t in range(tokens)]


IDS: dict[str, Callable[[int, int, Callable[..., list[int]]], list[int]]] = {
    "mixed": lambda _, adapters, random: random(-1, adapters),
    "none": lambda tokens, _, random: [-1] * tokens,
    "identical": lambda tokens, adapters, random: [adapters - 1] * tokens,
    "distinct": lambda tokens, adapters, random: _cycle(list(range(adapters))[::-1], tokens),
    "sorted": lambda _, adapters, random: sorted(random(0, adapters)),
    # empty buckets between full ones, and before the first
    "gaps": lambda _, adapters, random: [min(2 * (g // 2) + 1, adapters - 1) for g in random(0, adapters - 1)],
    # one token of the last, all others of the first
    "lone": lambda tokens, adapters, random: [adapters - 1] + [0] * (tokens - 1),
    "outside": lambda tokens, adapters, random: _cycle(
        [adapters - 1, adapters, -1, 0, -(2**40), 2**40, -adapters, adapters + 1, 0], tokens
    ),
}  # fmt: skip
"""How tokens name adapters: a list from their number, the number of adapters, and ``random(low, high)``."""


@dataclass(frozen=True)
class MultiLoRACase:
    """One `multi_lora` problem; ``shape`` is the shape of x without its last dimension."""

    name: str
    shape: tuple[int, ...]
    in_features: int
    out_features: tuple[int, ...] = (40,)
    adapters: int = 3
    rank: tuple[int, ...] = (8,)  # of each projection, or one for all
    ids: str = "mixed"
    mixed_ranks: bool = False
    base: bool = True
    row_scale: str = ""  # "token", "sample", "one", "number" (of no dimension), "zero"
    dropout_p: float = 0.0
    scaling: Numbers = (0.5, 4 / 3, -0.25)  # repeated for more adapters, rounded to fp32
    x_layout: str = "contiguous"
    dy_layout: str = "contiguous"
    base_layout: str = "contiguous"  # or "fused": slices of one tensor
    a_layout: str = "contiguous"
    b_layout: str = "contiguous"  # or "rank_major"
    adapter_dtype: torch.dtype | None = None  # None: the dtype of x
    scale_dtype: torch.dtype | None = None  # of the row scale; None: the dtype of x
    x_std: float = 1.0
    lora_a_std: float | None = None  # None: 1 / sqrt(in_features)
    lora_b_std: float | None = None  # None: 1 / sqrt(R)

    def __str__(self) -> str:
        return self.name

    @property
    def tokens(self) -> int:
        """Rows of x, all leading dimensions together."""
        return math.prod(self.shape)

    def make(
        self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
    ) -> MultiLoRAInputs:
        """Draw the tensors; the same seed draws the same numbers on every device."""
        generator = torch.Generator().manual_seed(seed)
        n, count, columns = len(self.out_features), self.adapters, self.in_features
        most = self.rank * n if len(self.rank) == 1 else self.rank

        def draw(shape: tuple[int, ...], std: float = 1.0, layout: str = "contiguous") -> Tensor:
            return inputs.draw(shape, std, layout, dtype, device, generator)

        def adapter(shape: tuple[int, ...], std: float, layout: str) -> Tensor:
            wanted = self.adapter_dtype or dtype
            if layout == "rank_major":
                turned = (shape[0], shape[2], shape[1])
                drawn = inputs.draw(turned, std, "contiguous", wanted, device, generator)
                return drawn.transpose(1, 2)
            return inputs.draw(shape, std, layout, wanted, device, generator)

        def random(low: int, high: int) -> list[int]:
            drawn: list[int] = torch.randint(
                low, max(high, low + 1), (self.tokens,), generator=generator
            ).tolist()
            return drawn

        ids = tuple(IDS[self.ids](self.tokens, count, random)) if self.tokens else ()
        a_std = columns**-0.5 if self.lora_a_std is None else self.lora_a_std
        lora_a = tuple(adapter((count, r, columns), a_std, self.a_layout) for r in most)
        lora_b = tuple(
            adapter((count, out, r), self.lora_b_std or r**-0.5, self.b_layout)
            for out, r in zip(self.out_features, most, strict=True)
        )
        found = MultiLoRAInputs(
            x=draw((*self.shape, columns), self.x_std, self.x_layout),
            dy=draw((*self.shape, sum(self.out_features)), layout=self.dy_layout),
            lora_a=lora_a,
            lora_b=lora_b,
            base=self._bases(draw),
            row_scale=self._row_scale(device, dtype, generator),
            plan=MultiAdapterPlan(ids, count, device=device),
            ids=ids,
            ranks=tuple(
                self._ranks(i, r) if self.mixed_ranks else None for i, r in enumerate(most)
            ),
            scaling=tuple(
                tuple(_fp32((1 + i) * self.scaling[g % len(self.scaling)]) for g in range(count))
                for i in range(n)
            ),
            dropout_p=self.dropout_p,
        )
        for a, b, ranks in zip(lora_a, lora_b, found.used_ranks, strict=True):
            for g, rank in enumerate(ranks if self.mixed_ranks else []):
                a[g, rank:] = math.nan
                b[g, :, rank:] = math.nan
        return found

    def _ranks(self, projection: int, most: int) -> tuple[int, ...]:
        """Some below R, 0 among them, and some that have to be clamped."""
        of_adapters = (max(1, most // 2), most, 0, 1, most + 5, -3, max(1, most - 1))
        return tuple(of_adapters[(g + projection) % 7] for g in range(self.adapters))

    def _bases(self, draw: Callable[..., Tensor]) -> tuple[Tensor | None, ...]:
        if not self.base:
            return (None,) * len(self.out_features)
        if self.base_layout == "fused":
            return draw((*self.shape, sum(self.out_features))).split(self.out_features, -1)
        return tuple(draw((*self.shape, out), layout=self.base_layout) for out in self.out_features)

    def _row_scale(
        self, device: str | torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> Tensor | None:
        if not self.row_scale:
            return None
        shape = {
            "token": (*self.shape, 1),
            "zero": (*self.shape, 1),
            "sample": (*self.shape[:1], *[1] * len(self.shape[1:]), 1),
            "one": (1,),
            "number": (),
        }[self.row_scale]
        wanted = self.scale_dtype or dtype
        scale = inputs.draw((*shape, 1), 0.5, "contiguous", wanted, device, generator, 1.0)[..., 0]
        if self.row_scale == "zero":
            scale.reshape(-1)[::2] = 0
        return scale


QKV = (40, 24, 24)
EVERYTHING: dict[str, Any] = {
    "out_features": (40, 7, 24),
    "rank": (8, 3, 16),
    "adapters": 5,
    "mixed_ranks": True,
    "row_scale": "token",
    "dropout_p": 0.25,
}

SHAPES = (
    MultiLoRACase("no_tokens", (0,), 24),
    MultiLoRACase("empty_batch", (2, 0, 3), 24, **EVERYTHING),
    MultiLoRACase("one_token", (1,), 24, ids="identical"),
    MultiLoRACase("one_token_of_none", (1,), 24, ids="none"),
    MultiLoRACase("one_dim", (), 24, ids="identical", row_scale="number"),
    MultiLoRACase("odd", (7,), 13, (29,), rank=(3,)),
    MultiLoRACase("three_dims", (3, 5), 24),
    MultiLoRACase("four_dims", (2, 3, 2), 24, QKV, mixed_ranks=True),
    MultiLoRACase("all_ones", (1,), 1, (1,), 1, (1,), "identical"),
    MultiLoRACase("few_features", (5,), 3, (2,)),
    MultiLoRACase("wide_in", (9,), 515, (6,), rank=(3,)),
    MultiLoRACase("wide_out", (9,), 6, (515,), rank=(3,)),
    MultiLoRACase("past_one_tile", (67,), 129, (131,), rank=(16,), ids="identical"),
    MultiLoRACase("whole_tiles", (64,), 128, (192,), 1, (16,), "identical"),
    MultiLoRACase("many_tokens", (515,), 40, (56,), 2),
    MultiLoRACase("past_one_chunk", (1101,), 16, (24,), 2, (4,), "lone"),
    MultiLoRACase("hidden_2049", (5,), 2049, (2049,), mixed_ranks=True),
)
ADAPTERS = tuple(
    MultiLoRACase(f"{count}_adapters", (19,), 24, adapters=count, mixed_ranks=mixed)
    for count, mixed in ((1, False), (3, False), (8, True), (128, True))
)
ASSIGNED = tuple(
    MultiLoRACase(f"ids_{ids}", (35,), 24, (40, 24), 6, ids=ids, mixed_ranks=ids == "gaps")
    for ids in IDS
)
RANKS = (
    *(
        MultiLoRACase(f"rank_{rank}", (19,), 72, (56,), rank=(rank,))
        for rank in (1, 3, 8, 16, 64, 129, 256)
    ),
    *(
        MultiLoRACase(f"mixed_ranks_{rank}", (29,), 40, (56,), 7, (rank,), mixed_ranks=True)
        for rank in (1, 3, 16, 129)
    ),
)
PROJECTIONS = (
    MultiLoRACase("qkv", (23,), 40, QKV, 4),
    MultiLoRACase("qkv_fused_base", (23,), 40, QKV, 4, base_layout="fused"),
    MultiLoRACase("gate_up", (23,), 40, (56, 56), 4, (8, 16)),
    MultiLoRACase("each_its_own_rank", (23,), 40, (1, 65, 24), 4, (1, 17, 64), mixed_ranks=True),
    MultiLoRACase("everything", (37,), 40, **EVERYTHING),
)
FACTORS = (
    MultiLoRACase("no_base", (11,), 24, base=False),
    MultiLoRACase("no_base_no_adapter", (5,), 24, base=False, ids="none", row_scale="token"),
    MultiLoRACase("zero_scaling", (11,), 24, scaling=(0.0, 1.0)),
    MultiLoRACase("scale_token", (4, 6), 24, row_scale="token"),
    MultiLoRACase("scale_sample", (4, 6), 24, QKV, row_scale="sample"),
    MultiLoRACase("scale_one", (4, 6), 24, row_scale="one"),
    MultiLoRACase("scale_number", (4, 6), 24, row_scale="number"),
    MultiLoRACase("scale_zero", (11,), 24, row_scale="zero", base=False),
    MultiLoRACase("scale_fp32", (11,), 24, row_scale="token", scale_dtype=torch.float32),
    MultiLoRACase("scale_bf16", (4, 6), 24, row_scale="sample", scale_dtype=torch.bfloat16),
)
STRIDES = (
    *(
        MultiLoRACase(f"{name}_{layout}", (4, 6), 40, (24,), **{f"{name}_layout": layout})  # type: ignore[arg-type]
        for name in ("x", "dy", "base")
        for layout in ("sliced", "strided_rows", "transposed", "permuted", "expanded")
    ),
    MultiLoRACase("dy_constant", (4, 6), 40, (24, 8), dy_layout="constant"),
    MultiLoRACase("x_and_dy_expanded", (16,), 40, x_layout="expanded", dy_layout="expanded"),
    *(
        MultiLoRACase(
            f"{name}_{layout}", (13,), 40, (24,), 4, mixed_ranks=mixed, **{f"{name}_layout": layout}  # type: ignore[arg-type]
        )
        for name, layout, mixed in (
            ("a", "sliced", True),
            ("a", "transposed", True),
            ("a", "permuted", False),
            ("a", "expanded", False),
            ("b", "sliced", True),
            ("b", "rank_major", True),
            ("b", "permuted", True),
            ("b", "expanded", False),
        )
    ),
)  # fmt: skip
DROPOUT = (
    MultiLoRACase("dropout", (33,), 40, (24,), dropout_p=0.1),
    MultiLoRACase("dropout_odd", (7,), 13, (29, 3), rank=(3,), dropout_p=0.5),
    MultiLoRACase("dropout_all", (7,), 24, dropout_p=1.0),
    MultiLoRACase("dropout_strided_x", (4, 6), 30, x_layout="transposed", dropout_p=0.3),
    MultiLoRACase("dropout_scaled", (4, 6), 24, QKV, row_scale="sample", dropout_p=0.3),
)
MIXED_DTYPE = tuple(
    replace(case, name=f"fp32_adapters_{case.name}", adapter_dtype=torch.float32)
    for case in (
        *(SHAPES[5], SHAPES[7], SHAPES[12], SHAPES[15], PROJECTIONS[3], PROJECTIONS[4]),
        *(FACTORS[4], STRIDES[-3], DROPOUT[1]),
    )
)
# s Bᵀ passes fp16's 65504 before it is scaled, and so do s and s Bᵀ times the row scale; s and the result do not.
FP16_OVERFLOW = MultiLoRACase(
    *("near_overflow", (33,), 64, (40,), 2),
    row_scale="token",
    scaling=(2.0**-8, 2.0**-9),
    x_std=64.0,
    lora_a_std=33.0,
    lora_b_std=2.0,
    b_layout="rank_major",
)

CASES = (*SHAPES, *ADAPTERS, *ASSIGNED, *RANKS, *PROJECTIONS, *FACTORS, *STRIDES, *DROPOUT)
"""What every backend meets in every dtype it serves."""
