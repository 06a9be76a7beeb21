"""Bytes between the GPU's memory and its last-level cache, counted from the traces of the launches of one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .trace import LaunchTrace, Region


class _Bytes(NamedTuple):
    touched: np.ndarray  # bool per piece of a storage
    stored: np.ndarray


def dram_bytes(launches: Sequence[LaunchTrace], cache: int) -> int:
    """What these launches, one after the other, read from memory and write to it.

    The rule: within a launch each distinct byte counts once, read and written: what a program, or its neighbours, load
    again comes from the cache. A byte that an earlier launch touched is a hit when all that was touched since, the
    earlier launch and this one included, fits into ``cache`` bytes together; storing to a byte that is still there from
    an earlier store replaces that one on its way to memory. All else that is loaded, and all else that is stored,
    counts. Nothing is in the cache at first, and everything stored goes to memory in the end.
    """
    total = 0
    past: list[dict[tuple[int, int], _Bytes]] = []
    for launch in launches:
        past.append({(r.start, r.piece): _touched(r) for r in launch.regions})
        resident = _resident(past, cache)
        for region in launch.regions:
            key = (region.start, region.piece)
            seen, dirty = np.zeros_like(region.covered), np.zeros_like(region.covered)
            for earlier in past[resident:-1]:
                if key in earlier:
                    seen |= earlier[key].touched
                    dirty |= earlier[key].stored
            loaded, stored = region.loaded & ~seen, region.stored & ~dirty
            total += region.piece * int(loaded.sum() + stored.sum())
    return total


def _touched(region: Region) -> _Bytes:
    return _Bytes(region.loaded | region.stored, region.stored)


def _resident(past: list[dict[tuple[int, int], _Bytes]], cache: int) -> int:
    """The first launch from which on everything fits into the cache, up to the last."""
    union: dict[tuple[int, int], np.ndarray] = {}
    for index in range(len(past) - 1, -1, -1):
        for key, found in past[index].items():
            union[key] = union[key] | found.touched if key in union else found.touched
        if sum(piece * int(mask.sum()) for (_, piece), mask in union.items()) > cache:
            return min(index + 1, len(past) - 1)
    return 0
