"""A mixed batch on a LoRA linear of the `adapters` library: one ``multi_lora_linear``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..functional import multi_lora_linear
from .adapters_mixed import MixedBatch, by_setup
from .adapters_paper import current
from .stacked_lora import StackedLoRA, plan_of, stacked

Read = Callable[[Any, Any], Any]
"""The operands of one setup on the layer, or why it is not served: ``adapters_lora``'s."""


def mixed_lora(layer: Any, batch: MixedBatch, x: Tensor, read: Read) -> Tensor:
    """The layer's output for a batch whose samples have setups of their own.

    Args:
        layer: the accelerated layer.
        batch: what is active on it.
        x: (B, ..., in).
        read: ``read(setup, x)`` gives what one setup computes with on this layer, or the reason why the library must.

    Returns:
        (B, ..., out). Where a setup is the library's (several LoRAs in a row, DoRA, IA³) or dropout differs, the
        samples are computed setup by setup.
    """
    groups = batch.groups(layer, x)
    used: dict[str, Any] = {}
    slots: list[int] = []
    served = len(groups.setups) > 1 and x.dim() > 1
    for setup in groups.setups if served else ():
        if setup is None:
            slots.append(-1)
            continue
        found = read(setup, x)
        if isinstance(found, str):
            served = False
            break
        used.setdefault(found.name, found)
        slots.append(list(used).index(found.name))
    if len({operands.dropout_p for operands in used.values()}) > 1:
        served = False
    if not served:
        return by_setup(layer, batch, layer.forward, x)
    loras, paper = list(used.values()), current()
    samples = tuple(slots[group] for group in groups.of_sample)
    tokens = x.numel() // max(len(x) * x.shape[-1], 1)
    stack = stacked(
        layer,
        tuple(used),
        [
            StackedLoRA(
                *(found.lora_a, found.lora_b, None),
                # the library has the gate in place of it
                found.scaling if found.gate_weight is None or paper else 1.0,
            )
            for found in loras
        ],
        x,
    )
    return multi_lora_linear(
        *(x, loras[0].weight, loras[0].bias, stack.lora_a, stack.lora_b),
        plan_of(samples, len(loras), tokens, x.device),
        stack.scaling,
        ranks=stack.ranks,
        row_scale=_gates(x, samples, loras, None if paper is None else paper.weights(x)),
        dropout_p=loras[0].dropout_p,
        training=True,
    )


def _gates(
    x: Tensor, samples: tuple[int, ...], loras: list[Any], token_weight: Tensor | None
) -> Tensor | None:
    """(B, 1, 1): for each sample the mean over tokens of sigmoid(x w + b), w and b its LoRA's; 1 without a gate.

    ``token_weight`` (B, S) is what each token counts in the mean; None: all the same.
    """
    gated = [slot for slot, found in enumerate(loras) if found.gate_weight is not None]
    if not gated:
        return None
    places = {slot: place for place, slot in enumerate(gated)}
    rows, owners = _gated_rows(tuple(places.get(slot, -1) for slot in samples), x.device)
    weights = torch.cat([loras[slot].gate_weight for slot in gated])  # (G, in)
    biases = [loras[slot].gate_bias for slot in gated]
    own = weights.to(x.dtype)[owners].unsqueeze(2)
    tokens = x if len(rows) == len(x) else x.index_select(0, rows)
    logits = torch.bmm(tokens, own)  # (n, S, 1)
    wide = torch.promote_types(logits.dtype, torch.float32)
    if all(bias is not None for bias in biases):
        logits = logits.to(wide) + torch.stack(biases)[owners].unsqueeze(1)
    elif any(bias is not None for bias in biases):
        zeros = weights.new_zeros(1)
        terms = torch.stack([zeros if bias is None else bias for bias in biases])
        logits = logits.to(wide) + terms[owners].unsqueeze(1)
    gate = logits.to(wide).sigmoid()
    if token_weight is None:
        gate = gate.mean(1, keepdim=True)
    else:
        gate = (gate * token_weight[rows].unsqueeze(2)).sum(1, keepdim=True)
    if len(rows) == len(x):
        return gate
    return gate.new_ones(len(x), 1, 1).index_copy(0, rows, gate)


@functools.lru_cache(maxsize=16)
def _gated_rows(places: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Samples that have a gate, and which it is."""
    rows = [row for row, place in enumerate(places) if place >= 0]
    with torch.inference_mode(False):
        return (
            torch.tensor(rows, device=device),
            torch.tensor([places[row] for row in rows], device=device),
        )
