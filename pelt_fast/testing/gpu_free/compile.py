"""Ahead-of-time compilation through the real launch functions, with no GPU.

Specialisation (alignment of pointers, strides of one, multiples of sixteen) follows from the very arguments of the
launch, as on a GPU; a kernel that wants more shared memory than the architecture has raises Triton's OutOfResources.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from triton.runtime.jit import JITFunction

from .driver import stand_in


@dataclass(frozen=True)
class CompiledLaunch:
    """One launch: the kernel that it would have run."""

    name: str
    capability: int
    kernel: Any  # triton.compiler.CompiledKernel


@contextmanager
def compiling(capability: int) -> Iterator[list[CompiledLaunch]]:
    """Within the block, launches on CPU tensors compile for this capability (80, 90, ...) and do not run."""
    launches: list[CompiledLaunch] = []
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = original(self, *args, grid=grid, warmup=warmup, **kwargs)
        launches.append(CompiledLaunch(self.__name__, capability, kernel))
        return kernel

    with stand_in(capability), mock.patch.object(JITFunction, "run", run):
        yield launches
