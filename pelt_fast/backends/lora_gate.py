"""What the torch and Triton backends do with a gate between two products: everything here is of size (T, r)."""

from __future__ import annotations

import torch
from torch import Tensor


def gate_of(
    logits: Tensor, bias: Tensor | None, token_weight: Tensor | None, samples: int
) -> Tensor:
    """Logits (T,) of the rows of ``samples`` samples to their gates (samples,), in the wide dtype."""
    opened = _open(logits, bias, samples)
    return opened.mean(1) if token_weight is None else _weighted(opened, token_weight).sum(1)


def gated(s: Tensor, gate: Tensor) -> Tensor:
    """Rows (T, r) times the gates of their samples, rounded once."""
    samples = gate.numel()
    wide = s.reshape(samples, -1, s.shape[1]).to(gate.dtype)
    return (wide * gate.view(-1, 1, 1)).to(s.dtype).reshape(s.shape)


def logits_backward(
    u: Tensor, s: Tensor, gate: Tensor, bias: Tensor | None, token_weight: Tensor | None
) -> Tensor:
    """The gradient (T,) of the logits, in the wide dtype.

    Args:
        u: dY B, (T, r).
        s: (T, r + 1), what was expanded, before the gate, and the logits.
        gate: (samples,).
        bias: (1,) or None, added to the logits.
        token_weight: (samples, tokens each) or None.
    """
    samples, rank = gate.numel(), u.shape[1]
    dgate = (u.to(gate.dtype) * s[:, :rank].to(gate.dtype)).sum(1).view(samples, -1).sum(1)
    opened = _open(s[:, rank], bias, samples)
    slope = opened * (1 - opened)
    length = opened.shape[1]
    shares = slope / length if token_weight is None else _weighted(slope, token_weight)
    return (dgate.view(-1, 1) * shares).reshape(-1)


def _weighted(values: Tensor, token_weight: Tensor) -> Tensor:
    """Of a token without weight nothing is left, whatever it holds."""
    weight = token_weight.to(values.dtype)
    return torch.where(weight == 0, 0.0, values * weight)


def _open(logits: Tensor, bias: Tensor | None, samples: int) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    shifted = logits.to(wide) if bias is None else logits.to(wide) + bias.to(wide)
    return torch.sigmoid(shifted).view(samples, -1)
