"""Drop-in layers."""

from .adapter import BottleneckAdapter
from .bitfit import BitFit
from .central_gate import CentralGate
from .compacter import Compacter, PHMLinear
from .delta import DiffPruningLinear, MaskedLinear, diff_pruning_penalty
from .fusion import AdapterFusion
from .lora import LoRALinear
from .multi_lora import MultiLoRALinear
from .prefix import PrefixGate, PrefixTuning

__all__ = [
    "AdapterFusion",
    "BitFit",
    "BottleneckAdapter",
    "CentralGate",
    "Compacter",
    "DiffPruningLinear",
    "LoRALinear",
    "MaskedLinear",
    "MultiLoRALinear",
    "PHMLinear",
    "PrefixGate",
    "PrefixTuning",
    "diff_pruning_penalty",
]
