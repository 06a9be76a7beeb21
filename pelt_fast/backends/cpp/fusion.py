"""AdapterFusion in the bottleneck space in C++ on a CPU: ``csrc/cpu/fusion.cpp``."""

from __future__ import annotations

from . import _C
from .adapter import priority, unsupported

__all__ = [
    "adapter_fusion_bwd",
    "adapter_fusion_fwd",
    "fingerprint",
    "priority",
    "unsupported",
]

# the operations themselves; ``pelt_fast/ops`` calls them with rows (T, d) whose last stride is 1
adapter_fusion_fwd = _C.adapter_fusion_fwd
adapter_fusion_bwd = _C.adapter_fusion_bwd
# of tensors and their contents, for who keeps what is made of them
fingerprint = _C.fingerprint_of
