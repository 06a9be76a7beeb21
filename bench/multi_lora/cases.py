"""The rows of batched multi-LoRA: shapes, how the tokens of a batch name their adapters, a large stack."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pelt_fast.testing.multi_lora_workloads import MultiLoRACase as Workload

from ..case import DTYPES, Case

RANK = 16
SCALING = (2.0, 1.0, 0.5)
SHAPES = ((64, 32, 768, 768), (2048, 8, 768, 768), (64, 32, 4096, 4096))
"""Tokens, adapters, in, out."""
MIXED = (64, 64, 768, 768)
EQUAL_BYTES = {"identical": 128, "uniform": 16, "distinct": 2}
"""Ranks with which 64 tokens read the same weights: one adapter's, eight adapters', or each token its own's."""
LARGE = (64, 1024, 768, 768)
POPULARITY = 1.5
CHEAP_TO_MERGE = 1 << 20
"""In a short run W + BA is made for each adapter of a batch in fp32, and of so many weights at most."""


def _even(tokens: int, adapters: int) -> list[int]:
    each, more = divmod(tokens, adapters)
    return [each + (g < more) for g in range(adapters)]


def _uniform(tokens: int, adapters: int) -> list[int]:
    return _even(tokens, min(adapters, math.ceil(math.sqrt(tokens))))


def _skewed(tokens: int, adapters: int) -> list[int]:
    """The rarest has one token, each of the others about 1.5 times as many as the next."""
    found: list[int] = []
    for k in range(adapters - 1):
        if sum(found) + int(POPULARITY**k) >= tokens:
            break
        found.append(int(POPULARITY**k))
    return sorted([*found, tokens - sum(found)], reverse=True)


DISTRIBUTIONS = {
    "even": _even,
    "identical": lambda tokens, adapters: [tokens],
    "uniform": _uniform,
    "skewed": _skewed,
    "distinct": lambda tokens, adapters: [1] * tokens,
}
"""How many tokens each adapter of a batch has. All but *even*, every adapter of the stack, are the popularities of
Punica (Chen et al. 2023, section 7): *uniform* is √T adapters, *skewed* Zipf's law with 1.5."""


@dataclass(frozen=True)
class MultiLoRACase(Case):
    """One frozen linear with a stack of adapters; no token goes without."""

    family: ClassVar[str] = "multi_lora"

    adapters: int
    in_features: int
    out_features: int
    rank: int = RANK
    ids: str = field(default="even", kw_only=True)
    merging: bool = field(default=True, kw_only=True)  # W + BA for each adapter is a contender

    def __str__(self) -> str:
        return super().__str__().replace(",", "")

    @property
    def label(self) -> str:
        rank = "" if self.rank == RANK else f", r {self.rank}"
        ids = "" if self.ids == "even" else f", {self.ids}"
        shape = f"{self.tokens} × {self.in_features} → {self.out_features}"
        return f"{shape}, {self.adapters} adapters{rank}{ids}"

    @property
    def record(self) -> dict[str, Any]:
        more = {"used_adapters": self.used_adapters, "adapter_bytes": self.adapter_bytes}
        return {key: value for key, value in super().record.items() if key != "merging"} | more

    @property
    def workload(self) -> Workload:
        return Workload(
            *(str(self), (self.tokens,), self.in_features, (self.out_features,)),
            *(self.adapters, (self.rank,)),
            ids="identical",
            base=False,
            scaling=SCALING,
            b_layout="rank_major",
        )

    @property
    def token_adapters(self) -> tuple[int, ...]:
        """Shuffled; the adapters that are used stand all over the stack."""
        counts = DISTRIBUTIONS[self.ids](self.tokens, self.adapters)
        apart = self.adapters // len(counts)
        found = list(itertools.chain.from_iterable([g * apart] * n for g, n in enumerate(counts)))
        random.Random(0).shuffle(found)
        return tuple(found)

    @property
    def used_adapters(self) -> int:
        return len(set(self.token_adapters))

    @property
    def adapter_bytes(self) -> int:
        """Of the adapters that the batch needs."""
        features = self.in_features + self.out_features
        return self.used_adapters * self.rank * features * DTYPES[self.dtype].itemsize

    @property
    def order(self) -> tuple[Any, ...]:
        shape = (self.adapters, self.in_features, self.tokens, -self.rank)
        kinds = list(DISTRIBUTIONS)
        return (list(DTYPES).index(self.dtype), kinds.index(self.ids), self.train, *shape)

    @property
    def frozen_flops(self) -> int:
        """Forward, and in training dX."""
        return (4 if self.train else 2) * self.tokens * self.in_features * self.out_features

    @property
    def work(self) -> tuple[int, int]:
        """The frozen linear, which here is a part of ours too; and each token's A and B, written and read."""
        features = self.in_features + self.out_features
        gathered = self.tokens * self.rank * features * DTYPES[self.dtype].itemsize
        return 2 * self.frozen_flops, (6 if self.train else 2) * gathered

    @property
    def flops(self) -> int:
        features = self.in_features + self.out_features
        lora = self.tokens * self.rank * features
        return self.frozen_flops + (6 if self.train else 2) * lora

    @property
    def bytes(self) -> int:
        """Once x, W, y and the adapters of the batch; in training dy, W, x, dx, these and all gradients too."""
        size = DTYPES[self.dtype].itemsize
        weight = self.in_features * self.out_features * size
        rows = self.tokens * (self.in_features + self.out_features) * size
        forward = rows + weight + self.adapter_bytes
        if not self.train:
            return forward
        gradients = self.adapters * self.rank * (self.in_features + self.out_features) * size
        return 2 * forward + self.tokens * self.in_features * size + gradients


def quick_cases() -> list[MultiLoRACase]:
    """Popularities, forward and training in a few shapes, 1024 adapters; the short ones first."""
    both, modes = ("fp32", "bf16"), ("decode", "train")
    rows = [
        MultiLoRACase(dtype, *MIXED, rank, ids=ids, mode="decode", merging=dtype == "fp32")
        for ids, rank in _popularities()
        for dtype in both
    ]
    rows += [
        MultiLoRACase(dtype, *shape, mode=mode, merging=_cheap_to_merge(dtype, *shape[2:]))
        for shape in SHAPES
        for dtype in both
        for mode in modes
    ]
    return rows + _large("decode")


def _large(mode: str) -> list[MultiLoRACase]:
    """Training writes a gradient of the whole stack, and checking it takes long: no row of a short run."""
    return [
        MultiLoRACase(dtype, *LARGE, ids="distinct", mode=mode, merging=False)
        for dtype in ("fp32", "bf16")
    ]


def _cheap_to_merge(dtype: str, in_features: int, out_features: int) -> bool:
    return dtype == "fp32" and in_features * out_features <= CHEAP_TO_MERGE


def _popularities() -> list[tuple[str, int]]:
    """Each at the usual rank; then those that read as many bytes as *uniform* does."""
    kinds = [(ids, RANK) for ids in DISTRIBUTIONS if ids != "even"]
    return kinds + [pair for pair in EQUAL_BYTES.items() if pair not in kinds]


MORE = ((1, 32, 4096, 4096), (16, 32, 4096, 4096), (512, 8, 768, 768), (8192, 8, 768, 768))


def full_cases() -> list[MultiLoRACase]:
    """Every row."""
    rows = quick_cases() + _large("train")
    rows += [
        MultiLoRACase(dtype, *shape, rank, mode=mode, merging=False)
        for shape in MORE
        for rank in (RANK, 64)
        for dtype in ("fp32", "bf16")
        for mode in ("decode", "train")
    ]
    rows += [
        MultiLoRACase(dtype, t, t, 4096, 4096, ids=ids, mode="decode", merging=False)
        for t in (64, 256)
        for ids in DISTRIBUTIONS
        if ids != "even"
        for dtype in ("fp32", "bf16")
    ]
    rows += [MultiLoRACase("fp16", *shape, mode="decode", merging=False) for shape in SHAPES]
    return rows
