"""C++ on a CPU; the kernels stand in ``csrc/cpu``. Here is what all of its operations share: the extension itself.

Frozen weights and adapters are packed once and the packs kept: see ``packed_bytes``, ``clear_packed`` and
``PELT_FAST_PACK_LIMIT_MB``. Memory of large results is kept when they are freed: ``pooled_bytes``, ``clear_pool``,
``PELT_FAST_POOL_LIMIT_MB``.
"""

from __future__ import annotations

from typing import Any

import torch

from ...env import env

try:
    from ... import _C
except ImportError as error:
    raise ImportError(
        f"the C++ extension is not built or does not load ({error}); python -m pelt_fast info says why"
    ) from error

available_isas = _C.available_isas
clear_packed = _C.clear_packed
isa = _C.isa
packed_bytes = _C.packed_bytes
set_isa = _C.set_isa
set_packed_limit = _C.set_packed_limit
pooled_bytes = _C.pooled_bytes
clear_pool = _C.clear_pool
set_pool_limit = _C.set_pool_limit

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

if env.cpu_isa in available_isas():  # a higher one than the machine's is no limit
    set_isa(env.cpu_isa)
set_packed_limit(env.pack_limit_mb << 20)
set_pool_limit(env.pool_limit_mb << 20)


def extension_obstacles(problem: Any) -> list[str]:
    """Why no operation of the extension can run on these devices and dtypes."""
    reasons = []
    if problem.device_type != "cpu":
        reasons.append(f"runs on cpu; the tensors are on {problem.device_type}")
    if problem.dtype not in _DTYPES:
        reasons.append(f"no kernel for {problem.dtype}")
    return reasons
