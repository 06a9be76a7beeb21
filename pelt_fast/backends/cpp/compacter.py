"""The Compacter adapter in C++ on a CPU: ``csrc/cpu/compacter.cpp``."""

from __future__ import annotations

from . import _C
from .adapter import priority, unsupported

__all__ = ["compacter_bwd", "compacter_fwd", "priority", "unsupported"]

# the operations themselves; ``pelt_fast/ops`` calls them with rows (T, d) whose last stride is 1
compacter_fwd = _C.compacter_fwd
compacter_bwd = _C.compacter_bwd
