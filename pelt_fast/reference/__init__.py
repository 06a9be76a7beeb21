"""Slow and obvious: what every backend must compute. Any floating dtype, differentiable by autograd."""

from .adapter import bottleneck_adapter
from .lora import lora_linear
from .multi_lora import multi_lora

__all__ = ["bottleneck_adapter", "lora_linear", "multi_lora"]
