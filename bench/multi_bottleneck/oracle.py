"""The yardsticks: the loop over the adapters of a batch, in fp64 and in the row's dtype."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pelt_fast.testing import inputs
from pelt_fast.testing.oracle import Results, run
from pelt_fast.testing.perturbation import roundoff, smallest_step
from pelt_fast.testing.tolerance import Deviation, compare

EPS = 1e-5


@dataclass(frozen=True)
class Inputs(inputs.Inputs):
    """LN(up_g(gelu(down_g(x))) + x + skip), g the token's adapter; the parameters as stacks."""

    skip: Tensor
    down: Tensor  # (L, m, d)
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    ln_weight: Tensor
    ln_bias: Tensor
    ids: list[int]

    @property
    def segments(self) -> list[tuple[int, Tensor]]:
        """The adapters that have tokens, and these tokens."""
        rows: dict[int, list[int]] = {}
        for token, adapter in enumerate(self.ids):
            rows.setdefault(adapter, []).append(token)
        return [(g, torch.tensor(rows[g], device=self.x.device)) for g in sorted(rows)]


def layernorm(leaves: Inputs, s: Tensor) -> Tensor:
    return F.layer_norm(s, s.shape[-1:], leaves.ln_weight, leaves.ln_bias, EPS)


def composed(leaves: Inputs) -> Tensor:
    """Adapter by adapter, in the dtype of ``leaves``."""
    y = leaves.x + leaves.skip
    parts = [t.unbind(0) for t in (leaves.down, leaves.down_bias, leaves.up, leaves.up_bias)]
    for g, rows in leaves.segments:
        down, down_bias, up, up_bias = (part[g] for part in parts)
        hidden = F.gelu(F.linear(leaves.x.index_select(0, rows), down, down_bias))
        y = y.index_add(0, rows, F.linear(hidden, up, up_bias))
    return layernorm(leaves, y)


def exact(inputs: Inputs, keep: Any, wanted: Iterable[str]) -> Results:
    """In fp64, on the very numbers of ``inputs``."""
    return run(composed, inputs.map(lambda _, t: t.detach().double()), wanted)


def eager(inputs: Inputs, keep: Any, wanted: Iterable[str]) -> Results:
    return run(composed, inputs, wanted)


def deviations(results: dict[str, Tensor], inputs: Inputs, keep: Any) -> list[Deviation]:
    """Twice the loop's error and one rounding of the result are allowed."""
    wanted = [name for name in results if name != "y"]
    right = exact(inputs, keep, wanted)
    dtype = inputs.x.dtype
    once = {name: roundoff(dtype) * t.abs() + smallest_step(dtype) for name, t in right.items()}
    bounds = {name: (t, t) for name, t in once.items()}
    return compare(results, right, eager(inputs, keep, wanted), bounds)
