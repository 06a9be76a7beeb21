"""Batched bottleneck adapters on Triton: the grouped products of multi-LoRA's kernels, elementwise steps of PyTorch.

``kernels/multi_lora``'s shrink is x D_gᵀ and dw U_g, its expand a U_gᵀ, and the gradients of A and B those of D and U.
Between them stand bias, activation, factors, dropout, residuals and the layernorm, in fp32. Nothing waits for the
device, nothing depends on the ids but numbers: a CUDA graph may hold it. Sums over an adapter's rows are in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...activations import activate, activate_backward
from ...kernels.multi_lora import expand, grad_a, grad_b, grad_x, groups, shrink
from ...random import keep_scale, philox_mask
from ..torch_.adapter_block import normalise, normalise_backward
from ..torch_.multi_elementwise import segment_sums
from .device import arch_of, device_reasons, precision_of

MAX_WIDTH = 768
"""Of an adapter. The kernels go through ranks in blocks; wider ones were not compiled for checks of their code."""


def unsupported(problem: Any) -> list[str]:
    """Why these kernels cannot run the problem; empty when they can."""
    reasons = list(shrink.unsupported(problem))
    if problem.bottleneck > MAX_WIDTH:
        reasons.append(
            f"width {problem.bottleneck} is above {MAX_WIDTH}; torch goes adapter by adapter"
        )
    return reasons + device_reasons(problem)


def priority(problem: Any) -> int:
    """Above ``torch``, which waits for the device once a pass and launches some kernels for each adapter."""
    return 40 if problem.device_type == "cuda" else 0


class _Shapes(NamedTuple):
    """What the configuration heuristics of the kernel files look at: one projection, x -> bottleneck -> x."""

    op: str
    arch: str
    dtype: torch.dtype
    tokens: int
    adapters: int
    in_features: int
    out_features: tuple[int, ...]
    ranks: tuple[int, ...]
    dropout: bool

    @property
    def rank(self) -> int:
        """The largest width."""
        return self.ranks[0]


class _Products:
    """The grouped products of one call."""

    def __init__(
        self, x: Tensor, down: Tensor, up: Tensor, plan: Sequence[Tensor], widths: Tensor
    ) -> None:
        adapters, m, d = down.shape
        self.x, self.down, self.up, self.plan = x, down, up, plan
        self.widths = [widths.contiguous()]
        self.ones = [x.new_ones(adapters, dtype=torch.float32)]
        self.precision = precision_of(x.dtype)
        sizes = (arch_of(x.device), x.dtype, x.shape[0], adapters, d, (d,), (m,), False)
        # named as multi-LoRA's, by which the heuristics know forward from backward
        self.forward, self.backward = (
            _Shapes(f"multi_lora_{way}", *sizes) for way in ("fwd", "bwd")
        )

    def to_bottleneck(self, rows: Tensor, weight: Tensor, shapes: _Shapes) -> Tensor:
        """rows (T, d), weight (L, M, d) of any strides -> (T, M) fp32; zeros past a width."""
        config = shrink.default_config(shapes)
        out = rows.new_empty((rows.shape[0], weight.shape[1]), dtype=torch.float32)
        to = out
        if config.split:
            parts = config.parts(rows.shape[1])
            to = rows.new_empty((parts, *out.shape), dtype=torch.float32)
        shrink.launch_shrink(
            *([rows], [weight], to, self.plan, self.widths, None, None, None, 0.0, 1.0, config),
            *(config.split, self.precision),
        )
        if config.split:
            shrink.launch_finish(
                *(to, to, out, None, self.plan, self.widths, [weight.shape[1]], self.ones, None)
            )
        return out

    def from_bottleneck(self, a: Tensor) -> Tensor:
        """a (T, M) in x's dtype -> a Uᵀ (T, d) fp32; zeros without an adapter."""
        w = self.x.new_empty(self.x.shape, dtype=torch.float32)
        expand.launch_expand(
            *(a, None, [self.up], [None], [w], self.plan, self.widths, self.ones, None, 1.0),
            *(False, expand.default_config(self.forward), self.precision),
        )
        return w

    def to_input(self, dq: Tensor) -> Tensor:
        """dq (T, M) in x's dtype -> dq D (T, d) fp32; zeros without an adapter."""
        dx = self.x.new_empty(self.x.shape, dtype=torch.float32)
        grad_x.launch_grad_x(
            *(dq, [self.down], dx, self.plan, self.widths, None, 0.0, 1.0),
            *(grad_x.default_config(self.backward), self.precision),
        )
        return dx

    def of_down(self, dq: Tensor) -> Tensor:
        """dD (L, M, d) = Σ dqᵀ x."""
        found = torch.empty_like(self.down, memory_format=torch.contiguous_format)
        config = grad_a.default_config(self.backward)
        sums = grad_a.launch_grad_a(
            *(self.x, dq, [found], self.plan, self.widths, None, 0.0, 1.0, config, self.precision)
        )
        groups.launch_sums(sums, self.plan[2], groups.group_rows(config.chunks), 1.0)
        return found

    def of_up(self, dw: Tensor, a: Tensor) -> Tensor:
        """dU (L, d, M) = Σ dwᵀ a."""
        found = torch.empty_like(self.up, memory_format=torch.contiguous_format)
        config = grad_b.default_config(self.backward)
        sums = grad_b.launch_grad_b(
            *([dw], a, [found], self.plan, self.widths, self.ones, None, config, self.precision)
        )
        groups.launch_sums(sums, self.plan[2], groups.group_rows(config.chunks), 1.0)
        return found


class _Rows:
    """What each row has of its adapter's vectors, in fp32."""

    def __init__(
        self,
        plan: Sequence[Tensor],
        widths: Tensor,
        tokens: int,
        most: int,
        scale: Tensor | None,
        gate: Tensor | None,
        constant: float,
    ) -> None:
        bucket, adapters = plan[0][:tokens].long(), widths.shape[0]
        self.adapter = bucket.clamp(max=adapters - 1)
        width = widths.index_select(0, self.adapter).clamp(0, most)
        self.without = ((bucket >= adapters) | (width == 0))[:, None]
        # (T, M): past its adapter's width, where whatever the bias holds is not read
        self.past = self.without | (torch.arange(most, device=bucket.device) >= width[:, None])
        self.scale = None if scale is None else self._column(scale.index_select(0, self.adapter))
        self.gate = None if gate is None else self._column(gate)
        self.constant = constant

    def _column(self, values: Tensor) -> Tensor:
        """(T, 1); 1 without an adapter."""
        return values.float()[:, None].masked_fill(self.without, 1.0)

    def of(self, vectors: Tensor, nowhere: Tensor) -> Tensor:
        """(L, n) -> (T, n): each row its adapter's, 0 where it has none."""
        return vectors.index_select(0, self.adapter).float().masked_fill(nowhere, 0.0)

    def times(self, rows: Tensor, *, scale: bool = True, gate: bool = True) -> Tensor:
        """rows times the factors of w, (T, n)."""
        rows = rows if self.constant == 1.0 else rows * self.constant
        rows = rows if self.scale is None or not scale else rows * self.scale
        return rows if self.gate is None or not gate else rows * self.gate


def _keep(x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor | None:
    return None if seed is None else philox_mask(seed, (x.shape[0], x.shape[1]), dropout_p)


def _drop(rows: Tensor, keep: Tensor | None) -> Tensor:
    return rows if keep is None else torch.where(keep, rows, 0.0)


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
    constant = scaling if seed is None else scaling * keep_scale(dropout_p)
    with torch.cuda.device_of(x):
        products = _Products(x, down, up, plan, widths)
        rows = _Rows(plan, widths, x.shape[0], down.shape[1], scale, gate, constant)
        q = products.to_bottleneck(x, down, products.forward)
        if down_bias is not None:
            q = q + rows.of(down_bias, rows.past)
        q = q.to(x.dtype)
        w = products.from_bottleneck(activate(q, activation))
        s = _sum(w, x, residual, up_bias, rows, _keep(x, seed, dropout_p), residual_x)
        stats = None
        if ln_weight is not None:
            s, stats = normalise(s, ln_weight, ln_bias, eps)
    return s.to(x.dtype), q, stats


def _sum(
    w: Tensor,
    x: Tensor,
    residual: Tensor | None,
    up_bias: Tensor | None,
    rows: _Rows,
    keep: Tensor | None,
    residual_x: bool,
) -> Tensor:
    """s (T, d) of a Uᵀ."""
    w = w if up_bias is None else w + rows.of(up_bias, rows.without)
    s = _drop(rows.times(w), keep)
    s = s + x if residual_x else s
    return s if residual is None else s + residual


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
    of_x, of_residual, of_down, of_down_bias, of_up, of_up_bias, of_scale, of_gate, *of_ln = needs
    owners = [x, residual, down, down_bias, up, up_bias, scale, gate, ln_weight, ln_bias]
    found: list[Tensor | None] = [None] * len(owners)
    constant = scaling if seed is None else scaling * keep_scale(dropout_p)
    with torch.cuda.device_of(x):
        products = _Products(x, down, up, plan, widths)
        rows = _Rows(plan, widths, x.shape[0], down.shape[1], scale, gate, constant)
        keep, q, order = _keep(x, seed, dropout_p), q.contiguous(), plan[1][: x.shape[0]]
        a = activate(q, activation)

        def sums(values: Tensor) -> Tensor:
            """(T, n) -> (L, n), over an adapter's rows in order."""
            return segment_sums(values.index_select(0, order), plan[2])

        w, ds = None, dy.float()
        if stats is not None or of_scale or of_gate:
            w = products.from_bottleneck(a)
        if stats is not None and ln_weight is not None and w is not None:
            s = _sum(w, x, residual, up_bias, rows, keep, residual_x)
            mask = [True, *of_ln]
            ds, found[8], found[9] = normalise_backward(ds, s, stats, ln_weight, ln_bias, mask)
        if w is not None and (of_scale or of_gate):
            w = w if up_bias is None else w + rows.of(up_bias, rows.without)
            along = _drop(ds * w, keep).sum(1, keepdim=True).masked_fill(rows.without, 0.0)
            if of_gate:
                found[7] = rows.times(along, gate=False).squeeze(1)
            if of_scale:
                found[6] = sums(rows.times(along, scale=False)).squeeze(1)
        dw = _drop(rows.times(ds), keep)
        if of_up_bias:
            found[5] = sums(dw.masked_fill(rows.without, 0.0))
        dw = dw.to(x.dtype)
        if of_up:
            found[4] = products.of_up(dw, a)
        dz = None
        if of_x or of_down or of_down_bias:
            da = products.to_bottleneck(dw, up.transpose(1, 2), products.backward)
            dq = activate_backward(da, q.float(), activation)
            if of_down_bias:
                found[3] = sums(dq)
            dq = dq.to(x.dtype)
            if of_down:
                found[2] = products.of_down(dq)
            if of_x:
                dz = products.to_input(dq)
        if dz is not None:
            found[0] = dz + ds if residual_x else dz
        if of_residual:
            found[1] = (
                ds.clone() if ds is dy else ds
            )  # what an operator returns is no argument of its
    return [
        None if g is None or owner is None else g.to(owner.dtype)
        for g, owner in zip(found, owners, strict=True)
    ]
