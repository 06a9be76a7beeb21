"""The LoRA linear with UniPELT's gate in C++ on a CPU: ``csrc/cpu/gated_lora.cpp``."""

from __future__ import annotations

from . import _C
from .lora import priority, unsupported

__all__ = ["gated_lora_linear_bwd", "gated_lora_linear_fwd", "priority", "unsupported"]

gated_lora_linear_fwd = _C.gated_lora_linear_fwd
gated_lora_linear_bwd = _C.gated_lora_linear_bwd
