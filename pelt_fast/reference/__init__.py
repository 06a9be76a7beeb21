"""Slow and obvious: what every backend must compute. Any floating dtype, differentiable by autograd."""

from .lora import lora_linear

__all__ = ["lora_linear"]
