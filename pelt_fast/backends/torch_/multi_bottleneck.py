"""Batched bottleneck adapters out of ATen: products for each adapter that has tokens, the rest for all rows at once.

It reads the segments on the host, so on a GPU it waits for the device, and cannot be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...activations import activate, activate_backward
from ...random import philox_mask
from .adapter_block import fresh_sum, normalise, normalise_backward, times, wide_dtype


def unsupported(problem: Any) -> list[str]:
    """Every problem can run."""
    return []


def priority(problem: Any) -> int:
    """What is left when no kernel of ours can run."""
    return 10


def _segments(
    plan: Sequence[Tensor], widths: Tensor, most: int
) -> Iterator[tuple[int, Tensor, int]]:
    """Each adapter that has tokens and a width: its number, the tokens, the width."""
    perm, indptr = plan[1], plan[2].tolist()
    for g, width in enumerate(widths.clamp(0, most).tolist()):
        if width and indptr[g] < indptr[g + 1]:
            yield g, perm[indptr[g] : indptr[g + 1]], width


def _keep(x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor | None:
    return None if seed is None else philox_mask(seed, (x.shape[0], x.shape[1]), dropout_p)


def _of(t: Tensor | None, where: Tensor) -> Tensor | None:
    return None if t is None else t[where]


def _ups(
    q: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    plan: Sequence[Tensor],
    widths: Tensor,
    activation: str,
) -> Tensor:
    """w (T, d) = act(q) Uᵀ + b_U; zeros where there is no adapter."""
    w = q.new_zeros((q.shape[0], up.shape[1]))
    for g, where, m in _segments(plan, widths, up.shape[2]):
        bias = None if up_bias is None else up_bias[g].to(q.dtype)
        w[where] = F.linear(activate(q[where, :m], activation), up[g, :, :m].to(q.dtype), bias)
    return w


def _factors(
    scale: Tensor | None, gate: Tensor | None, plan: Sequence[Tensor], widths: Tensor, tokens: int
) -> Tensor | None:
    """(T,) in what is accumulated in: scale_g · gate_t; 1 for a row that no adapter changes."""
    if scale is None and gate is None:
        return None
    factors = gate
    if scale is not None:
        of_rows = scale[plan[0][:tokens].clamp(max=scale.shape[0] - 1)].to(wide_dtype(scale.dtype))
        factors = of_rows if gate is None else of_rows * gate.to(of_rows.dtype)
    assert factors is not None
    return factors.masked_fill(_without(plan, widths, tokens), 1.0)


def _without(plan: Sequence[Tensor], widths: Tensor, tokens: int) -> Tensor:
    """(T,): rows that no adapter changes."""
    bucket, adapters = plan[0][:tokens], widths.shape[0]
    return (bucket >= adapters) | (widths[bucket.clamp(max=adapters - 1)] <= 0)


def multi_bottleneck_fwd(
    x: Tensor,
    residual: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    plan: Sequence[Tensor],
    widths: Tensor,
    seed: Tensor | None,
    activation: str,
    scaling: float,
    eps: float,
    dropout_p: float,
    residual_x: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x (T, d) -> y (T, d), q (T, M), and mean and reciprocal deviation (T, 2) of the layernorm."""
    dtype, stats = x.dtype, None
    q = x.new_zeros((x.shape[0], down.shape[1]))
    for g, where, m in _segments(plan, widths, down.shape[1]):
        bias = None if down_bias is None else down_bias[g, :m].to(dtype)
        q[where, :m] = F.linear(x[where], down[g, :m].to(dtype), bias)
    w = _ups(q, up, up_bias, plan, widths, activation)
    factors = _factors(scale, gate, plan, widths, x.shape[0])
    s = times(w, scaling, None, factors, _keep(x, seed, dropout_p), dropout_p)
    if residual_x:
        s += x
    if residual is not None:
        s += residual
    if ln_weight is not None:
        s, stats = normalise(s, ln_weight, ln_bias, eps)
    return s, q, stats


def multi_bottleneck_bwd(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    q: Tensor,
    stats: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    plan: Sequence[Tensor],
    widths: Tensor,
    seed: Tensor | None,
    activation: str,
    scaling: float,
    eps: float,
    dropout_p: float,
    residual_x: bool,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """dy (T, d) -> the gradients that ``needs`` asks for, in the order of ``GRADIENTS`` in ``pelt_fast/ops``."""
    dtype, wide, tokens, most = x.dtype, wide_dtype(x.dtype), x.shape[0], down.shape[1]
    keep = _keep(x, seed, dropout_p)
    factors = _factors(scale, gate, plan, widths, tokens)
    owners = [x, residual, down, down_bias, up, up_bias, scale, gate, ln_weight, ln_bias]
    found: list[Tensor | None] = [
        torch.zeros_like(owner) if 2 <= i < 6 and need and owner is not None else None
        for i, (owner, need) in enumerate(zip(owners, needs, strict=True))
    ]
    ddown, ddown_bias, dup, dup_bias = found[2:6]

    w = None
    if stats is not None or needs[6] or needs[7]:
        w = _ups(q, up, up_bias, plan, widths, activation)
    ds = dy
    if stats is not None and ln_weight is not None and w is not None:
        s = times(w, scaling, None, factors, keep, dropout_p)
        s = s + x if residual_x else s
        s = s if residual is None else s + residual
        mask = [True, needs[8], needs[9]]
        ds, found[8], found[9] = normalise_backward(dy, s, stats, ln_weight, ln_bias, mask)
    along = None  # (T,): the gradient of the row's factor
    if w is not None and (needs[6] or needs[7]):
        along = times(ds.to(wide) * w, scaling, None, None, keep, dropout_p).sum(1)
    if along is not None and needs[7]:
        scales = _factors(scale, None, plan, widths, tokens)
        dgate = along if scales is None else along * scales
        found[7] = dgate.masked_fill(_without(plan, widths, tokens), 0.0)
    if along is not None and scale is not None and needs[6]:
        along = along if gate is None else along * gate.to(wide)
        dscale = found[6] = torch.zeros_like(scale)
        for g, where, _ in _segments(plan, widths, most):
            dscale[g] = along[where].sum()

    dw = times(ds, scaling, None, factors, keep, dropout_p)
    dx = x.new_zeros(x.shape) if needs[0] else None
    for g, where, m in _segments(plan, widths, most):
        rows_of_dw, rows_of_q = dw[where], q[where, :m]
        if dup is not None:
            dup[g, :, :m] = (rows_of_dw.T @ activate(rows_of_q, activation)).to(dup.dtype)
        if dup_bias is not None:
            dup_bias[g] = rows_of_dw.sum(0, dtype=wide)
        if dx is None and ddown is None and ddown_bias is None:
            continue
        da = rows_of_dw @ up[g, :, :m].to(dtype)
        dq = activate_backward(da.to(wide), rows_of_q.to(wide), activation).to(dtype)
        if ddown is not None:
            ddown[g, :m] = (dq.T @ x[where]).to(ddown.dtype)
        if ddown_bias is not None:
            ddown_bias[g, :m] = dq.sum(0, dtype=wide)
        if dx is not None:
            dx[where] = dq @ down[g, :m].to(dtype)
    found[0] = fresh_sum(dx, ds if residual_x else None) if needs[0] else None
    if needs[1]:
        found[1] = fresh_sum(None, ds) if ds is dy else ds
    return [
        None if g is None or owner is None else g.to(owner.dtype)
        for g, owner in zip(found, owners, strict=True)
    ]
