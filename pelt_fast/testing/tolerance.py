"""How far from the oracle a backend may be: never a constant, always a consequence of dtypes and shapes.

A result passes when, against the fp64 oracle,

    error <= 2 · (error of the eager composition in the same dtypes) + bound

for the largest error and for the mean. The bound keeps the test meaningful where eager is exact by luck (one token,
one feature). With u the unit roundoff of x's dtype and a that of the accumulator (fp32; fp64 for fp64), element by
element it is the sum of

1. ``u · |result|``: the one rounding of the result, or of a factor that all its terms share;
2. ``c · u · ‖terms of the LoRA path‖₂``: the rank-r intermediate, and adapters wider than x, are
   rounded to x's dtype. Such an error is independent in each term, with standard deviation at most
   u/√3 of it, and each term has two of them: √(2/3) · u · ‖terms‖₂. The largest of up to 10⁵ normal
   numbers is 4.5 deviations away, so c = 4 (4.5 · √(2/3) is 3.7); their mean size is 0.8 deviations,
   so c = 1 there (0.8 · √(2/3) is 0.65);
3. ``c · √K · a · (‖terms‖₂ + |result|)``: each of the K partial sums is rounded by at most a of itself,
   independently (Higham and Mary 2019, "A new approach to probabilistic rounding error analysis"). Sums
   of terms of random sign grow as √k to ‖terms‖₂, which makes √(1/6) of √K · a · ‖terms‖₂; sums of terms
   of one sign grow as k to the result, which makes 1/3 of √K · a · |result|. Any order of summation
   that a kernel may choose does better.

``‖terms‖₂²`` is the oracle run on squares, so every gradient gets its bound from the same few lines.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..random import keep_scale
from . import oracle
from .inputs import Inputs
from .workloads import LoRAInputs

Bounds = dict[str, tuple[Tensor, Tensor]]  # of each element, for the largest error and for the mean


@dataclass(frozen=True)
class Deviation:
    """How far one result is from the oracle, and how far it may be."""

    name: str
    max: float
    mean: float
    allowed_max: float
    allowed_mean: float

    @property
    def ok(self) -> bool:
        """Both within what is allowed; NaN is not."""
        return self.max <= self.allowed_max and self.mean <= self.allowed_mean

    def __str__(self) -> str:
        return (
            f"{self.name}: max {self.max:.3g} (allowed {self.allowed_max:.3g}), "
            f"mean {self.mean:.3g} (allowed {self.allowed_mean:.3g})"
        )


def deviations(actual: oracle.Results, inputs: LoRAInputs, keep: oracle.Masks) -> list[Deviation]:
    """Compares results by name, ``y`` and gradients in any shape of the right size, with the oracle."""
    wanted = [name for name in actual if name != "y"]
    exact = oracle.exact(inputs, keep, wanted)
    eager = oracle.eager(inputs, keep, wanted)
    return compare(actual, exact, eager, _bounds(exact, inputs, keep, wanted))


def compare(
    actual: oracle.Results, exact: oracle.Results, eager: oracle.Results, bounds: Bounds
) -> list[Deviation]:
    """The errors of ``actual`` and of ``eager``, set side by side."""
    found = []
    for name, value in actual.items():
        if value.numel() == 0:
            continue
        error = (value.double().reshape(exact[name].shape) - exact[name]).abs()
        yardstick = (eager[name].double() - exact[name]).abs()
        # Where eager overflows it is no yardstick, and the bound has to do alone.
        yardstick = torch.where(yardstick.isfinite(), yardstick, 0.0)
        bound_max, bound_mean = bounds[name]
        found.append(
            Deviation(
                name,
                error.max().item(),
                error.mean().item(),
                2 * yardstick.max().item() + bound_max.max().item(),
                2 * yardstick.mean().item() + bound_mean.mean().item(),
            )
        )
    return found


def assert_accurate(actual: oracle.Results, inputs: LoRAInputs, keep: oracle.Masks) -> None:
    """Raises AssertionError when a result has the wrong size, the wrong dtype or too large an error."""
    assert_forms(actual, inputs)
    assert_all_ok(deviations(actual, inputs, keep))


def assert_forms(actual: oracle.Results, inputs: Inputs) -> None:
    """Raises AssertionError when a result has the wrong size or the wrong dtype."""
    expected = {"y": (inputs.dy.shape, inputs.x.dtype)}
    expected.update({name: (t.shape, t.dtype) for name, t in inputs.named_tensors()})
    for name, value in actual.items():
        shape, dtype = expected[name]
        assert value.shape == shape, f"{name}: shape {tuple(value.shape)}, expected {tuple(shape)}"
        assert value.dtype == dtype, f"{name}: {value.dtype}, expected {dtype}"


def assert_all_ok(found: Iterable[Deviation]) -> None:
    """Raises AssertionError with every deviation that is too large."""
    wrong = [str(d) for d in found if not d.ok]
    assert not wrong, "\n".join(wrong)


def _bounds(
    exact: oracle.Results, inputs: LoRAInputs, keep: oracle.Masks, wanted: Iterable[str]
) -> Bounds:
    """Per result the bound of each element's error, for the largest error and for the mean."""
    dtype = inputs.x.dtype
    roundoff = torch.finfo(dtype).eps / 2
    accumulator = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    squares = oracle.exact(_squares(inputs), keep, wanted)
    squares_of_lora = oracle.exact(_without_base(_squares(inputs)), keep, wanted)
    bounds = {}
    for name, value in exact.items():
        size = value.abs()
        sums = math.sqrt(_terms(name, inputs)) * accumulator * (squares[name].sqrt() + size)
        independent = roundoff * squares_of_lora[name].sqrt() + sums
        bounds[name] = (roundoff * size + 4 * independent, roundoff * size + independent)
    return bounds


def _terms(name: str, inputs: LoRAInputs) -> int:
    """K: how many terms are summed, one after the other, on the way to this result."""
    (n_out, n_in), tokens = inputs.weight.shape, inputs.x[..., 0].numel()
    rank = sum(a.shape[0] for a in inputs.lora_a)
    return {
        "y": n_in + rank,
        "x": n_out + rank,
        "weight": tokens,
        "bias": tokens,
        "lora_a": n_out + tokens,
        "lora_b": n_in + tokens,
        "lora_bias": tokens,
    }[name.partition(".")[0]]


def _squares(inputs: LoRAInputs) -> LoRAInputs:
    """The call whose results are the sums of the squares of the terms that make up the results of ``inputs``."""
    squared = inputs.map(lambda _, t: t.detach().double().square())
    # The reference divides x² by 1 - p once; its terms want that squared.
    pairs = zip(inputs.scaling, inputs.dropout_p, strict=True)
    return replace(squared, scaling=tuple(s * s * keep_scale(p) for s, p in pairs))


def _without_base(inputs: LoRAInputs) -> LoRAInputs:
    base = ("weight", "bias", "lora_bias")
    return inputs.map(lambda name, t: t * (not name.startswith(base)))
