"""The inputs of the Compacter adapter: blocks and layouts of `adapter_workloads`, factors in the place of matrices.

No factor is zero, and no rule near it, where adapters start: there all gradients but one vanish.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..functional import PHM
from . import adapter_workloads, inputs
from .adapter_workloads import (
    EVERYTHING,
    HOULSBY,
    PARALLEL,
    PFEIFFER,
    T5,
    T5_PFEIFFER,
    AdapterCase,
    BlockInputs,
)

FACTORS = ("rule", "left", "right")
NAMES = (
    *("x", "skip"),
    *(f"down_{factor}" for factor in FACTORS),
    "down_bias",
    *(f"up_{factor}" for factor in FACTORS),
    *adapter_workloads.NAMES[5:],
)
"""The tensors that may get a gradient, in the order of the operator's results."""


@dataclass(frozen=True)
class CompacterInputs(BlockInputs):
    """The tensors of one `compacter` call, and the gradient that comes back to it."""

    operation = "compacter"
    names = NAMES
    down_rule: Tensor
    down_left: Tensor
    down_right: Tensor | None
    up_rule: Tensor
    up_left: Tensor
    up_right: Tensor | None

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments of `functional.compacter`."""
        down = PHM(self.down_rule, self.down_left, self.down_right)
        up = PHM(self.up_rule, self.up_left, self.up_right)
        return (self.x, down, self.down_bias, up, self.up_bias)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """In the order of ``NAMES``, then dy."""
        for name in (*NAMES, "dy"):
            if getattr(self, name) is not None:
                yield name, getattr(self, name)


@dataclass(frozen=True)
class CompacterCase(AdapterCase):
    """One `compacter` problem; features and bottleneck are multiples of ``phm_dim``."""

    phm_dim: int = 4
    rank: int = 1
    up_rank: int | None = None  # None: rank
    factorized: bool = True

    def make(  # type: ignore[override]
        self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
    ) -> CompacterInputs:
        """Draw the tensors; the same seed draws the same numbers on every device."""
        block = super().make(dtype, device, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        n, p, z = self.phm_dim, self.features // self.phm_dim, self.bottleneck // self.phm_dim

        def draw(std: float, *shape: int) -> Tensor:
            return inputs.draw(
                shape,
                std,
                self.weight_layout,
                dtype=self.param_dtype or dtype,
                device=device,
                generator=generator,
            )

        def factors(size: tuple[int, int], std: float, k: int) -> tuple[Tensor | None, ...]:
            rule = draw(n**-0.5, n, n, n)
            if not self.factorized:
                return rule, draw(std, n, *size), None
            return rule, draw(1.0, n, size[0], k), draw(std * k**-0.5, n, k, size[1])

        up_std = self.bottleneck**-0.5 if self.up_std is None else self.up_std
        down_std = self.features**-0.5 / self._input_std
        down = factors((p, z), down_std, self.rank)
        up = factors((z, p), up_std, self.up_rank or self.rank)
        tensors = dict(zip(NAMES[2:5] + NAMES[6:9], down + up, strict=True))
        shared = {
            f.name: getattr(block, f.name) for f in fields(block) if f.name not in ("down", "up")
        }
        return CompacterInputs(**shared, **tensors)  # type: ignore[arg-type]


def _case(name: str, shape: tuple[int, ...], d: int, m: int, **more: Any) -> CompacterCase:
    return CompacterCase(name, shape, d, m, **more)


BLOCKS = (
    _case("houlsby", (2, 9), 40, 12, **HOULSBY),
    _case("pfeiffer", (2, 9), 40, 12, **PFEIFFER),
    _case("parallel", (2, 9), 40, 12, **PARALLEL),
    _case("t5", (2, 9), 40, 12, **T5),
    _case("t5_pfeiffer", (2, 9), 40, 12, **T5_PFEIFFER),
    _case("bare", (2, 9), 40, 12),
    _case("everything", (2, 9), 40, 12, **EVERYTHING),
)
SHAPES = (
    _case("no_tokens", (0,), 40, 12, **PFEIFFER, gate="token", scale="one"),
    _case("one_token", (1,), 40, 12, **PFEIFFER),
    _case("one_dim", (), 40, 12, **PFEIFFER),
    _case("four_dims", (2, 3, 2), 40, 12, **PFEIFFER),
    _case("empty_batch", (2, 0, 3), 40, 12, **EVERYTHING),
    _case("n_1", (7,), 37, 5, phm_dim=1, **PFEIFFER),
    _case("n_2_rank_2", (9,), 30, 14, phm_dim=2, rank=2, **HOULSBY),
    _case("n_3", (9,), 39, 12, phm_dim=3, **PFEIFFER),
    _case("n_5_unequal_ranks", (9,), 85, 35, phm_dim=5, rank=1, up_rank=3, **EVERYTHING),
    _case("rank_3", (9,), 120, 60, rank=3, **HOULSBY),
    _case("past_one_block", (67,), 132, 28, **PFEIFFER),
    _case("many_tokens", (515,), 40, 16, **HOULSBY),
    _case("base_model", (17,), 768, 24, **PFEIFFER),
    _case("not_factorized", (9,), 40, 12, factorized=False, **HOULSBY),  # dense matrices
    _case("rank_of_no_use", (9,), 24, 8, rank=7, **PFEIFFER),  # and here
)
FACTORS_OF_OUTPUT = (
    _case("scale_one", (2, 5), 40, 12, **PFEIFFER, scale="one"),
    _case("gate_sample", (3, 4), 40, 12, **HOULSBY, gate="sample"),
    _case("no_bias", (6,), 40, 12, **PFEIFFER, down_bias=False, up_bias=False, ln_bias=False),
    _case("dropout_all", (7,), 40, 12, **PFEIFFER, dropout_p=1.0),
)
STRIDES = tuple(
    _case(f"{name}_{layout}", (4, 6), 40, 12, **{**block, f"{name}_layout": layout})
    for name, block in (("x", HOULSBY), ("skip", PFEIFFER), ("dy", T5_PFEIFFER))
    for layout in ("sliced", "transposed", "expanded")
) + tuple(
    _case(f"weight_{layout}", (6,), 40, 12, weight_layout=layout, **HOULSBY)
    for layout in ("transposed", "sliced")
)
MIXED_DTYPE = tuple(
    replace(case, name=f"fp32_parameters_{case.name}", param_dtype=torch.float32)
    for case in (BLOCKS[0], BLOCKS[-1], SHAPES[8])
)
CASES = (*BLOCKS, *SHAPES, *FACTORS_OF_OUTPUT, *STRIDES)
"""What every backend meets in every dtype it serves."""
