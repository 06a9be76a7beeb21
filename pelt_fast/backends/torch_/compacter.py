"""The Compacter adapter out of thin GEMMs: no H, and nothing of size T × d but the results.

Each projection is a contraction over features that are (n, features / n), which a view of the rows is, and a product
with a small matrix; see ``pelt_fast/phm.py``. Their results, n · n · rank numbers a row, are made again in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...phm import PHM, parts, parts_backward, turned
from .adapter_block import Block, Needs, backward, forward


def unsupported(problem: Any) -> list[str]:
    """Every problem can run."""
    return []


def priority(problem: Any) -> int:
    """What is left when no kernel of ours can run."""
    return 10


def compacter_fwd(
    x: Tensor,
    skip: Tensor | None,
    down_rule: Tensor,
    down_left: Tensor,
    down_right: Tensor,
    down_bias: Tensor | None,
    up_rule: Tensor,
    up_left: Tensor,
    up_right: Tensor,
    up_bias: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    scaling: float,
    pre_eps: float,
    eps: float,
    dropout_p: float,
    skip_in: bool,
    residual_x: bool,
    residual_skip: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x (T, d) -> y (T, d), q (T, m), and mean and reciprocal deviation (T, 2) of each layernorm."""
    block = Block(
        *(down_bias, up_bias, scale, gate, pre_weight, pre_bias, ln_weight, ln_bias, seed),
        *(activation, scaling, pre_eps, eps, dropout_p, skip_in, residual_x, residual_skip),
    )
    down = _Narrowing(PHM(down_rule, down_left, down_right), x.dtype)
    up = _Widening(PHM(up_rule, up_left, up_right), x.dtype)
    return forward(x, skip, down, up, block)


def compacter_bwd(
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    q: Tensor,
    pre_stats: Tensor | None,
    post_stats: Tensor | None,
    down_rule: Tensor,
    down_left: Tensor,
    down_right: Tensor,
    down_bias: Tensor | None,
    up_rule: Tensor,
    up_left: Tensor,
    up_right: Tensor,
    up_bias: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    scaling: float,
    pre_eps: float,
    eps: float,
    dropout_p: float,
    skip_in: bool,
    residual_x: bool,
    residual_skip: bool,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """dy (T, d) -> the gradients that ``needs`` asks for, in the order of ``GRADIENTS`` in ``pelt_fast/ops``."""
    block = Block(
        *(down_bias, up_bias, scale, gate, pre_weight, pre_bias, ln_weight, ln_bias, seed),
        *(activation, scaling, pre_eps, eps, dropout_p, skip_in, residual_x, residual_skip),
    )
    down = _Narrowing(PHM(down_rule, down_left, down_right), x.dtype)
    up = _Widening(PHM(up_rule, up_left, up_right), x.dtype)
    collapsed = [*needs[:2], any(needs[2:5]), needs[5], any(needs[6:9]), *needs[9:]]
    need = Needs(*collapsed)
    g = backward(dy, x, skip, q, pre_stats, post_stats, down, up, block, need)
    of_down, of_up = g.down or (None,) * 3, g.up or (None,) * 3
    flat = [g.x, g.skip, *of_down, g.down_bias, *of_up, g.up_bias]
    flat += [g.scale, g.gate, g.pre_weight, g.pre_bias, g.ln_weight, g.ln_bias]
    owners = [x, skip, down_rule, down_left, down_right, down_bias, up_rule, up_left, up_right]
    owners += [up_bias, scale, gate, pre_weight, pre_bias, ln_weight, ln_bias]
    return [
        grad.to(owner.dtype).contiguous()
        if need and grad is not None and owner is not None
        else None
        for grad, owner, need in zip(flat, owners, needs, strict=True)
    ]


class _Narrowing:
    """A PHM weight from the wide side to the narrow one."""

    def __init__(self, weight: PHM, dtype: torch.dtype) -> None:
        self.weight, self.wide = weight, torch.promote_types(dtype, torch.float32)
        self.c, self.m = parts(weight, dtype)

    def contract(self, v: Tensor) -> Tensor:
        """(T, wide) -> (T, n · n·k)."""
        return (v.reshape(-1, self.c.shape[1]) @ self.c.T).view(v.shape[0], -1)

    def expand(self, s: Tensor) -> Tensor:
        """(T, n · n·k) -> (T, wide)."""
        return (s.view(-1, self.c.shape[0]) @ self.c).view(s.shape[0], -1)

    def linear(self, v: Tensor, bias: Tensor | None) -> Tensor:
        s = self.contract(v)
        return s @ self.m if bias is None else torch.addmm(bias, s, self.m)

    def back(self, dy: Tensor) -> Tensor:
        return self.expand(dy @ self.m.T)

    def gradients(self, dy: Tensor, v: Tensor) -> tuple[Tensor | None, ...]:
        dm = self.contract(v).T @ dy
        return self.of_parts((dy @ self.m.T), v, dm)

    def of_parts(self, ds: Tensor, v: Tensor, dm: Tensor) -> tuple[Tensor | None, ...]:
        """From the gradients of what was contracted, or of what was expanded from, (T, n · n·k) and of M."""
        dc = ds.view(-1, self.c.shape[0]).T @ v.reshape(-1, self.c.shape[1])
        return parts_backward(self.weight, dc.to(self.wide), dm.to(self.wide))


class _Widening(_Narrowing):
    """A PHM weight from the narrow side to the wide one: the transpose of the other."""

    def __init__(self, weight: PHM, dtype: torch.dtype) -> None:
        super().__init__(turned(weight), dtype)

    def linear(self, v: Tensor, bias: Tensor | None) -> Tensor:
        w = self.expand(v @ self.m.T)
        return w if bias is None else w.add_(bias)

    def back(self, dy: Tensor) -> Tensor:
        return self.contract(dy) @ self.m

    def gradients(self, dy: Tensor, v: Tensor) -> tuple[Tensor | None, ...]:
        dm = self.contract(dy).T @ v
        drule, dright, dleft = self.of_parts(v @ self.m.T, dy, dm)
        assert drule is not None
        assert dleft is not None
        assert dright is not None
        return drule.transpose(1, 2), dleft.transpose(1, 2), dright.transpose(1, 2)
