"""IA³ and BitFit with an adapter for each token, out of ATen: rows of the parameters are gathered for the tokens.

Rows sums run over an adapter's own tokens in their order, so that they do not depend on who else is in the batch: on a
CPU one sum for each adapter, elsewhere ``segment_reduce``, which waits for nothing and has no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def unsupported(problem: Any) -> list[str]:
    """Every problem can run."""
    return []


def priority(problem: Any) -> int:
    """What is left when no kernel of ours can run."""
    return 10


def _rows(parameter: Tensor, bucket: Tensor, null: Tensor, neutral: float, wide: Any) -> Tensor:
    """(T, features): each token's row, or ``neutral`` in all of it."""
    most = parameter.shape[0] - 1
    rows = parameter.index_select(0, bucket.clamp(max=most)).to(wide)
    return rows.masked_fill_(null, neutral)


def multi_elementwise_fwd(
    x: Tensor, scales: Tensor | None, biases: Tensor | None, plan: Sequence[Tensor]
) -> Tensor:
    """x (T, features) -> y, rounded once."""
    given = scales if scales is not None else biases
    assert given is not None
    wide = torch.promote_types(x.dtype, torch.float32)
    bucket = plan[0][: x.shape[0]]
    null = (bucket >= given.shape[0]).unsqueeze(1)
    y = x.to(wide)
    if scales is not None:
        y = _rows(scales, bucket, null, 1.0, wide).mul_(y)
    if biases is not None:  # -0 changes no number's bits, 0 that of -0
        y = _rows(biases, bucket, null, -0.0, wide).add_(y)
    return y.to(x.dtype)


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
    wide, tokens = torch.promote_types(dy.dtype, torch.float32), dy.shape[0]
    adapters = plan[2].shape[0] - 2
    dx, dscales, dbiases = None, None, None
    if need_dx:
        assert scales is not None
        bucket = plan[0][:tokens]
        rows = _rows(scales, bucket, (bucket >= adapters).unsqueeze(1), 1.0, wide)
        dx = rows.mul_(dy.to(wide)).to(dy.dtype)
    if need_dscales or need_dbiases:
        order = plan[1][:tokens]
        sums = _cpu_sums if dy.device.type == "cpu" else segment_sums
        by_adapter = dy.index_select(0, order).to(wide)
        if need_dbiases:
            dbiases = sums(by_adapter, plan[2])
        if need_dscales:
            assert x is not None
            dscales = sums(by_adapter * x.index_select(0, order).to(wide), plan[2])
    return dx, dscales, dbiases


def _cpu_sums(rows: Tensor, indptr: Tensor) -> Tensor:
    """(T, features) by bucket -> (L, features)."""
    sums = rows.new_zeros(indptr.shape[0] - 2, rows.shape[1])
    bounds = indptr.tolist()
    for g in range(len(sums)):
        if bounds[g] < bounds[g + 1]:
            torch.sum(rows[bounds[g] : bounds[g + 1]], 0, out=sums[g])
    return sums


def segment_sums(rows: Tensor, indptr: Tensor) -> Tensor:
    """The same without reading ``indptr`` on the host; rows are added one after the other."""
    return torch.segment_reduce(rows, "sum", offsets=indptr[:-1], axis=0, initial=0, unsafe=True)
