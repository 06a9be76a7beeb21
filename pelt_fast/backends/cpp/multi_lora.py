"""Batched multi-LoRA in C++ on a CPU: ``csrc/cpu/multi_lora.cpp``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import _C, extension_obstacles


def unsupported(problem: Any) -> list[str]:
    """Why the C++ kernels cannot run this problem; empty when they can."""
    return extension_obstacles(problem)


def priority(problem: Any) -> int:
    """Ahead of torch on a CPU."""
    return 20 if problem.device_type == "cpu" else 0


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
    y, s = _C.multi_lora_fwd(
        x, lora_a, lora_b, base, plan, ranks, scaling, row_scale, dropout_p, seed, inplace
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
) -> tuple[Any, list[Any], list[Any], Any]:
    """dy[i] (T, out_i) -> dx (T, in), dA[i] (L, R, in), dB[i] (L, out_i, R), drow_scale (T,)."""
    found: tuple[Any, list[Any], list[Any], Any] = _C.multi_lora_bwd(
        *(dy, x, lora_a, lora_b, s, plan, ranks, scaling, row_scale, dropout_p, seed),
        *(need_dx, need_da, need_db, need_drow_scale),
    )
    return found
