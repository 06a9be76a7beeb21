"""One ``torch.autograd.Function`` per operation: what is saved, and which gradients are asked for."""

from .adapter import BottleneckAdapterFunction
from .lora import LoRALinearFunction

__all__ = ["BottleneckAdapterFunction", "LoRALinearFunction"]
