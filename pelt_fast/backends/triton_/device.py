"""What every family on Triton asks of a device."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton

from ...env import env
from ...kernels.common.hardware import capability


def device_reasons(problem: Any) -> list[str]:
    """Why no Triton kernel can run on the problem's device; empty when it can."""
    reasons = []
    if problem.device_type == "cpu":
        if not (env.triton_cpu or triton.knobs.runtime.interpret):
            reasons.append(
                "x is on the CPU; Triton needs a GPU, TRITON_INTERPRET=1, "
                "or a stand-in driver with PELT_FAST_TRITON_CPU=1"
            )
    elif problem.device_type != "cuda":
        reasons.append(f"device type {problem.device_type!r} is not served")
    elif capability(problem.arch) < 80:
        reasons.append(f"{problem.arch} is older than sm_80")
    return reasons


def precision_of(dtype: torch.dtype) -> str:
    """fp32 products are exact unless torch was told that its own may use tf32."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@cache
def _arch_of(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def arch_of(device: torch.device) -> str:
    """The architecture that configurations are made for, "sm_90"."""
    if device.type == "cuda":
        return _arch_of(device.index)
    try:
        return f"sm_{triton.runtime.driver.active.get_current_target().arch}"
    except RuntimeError:  # interpreted, with no driver at all
        return "sm_80"
