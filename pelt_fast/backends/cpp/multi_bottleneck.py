"""Batched bottleneck adapters in C++ on a CPU: ``csrc/cpu/multi_bottleneck.cpp``."""

from __future__ import annotations

from . import _C
from .adapter import priority, unsupported

__all__ = ["multi_bottleneck_bwd", "multi_bottleneck_fwd", "priority", "unsupported"]

# the operations themselves; ``pelt_fast/ops`` calls them with rows (T, d) whose last stride is 1
multi_bottleneck_fwd = _C.multi_bottleneck_fwd
multi_bottleneck_bwd = _C.multi_bottleneck_bwd
