"""Bottleneck adapter on Triton: one launch forward; backward by rows and by columns, slab after slab.

Kernels and their maths: ``pelt_fast/kernels/adapter``. Here arguments become what those launch functions take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.adapter import choice, forward, grad_columns, grad_rows
from ...kernels.adapter.grad_columns import ColumnGrads, Partials
from ...kernels.adapter.operands import Form, Operands
from ...random import keep_scale
from .device import arch_of, device_reasons, precision_of


class _Shapes(NamedTuple):
    """What the configuration heuristics of the kernel files look at."""

    op: str
    arch: str
    dtype: torch.dtype
    tokens: int
    features: int
    bottleneck: int
    activation: str
    pre_ln: bool
    post_ln: bool
    skip: bool
    gate: bool
    dropout: bool


def unsupported(problem: Any) -> list[str]:
    """Why these kernels cannot run the problem; empty when they can."""
    return forward.unsupported(problem) + device_reasons(problem)


def priority(problem: Any) -> int:
    """Above ``torch`` where the fused kernels are modelled to be faster, below it elsewhere; 0 off the GPU."""
    if problem.device_type != "cuda":
        return 0
    return 40 if choice.prefers_fused(problem) else 5


def _shapes(op: str, ops: Operands, tokens: int, activation: str) -> _Shapes:
    x = ops.x
    return _Shapes(
        op=op,
        arch=arch_of(x.device),
        dtype=x.dtype,
        tokens=tokens,
        features=ops.features,
        bottleneck=ops.bottleneck,
        activation=activation,
        pre_ln=ops.pre_weight is not None,
        post_ln=ops.ln_weight is not None,
        skip=ops.skip is not None,
        gate=ops.gate is not None,
        dropout=ops.seed is not None,
    )


def _operands(
    x: Tensor,
    skip: Tensor | None,
    matrices: Sequence[Tensor],
    vectors: Sequence[Tensor | None],
    gate: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> Operands:
    """``matrices`` are down and up; ``vectors`` both biases, scale, and the weights and biases of both layernorms."""
    # The kernels' offsets into parameters are of 32 bits.
    down, up = (w if _extent(w) < 2**31 else w.contiguous() for w in matrices)
    down_bias, up_bias, scale, *norms = (None if v is None else v.contiguous() for v in vectors)
    amount = scaling if seed is None else scaling * keep_scale(dropout_p)
    return Operands.make(
        *(x, skip, down, down_bias, up, up_bias, scale, gate, *norms, seed, amount, dropout_p)
    )


def _extent(t: Tensor) -> int:
    return sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))


def bottleneck_adapter_fwd(
    x: Tensor,
    skip: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
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
    tokens = x.shape[0]
    with torch.cuda.device_of(x):
        vectors = (down_bias, up_bias, scale, pre_weight, pre_bias, ln_weight, ln_bias)
        ops = _operands(x, skip, (down, up), vectors, gate, seed, scaling, dropout_p)
        y, q = x.new_empty(x.shape), x.new_empty((tokens, down.shape[0]))
        pre_stats, post_stats = (
            None if weight is None else x.new_empty((tokens, 2), dtype=torch.float32)
            for weight in (pre_weight, ln_weight)
        )
        shapes = _shapes("bottleneck_adapter_fwd", ops, tokens, activation)
        forward.launch_forward(
            ops,
            y,
            q,
            pre_stats,
            post_stats,
            pre_eps,
            eps,
            Form.make(ops, activation, skip_in, residual_x, residual_skip, precision_of(x.dtype)),
            forward.default_config(shapes),
        )
    return y, q, pre_stats, post_stats


def bottleneck_adapter_bwd(
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    q: Tensor,
    pre_stats: Tensor | None,
    post_stats: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
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
    tokens, features = x.shape
    owners: tuple[Tensor | None, ...] = (x, skip, down, down_bias, up, up_bias, scale, gate)
    owners += (pre_weight, pre_bias, ln_weight, ln_bias)
    with torch.cuda.device_of(x):
        vectors = (down_bias, up_bias, scale, pre_weight, pre_bias, ln_weight, ln_bias)
        ops = _operands(x, skip, (down, up), vectors, gate, seed, scaling, dropout_p)
        q = q.contiguous()
        found = [
            owner.new_empty(owner.shape) if need and owner is not None else None
            for owner, need in zip(owners, needs, strict=True)
        ]
        dx, dskip, ddown, ddown_bias, dup, dup_bias, dscale, dgate, *dnorms = found
        # A scale of one element is the sum of those of the columns.
        dscales = dscale if scale is None or scale.numel() == features else None
        if dscale is not None and dscales is None:
            dscales = x.new_empty(features, dtype=torch.float32)
        grads = ColumnGrads(ddown, ddown_bias, dup, dup_bias, dscales, *dnorms)

        through_down = grads.down, grads.down_bias, grads.pre_weight, grads.pre_bias
        need_dq = dx is not None or (dskip is not None and skip_in) or _any(through_down)
        need_sums = ln_weight is not None and _any((dup, dup_bias, dscale))
        need_a = _any((dup, dscale, grads.ln_weight)) or (dup_bias is not None and need_sums)
        a = torch.empty_like(q) if need_a else None
        dq = torch.empty_like(q) if need_dq else None
        sums = x.new_empty((tokens, 2), dtype=torch.float32) if need_sums else None
        by_rows, by_columns = _any((dx, dskip, a, dq, dgate, sums)), _any(grads)

        shapes = _shapes("bottleneck_adapter_bwd", ops, tokens, activation)
        rows_config = grad_rows.default_config(shapes)
        columns_config = grad_columns.default_config(shapes)
        streams = 2 + sum(t is not None for t in (skip, dx, dskip))
        slab = grad_columns.slab_rows(shapes, streams) if by_rows and by_columns else tokens
        slabs = [range(begin, min(begin + slab, tokens)) for begin in range(0, tokens, slab)]
        partials = Partials.make(grads, columns_config.strips, len(slabs))
        precision = precision_of(x.dtype)
        form = Form.make(ops, activation, skip_in, residual_x, residual_skip, precision)
        for rows in slabs:
            if by_rows:
                grad_rows.launch_grad_rows(
                    *(ops, dy, q, pre_stats, post_stats, dx, dskip, a, dq, dgate, sums, rows),
                    form,
                    rows_config,
                )
            if by_columns:
                grad_columns.launch_grad_columns(
                    *(ops, partials, dy, a, dq, pre_stats, post_stats, sums, rows),
                    form,
                    columns_config,
                )
        partials.finish(grads)
        if dscale is not None and dscales is not dscale and dscales is not None:
            found[6] = dscales.sum(0, keepdim=True).to(dscale.dtype)
    return found


def _any(grads: Sequence[Tensor | None]) -> bool:
    return any(g is not None for g in grads)
