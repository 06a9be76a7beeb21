"""Drop-in layers."""

from .adapter import BottleneckAdapter
from .lora import LoRALinear
from .multi_lora import MultiLoRALinear

__all__ = ["BottleneckAdapter", "LoRALinear", "MultiLoRALinear"]
