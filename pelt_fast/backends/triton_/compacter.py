"""The Compacter adapter on Triton: the dense matrices, which are small, and the bottleneck adapter's kernels."""

from __future__ import annotations

from ..dense_compacter import through
from . import adapter
from .adapter import priority, unsupported

__all__ = ["compacter_bwd", "compacter_fwd", "priority", "unsupported"]

compacter_fwd, compacter_bwd = through(adapter)
