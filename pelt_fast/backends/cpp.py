"""LoRA linear in C++ on a CPU; the kernels stand in ``csrc/cpu``.

Frozen weights and adapters are packed once and the packs kept: see ``packed_bytes``, ``clear_packed`` and
``PELT_FAST_PACK_LIMIT_MB``.
"""

from __future__ import annotations

from typing import Any

import torch

from ..env import env

try:
    from .. import _C
except ImportError as error:
    raise ImportError(
        f"the C++ extension is not built or does not load ({error}); python -m pelt_fast info says why"
    ) from error

# the operations themselves; ``pelt_fast/ops`` calls them with rows (T, features) whose last stride is 1
lora_linear_fwd = _C.lora_linear_fwd
lora_linear_bwd = _C.lora_linear_bwd

available_isas = _C.available_isas
clear_packed = _C.clear_packed
isa = _C.isa
packed_bytes = _C.packed_bytes
set_isa = _C.set_isa
set_packed_limit = _C.set_packed_limit

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

if env.cpu_isa in available_isas():  # a higher one than the machine's is no limit
    set_isa(env.cpu_isa)
set_packed_limit(env.pack_limit_mb << 20)


def unsupported(problem: Any) -> list[str]:
    """Why the C++ kernels cannot run this problem; empty when they can."""
    reasons = []
    if problem.device_type != "cpu":
        reasons.append(f"runs on cpu; the tensors are on {problem.device_type}")
    if problem.dtype not in _DTYPES:
        reasons.append(f"no kernel for {problem.dtype}")
    if problem.weight_requires_grad:
        reasons.append("weight requires a gradient: its packed copy would be stale at every step")
    return reasons


def priority(problem: Any) -> int:
    """Ahead of torch on a CPU, but for two cases.

    One token in fp32 is a gemv, and MKL's reads memory faster than ours. A weight that was made in inference mode
    counts no versions, so no pack of it can be kept, and it would be packed at every call.
    """
    if problem.device_type != "cpu":
        return 0
    gemv = (
        problem.tokens == 1 and problem.dtype == torch.float32 and problem.op == "lora_linear_fwd"
    )
    return 5 if gemv or problem.weight_is_inference else 20
