"""CUDA C++ on NVIDIA GPUs; the kernels stand in ``csrc/cuda``, the library that holds them is ``pelt_fast/_cuda.so``.

They were compiled, and run by an emulator of PTX; on a GPU they have not run yet. So nothing is chosen here by itself:
``backend="cuda"`` asks for them.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).parents[2] / "_cuda.so"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = 80


@cache
def library_obstacle() -> str | None:
    """Why the library cannot be used, or None; it is loaded by the first to ask."""
    if not LIBRARY.exists():
        return "the CUDA library is not built; python -m pelt_fast info says why"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the CUDA library does not load: {error}"
    return None


def library_obstacles(problem: Any) -> list[str]:
    """Why no operation of the library can run on this device, in this dtype."""
    reasons = []
    if problem.device_type != "cuda":
        reasons.append(f"runs on cuda; the tensors are on {problem.device_type}")
    elif int(problem.arch.removeprefix("sm_")) < _OLDEST:
        reasons.append(f"{problem.arch} is older than sm_{_OLDEST}")
    if problem.dtype not in _DTYPES:
        reasons.append(f"no kernel for {problem.dtype}")
    if missing := library_obstacle():
        reasons.append(missing)
    return reasons
