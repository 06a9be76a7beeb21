"""What the configuration heuristics know about a GPU architecture. Tables, no query: configurations need no GPU."""

from __future__ import annotations

from functools import cache

_SM_COUNT = {"sm_80": 108, "sm_86": 84, "sm_89": 142, "sm_90": 132, "sm_100": 148, "sm_103": 148}
_SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_103": 227}
_L2_MIB = {"sm_80": 40, "sm_86": 6, "sm_89": 48, "sm_90": 50, "sm_100": 126, "sm_103": 126}


def sm_count(arch: str) -> int:
    """Streaming multiprocessors of the largest common part of this architecture."""
    return _SM_COUNT.get(arch, 108)


def shared_memory(arch: str) -> int:
    """Bytes of shared memory that one program may have."""
    return _SHARED_KIB.get(arch, 99) << 10


def l2_cache(arch: str) -> int:
    """Bytes of the last-level cache."""
    return _L2_MIB.get(arch, 32) << 20


@cache
def capability(arch: str) -> int:
    """90 for "sm_90"; 0 where the name is not that of an NVIDIA architecture."""
    number = arch.removeprefix("sm_")
    return int(number) if number.isdecimal() else 0
