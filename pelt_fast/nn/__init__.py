"""Drop-in layers."""

from .adapter import BottleneckAdapter
from .lora import LoRALinear

__all__ = ["BottleneckAdapter", "LoRALinear"]
