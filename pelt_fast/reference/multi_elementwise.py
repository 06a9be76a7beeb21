"""IA³ and BitFit with an adapter for each token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def multi_elementwise(
    x: Tensor, scales: Tensor | None, biases: Tensor | None, ids: Sequence[int]
) -> Tensor:
    """x (T, features), scales and biases (L, features) -> y (T, features), of one dtype.

    Token t has y = x · scales[g] + biases[g], g = ids[t]; outside [0, L) it stays as it is.
    """
    given = scales if scales is not None else biases
    adapters = 0 if given is None else given.shape[0]
    rows = []
    for row, g in zip(x.unbind(), ids, strict=True):
        y = row
        if 0 <= g < adapters:
            y = y if scales is None else y * scales[g]
            y = y if biases is None else y + biases[g]
        rows.append(y)
    return torch.stack(rows)
