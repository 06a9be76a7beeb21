"""One ``torch.autograd.Function`` per operation: what is saved, and which gradients are asked for."""

from .adapter import BottleneckAdapterFunction
from .compacter import CompacterFunction
from .delta import DiffPruningFunction, DiffPruningLinearFunction, MaskedLinearFunction
from .dropout import MaskedFunction
from .fusion import AdapterFusionFunction
from .gated_lora import GatedLoRALinearFunction
from .lora import LoRALinearFunction
from .multi_bottleneck import MultiBottleneckFunction
from .multi_elementwise import MultiElementwiseFunction
from .multi_lora import MultiLoRAFunction, MultiLoRALinearFunction

__all__ = [
    "AdapterFusionFunction",
    "BottleneckAdapterFunction",
    "CompacterFunction",
    "DiffPruningFunction",
    "DiffPruningLinearFunction",
    "GatedLoRALinearFunction",
    "LoRALinearFunction",
    "MaskedFunction",
    "MaskedLinearFunction",
    "MultiBottleneckFunction",
    "MultiElementwiseFunction",
    "MultiLoRAFunction",
    "MultiLoRALinearFunction",
]
