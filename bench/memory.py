"""Memory of a step: what it keeps between forward and backward, and its peak."""

from __future__ import annotations

import ctypes
import importlib
import re
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pelt_fast.dispatch import backend

LONG_S = 0.2
"""A step that takes longer is watched once: beside its memory the pools of libraries are small."""


def saved_bytes(forward: Callable[[], Any], known: Iterable[Tensor]) -> int:
    """Bytes that ``forward`` saves for its backward in other storages than the ``known`` ones."""
    mine = {tensor.untyped_storage().data_ptr() for tensor in known}
    found: dict[int, int] = {}
    alive = []  # a storage that is freed meanwhile could lend its address to the next one

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in mine:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(found.values())


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int | None:
    """How far memory grows while ``step`` runs, result included; None where that is unseen.

    On a GPU the caching allocator's peak; on Linux the growth of the peak resident size, which sees
    scratch memory of C++ kernels and of libraries too. Run the step once before: what it caches for
    good is not counted.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not _can_reset_peak():
        return None
    started = time.perf_counter()
    first = _growth(step)
    if time.perf_counter() - started > LONG_S:
        return first
    # the smaller of two: a library that grows a pool of its own does so once
    return min(first, _growth(step))


def _growth(step: Callable[[], Any]) -> int:
    _return_free_memory()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step()
    return max(0, _status("VmHWM") - before)


@cache
def _can_reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return False
    return True


def _return_free_memory() -> None:
    # memory that is held back for later is resident already: using it again would not show as growth
    if backend("cpp", "lora").module is not None:
        importlib.import_module("pelt_fast.backends.cpp").clear_pool()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
