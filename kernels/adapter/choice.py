"""Fused kernels or torch: a model, not a measurement.

Torch pays for each elementwise operation and layernorm with reads and writes of (T, d) in HBM. The fused kernels pay
with D and U, which every block of rows reads out of L2, with products made again, and with products of few rows that
reach a part of the library's rate: all three grow with the bottleneck, so a large one belongs to torch. Rates are
those of `lora.choice`, L2's and the share are assumptions.
"""

from __future__ import annotations

from typing import Any

from ..common.cost import itemsize
from ..common.hardware import sm_count
from ..common.tiling import cdiv
from ..lora.choice import DEVICES, LAUNCH_SECONDS
from . import forward, grad_columns, grad_rows

L2_BANDWIDTH = 2.0  # of HBM's
DOT_SHARE = {2: 0.25, 4: 0.5}  # of the library's rate, by bytes of an element


def prefers_fused(problem: Any) -> bool:
    """Whether the fused kernels are modelled to be faster than GEMMs and elementwise operations."""
    if problem.features % 8:
        return False  # rows that begin anywhere are loaded one element at a time
    fused, composed = modelled_seconds(problem)
    return fused < composed


def modelled_seconds(problem: Any) -> tuple[float, float]:
    """(fused, composed) of one pass."""
    device = DEVICES.get(problem.arch, DEVICES["sm_80"])
    t, d, m, size = problem.tokens, problem.features, problem.bottleneck, itemsize(problem.dtype)
    product = 2 * t * d * m
    peak = device.half_flops if size == 2 else device.float_flops
    rows, weights = size * t * d, size * 2 * d * m
    factors = problem.dropout + problem.gate
    if problem.op.endswith("_fwd"):
        # reads and writes of (T, d): GEMMs 2; a residual 3, a layernorm 2, a factor 2 each
        moved = 2 + 3 + 3 * problem.skip + 2 * problem.pre_ln + 2 * problem.post_ln + 2 * factors
        composed = 2 * product / peak + (moved * rows + weights) / device.bandwidth
        composed += LAUNCH_SECONDS * (4 + problem.skip + problem.pre_ln + problem.post_ln + factors)
        config = forward.default_config(problem)
        again = problem.post_ln and not config.held
        blocks, launches = cdiv(t, config.block_t), 1
        products, from_l2 = 2 + again, blocks * weights * (2 + again) / 2
        streams = 2 + problem.skip
    else:
        # da, dD, dv, dU and w; layernorms read three tensors, write one and sum columns
        moved = 5 + 3 + 3 * problem.skip + 5 * problem.pre_ln + 8 * problem.post_ln + 3 * factors
        composed = 5 * product / peak + (moved * rows + 2 * weights) / device.bandwidth
        composed += LAUNCH_SECONDS * (8 + 3 * problem.pre_ln + 4 * problem.post_ln + factors)
        by_rows, by_columns = (
            grad_rows.default_config(problem),
            grad_columns.default_config(problem),
        )
        blocks, launches = cdiv(t, by_rows.block_t), 3
        products = 4 + 4 * problem.post_ln + 2 * problem.pre_ln
        from_l2 = blocks * weights * (2 + 2 * problem.post_ln + problem.pre_ln) / 2
        from_l2 += cdiv(d, by_columns.block_d) * 2 * size * t * m
        streams = 3 + 2 * problem.skip
    filled = min(1.0, blocks / sm_count(problem.arch))
    fused = max(
        products * product / (peak * DOT_SHARE[size]),
        (streams * rows + weights) / device.bandwidth,
        (from_l2 + streams * rows) / (device.bandwidth * L2_BANDWIDTH),
    )
    return fused / filled + LAUNCH_SECONDS * launches, composed
