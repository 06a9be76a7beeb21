"""A linear layer whose weight is frozen, and so can be packed once: what stands beside the LoRA linears in a model."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..autograd import LoRALinearFunction
from ..dispatch import ORDINARY
from .ordinary import short_way


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, with the packed weight that LoRA linears use where that is faster.

    That is on a CPU, of a weight that needs no gradient: in half precision, where PyTorch's own product takes up to
    eight times as long without the instructions for it; in float32 and float64 of 2 to 32 tokens, as a library packs
    the weight at each call; in float32 of more where AVX2 is the best instruction set, as PyTorch's own product takes
    1.1 to 1.3 times as long there. All of it forward and backward, and only while there is room for the packed weight
    beside the other packs (``PELT_FAST_PACK_LIMIT_MB``): to pack it at each call, and to drive others out, would cost
    more than it brings. A backward needs a second pack, of the weight's transpose: where there is room for one alone,
    or the room changes in between, activation checkpointing recomputes other bits than it had.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.

    Returns:
        (..., out); sums in another order than ``F.linear``'s.

    Raises:
        RuntimeError: what ``F.linear`` raises; in a double backward of a packed product, as ``lora_linear``.
    """
    extension = short_way(None)
    if extension is not None:
        y = extension.ordinary_frozen_linear(x, weight, bias)
        if type(y) is Tensor:
            return y
        if y:
            return LoRALinearFunction.apply(x, weight, bias, None, (), (), ORDINARY)
    return F.linear(x, weight, bias)
