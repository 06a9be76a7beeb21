"""Drop-in layers."""

from .lora import LoRALinear

__all__ = ["LoRALinear"]
