"""Batched multi-LoRA on Triton: shrink and expand; backward by tiles of rows and by groups of an adapter's rows.

Kernels and their maths: ``pelt_fast/kernels/multi_lora``. Here arguments become what those launch functions take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.multi_lora import choice, expand, grad_a, grad_b, grad_x, groups, shrink
from ...random import keep_scale
from .device import arch_of, device_reasons, precision_of

_MAX_RANK = 256


class _Shapes(NamedTuple):
    """What the configuration heuristics of the kernel files look at."""

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
        """The largest."""
        return max(self.ranks)


def unsupported(problem: Any) -> list[str]:
    """Why these kernels cannot run the problem; empty when they can."""
    reasons = list(shrink.unsupported(problem))
    if problem.rank > _MAX_RANK:
        reasons.append(f"rank {problem.rank} is above {_MAX_RANK}")
    return reasons + device_reasons(problem)


def priority(problem: Any) -> int:
    """Above ``torch`` where the fused kernels are modelled to be faster, below it elsewhere; 0 off the GPU."""
    if problem.device_type != "cuda":
        return 0
    return 40 if choice.prefers_fused(problem) else 5


def _shapes(
    op: str, x: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], dropout: bool
) -> _Shapes:
    return _Shapes(
        op=op,
        arch=arch_of(x.device),
        dtype=x.dtype,
        tokens=x.shape[0],
        adapters=lora_a[0].shape[0],
        in_features=x.shape[1],
        out_features=tuple([b.shape[1] for b in lora_b]),
        ranks=tuple([a.shape[1] for a in lora_a]),
        dropout=dropout,
    )


def _fp32(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.contiguous().to(torch.float32) for t in tensors]


def _transposed(lora_b: Sequence[Tensor]) -> list[Tensor]:
    return [b.transpose(1, 2) for b in lora_b]


def multi_lora_fwd(
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    base: Sequence[Tensor | None],
    plan: Sequence[Tensor],
    ranks: Sequence[Tensor],
    scaling: Sequence[Tensor],
    row_scale: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    inplace: bool,
) -> tuple[list[Tensor], Tensor]:
    """x (T, in) -> y[i] (T, out_i) and s (T, ΣR), the shrink without scalings."""
    tokens = x.shape[0]
    shapes = _shapes("multi_lora_fwd", x, lora_a, lora_b, seed is not None)
    precision = precision_of(x.dtype)
    scale = keep_scale(dropout_p) if seed is not None else 1.0
    with torch.cuda.device_of(x):
        ranks = [r.contiguous() for r in ranks]
        row_scale = None if row_scale is None else row_scale.contiguous()
        config = shrink.default_config(shapes)
        s = x.new_empty((tokens, sum([a.shape[1] for a in lora_a])))
        partial = None
        if config.split:
            parts = config.parts(shapes.in_features)
            partial = x.new_empty((parts, *s.shape), dtype=torch.float32)
        shrink.launch_shrink(
            *([x] * len(lora_a), lora_a, s if partial is None else partial, plan, ranks),
            *(None, None, seed, dropout_p, scale, config, partial is not None, precision),
        )
        y = [
            b if inplace and b is not None else x.new_empty((tokens, columns))
            for b, columns in zip(base, shapes.out_features, strict=True)
        ]
        expand.launch_expand(
            *(s, partial, lora_b, base, y, plan, ranks, _fp32(scaling), row_scale, scale, inplace),
            *(expand.default_config(shapes), precision),
        )
    return y, s


def multi_lora_bwd(
    dy: Sequence[Tensor],
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    s: Tensor,
    plan: Sequence[Tensor],
    ranks: Sequence[Tensor],
    scaling: Sequence[Tensor],
    row_scale: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    need_drow_scale: bool,
) -> tuple[Tensor | None, list[Tensor], list[Tensor], Tensor | None]:
    """dy[i] (T, out_i) -> dx (T, in), dA[i] (L, R_i, in), dB[i] (L, out_i, R_i), drow_scale (T,) fp32."""
    tokens = x.shape[0]
    shapes = _shapes("multi_lora_bwd", x, lora_a, lora_b, seed is not None)
    precision = precision_of(x.dtype)
    scale = keep_scale(dropout_p) if seed is not None else 1.0
    with torch.cuda.device_of(x):
        ranks, scalings, s = [r.contiguous() for r in ranks], _fp32(scaling), s.contiguous()
        row_scale = None if row_scale is None else row_scale.contiguous()
        drow_scale = x.new_empty(tokens, dtype=torch.float32) if need_drow_scale else None
        ds = x.new_empty(s.shape) if need_dx or need_da else None
        if ds is not None or drow_scale is not None:
            config = shrink.default_config(shapes)
            b = _transposed(lora_b)
            # The sum of partials makes drow_scale too; without a split there is one partial.
            if config.split or drow_scale is not None or ds is None:
                parts = config.parts(max(shapes.out_features)) if config.split else 1
                partial = x.new_empty((parts, *s.shape), dtype=torch.float32)
                shrink.launch_shrink(
                    *(dy, b, partial, plan, ranks, None, None, None, 0.0, 1.0, config),
                    *(config.split, precision),
                )
                shrink.launch_finish(
                    *(partial, s, ds, drow_scale, plan, ranks, [a.shape[1] for a in lora_a]),
                    *(scalings, row_scale),
                )
            else:
                shrink.launch_shrink(
                    *(dy, b, ds, plan, ranks, scalings, row_scale, None, 0.0, 1.0, config),
                    *(False, precision),
                )
        dx = x.new_empty(x.shape) if need_dx else None
        if dx is not None and ds is not None:
            grad_x.launch_grad_x(
                *(ds, lora_a, dx, plan, ranks, seed, dropout_p, scale),
                *(grad_x.default_config(shapes), precision),
            )
        da = _grads(lora_a) if need_da else []
        db = _grads(lora_b) if need_db else []
        if ds is not None and need_da:
            by_a = grad_a.default_config(shapes)
            sums = grad_a.launch_grad_a(
                x, ds, da, plan, ranks, seed, dropout_p, scale, by_a, precision
            )
            groups.launch_sums(sums, plan[2], groups.group_rows(by_a.chunks), scale)
        if need_db:
            by_b = grad_b.default_config(shapes)
            sums = grad_b.launch_grad_b(
                dy, s, db, plan, ranks, scalings, row_scale, by_b, precision
            )
            groups.launch_sums(sums, plan[2], groups.group_rows(by_b.chunks), 1.0)
    return dx, da, db, drow_scale


def _grads(parameters: Sequence[Tensor]) -> list[Tensor]:
    """A contiguous gradient for each parameter."""
    return [torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters]
