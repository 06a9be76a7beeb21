"""A scale and a bias by element, of an adapter for each token, in C++ on a CPU: ``csrc/cpu/multi_elementwise.cpp``."""

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


def _rows(dtype: torch.dtype, *parameters: Tensor | None) -> list[Tensor | None]:
    """Last stride 1, all in ``dtype`` or all in the one that is computed in."""
    if any(p is not None and p.dtype != dtype for p in parameters):
        dtype = torch.promote_types(dtype, torch.float32)
    rows = [None if p is None else p.to(dtype) for p in parameters]
    return [p if p is None or p.stride(1) == 1 else p.contiguous() for p in rows]


def multi_elementwise_fwd(
    x: Tensor, scales: Tensor | None, biases: Tensor | None, plan: Sequence[Tensor]
) -> Tensor:
    """x (T, features) -> y, rounded once."""
    y: Tensor = _C.multi_elementwise_fwd(x, *_rows(x.dtype, scales, biases), plan[0])
    return y


def multi_elementwise_bwd(
    dy: Tensor,
    x: Tensor | None,
    scales: Tensor | None,
    plan: Sequence[Tensor],
    need_dx: bool,
    need_dscales: bool,
    need_dbiases: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx in dy's dtype; dscales and dbiases (L, features) in the dtype that is computed in."""
    needs = (need_dx, need_dscales, need_dbiases)
    found: tuple[Tensor | None, Tensor | None, Tensor | None] = _C.multi_elementwise_bwd(
        dy, x, *_rows(dy.dtype, scales), *plan[1:], *needs
    )
    return found
