"""The yardsticks of `pelt_fast.testing`, with the frozen linear in them.

The oracle there goes token by token, which is slow for thousands of tokens and whose gradients of a large stack
would fill the memory; here adapter by adapter, in fp64. `tests/bench` holds the two against each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pelt_fast.testing import multi_lora_oracle, tolerance
from pelt_fast.testing.multi_lora_workloads import MultiLoRAInputs
from pelt_fast.testing.oracle import Masks, Results, run
from pelt_fast.testing.perturbation import roundoff, smallest_step

masks = multi_lora_oracle.masks


@dataclass(frozen=True)
class Inputs(MultiLoRAInputs):
    """One projection, no dropout, no row scale, every adapter of the full rank; over a frozen linear."""

    weight: Tensor
    bias: Tensor

    @property
    def segments(self) -> list[tuple[int, Tensor]]:
        """The adapters that have tokens, and these tokens."""
        rows: dict[int, list[int]] = {}
        for token, adapter in enumerate(self.ids):
            rows.setdefault(adapter, []).append(token)
        return [(g, torch.tensor(rows[g], device=self.x.device)) for g in sorted(rows)]


def by_rows(inputs: Inputs) -> Inputs:
    """The same with B as (L, out, R) without a gap, as PEFT's modules keep an adapter's."""
    found: Inputs = inputs.map(lambda name, t: t.contiguous() if name == "lora_b.0" else t)
    return found


def composed(leaves: Inputs) -> Tensor:
    """PEFT's loop over the adapters of a batch, in the dtype of ``leaves``."""
    y = F.linear(leaves.x, leaves.weight, leaves.bias)
    (a,), (b,), (scaling,) = leaves.lora_a, leaves.lora_b, leaves.scaling
    a_of, b_of = a.unbind(0), b.unbind(0)
    for g, rows in leaves.segments:
        delta = F.linear(F.linear(leaves.x[rows], a_of[g]), b_of[g]) * scaling[g]
        y = y.index_add(0, rows, delta)
    return y


def exact(inputs: Inputs, keep: Masks, wanted: Iterable[str]) -> Results:
    """In fp64, on the very numbers of ``inputs``."""
    return run(composed, inputs.map(lambda _, t: t.detach().double()), wanted)


def eager(inputs: Inputs, keep: Masks, wanted: Iterable[str]) -> Results:
    return run(composed, by_rows(inputs), wanted)


def deviations(actual: Results, inputs: Inputs, keep: Masks) -> list[tolerance.Deviation]:
    """The criterion of `tolerance.py`: a frozen linear and a LoRA path, which is rounded in between."""
    wanted = [name for name in actual if name != "y"]
    right = exact(inputs, keep, wanted)
    squares = exact(_squares(inputs), keep, wanted)
    frozen = ("weight", "bias")
    alone = _squares(inputs).map(lambda name, t: t * (name not in frozen))
    of_lora = exact(alone, keep, wanted)
    dtype = inputs.x.dtype
    unit, accumulator = roundoff(dtype), roundoff(torch.promote_types(dtype, torch.float32))
    bounds = {}
    for name, value in right.items():
        size = value.abs()
        sums = math.sqrt(_terms(name, inputs)) * accumulator * (squares[name].sqrt() + size)
        once = unit * size + smallest_step(dtype)
        independent = unit * of_lora[name].sqrt() + sums
        bounds[name] = (once + 4 * independent, once + independent)
    return tolerance.compare(actual, right, eager(inputs, keep, wanted), bounds)


def _terms(name: str, inputs: Inputs) -> int:
    """K: how many terms are summed, one after the other, on the way to this result."""
    (out, features), rank = inputs.weight.shape, inputs.lora_a[0].shape[1]
    sums = {"y": features + rank, "x": out + rank}
    of_adapters = {"lora_a.0": out + inputs.tokens, "lora_b.0": features + inputs.tokens}
    return {**sums, **of_adapters}[name]


def _squares(inputs: Inputs) -> Inputs:
    """The call whose results are the sums of the squares of all terms of ``inputs``."""
    squared = inputs.map(lambda _, t: t.detach().double().square())
    return replace(squared, scaling=tuple(tuple(s * s for s in one) for one in inputs.scaling))
