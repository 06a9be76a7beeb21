"""Fused kernels or the math library's GEMM with rank-r `addmm` around it: a model of both, not a measurement.

The fused GEMM saves one read and one write of the output, and with dropout every mask in memory; it pays with a GEMM
that reaches a part of the library's speed. Peak rates are the vendor's, the efficiencies are assumptions. A table
measured on the device should take this module's place as soon as there is one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..common.cost import itemsize
from ..common.hardware import sm_count
from . import linear


class Device(NamedTuple):
    """Assumed sustained rates: the library's GEMM by item size in flop/s, memory in byte/s, the fused GEMM's share."""

    half_flops: float
    float_flops: float
    bandwidth: float
    gemm_share: float


DEVICES = {
    "sm_80": Device(230e12, 17e12, 1.7e12, 0.92),
    "sm_86": Device(60e12, 25e12, 0.6e12, 0.92),
    "sm_89": Device(150e12, 60e12, 0.85e12, 0.92),
    "sm_90": Device(650e12, 50e12, 2.7e12, 0.85),
    "sm_100": Device(1500e12, 60e12, 6.5e12, 0.75),
}
LAUNCH_SECONDS = 3e-6


def prefers_fused(problem: Any) -> bool:
    """Whether the fused kernels are modelled to be faster than the library's GEMM plus addmm."""
    if problem.dropout:
        return True  # the composition writes and reads masks of the size of x, several times over
    if problem.in_features % 8 or problem.out_features % 8:
        return False  # unaligned rows are loaded one element at a time
    fused, composed = modelled_seconds(problem)
    return fused < composed


def modelled_seconds(problem: Any) -> tuple[float, float]:
    """(fused, composed): the GEMM of this pass and the rank-r work that differs between the two."""
    device = DEVICES.get(problem.arch, DEVICES["sm_80"])
    t, k, n = problem.tokens, problem.in_features, problem.out_features
    size, rank = itemsize(problem.dtype), sum(problem.ranks)
    side = n if problem.op.endswith("_fwd") else k
    peak = device.half_flops if size == 2 else device.float_flops
    gemm_bytes = size * (t * k + k * n + t * n)
    config = linear.default_config(problem)
    programs = -(-t // config.block_t) * -(-side // config.block_n)
    waves = -(-programs // sm_count(problem.arch))
    filled = programs / (waves * sm_count(problem.arch))

    flops = 2 * t * n * k
    composed = max(flops / peak, gemm_bytes / device.bandwidth)
    composed += 2 * size * t * side / device.bandwidth + LAUNCH_SECONDS * len(problem.ranks)
    # without tensor cores, hand-tuned assembly is far ahead
    share = device.gemm_share if size == 2 else 0.6
    fused = max(
        (flops + 2 * t * side * rank) / (peak * share * filled),
        gemm_bytes / (device.bandwidth * min(1.0, filled)),
    )
    return fused, composed
