"""Operators of diff pruning and masking; see ``pelt_fast/ops/lora.py`` for what an operator does here.

Both directions can make the weight itself, in any floating dtype: backward makes it again beside its gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import DeltaProblem, arch_of, asked_for, select
from .library import define


def problem_of(op: str, weight: Tensor, dtype: torch.dtype) -> DeltaProblem:
    """Describes a call that makes a weight of ``dtype``."""
    device = weight.device
    return DeltaProblem(
        op=op,
        device_type=device.type,
        arch=arch_of(device.type, device.index),
        dtype=weight.dtype,
        out_dtype=dtype,
        elements=weight.numel(),
    )


def _run(op: str, weight: Tensor, dtype: torch.dtype, backend: str) -> Any:
    return getattr(select(problem_of(op, weight, dtype), backend or asked_for()).module, op)


def _dense(*tensors: Tensor | None) -> list[Any]:
    """Row-major: the index of an element is the same everywhere."""
    return [None if t is None else t.contiguous() for t in tensors]


def _given(like: Tensor, *found: Tensor | None) -> tuple[Any, ...]:
    return tuple([like.new_empty(0) if t is None else t for t in found])


def _diff_forward(
    diff: Tensor,
    log_alpha: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    seed: Tensor | None,
    lower: float,
    upper: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    run = _run("diff_pruning_fwd", weight, dtype, backend)
    out, count = run(*_dense(diff, log_alpha, weight, scale), seed, lower, upper, dtype)
    return out, count


def _diff_forward_fake(
    diff: Tensor,
    log_alpha: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    seed: Tensor | None,
    lower: float,
    upper: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight.new_empty(weight.shape, dtype=dtype), weight.new_empty((), dtype=wide)


def _diff_backward(
    diff: Tensor,
    log_alpha: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    seed: Tensor | None,
    dmade: Tensor | None,
    dcount: Tensor | None,
    lower: float,
    upper: float,
    need_diff: bool,
    need_log_alpha: bool,
    need_scale: bool,
    need_out: bool,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = _run("diff_pruning_bwd", weight, dtype, backend)
    found = run(
        *_dense(diff, log_alpha, weight, scale),
        seed,
        *_dense(dmade, dcount),
        *(lower, upper, need_diff, need_log_alpha, need_scale, need_out, dtype),
    )
    ddiff, dlog_alpha, dscale, out = _given(weight, *found)
    return ddiff, dlog_alpha, dscale, out


def _diff_backward_fake(
    diff: Tensor,
    log_alpha: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    seed: Tensor | None,
    dmade: Tensor | None,
    dcount: Tensor | None,
    lower: float,
    upper: float,
    need_diff: bool,
    need_log_alpha: bool,
    need_scale: bool,
    need_out: bool,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(weight.dtype, torch.float32)
    ddiff, dlog_alpha, dscale, out = _given(
        weight,
        diff.new_empty(diff.shape) if need_diff else None,
        log_alpha.new_empty(log_alpha.shape) if need_log_alpha else None,
        weight.new_empty((), dtype=wide) if need_scale else None,
        weight.new_empty(weight.shape, dtype=dtype) if need_out else None,
    )
    return ddiff, dlog_alpha, dscale, out


def _mask_forward(
    weight: Tensor, scores: Tensor, threshold: float, dtype: torch.dtype, backend: str
) -> Tensor:
    run = _run("masking_fwd", weight, dtype, backend)
    out: Tensor = run(*_dense(weight, scores), threshold, dtype)
    return out


def _mask_forward_fake(
    weight: Tensor, scores: Tensor, threshold: float, dtype: torch.dtype, backend: str
) -> Tensor:
    return weight.new_empty(weight.shape, dtype=dtype)


def _mask_backward(
    weight: Tensor,
    scores: Tensor,
    dmade: Tensor | None,
    threshold: float,
    need_scores: bool,
    need_weight: bool,
    need_out: bool,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    run = _run("masking_bwd", weight, dtype, backend)
    found = run(
        *_dense(weight, scores, dmade), threshold, need_scores, need_weight, need_out, dtype
    )
    dscores, dweight, out = _given(weight, *found)
    return dscores, dweight, out


def _mask_backward_fake(
    weight: Tensor,
    scores: Tensor,
    dmade: Tensor | None,
    threshold: float,
    need_scores: bool,
    need_weight: bool,
    need_out: bool,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dscores, dweight, out = _given(
        weight,
        scores.new_empty(scores.shape) if need_scores else None,
        weight.new_empty(weight.shape) if need_weight else None,
        weight.new_empty(weight.shape, dtype=dtype) if need_out else None,
    )
    return dscores, dweight, out


diff_pruning_fwd = define(
    "diff_pruning_fwd(Tensor diff, Tensor log_alpha, Tensor weight, Tensor? scale, Tensor? seed, float lower, "
    "float upper, ScalarType dtype, str backend) -> (Tensor, Tensor)",
    _diff_forward,
    _diff_forward_fake,
)
diff_pruning_bwd = define(
    "diff_pruning_bwd(Tensor diff, Tensor log_alpha, Tensor weight, Tensor? scale, Tensor? seed, Tensor? dmade, "
    "Tensor? dcount, float lower, float upper, bool need_diff, bool need_log_alpha, bool need_scale, bool need_out, "
    "ScalarType dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _diff_backward,
    _diff_backward_fake,
)
masking_fwd = define(
    "masking_fwd(Tensor weight, Tensor scores, float threshold, ScalarType dtype, str backend) -> Tensor",
    _mask_forward,
    _mask_forward_fake,
)
masking_bwd = define(
    "masking_bwd(Tensor weight, Tensor scores, Tensor? dmade, float threshold, bool need_scores, bool need_weight, "
    "bool need_out, ScalarType dtype, str backend) -> (Tensor, Tensor, Tensor)",
    _mask_backward,
    _mask_backward_fake,
)
