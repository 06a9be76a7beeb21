"""Fused kernels or torch: a model of both, not a measurement.

Torch gathers each token's A and B (they are written and read again, T times) or loops over adapters with a handful
of launches each; the fused kernels read what they need once. Rates are those of `lora.choice`. Rows that begin
anywhere are loaded an element at a time, which is where torch may win.
"""

from __future__ import annotations

from typing import Any

from ..common.cost import itemsize
from ..lora.choice import DEVICES, LAUNCH_SECONDS

UNALIGNED = 4.0  # times the bytes, where rows are loaded an element at a time


def prefers_fused(problem: Any) -> bool:
    """Whether the fused kernels are modelled to be faster than torch's composition."""
    fused, composed = modelled_seconds(problem)
    return fused < composed


def modelled_seconds(problem: Any) -> tuple[float, float]:
    """(fused, composed) of one pass, every adapter in the batch."""
    device = DEVICES.get(problem.arch, DEVICES["sm_80"])
    size, n = itemsize(problem.dtype), len(problem.out_features)
    t, k, r = problem.tokens, problem.in_features, problem.rank
    out = sum(problem.out_features)
    present = min(problem.adapters, t)
    weights, rows = r * (n * k + out), t * (k + 2 * out)
    passes = 1 if problem.op.endswith("_fwd") else 2
    moved = size * (present * weights + rows) * passes
    aligned = k % 8 == 0 and all(width % 8 == 0 for width in problem.out_features)
    fused = moved * (1.0 if aligned else UNALIGNED) / device.bandwidth
    fused += LAUNCH_SECONDS * (2 if passes == 1 else 6)

    dropout = 3 * t * k * n * problem.dropout
    loop = size * passes * (present * weights + 3 * rows + dropout) / device.bandwidth
    loop += LAUNCH_SECONDS * 6 * n * present * passes
    gather = size * passes * (3 * t * weights + 2 * rows + dropout) / device.bandwidth
    gather += LAUNCH_SECONDS * 6 * n * passes
    return fused, min(loop, gather)
