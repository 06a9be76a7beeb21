"""UniPELT's gates as functions of tensors: one for each submodule, or one for all. Arguments are checked here, once.

They are a few numbers for each sample, made of a product of T rows with one or three columns: PyTorch's composition is
what there is to it. Where a gate's product shares x with LoRA's, ``gated_lora_linear`` computes it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import (
    autocast_dtype,
    check_dtype,
    check_input,
    check_input_dtype,
    check_tensor,
    check_vector,
    shape_of,
)


def prefix_gate(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, attention_mask: Tensor | None = None
) -> Tensor:
    """The gate of a prefix, or of any submodule, for each sample: the mean over its tokens of σ(x weightᵀ + bias).

    Args:
        x: (B, T, d), the attention's input.
        weight: (g, d): one row for keys and values together, or one for each.
        bias: (g,) or None.
        attention_mask: (B, T), not 0 where a token is real: the mean is over those, as UniPELT's paper has it; a sample
            without any gets NaN. None: over all tokens, padding included, as `adapters` and UniPELT's own code do.

    Returns:
        (B, g), as ``prefix_attention`` takes it.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape or device.
    """
    return _mean(torch.sigmoid, _logits(x, weight, bias), attention_mask)


def central_gate(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, attention_mask: Tensor | None = None
) -> Tensor:
    """One gate for all submodules of a layer: the softmax over them of the mean over tokens of relu(x weightᵀ + bias).

    The central gate of UniPELT's own code, where the submodules (LoRA, adapter, prefix) share a weight of 1.

    Args:
        x: (B, T, d), the layer's input.
        weight: (n, d), a row for each submodule.
        bias: (n,) or None.
        attention_mask: (B, T), not 0 where a token is real: the mean is over those; a sample without any gets NaN.
            None: over all tokens, padding included, as in UniPELT's own code.

    Returns:
        (B, n), rows that sum to 1: a factor of each submodule for each sample.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape or device.
    """
    return torch.softmax(_mean(torch.relu, _logits(x, weight, bias), attention_mask), -1)


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weightᵀ + bias, (B, T, g), in x's dtype, or autocast's."""
    check_input(x, "d")
    if x.dim() != 3:
        raise ValueError(f"x has shape {shape_of(x)}; expected (B, T, d)")
    check_tensor("weight", weight, x, "(g, d)")
    if weight.dim() != 2 or weight.shape[1] != x.shape[2]:
        raise ValueError(
            f"weight has shape {shape_of(weight)}; expected (g, d) with d = {x.shape[2]}, x's last size"
        )
    autocast = autocast_dtype(x) is not None
    if not autocast:
        check_input_dtype(x)
    check_dtype("weight", weight, x, autocast, wider=True)
    if bias is not None:
        check_tensor("bias", bias, x, "(g,)")
        check_vector("bias", bias, "g", weight.shape[0])
        check_dtype("bias", bias, x, autocast, wider=True)
        bias = bias if autocast else bias.to(x.dtype)
    return F.linear(x, weight if autocast else weight.to(x.dtype), bias)


def _mean(
    score: Callable[[Tensor], Tensor], logits: Tensor, attention_mask: Tensor | None
) -> Tensor:
    """Of the scores of logits (B, T, g) over all tokens, or over the real ones, whatever the others hold."""
    if attention_mask is None:
        return score(logits).mean(1)
    check_tensor("attention_mask", attention_mask, logits, "(B, T)")
    if attention_mask.shape != logits.shape[:2]:
        raise ValueError(
            f"attention_mask has shape {shape_of(attention_mask)}; expected (B, T) = {tuple(logits.shape[:2])}"
        )
    real = (attention_mask != 0).unsqueeze(-1)
    weights = real.to(logits.dtype)
    return (score(logits.masked_fill(~real, 0.0)) * weights).sum(1) / weights.sum(1)
