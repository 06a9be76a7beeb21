"""How far from the oracle AdapterFusion may be: as in `adapter_tolerance.py`, a consequence of dtypes and shapes.

    error <= 2 · (error of the library's composition in the same dtypes) + bound

for the largest error and for the mean, where the bound comes from Monte Carlo arithmetic (`perturbation.py`): the
library's own order of operations with one roundoff u of x's dtype in v, q, h, each adapter's result, query, keys,
values, scores, attention, context and the gradient of each, and in parameters wider than x, and with the accumulation
of each product and each mean. With R the root mean square distance of ``DRAWS`` such runs from the oracle, N elements:
``u · |result| + 4.5 R`` for the largest error, ``(1 + 1/√N) / 2 · u · |result| + (1 + 3.5/√N) · R`` for the mean.

What is computed rounds other intermediates (k and p ⊙ h in place of keys and values), of the same sizes or smaller and
fewer of them, so that the library's order is the more generous model by no more than the count of its steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

import torch
from torch import Tensor

from ..random import keep_scale
from ..reference.adapter import ACTIVATIONS
from . import fusion_oracle, tolerance
from .fusion_workloads import FusionInputs
from .oracle import Results, run
from .perturbation import Perturbation, roundoff, smallest_step

DRAWS = 8


def yardsticks(
    inputs: FusionInputs, keep: Tensor | None, wanted: Iterable[str] | None = None
) -> tuple[Results, Results, tolerance.Bounds]:
    """What `tolerance.compare` compares with: the oracle, eager, the bounds."""
    wanted = None if wanted is None else list(wanted)
    exact = fusion_oracle.exact(inputs, keep, wanted)
    eager = fusion_oracle.eager(inputs, keep, wanted)
    return exact, eager, bounds(exact, inputs, keep)


def assert_accurate(actual: Results, inputs: FusionInputs, keep: Tensor | None) -> None:
    """Raises AssertionError when a result has the wrong size, the wrong dtype or too large an error."""
    tolerance.assert_forms(actual, inputs)
    wanted = [name for name in actual if name != "y"]
    tolerance.assert_all_ok(tolerance.compare(actual, *yardsticks(inputs, keep, wanted)))


def bounds(exact: Results, inputs: FusionInputs, keep: Tensor | None) -> tolerance.Bounds:
    """Per result the bound of each element's error, for the largest error and for the mean."""
    wanted = [name for name in exact if name != "y"]
    wide = inputs.map(lambda _, t: t.detach().double())
    widened = {name for name, t in inputs.named_tensors() if t.dtype != inputs.x.dtype}
    squares = {name: torch.zeros_like(value) for name, value in exact.items()}
    at_once = DRAWS if wide.x.numel() < 2**16 else 1  # memory
    for seed in range(0, DRAWS, at_once):
        model = _Model(Perturbation(inputs.x.dtype, seed), keep, widened)
        copies = wide.map(lambda _, t: t.expand(at_once, *t.shape))
        for name, draws in run(model, copies, wanted).items():
            squares[name] += (draws - exact[name]).square().sum(0) / DRAWS
    dtypes = {"y": inputs.x.dtype, **{name: t.dtype for name, t in inputs.named_tensors()}}
    found = {}
    for name, value in exact.items():
        once = roundoff(dtypes[name]) * value.abs() + smallest_step(dtypes[name])
        few, rms = max(1, value.numel()) ** -0.5, squares[name].sqrt()
        found[name] = (once + 4.5 * rms, (1 + few) / 2 * once + (1 + 3.5 * few) * rms)
    return found


class _Model:
    """`reference.adapter_fusion` in Monte Carlo arithmetic, on copies along a new first dimension."""

    def __init__(
        self, errors: Perturbation, keep: Tensor | None, widened: Set[str] = frozenset()
    ) -> None:
        self.errors, self.keep, self.widened = errors, keep, widened

    def __call__(self, copies: FusionInputs) -> Tensor:
        e, s = self.errors, copies.map(self.narrowed)
        n, d = len(s.x), s.x.shape[-1]

        def rows(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.reshape(n, -1, d)

        x, skip, value_residual = rows(s.x), rows(s.skip), rows(s.value_residual)
        assert x is not None
        tokens, count = x.shape[1], len(s.down)
        v = x + skip if s.skip_in and skip is not None else x
        if s.pre_weight is not None:
            v = self.layernorm(v, s.pre_weight, s.pre_bias, s.pre_eps)
        v = e.rounded(v)
        results = []
        for i in range(count):
            q = self.linear(v, s.down[i], s.down_bias[i])
            h = e.rounded(ACTIVATIONS[s.activation](q))
            u = self.linear(h, s.up[i], s.up_bias[i])
            scaling = s.scaling[i]
            if isinstance(scaling, Tensor):
                one = scaling.shape[1] == 1
                each = e.columns(scaling[:, None], d)[:, 0] if one else scaling
                u = e.rounded(u * e.rows(each, tokens))
            results.append(u if value_residual is None else e.rounded(u + value_residual))
        source = rows(s.query)
        source = v if source is None else source
        query = source
        if s.query_weight is not None:
            query = self.linear(source, s.query_weight, s.query_bias)
        keys = results
        if s.key_weight is not None:
            keys = [self.linear(r, s.key_weight, s.key_bias) for r in results]
        scores = torch.cat([e.mean(query * key) * d for key in keys], -1)
        scores = e.rounded(scores)
        if self.keep is not None:
            scores = scores * self.keep * keep_scale(s.dropout_p)
        p = e.rounded(torch.softmax(scores / s.temperature, -1))
        y = torch.zeros_like(x)
        for i, r in enumerate(results):
            y = y + e.columns(p[..., i : i + 1], d) * r
        y = e.rounded(y)
        if s.value_weight is not None:
            y = self.linear(y, s.value_weight, None)
        y = y + x if s.residual_x else y
        y = y + skip if s.residual_skip and skip is not None else y
        if s.ln_weight is not None:
            y = self.layernorm(y, s.ln_weight, s.ln_bias, s.eps)
        return y.reshape(s.x.shape)

    def narrowed(self, name: str, tensor: Tensor) -> Tensor:
        return self.errors.rounded(tensor) if name in self.widened else tensor

    def linear(self, a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        result = self.errors.product(a, weight)
        if bias is not None:
            result = result + self.errors.rows(bias, a.shape[1])
        return self.errors.rounded(result)

    def layernorm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        e, (_, tokens, d) = self.errors, x.shape
        centred = x - e.columns(e.mean(x), d)
        deviation = torch.sqrt(e.mean(centred.square()) + eps)
        normal = centred * e.columns(1 / deviation, d) * e.rows(weight, tokens)
        return normal if bias is None else normal + e.rows(bias, tokens)
