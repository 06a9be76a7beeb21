"""Drop-in layers."""

from .adapter import BottleneckAdapter
from .delta import DiffPruningLinear, MaskedLinear, diff_pruning_penalty
from .lora import LoRALinear
from .multi_lora import MultiLoRALinear
from .prefix import PrefixGate, PrefixTuning

__all__ = [
    "BottleneckAdapter",
    "DiffPruningLinear",
    "LoRALinear",
    "MaskedLinear",
    "MultiLoRALinear",
    "PrefixGate",
    "PrefixTuning",
    "diff_pruning_penalty",
]
