"""How fast a frozen linear runs on this machine: asked before anything slow is started."""

from __future__ import annotations

import math
import time
from functools import lru_cache

import torch
import torch.nn.functional as F

from .cases import DTYPES


@lru_cache
def seconds_per_flop(dtype: str, train: bool = True) -> float:
    """Of a small frozen step on the CPU.

    Without bf16 instructions torch's backward matmul runs at 1 GFLOP/s in bf16, a hundred times
    slower than in fp32: taken unawares, one row of the table would last a quarter of an hour.
    """
    tokens, features = 64, 512
    x = torch.randn(tokens, features).to(DTYPES[dtype]).requires_grad_(train)
    weight = torch.randn(features, features).to(DTYPES[dtype])
    dy = torch.randn(tokens, features).to(DTYPES[dtype])
    best = math.inf
    # the best of many: on a busy machine threads that wait for each other make single calls a
    # hundred times too long
    end = time.perf_counter() + 0.5
    while time.perf_counter() < end:
        start = time.perf_counter()
        y = F.linear(x, weight)
        if train:
            torch.autograd.grad(y, [x], dy)
        best = min(best, time.perf_counter() - start)
    return best / ((4 if train else 2) * tokens * features * features)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether a bf16 step is at least about as fast as an fp32 one."""
    return device.type == "cuda" or seconds_per_flop("bf16") < 1.5 * seconds_per_flop("fp32")
