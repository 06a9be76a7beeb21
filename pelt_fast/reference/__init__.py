"""Slow and obvious: what every backend must compute. Any floating dtype, differentiable by autograd."""

from .adapter import bottleneck_adapter
from .compacter import compacter, phm_matrix
from .delta import diff_pruning_weight, masked_weight
from .fusion import adapter_fusion
from .lora import gated_lora_linear, lora_linear
from .multi_bottleneck import multi_bottleneck
from .multi_elementwise import multi_elementwise
from .multi_lora import multi_lora
from .prefix import central_gate, prefix_attention, prefix_gate

__all__ = [
    "adapter_fusion",
    "bottleneck_adapter",
    "central_gate",
    "compacter",
    "diff_pruning_weight",
    "gated_lora_linear",
    "lora_linear",
    "masked_weight",
    "multi_bottleneck",
    "multi_elementwise",
    "multi_lora",
    "phm_matrix",
    "prefix_attention",
    "prefix_gate",
]
