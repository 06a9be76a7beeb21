"""The operators: schema, fake kernel, and the step into a backend. Importing this package registers them."""

from .adapter import bottleneck_adapter_bwd, bottleneck_adapter_fwd
from .compacter import compacter_bwd, compacter_fwd
from .delta import diff_pruning_bwd, diff_pruning_fwd, masking_bwd, masking_fwd
from .fusion import adapter_fusion_bwd, adapter_fusion_fwd
from .gated_lora import gated_lora_linear_bwd, gated_lora_linear_fwd
from .lora import lora_linear_bwd, lora_linear_fwd
from .multi_bottleneck import multi_bottleneck_bwd, multi_bottleneck_fwd
from .multi_elementwise import multi_elementwise_bwd, multi_elementwise_fwd
from .multi_lora import (
    multi_lora_add_,
    multi_lora_bwd,
    multi_lora_fwd,
    multi_lora_linear_bwd,
    multi_lora_linear_fwd,
)
from .prefix import prefix_attention

__all__ = [
    "adapter_fusion_bwd",
    "adapter_fusion_fwd",
    "bottleneck_adapter_bwd",
    "bottleneck_adapter_fwd",
    "compacter_bwd",
    "compacter_fwd",
    "diff_pruning_bwd",
    "diff_pruning_fwd",
    "gated_lora_linear_bwd",
    "gated_lora_linear_fwd",
    "lora_linear_bwd",
    "lora_linear_fwd",
    "masking_bwd",
    "masking_fwd",
    "multi_bottleneck_bwd",
    "multi_bottleneck_fwd",
    "multi_elementwise_bwd",
    "multi_elementwise_fwd",
    "multi_lora_add_",
    "multi_lora_bwd",
    "multi_lora_fwd",
    "multi_lora_linear_bwd",
    "multi_lora_linear_fwd",
    "prefix_attention",
]
