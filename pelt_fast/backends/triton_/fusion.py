"""AdapterFusion has no Triton kernel; this says so where dispatch asks."""

from __future__ import annotations

from typing import Any


def unsupported(problem: Any) -> list[str]:
    """Why nothing runs here."""
    return [
        "AdapterFusion has no Triton kernel; on a GPU its operators are composed by the torch backend, in the "
        "bottleneck space all the same"
    ]


def priority(problem: Any) -> int:
    """Never chosen."""
    return 0
