"""How far from the oracle batched multi-LoRA may be: never a constant, always a consequence of dtypes and shapes.

The criterion of `tolerance.py`, with its table of bounds: the operation is a sum of products, as the LoRA linear is,
so the oracle run on squares gives ``‖terms‖₂²`` of every result. The base is added once, so it is no term of the LoRA
path, and the two differ by its square alone. A row scale is applied where the accumulator is rounded; its
gradient is summed over the tokens that share it after it was rounded to its dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ..random import keep_scale
from . import multi_lora_oracle, tolerance
from .multi_lora_workloads import MultiLoRAInputs
from .oracle import Masks, Results
from .perturbation import roundoff, smallest_step


def deviations(actual: Results, inputs: MultiLoRAInputs, keep: Masks) -> list[tolerance.Deviation]:
    """Compares results by name, ``y`` and gradients in any shape of the right size, with the oracle."""
    wanted = [name for name in actual if name != "y"]
    return tolerance.compare(actual, *yardsticks(inputs, keep, wanted))


def yardsticks(
    inputs: MultiLoRAInputs, keep: Masks, wanted: Iterable[str] | None = None
) -> tuple[Results, Results, tolerance.Bounds]:
    """What `tolerance.compare` compares with: the oracle, eager, the bounds. For who has several results to compare."""
    exact = multi_lora_oracle.exact(inputs, keep, wanted)
    eager = multi_lora_oracle.eager(inputs, keep, wanted)
    return exact, eager, bounds(exact, inputs, keep)


def assert_accurate(actual: Results, inputs: MultiLoRAInputs, keep: Masks) -> None:
    """Raises AssertionError when a result has the wrong size, the wrong dtype or too large an error."""
    tolerance.assert_forms(actual, inputs)
    tolerance.assert_all_ok(deviations(actual, inputs, keep))


def bounds(exact: Results, inputs: MultiLoRAInputs, keep: Masks) -> tolerance.Bounds:
    """Per result the bound of each element's error, for the largest error and for the mean."""
    dtype = inputs.x.dtype
    accumulator = roundoff(torch.promote_types(dtype, torch.float32))
    wanted = [name for name in exact if name != "y"]
    squares_of_lora = multi_lora_oracle.exact(_squares(inputs), keep, wanted)
    dtypes = {"y": dtype, **{name: t.dtype for name, t in inputs.named_tensors()}}
    found = {}
    for name, value in exact.items():
        size, of_lora = value.abs(), squares_of_lora[name]
        terms = of_lora + _base(inputs, value).square() if name == "y" else of_lora
        # of the result, or of a factor that all its terms share: x's dtype, or a row scale's narrower one
        u = max(roundoff(dtype), roundoff(dtypes[name]))
        once = u * size + smallest_step(dtypes[name])
        sums = math.sqrt(_terms(name, inputs)) * accumulator * (terms.sqrt() + size)
        independent = u * of_lora.sqrt() + sums
        if name.startswith("base"):  # dy itself
            independent = torch.zeros_like(sums)
        found[name] = (once + 4 * independent, once + independent)
    return found


def _terms(name: str, inputs: MultiLoRAInputs) -> int:
    """K: how many terms are summed, one after the other, on the way to this result."""
    features, tokens, out = inputs.x.shape[-1], inputs.tokens, sum(inputs.outs)
    ranks = [a.shape[1] for a in inputs.lora_a]
    return {
        "y": features + max(ranks),
        "x": out + sum(ranks),
        "base": 1,
        "lora_a": max(inputs.outs) + tokens,
        "lora_b": features + tokens,
        "row_scale": features + out + sum(ranks) + tokens,
    }[name.partition(".")[0]]


def _base(inputs: MultiLoRAInputs, y: Tensor) -> Tensor:
    bases = [b.double() for b in inputs.base if b is not None]
    return torch.cat(bases, -1) if bases else torch.zeros_like(y)


def _squares(inputs: MultiLoRAInputs) -> MultiLoRAInputs:
    """The call whose results are the sums of the squares of the terms of the LoRA path of ``inputs``."""
    squared = inputs.map(lambda _, t: t.detach().double().square())
    bases = tuple(None if b is None else torch.zeros_like(b) for b in squared.base)
    # the reference divides x² by 1 - p once; its terms want that squared
    again = keep_scale(inputs.dropout_p)
    scaling = tuple(tuple(s * s * again for s in of_one) for of_one in inputs.scaling)
    return replace(squared, base=bases, scaling=scaling)
