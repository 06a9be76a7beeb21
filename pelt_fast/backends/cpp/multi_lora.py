"""Batched multi-LoRA in C++ on a CPU: ``csrc/cpu/multi_lora.cpp``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _C, extension_obstacles


def unsupported(problem: Any) -> list[str]:
    """Why the C++ kernels cannot run this problem; empty when they can."""
    return extension_obstacles(problem)


def priority(problem: Any) -> int:
    """Ahead of torch on a CPU."""
    return 20 if problem.device_type == "cpu" else 0


def _call(
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    plan: Sequence[Tensor],
    ranks: Sequence[Tensor],
    scaling: Sequence[Tensor],
    row_scale: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Any, ...]:
    if row_scale is not None:
        row_scale = row_scale.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    dense = [[t.contiguous() for t in values] for values in (ranks, scaling)]
    return (lora_a, lora_b, plan[1], plan[2], *dense, row_scale, dropout_p, seed)


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
    """x (T, in) -> y[i] (T, out_i) and s (T, ΣR), the shrink before its scaling."""
    call = _call(x, lora_a, lora_b, plan, ranks, scaling, row_scale, dropout_p, seed)
    y, s = _C.multi_lora_fwd(x, base, *call, inplace)
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
    """dy[i] (T, out_i) -> dx (T, in), dA[i] (L, R, in), dB[i] (L, out_i, R), drow_scale (T,)."""
    call = _call(x, lora_a, lora_b, plan, ranks, scaling, row_scale, dropout_p, seed)
    found: tuple[Tensor | None, list[Tensor], list[Tensor], Tensor | None] = _C.multi_lora_bwd(
        dy, x, s, *call, need_dx, need_da, need_db, need_drow_scale
    )
    return found
