"""Two yardsticks for one `compacter` call, and how far from the first a result may be.

The exact answer is the reference's in fp64; eager is the library's ``PHMLayer``, which builds every Kronecker product.
The bound is the bottleneck adapter's, whose Monte Carlo model here makes the errors of a composition that goes through
the factors: one rounding of what each contraction gives, and of the small matrices between factors and bottleneck.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import adapter_oracle, adapter_tolerance, tolerance
from .adapter_oracle import mask
from .adapter_workloads import AdapterInputs
from .compacter_workloads import CompacterInputs
from .oracle import Results, run

__all__ = ["assert_accurate", "deviations", "eager", "exact", "mask", "yardsticks"]


def exact(
    inputs: CompacterInputs, keep: Tensor | None, wanted: Iterable[str] | None = None
) -> Results:
    """The oracle: `pelt_fast.reference` and its autograd in fp64, on the very numbers of ``inputs``."""

    def function(i: CompacterInputs) -> Tensor:
        down = reference.phm_matrix(i.down_rule, i.down_left, i.down_right)
        up = reference.phm_matrix(i.up_rule, i.up_left, i.up_right)
        return adapter_oracle.formula(_with_matrices(i, down.T, up.T), keep)

    return run(function, inputs.map(lambda _, t: t.detach().double()), wanted)


def eager(
    inputs: CompacterInputs, keep: Tensor | None, wanted: Iterable[str] | None = None
) -> Results:
    """The composition of the `adapters` library: operation for operation ``PHMLayer``, in the dtypes of ``inputs``."""
    return run(lambda leaves: composition(leaves, keep), inputs, wanted)


def composition(leaves: CompacterInputs, keep: Tensor | None = None) -> Tensor:
    """The library's y."""
    i = leaves.map(lambda _, t: t.to(leaves.x.dtype))
    down = _library_matrix(i.down_rule, i.down_left, i.down_right)
    up = _library_matrix(i.up_rule, i.up_left, i.up_right)
    return adapter_oracle.composition(_with_matrices(leaves, down.T, up.T), keep)


def deviations(
    actual: Results, inputs: CompacterInputs, keep: Tensor | None
) -> list[tolerance.Deviation]:
    """Compares results by name, ``y`` and gradients, with the oracle."""
    wanted = [name for name in actual if name != "y"]
    return tolerance.compare(actual, *yardsticks(inputs, keep, wanted))


def yardsticks(
    inputs: CompacterInputs, keep: Tensor | None, wanted: Iterable[str] | None = None
) -> tuple[Results, Results, tolerance.Bounds]:
    """What `tolerance.compare` compares with: the oracle, eager, the bounds."""
    found = exact(inputs, keep, wanted)
    bounds = adapter_tolerance.bounds(found, inputs, keep, _Model)
    return found, eager(inputs, keep, wanted), bounds


def assert_accurate(actual: Results, inputs: CompacterInputs, keep: Tensor | None) -> None:
    """Raises AssertionError when a result has the wrong size, the wrong dtype or too large an error."""
    tolerance.assert_forms(actual, inputs)
    tolerance.assert_all_ok(deviations(actual, inputs, keep))


def _with_matrices(inputs: CompacterInputs, down: Tensor, up: Tensor) -> AdapterInputs:
    """The same call with dense matrices, (m, d) and (d, m)."""
    shared = {f.name for f in fields(AdapterInputs)} - {"down", "up"}
    return AdapterInputs(**{name: getattr(inputs, name) for name in shared}, down=down, up=up)


def _library_matrix(rule: Tensor, left: Tensor, right: Tensor | None) -> Tensor:
    """``kronecker_product(phm_rule, W).sum(0)``."""
    w = left if right is None else torch.bmm(left, right)
    products = rule.unsqueeze(-1).unsqueeze(-3) * w.unsqueeze(-2).unsqueeze(-4)
    return products.reshape(len(rule), rule.shape[1] * w.shape[1], -1).sum(0)


class _Model(adapter_tolerance.Model):
    """Through the factors; every tensor has a leading dimension for the draws."""

    def down(self, v: Tensor, s: Any) -> Tensor:
        e, (rule, left, right) = self.errors, (s.down_rule, s.down_left, s.down_right)
        if right is None:
            return self.linear(v, self._matrix(rule, left), s.down_bias)
        count, n, p, k = left.shape
        c = left.transpose(2, 3).reshape(count, n * k, p)
        tokens = v.shape[1]
        inner = e.rounded(e.product(v.reshape(count, tokens * n, p), c))
        inner = inner.view(count, tokens, n * n * k)
        mix = torch.einsum("ciab,cikq->cbqaik", rule, right).reshape(count, -1, n * n * k)
        return self.linear(inner, e.rounded(mix), s.down_bias)

    def up(self, a: Tensor, s: Any) -> Tensor:
        e, (rule, left, right) = self.errors, (s.up_rule, s.up_left, s.up_right)
        if right is None:
            return self.linear(a, self._matrix(rule, left), s.up_bias)
        count, n, k, p = right.shape
        mix = torch.einsum("ciab,cizk->cbikaz", rule, left).reshape(count, n * n * k, -1)
        inner = e.rounded(e.product(a, e.rounded(mix)))
        c = right.reshape(count, n * k, p).transpose(1, 2)
        tokens = a.shape[1]
        w = e.product(inner.view(count, tokens * n, n * k), c).view(count, tokens, n * p)
        return e.rounded(w if s.up_bias is None else w + e.rows(s.up_bias, tokens))

    def _matrix(self, rule: Tensor, w: Tensor) -> Tensor:
        """H, transposed; PyTorch rounds it once."""
        h = torch.einsum("ciab,cipq->cbqap", rule, w)
        return self.errors.rounded(h.flatten(3, 4).flatten(1, 2))
