"""LoRA linear in C++ on a CPU: ``csrc/cpu/lora.cpp``."""

from __future__ import annotations

from typing import Any

import torch

from . import _C, extension_obstacles

# the operations themselves; ``pelt_fast/ops`` calls them with rows (T, features) whose last stride is 1
lora_linear_fwd = _C.lora_linear_fwd
lora_linear_bwd = _C.lora_linear_bwd


def unsupported(problem: Any) -> list[str]:
    """Why the C++ kernels cannot run this problem; empty when they can."""
    reasons = extension_obstacles(problem)
    if problem.weight_requires_grad:
        reasons.append("weight requires a gradient: its packed copy would be stale at every step")
    return reasons


def priority(problem: Any) -> int:
    """Ahead of torch on a CPU, but for two cases.

    One token in fp32 is a gemv, and MKL's reads memory faster than ours. A weight that was made in inference mode
    counts no versions, so no pack of it can be kept, and it would be packed at every call.
    """
    if problem.device_type != "cpu":
        return 0
    gemv = (
        problem.tokens == 1 and problem.dtype == torch.float32 and problem.op == "lora_linear_fwd"
    )
    return 5 if gemv or problem.weight_is_inference else 20
