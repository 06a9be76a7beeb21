"""How fast this machine multiplies matrices and moves memory: asked before anything slow is started."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from .case import DTYPES


def seconds(flops: int, traffic: int, dtype: str, train: bool = True) -> float:
    """Of an eager step of that many flops in matrix products, and bytes in everything else."""
    return flops * seconds_per_flop(dtype, train) + traffic * seconds_per_byte()


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

    def step() -> None:
        y = F.linear(x, weight)
        if train:
            torch.autograd.grad(y, [x], dy)

    return _best(step) / ((4 if train else 2) * tokens * features * features)


@lru_cache
def seconds_per_byte() -> float:
    """Of an addition that no cache holds and whose result is new, on the CPU."""
    x = torch.ones(1 << 22)
    return _best(lambda: x + x) / (2 * 4 * x.numel())


def _best(step: Callable[[], Any], seconds: float = 0.5, least: int = 5) -> float:
    """Of many: the first one sets things up, and on a busy machine threads wait for each other."""
    best, calls = math.inf, 0
    end = time.perf_counter() + seconds
    while calls < least or time.perf_counter() < end:
        start = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - start)
        calls += 1
    return best


def has_fast_bf16(device: torch.device) -> bool:
    """Whether a bf16 step is at least about as fast as an fp32 one."""
    return device.type == "cuda" or seconds_per_flop("bf16") < 1.5 * seconds_per_flop("fp32")
