"""The bottleneck adapter in C++ on a CPU: ``csrc/cpu/adapter.cpp``."""

from __future__ import annotations

from typing import Any

from ...activations import ACTIVATIONS
from . import _C, extension_obstacles

# the operations themselves; ``pelt_fast/ops`` calls them with rows (T, d) whose last stride is 1
bottleneck_adapter_fwd = _C.bottleneck_adapter_fwd
bottleneck_adapter_bwd = _C.bottleneck_adapter_bwd


def unsupported(problem: Any) -> list[str]:
    """Why the C++ kernels cannot run this problem; empty when they can."""
    reasons = extension_obstacles(problem)
    if problem.activation not in ACTIVATIONS:
        reasons.append(f"no kernel for the activation {problem.activation!r}")
    return reasons


def priority(problem: Any) -> int:
    """Ahead of torch on a CPU."""
    return 20 if problem.device_type == "cpu" else 0
