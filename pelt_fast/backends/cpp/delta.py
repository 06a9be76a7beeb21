"""Diff pruning and masking in C++ on a CPU: ``csrc/cpu/delta.cpp``."""

from __future__ import annotations

from typing import Any

from . import _C, extension_obstacles

# the operations themselves; ``pelt_fast/ops`` calls them with row-major tensors
diff_pruning_fwd = _C.diff_pruning_fwd
diff_pruning_bwd = _C.diff_pruning_bwd
masking_fwd = _C.masking_fwd
masking_bwd = _C.masking_bwd


def unsupported(problem: Any) -> list[str]:
    """Why the C++ kernels cannot run this problem; empty when they can."""
    return extension_obstacles(problem)


def priority(problem: Any) -> int:
    """Ahead of torch on a CPU."""
    return 20 if problem.device_type == "cpu" else 0
