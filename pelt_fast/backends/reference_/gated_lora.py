"""The gated LoRA oracle as a backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import reference
from ...random import keep_scale
from .lora import _masks, priority, unsupported

__all__ = ["gated_lora_linear_bwd", "gated_lora_linear_fwd", "priority", "unsupported"]


def gated_lora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    token_weight: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    samples: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, out), s (T, r + 1): the scaled shrink and the gate's logits, and the gates (samples,)."""
    dtype = x.dtype
    (keep,) = _masks(x, (dropout_p,), seed)
    y, gate = reference.gated_lora_linear(
        x.view(samples, -1, x.shape[1]),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        lora_a.to(dtype),
        lora_b.to(dtype),
        gate_weight.to(dtype),
        None if gate_bias is None else gate_bias.to(dtype),
        scaling,
        token_weight=None if token_weight is None else token_weight.to(dtype),
        dropout_p=dropout_p,
        keep=None if keep is None else keep.view(samples, -1, x.shape[1]),
    )
    dropped = x if keep is None else torch.where(keep, x, 0.0)
    factor = scaling if keep is None else scaling * keep_scale(dropout_p)
    s = torch.cat((dropped @ lora_a.to(dtype).T * factor, x @ gate_weight.to(dtype).T), dim=1)
    return y.reshape(x.shape[0], -1), s, gate.to(torch.promote_types(dtype, torch.float32))


def gated_lora_linear_bwd(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    token_weight: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    s: Tensor,
    gate: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients, each by its formula, in dy's dtype and then in the parameter's."""
    dtype, samples, rank = dy.dtype, gate.numel(), lora_a.shape[0]
    (keep,) = _masks(dy.new_empty((dy.shape[0], weight.shape[1])), (dropout_p,), seed)
    factor = 1.0 if keep is None else keep_scale(dropout_p)
    per_row = gate.to(dtype).repeat_interleave(dy.shape[0] // samples).unsqueeze(1)
    u = dy @ lora_b.to(dtype)
    dgate = (u * s[:, :rank]).sum(1).view(samples, -1).sum(1, keepdim=True)
    logits = s[:, rank] if gate_bias is None else s[:, rank] + gate_bias.to(dtype)
    opened = torch.sigmoid(logits).view(samples, -1)
    share = torch.full_like(opened, 1.0 / opened.shape[1])
    if token_weight is not None:
        share = token_weight.to(dtype)
    dlogits = torch.where(share == 0, 0.0, dgate * share * opened * (1 - opened)).reshape(-1, 1)
    ds = scaling * per_row * u
    out: list[Tensor | None] = [None] * 6
    if needs[0]:
        through = ds @ lora_a.to(dtype) * factor
        through = through if keep is None else torch.where(keep, through, 0.0)
        out[0] = dy @ weight.to(dtype) + through + dlogits @ gate_weight.to(dtype)
    if needs[1]:
        out[1] = dy.sum(0)
    if needs[2]:
        assert x is not None
        dropped = x if keep is None else torch.where(keep, x, 0.0)
        out[2] = (ds.T @ dropped * factor).to(lora_a.dtype)
    if needs[3]:
        out[3] = (dy.T @ (s[:, :rank] * per_row)).to(lora_b.dtype)
    if needs[4]:
        assert x is not None
        out[4] = (dlogits.T @ x).to(gate_weight.dtype)
    if needs[5]:
        assert gate_bias is not None
        out[5] = dlogits.sum().reshape(1).to(gate_bias.dtype)
    return out
