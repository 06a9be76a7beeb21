"""Tensors of any number of dimensions as rows (T, features), and back."""

from __future__ import annotations

import torch
from torch import Tensor

_unsafe_view = torch.ops.aten._unsafe_view.default


def to_rows(x: Tensor) -> Tensor:
    """(..., features) -> (T, features), last stride 1; a view wherever x's strides allow one."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def from_rows(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A fresh (T, features) in ``shape``.

    Not a view to autograd: it forbids in-place changes of views that a custom Function returns.
    """
    return rows if len(shape) == 2 else _unsafe_view(rows, shape)
