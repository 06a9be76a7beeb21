"""PEFT's prefix tuning: its MLP runs once for all samples, where PEFT has as many equal rows as there are samples.

What else PEFT puts in front of a sequence it makes once already (prompt tuning, P-tuning), or there is nothing to make
(a flat prefix): that is left to it.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.prefix_tuning import PrefixEncoder
from peft.tuners.tuners_utils import BasePromptEncoder
from torch import Tensor, nn

from .obstacles import LINEAR, dtype_name, module_obstacle, type_name

ENCODERS = BasePromptEncoder


class AcceleratedPrefixEncoder(PrefixEncoder):
    """PEFT's ``PrefixEncoder`` with a fast ``forward``. ``pelt_fast.accelerate`` makes its instances."""

    def forward(self, prefix: Tensor) -> Tensor:
        """prefix (B, P), which PEFT expands from (1, P) -> (B, P, layers · 2 · hidden), expanded likewise."""
        encode: Any = super().forward
        # rows that are one row in memory are equal
        expanded = prefix.dim() == 2 and prefix.shape[0] > 1 and prefix.stride(0) == 0
        if not expanded or obstacle(self) is not None:
            states: Tensor = encode(prefix)
            return states
        once: Tensor = encode(prefix[:1])
        return once.expand(prefix.shape[0], -1, -1)


def why_left(encoder: nn.Module) -> str | None:
    """Why an encoder of prompts keeps PEFT's class."""
    if type(encoder) is not PrefixEncoder:
        return f"it is a {type_name(encoder)}, which PEFT runs once for all samples, or which has no network"
    if "forward" in encoder.__dict__:
        return "its forward was replaced on the instance"
    if "transform" not in encoder._modules:
        return "its prefix is flat: there is no network to run"
    return None


def obstacle(encoder: nn.Module) -> str | None:
    """Why the network must run on all rows, as they are looked at on the way."""
    modules: Any = encoder._modules
    found = module_obstacle(modules["embedding"], (nn.Embedding.forward,), "its embedding")
    found = found or module_obstacle(
        modules["transform"], (nn.Sequential.forward,), "its transform"
    )
    for layer in () if found else modules["transform"]:
        found = found or module_obstacle(layer, (*LINEAR, nn.Tanh.forward), "a layer of its MLP")
    return found


def describe(encoder: Any) -> str:
    """What is computed, in words."""
    first, last = encoder.transform[0], encoder.transform[-1]
    return (
        f"prefix {encoder.embedding.num_embeddings} x {first.in_features} -> {first.out_features} -> "
        f"{last.out_features}, {dtype_name(first.weight.dtype)}: once for all samples"
    )
