"""Proofs of Triton kernels on a machine without a GPU.

- `interpreting`: unmodified launch functions run on CPU tensors under Triton's interpreter, mended where it
  computes bfloat16 and tf32 wrongly.
- `Trace`: checks every access of an interpreted launch for bounds, races and conflicting stores; shuffles the order of
  programs; counts bytes per argument.
- `dram_bytes`: what of it goes to memory and what hits the cache, by a stated rule.
- `compiling`: the same launch functions compile for an NVIDIA architecture, truly specialised; nothing runs.
- `inspect_kernel`, `violations`: what the machine code does, and the gates that it has to pass.
- `mutant`: a copy of a kernel file with one line broken, to see that the checks above catch it.

Nothing here gives a time.
"""

from .compile import CompiledLaunch, compiling
from .interpreter import interpreting
from .mutate import mutant
from .sass import KernelReport, inspect_kernel, inspect_launches, violations
from .trace import LaunchTrace, Trace, Violation
from .traffic import dram_bytes

__all__ = [
    "CompiledLaunch",
    "KernelReport",
    "LaunchTrace",
    "Trace",
    "Violation",
    "compiling",
    "dram_bytes",
    "inspect_kernel",
    "inspect_launches",
    "interpreting",
    "mutant",
    "violations",
]
