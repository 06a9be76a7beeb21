"""How far from the oracle a bottleneck adapter may be: never a constant, always a consequence of dtypes and shapes.

As in `tolerance.py` a result passes when, against the fp64 oracle,

    error <= 2 · (error of the eager composition in the same dtypes) + bound

for the largest error and for the mean. There the bound comes from sums of squares, which holds for what is bilinear;
here activations and layernorms are between the sums. So the oracle is run ``DRAWS`` times in Monte Carlo arithmetic
(`perturbation.py`): as a good composition of operations runs, whose errors are

- one roundoff u of x's dtype in v, q, a and w, which go into a product or come out of one, in the scaled w, in the
  gradient of each, and in parameters wider than x;
- the accumulation of each sum: the products, the statistics of layernorms, the gradients of what is broadcast.

What these errors do to a result, at each element, is the root mean square R over the draws of its distance from the
oracle. With u the roundoff of the result's dtype and N its size, the bound is, element by element, the sum of

1. ``u · |result|`` for the largest error: the one rounding of the result. It is uniform, so half of that is its mean,
   and of few elements ``(1 + 1/√N) / 2`` of it.
2. ``4.5 · R`` for the largest error: the largest of up to 10⁵ normal numbers is 4.5 deviations away. Their mean size is
   0.8 deviations, and 0.6/√N is the deviation of that; ``(1 + 3.5/√N) · R`` for the mean error is both, and for one
   element what the largest error is allowed.
3. ``|result' - result|``, where result' has the derivative of the activation from the other side of a kink (relu,
   leaky_relu, relu6) for every q within 4.5 R of it. There a gradient jumps, and R knows of
   it only if a draw happened to cross. So relu's gradients tell little where q is rounded much; what is smooth, and
   fp32, tell the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Set
from typing import Any

import torch
from torch import Tensor

from ..random import keep_scale
from ..reference.adapter import ACTIVATIONS
from . import adapter_oracle, tolerance
from .adapter_oracle import AnyBlock
from .adapter_workloads import AdapterInputs, BlockInputs
from .oracle import Results, run
from .perturbation import Perturbation, roundoff, smallest_step

DRAWS = 8
KINKS = {"relu": (0.0,), "leaky_relu": (0.0,), "relu6": (0.0, 6.0)}


def deviations(
    actual: Results, inputs: AdapterInputs, keep: Tensor | None
) -> list[tolerance.Deviation]:
    """Compares results by name, ``y`` and gradients in any shape of the right size, with the oracle."""
    wanted = [name for name in actual if name != "y"]
    return tolerance.compare(actual, *yardsticks(inputs, keep, wanted))


def yardsticks(
    inputs: AdapterInputs, keep: Tensor | None, wanted: Iterable[str] | None = None
) -> tuple[Results, Results, tolerance.Bounds]:
    """What `tolerance.compare` compares with: the oracle, eager, the bounds. For who has several results to compare."""
    exact = adapter_oracle.exact(inputs, keep, wanted)
    eager = adapter_oracle.eager(inputs, keep, wanted)
    return exact, eager, bounds(exact, inputs, keep)


def assert_accurate(actual: Results, inputs: AdapterInputs, keep: Tensor | None) -> None:
    """Raises AssertionError when a result has the wrong size, the wrong dtype or too large an error."""
    tolerance.assert_forms(actual, inputs)
    tolerance.assert_all_ok(deviations(actual, inputs, keep))


def bounds(
    exact: Results,
    inputs: BlockInputs,
    keep: Tensor | None,
    model_class: type[Model] | None = None,
) -> tolerance.Bounds:
    """Per result the bound of each element's error, for the largest error and for the mean."""
    make = model_class or Model
    wanted = [name for name in exact if name != "y"]
    wide = inputs.map(lambda _, t: t.detach().double())
    widened = {name for name, t in inputs.named_tensors() if t.dtype != inputs.x.dtype}
    oracle = make(Perturbation(), keep)
    oracle(_copies(wide, 1))
    at_once = DRAWS if wide.x.numel() < 2**16 else 1  # memory
    squares = {name: torch.zeros_like(value) for name, value in exact.items()}
    squares_of_q = torch.zeros_like(oracle.q[0])
    for seed in range(0, DRAWS, at_once):
        model = make(Perturbation(inputs.x.dtype, seed), keep, widened)
        for name, draws in run(model, _copies(wide, at_once), wanted).items():
            squares[name] += (draws - exact[name]).square().sum(0) / DRAWS
        squares_of_q += (model.q - oracle.q).square().sum(0) / DRAWS
    rms = {name: value.sqrt() for name, value in squares.items()}
    jumps = _jumps(make, exact, wide, keep, oracle.q[0], 4.5 * squares_of_q.sqrt())
    dtypes = {"y": inputs.x.dtype, **{name: t.dtype for name, t in inputs.named_tensors()}}
    found = {}
    for name, value in exact.items():
        once = roundoff(dtypes[name]) * value.abs() + smallest_step(dtypes[name])
        few = max(1, value.numel()) ** -0.5
        found[name] = (
            once + 4.5 * rms[name] + jumps[name],
            (1 + few) / 2 * once + (1 + 3.5 * few) * rms[name] + jumps[name],
        )
    return found


def _jumps(
    make: type[Model],
    exact: Results,
    wide: BlockInputs,
    keep: Tensor | None,
    q: Tensor,
    reach: Tensor,
) -> Results:
    """What changes when every q within ``reach`` of a kink has the derivative of the other side."""
    other_side = q
    for kink in KINKS.get(wide.activation, ()):
        across = torch.where(q > kink, kink - reach, kink + reach)
        other_side = torch.where((q - kink).abs() < reach, across, other_side)
    if torch.equal(other_side, q):
        return {name: torch.zeros_like(value) for name, value in exact.items()}
    model = make(Perturbation(), keep, other_side=other_side)
    changed = run(model, _copies(wide, 1), [name for name in exact if name != "y"])
    return {name: (value[0] - exact[name]).abs() for name, value in changed.items()}


def _copies(inputs: AnyBlock, n: int) -> AnyBlock:
    """One copy of every tensor for each draw, along a new first dimension."""
    return inputs.map(lambda _, t: t.expand(n, *t.shape))


class Model:
    """`reference.bottleneck_adapter` in Monte Carlo arithmetic, on `_copies`; keeps q of the last call."""

    q: Tensor

    def __init__(
        self,
        errors: Perturbation,
        keep: Tensor | None,
        widened: Set[str] = frozenset(),
        other_side: Tensor | None = None,
    ) -> None:
        self.errors, self.keep, self.widened = errors, keep, widened
        self.other_side = other_side  # where the derivative of the activation is taken, if not at q

    def __call__(self, copies: Any) -> Tensor:
        """y for each draw."""
        e, s = self.errors, copies.map(self.narrowed)
        n, d = len(s.x), s.x.shape[-1]
        tokens = math.prod(s.x.shape[1:-1])
        x = s.x.reshape(n, tokens, d)
        skip = None if s.skip is None else s.skip.reshape(n, tokens, d)
        v = x + skip if s.skip_in and skip is not None else x
        if s.pre_weight is not None:
            v = self.layernorm(v, s.pre_weight, s.pre_bias, s.pre_eps)
        q = self.down(e.rounded(v), s)
        self.q = q.detach()
        w = s.scaling * self.up(e.rounded(self.activate(q, s.activation)), s)
        if s.scale is not None:
            one = s.scale.shape[1] == 1
            w = w * e.rows(e.columns(s.scale[:, None], d)[:, 0] if one else s.scale, tokens)
        if self.keep is not None:
            w = w * self.keep * keep_scale(s.dropout_p)
        if s.gate is not None:
            gate = s.gate.expand(*s.x.shape[:-1], 1).reshape(n, tokens, 1)
            w = w * e.columns(e.rounded(gate), d)
        w = e.rounded(w)
        y = w + x if s.residual_x else w
        y = y + skip if s.residual_skip and skip is not None else y
        if s.ln_weight is not None:
            y = self.layernorm(y, s.ln_weight, s.ln_bias, s.eps)
        return y.reshape(s.x.shape)

    def narrowed(self, name: str, tensor: Tensor) -> Tensor:
        """What is wider than x, rounded to x's dtype."""
        return self.errors.rounded(tensor) if name in self.widened else tensor

    def activate(self, q: Tensor, name: str) -> Tensor:
        """act(q), with the derivative of the other side of a kink where that is asked for."""
        a = ACTIVATIONS[name](q)
        if self.other_side is None:
            return a
        elsewhere = ACTIVATIONS[name](q + (self.other_side - q).detach())
        return elsewhere + (a - elsewhere).detach()

    def down(self, v: Tensor, s: Any) -> Tensor:
        """q."""
        return self.linear(v, s.down, s.down_bias)

    def up(self, a: Tensor, s: Any) -> Tensor:
        """w."""
        return self.linear(a, s.up, s.up_bias)

    def linear(self, a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """a weightᵀ + bias."""
        result = self.errors.product(a, weight)
        if bias is not None:
            result = result + self.errors.rows(bias, a.shape[1])
        return self.errors.rounded(result)

    def layernorm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """Of each row."""
        e, (_, tokens, d) = self.errors, x.shape
        centred = x - e.columns(e.mean(x), d)
        deviation = torch.sqrt(e.mean(centred.square()) + eps)
        normal = centred * e.columns(1 / deviation, d) * e.rows(weight, tokens)
        return normal if bias is None else normal + e.rows(bias, tokens)
