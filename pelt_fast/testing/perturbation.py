"""Monte Carlo arithmetic: fp64 computations that err as those of a narrower dtype do (Parker 1997).

A value that is rounded is moved by a random part, uniform within ±1, of one unit roundoff of itself; a sum of K terms
by such a part of ``√K · a · (‖terms‖₂ + |sum|)``, a being the unit roundoff of the accumulator: `tolerance.py` says
why. Gradients are perturbed alike, by errors of their own, as a backward in that arithmetic is.

Every tensor has a leading dimension for the draws, which are computed side by side.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def roundoff(dtype: torch.dtype) -> float:
    """Half a unit in the last place of numbers just above 1: what one rounding errs by, relatively, at most."""
    return torch.finfo(dtype).eps / 2


def smallest_step(dtype: torch.dtype) -> float:
    """What one rounding errs by at most where numbers are subnormal."""
    return torch.finfo(dtype).smallest_normal * roundoff(dtype)


class Perturbation:
    """The errors of computations in ``dtype`` that accumulate in fp32 (fp64 for fp64); None: no errors."""

    def __init__(self, dtype: torch.dtype | None = None, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.exact = dtype is None
        if dtype is not None:
            self.roundoff, self.smallest = roundoff(dtype), smallest_step(dtype)
            self.accumulator = roundoff(torch.promote_types(dtype, torch.float32))

    def rounded(self, value: Tensor) -> Tensor:
        """``value`` in the dtype; so is its gradient."""
        if self.exact:
            return value
        if value.requires_grad:
            value = value.view_as(
                value
            )  # the hook of an argument would meet the sum of its gradients
            value.register_hook(lambda gradient: gradient + self._step(gradient))
        return value + self._step(value.detach())

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a bᵀ of (n, T, K) and (n, N, K)."""
        return _Product.apply(a, b, self)

    def rows(self, value: Tensor, tokens: int) -> Tensor:
        """(n, N) as every one of T rows; the gradient is a sum of T terms."""
        return self.product(value.new_ones(len(value), tokens, 1), value[..., None])

    def columns(self, value: Tensor, features: int) -> Tensor:
        """(n, T, 1) as every one of N columns; the gradient is a sum of N terms."""
        return self.product(value, value.new_ones(len(value), features, 1))

    def mean(self, value: Tensor) -> Tensor:
        """Of each row, (n, T, N) -> (n, T, 1)."""
        n, _, features = value.shape
        return self.product(value, value.new_full((n, 1, features), 1 / features))

    def sum(self, a: Tensor, b: Tensor) -> Tensor:
        """a b of (n, T, K) and (n, K, N), without autograd."""
        result = a @ b
        if self.exact:
            return result
        size = (a.square() @ b.square()).sqrt_().add_(result.abs())
        return result.addcmul_(
            size, self._parts(result), value=math.sqrt(a.shape[-1]) * self.accumulator
        )

    def _step(self, value: Tensor) -> Tensor:
        size = value.abs().mul_(self.roundoff).add_(self.smallest)
        return size.mul_(self._parts(value))

    def _parts(self, like: Tensor) -> Tensor:
        parts = torch.rand(like.shape, generator=self.generator, dtype=torch.float32)
        return parts.to(like.device, like.dtype).mul_(2).sub_(1)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, errors: Perturbation) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.errors = errors
        return errors.sum(a, b.mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (dy,), (a, b) = gradients, ctx.saved_tensors
        need_a, need_b, _ = ctx.needs_input_grad
        return (
            ctx.errors.sum(dy, b) if need_a else None,
            ctx.errors.sum(dy.mT, a) if need_b else None,
            None,
        )
