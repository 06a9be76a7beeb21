"""Fused kernels or torch: a model, with its assumed rates; and how many rows backward takes at a time."""

from __future__ import annotations

from typing import Any


def prefers_fused(problem: Any) -> bool:
    """Whether the fused kernels are modelled to be faster than GEMMs and elementwise operations."""
    return bool(problem.bottleneck <= 128)


def slab_rows(problem: Any) -> int:
    """Rows that backward by rows and by columns take in turn."""
    return int(problem.tokens)
