"""What a user calls with tensors. Arguments are checked here, once; below, shapes and dtypes are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..activations import ACTIVATIONS, activation_name
from ..dispatch import Explanation
from ..phm import PHM
from ..random import philox_mask
from .adapter import bottleneck_adapter, explain_bottleneck_adapter
from .compacter import compacter, explain_compacter, phm_linear
from .delta import (
    diff_pruning_linear,
    diff_pruning_weight,
    explain_diff_pruning_linear,
    explain_diff_pruning_weight,
    explain_masked_linear,
    masked_linear,
)
from .frozen import frozen_linear
from .fusion import adapter_fusion, explain_adapter_fusion
from .fusion_cache import clear_folded, folded_bytes
from .gated_lora import explain_gated_lora_linear, gated_lora_linear
from .gates import central_gate, prefix_gate
from .lora import MAX_RANK, explain_lora_linear, lora_linear
from .multi_bottleneck import explain_multi_bottleneck, multi_bottleneck
from .multi_elementwise import explain_multi_elementwise, multi_elementwise
from .multi_lora import (
    explain_multi_lora,
    explain_multi_lora_linear,
    multi_lora,
    multi_lora_linear,
)
from .prefix import explain_prefix_attention, prefix_attention

__all__ = [
    "ACTIVATIONS",
    "MAX_RANK",
    "PHM",
    "activation_name",
    "adapter_fusion",
    "bottleneck_adapter",
    "central_gate",
    "clear_folded",
    "compacter",
    "diff_pruning_linear",
    "diff_pruning_weight",
    "explain",
    "folded_bytes",
    "frozen_linear",
    "gated_lora_linear",
    "lora_linear",
    "masked_linear",
    "multi_bottleneck",
    "multi_elementwise",
    "multi_lora",
    "multi_lora_linear",
    "philox_mask",
    "phm_linear",
    "prefix_attention",
    "prefix_gate",
]

_EXPLAINED: dict[str, Callable[..., Explanation]] = {
    "lora_linear": explain_lora_linear,
    "gated_lora_linear": explain_gated_lora_linear,
    "bottleneck_adapter": explain_bottleneck_adapter,
    "compacter": explain_compacter,
    "multi_bottleneck": explain_multi_bottleneck,
    "multi_elementwise": explain_multi_elementwise,
    "multi_lora": explain_multi_lora,
    "multi_lora_linear": explain_multi_lora_linear,
    "adapter_fusion": explain_adapter_fusion,
    "diff_pruning_weight": explain_diff_pruning_weight,
    "diff_pruning_linear": explain_diff_pruning_linear,
    "masked_linear": explain_masked_linear,
    "prefix_attention": explain_prefix_attention,
}


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend a call would run on, forward and backward, and why not the others.

    Args:
        op: the name of the function: "lora_linear", "bottleneck_adapter", "multi_lora" and the others of one operation.
        *args: the arguments of the function of that name in ``pelt_fast.functional``; nothing is computed.
        **kwargs: likewise.

    Returns:
        An ``Explanation``; ``str()`` of it is the report.
    """
    if op not in _EXPLAINED:
        expected = " or ".join(map(repr, _EXPLAINED))
        raise ValueError(f"op={op!r} is not known; expected {expected}")
    return _EXPLAINED[op](*args, **kwargs)
