"""A stand-in for a GPU driver: it says which architecture there is, and launches nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes of shared memory that one program may have, by compute capability."""


class _Utils:
    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_MEMORY[self._capability],
            "multiprocessor_count": 100,
            "warpSize": 32,
            "max_num_regs": 65536,
            "sm_clock_rate": 0,
            "mem_clock_rate": 0,
            "mem_bus_width": 0,
        }

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        # module, function, registers, spills, threads: what the real loader answers
        return (1, 1, 0, 0, 1024)

    def unload_module(self, module: int) -> None:
        pass


class StandInDriver:
    """What Triton's runtime asks of a driver."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.utils = _Utils(capability)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *args: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton caches kernels by device: one device per architecture

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def stand_in(capability: int) -> Iterator[None]:
    """Within the block, Triton believes in a GPU of this compute capability."""
    before = driver._active
    driver.set_active(StandInDriver(capability))
    try:
        yield
    finally:
        driver.set_active(before)
