"""Attention over a prefix in C++ on a CPU: ``csrc/cpu/prefix.cpp``."""

from __future__ import annotations

from typing import Any

from . import _C, extension_obstacles

prefix_attention = _C.prefix_attention


def unsupported(problem: Any) -> list[str]:
    """Why the C++ kernel cannot run this problem; empty when it can."""
    return extension_obstacles(problem)


def priority(problem: Any) -> int:
    """Ahead of torch on a CPU, but where concatenating costs less than the kernel's work on the result."""
    if problem.device_type != "cpu":
        return 0
    return 5 if problem.few_keys else 20
