"""The LoRA linear with UniPELT's gate as an ATen composition; see ``lora.py`` beside this file."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...random import keep_scale
from ..lora_gate import gate_of, gated, logits_backward
from .lora import _drop, _keep, _scaled_product, priority, unsupported

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
    """x (T, in) -> y (T, out), s (T, r + 1): the scaled shrink and the gate's logits, and the gates (samples,)."""
    dtype, rank = x.dtype, lora_a.shape[0]
    keep = _keep(seed, x.shape[0], x.shape[1], dropout_p, 0)
    factor = scaling if keep is None else scaling * keep_scale(dropout_p)
    s = x.new_empty((x.shape[0], rank + 1))
    s[:, :rank] = _scaled_product(_drop(x, keep), lora_a.to(dtype).T, factor)
    s[:, rank:] = x @ gate_weight.to(dtype).T
    gate = gate_of(s[:, rank], gate_bias, token_weight, samples)
    y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
    return y.addmm_(gated(s[:, :rank], gate), lora_b.to(dtype).T), s, gate


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
    """dy (T, out) -> the gradients of ``GRADIENTS`` in ``pelt_fast/ops/gated_lora.py``."""
    dtype, rank = dy.dtype, lora_a.shape[0]
    need_dx, need_dbias, need_da, need_db, need_dgate_weight, need_dgate_bias = needs
    out: list[Tensor | None] = [None] * 6
    keep = _keep(seed, dy.shape[0], weight.shape[1], dropout_p, 0)
    factor = 1.0 if keep is None else keep_scale(dropout_p)
    u = dy @ lora_b.to(dtype)
    dlogits = logits_backward(u, s, gate, gate_bias, token_weight)
    ds = gated(u, gate * scaling)
    column = dlogits.to(dtype).unsqueeze(1)
    if need_dx:
        dx = dy @ weight.to(dtype)
        if keep is None:
            dx.addmm_(ds, lora_a.to(dtype))
        else:
            dx += _drop(_scaled_product(ds, lora_a.to(dtype), factor), keep)
        out[0] = dx.addmm_(column, gate_weight.to(dtype))
    if need_dbias:
        out[1] = dy.sum(0, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)
    if need_da:
        assert x is not None
        out[2] = _scaled_product(ds.T, _drop(x, keep), factor).to(lora_a.dtype)
    if need_db:
        out[3] = (dy.T @ gated(s[:, :rank], gate)).to(lora_b.dtype)
    if need_dgate_weight:
        assert x is not None
        out[4] = (column.T @ x).to(gate_weight.dtype)
    if need_dgate_bias:
        assert gate_bias is not None
        out[5] = dlogits.sum().reshape(1).to(gate_bias.dtype)
    return out
