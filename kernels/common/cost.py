"""What a launch costs at least: the numbers of a roofline."""

from __future__ import annotations

from typing import NamedTuple

import torch

_BYTES = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 4, torch.float64: 8}


class Cost(NamedTuple):
    """Useful floating-point operations, and compulsory bytes: every argument read or written once."""

    flops: int
    bytes: int


def itemsize(dtype: torch.dtype) -> int:
    """Bytes of one element."""
    return _BYTES[dtype]
