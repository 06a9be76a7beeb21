"""What the configuration heuristics know about a GPU architecture. Tables, no query: configurations need no GPU."""

from __future__ import annotations

from functools import cache

_SM_COUNT = {"sm_80": 108, "sm_86": 84, "sm_89": 142, "sm_90": 132, "sm_100": 148, "sm_103": 148}
_SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_103": 227}


def sm_count(arch: str) -> int:
    """Streaming multiprocessors of the largest common part of this architecture."""
    return _SM_COUNT.get(arch, 108)


def shared_memory(arch: str) -> int:
    """Bytes of shared memory that one program may have."""
    return _SHARED_KIB.get(arch, 99) << 10


@cache
def capability(arch: str) -> int:
    """90 for "sm_90"; 0 where the name is not that of an NVIDIA architecture."""
    number = arch.removeprefix("sm_")
    return int(number) if number.isdecimal() else 0
