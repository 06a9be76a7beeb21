"""The oracle as a backend: dense matrices and ``pelt_fast.reference``. Slow; it runs only when asked for by name."""

from __future__ import annotations

from ..dense_compacter import through
from . import adapter
from .adapter import priority, unsupported

__all__ = ["compacter_bwd", "compacter_fwd", "priority", "unsupported"]

compacter_fwd, compacter_bwd = through(adapter)
