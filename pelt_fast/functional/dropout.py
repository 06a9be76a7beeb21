"""``torch.nn.functional.dropout`` where torch draws its masks element by element, in one thread."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import MaskedFunction
from .ordinary import short_way


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """``F.dropout``: the same result and the same state of the generator after it, bit for bit.

    In float32 on a CPU, where torch has no vectorised draw, the mask is made of the generator's words a block at a
    time (about a fifth of the time), kept as a byte an element instead of four, and applied by all threads. Anything
    else is torch's.

    Args:
        x: any shape and dtype.
        p: probability in [0, 1] that an element is set to zero; the others are divided by 1 - p.
        training: False: x itself.

    Raises:
        ValueError: p is no probability.
    """
    extension = short_way(None) if training else None
    mask = None if extension is None else extension.ordinary_dropout(x, p)
    if extension is None or mask is None:
        return F.dropout(x, p, training)
    trains = x.requires_grad and torch.is_grad_enabled()
    y: Tensor = (MaskedFunction.apply if trains else extension.masked)(x, mask, 1.0 - p)
    return y
