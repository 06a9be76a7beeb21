"""PHM weights (parameterised hypercomplex multiplication): sums of Kronecker products, and their parts.

A weight H (in, out) = Σ_i rule_i ⊗ (left_i right_i), so that with inputs (a, p) and outputs (b, q), a and b < n:

    y[(b,q)] = Σ_i Σ_a rule[i,a,b] Σ_p x[(a,p)] Σ_k left[i,p,k] right[i,k,q]

Nobody needs H for it. Towards the narrow side, x as rows of in / n is contracted with left, and what is left of it,
(n · n·k) numbers, is multiplied by one small matrix; towards the wide side it is the transpose:

    narrow = contract(x) M       contract(x)[(a,i,k)] = Σ_p x[(a,p)] C[(i,k),p]       M ((a,i,k), (b,q))

Mahabadi et al., "Compacter" (NeurIPS 2021); semantics of `adapters` 1.3.0, ``PHMLayer``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PHM(NamedTuple):
    """The tensors of one PHM weight: in = n · p and out = n · q features.

    Attributes:
        rule: (n, n, n).
        left: (n, p, k); or, where ``right`` is None, the weight that is not factorized, (n, p, q).
        right: (n, k, q), or None.
    """

    rule: Tensor
    left: Tensor
    right: Tensor | None

    @property
    def features(self) -> tuple[int, int]:
        """in, out."""
        n = self.rule.shape[0]
        last = self.left if self.right is None else self.right
        return n * self.left.shape[1], n * last.shape[2]


def dense(weight: PHM) -> Tensor:
    """Hᵀ, (out, in), as a linear layer has it; differentiable by autograd."""
    rule, left, right = weight
    n = rule.shape[0]
    w = left if right is None else torch.bmm(left, right)  # (n, p, q)
    _, p, q = w.shape
    h = torch.mm(rule.reshape(n, n * n).T, w.reshape(n, p * q))  # ((a, b), (p, q))
    return h.view(n, n, p, q).permute(1, 3, 0, 2).reshape(n * q, n * p)


def dense_backward(weight: PHM, dh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradient (out, in) of ``dense`` to those of rule, left and right."""
    rule, left, right = weight
    assert right is not None
    (n, p, _), q = left.shape, right.shape[2]
    grads = dh.view(n, q, n, p).permute(2, 0, 3, 1).reshape(n * n, p * q)
    drule = torch.mm(torch.bmm(left, right).view(n, p * q), grads.T).view(n, n, n)
    dw = torch.mm(rule.reshape(n, n * n), grads).view(n, p, q)
    return drule, torch.bmm(dw, right.transpose(1, 2)), torch.bmm(left.transpose(1, 2), dw)


def pays(down: PHM, up: PHM) -> bool:
    """Whether the parts take fewer products than the two dense matrices do; never for what is not factorized."""
    if down.right is None or up.right is None:
        return False
    d, m = down.features
    width = down.rule.shape[0] * (down.left.shape[2] + up.left.shape[2])  # n · k of both
    return width * d + width * down.rule.shape[0] * m < 2 * d * m


def turned(weight: PHM) -> PHM:
    """The transpose: in and out change places."""
    rule, left, right = weight
    assert right is not None
    return PHM(rule.transpose(1, 2), right.transpose(1, 2), left.transpose(1, 2))


def parts(weight: PHM, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """C (n·k, p) and M (n·n·k, out) of a weight whose input is the wide side, in ``dtype``; see above."""
    rule, left, right = weight
    assert right is not None
    n, k, q = right.shape
    wide = torch.promote_types(dtype, torch.float32)
    m = torch.bmm(rule.to(wide).reshape(n, n * n, 1), right.to(wide).reshape(n, 1, k * q))
    m = (
        m.view(n, n, n, k, q).permute(1, 0, 3, 2, 4).reshape(n * n * k, n * q)
    )  # from (i, a, b, k, q)
    return left.to(dtype).transpose(1, 2).reshape(n * k, -1), m.to(dtype)


def parts_backward(
    weight: PHM, dc: Tensor | None, dm: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """From the gradients of C and M to those of rule, left and right; None of None."""
    rule, _, right = weight
    assert right is not None
    n, k, q = right.shape
    dleft = None if dc is None else dc.view(n, k, -1).transpose(1, 2)
    if dm is None:
        return None, dleft, None
    grads = dm.view(n, n, k, n, q).permute(1, 0, 3, 2, 4).reshape(n, n * n, k * q)
    drule = torch.bmm(grads, right.to(dm.dtype).reshape(n, k * q, 1)).view(n, n, n)
    dright = torch.bmm(rule.to(dm.dtype).reshape(n, 1, n * n), grads).view(n, k, q)
    return drule, dleft, dright
