"""The LoRA linear with UniPELT's gate on Triton: the kernels of the LoRA linear, and the gate between them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.common.adapters import AdapterTable
from ...kernels.lora import grad_a, grad_b, linear, shrink
from ...random import keep_scale
from ..lora_gate import gate_of, gated, logits_backward
from .device import arch_of, precision_of
from .lora import _bias, _grads, _Shapes, _side_by_side, priority, unsupported

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
    """x (T, in) -> y (T, out), s (T, r + 1): the scaled shrink and the gate's logits, and the gates (samples,).

    The gate's projection is one more adapter, of rank 1, to the shrink; the expand sees A's alone.
    """
    (tokens, in_features), out_features, dtype = x.shape, weight.shape[0], x.dtype
    rank, drops = lora_a.shape[0], seed is not None
    arch, precision = arch_of(x.device), precision_of(dtype)
    table = AdapterTable.make((rank, 1), (scaling * keep_scale(dropout_p), 1.0), (dropout_p, 0.0))
    s, y = x.new_empty((tokens, rank + 1)), x.new_empty((tokens, out_features))
    operation = ("lora_linear_fwd", arch, dtype, tokens, in_features, out_features)
    with torch.cuda.device_of(x):
        a, b = _side_by_side((lora_a, gate_weight), 0, dtype), _side_by_side((lora_b,), 1, dtype)
        config = shrink.default_config(_Shapes(*operation, (rank, 1), drops))
        shrink.launch_shrink(x, a, s, table, seed, config, precision)
        gate = gate_of(s[:, rank], gate_bias, token_weight, samples)
        expanded = gated(s[:, :rank], gate)
        config = linear.default_config(_Shapes(*operation, (rank,), drops))
        linear.launch_linear_fwd(
            x, weight.to(dtype), _bias(bias, (), ()), expanded, b, y, config, precision
        )
    return y, s, gate


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
    (tokens, out_features), in_features, dtype = dy.shape, weight.shape[1], dy.dtype
    need_dx, need_dbias, need_da, need_db, need_dgate_weight, need_dgate_bias = needs
    rank, drops = lora_a.shape[0], seed is not None
    arch, precision = arch_of(dy.device), precision_of(dtype)
    operation = ("lora_linear_bwd", arch, dtype, tokens, in_features, out_features)
    one, both = _Shapes(*operation, (rank,), drops), _Shapes(*operation, (rank, 1), drops)
    plain = AdapterTable.make((rank,), (1.0,), (0.0,))
    masked = AdapterTable.make((rank, 1), (keep_scale(dropout_p), 1.0), (dropout_p, 0.0))
    out: list[Tensor | None] = [None] * 6
    u = dy.new_empty((tokens, rank))
    sums = dy.new_empty(out_features, dtype=torch.float32) if need_dbias else None
    out[3] = torch.empty_like(lora_b, memory_format=torch.contiguous_format) if need_db else None
    with torch.cuda.device_of(dy):
        b = _side_by_side((lora_b,), 1, dtype)
        shrink.launch_shrink(dy, b.T, u, plain, None, shrink.default_config(one), precision)
        if need_db or need_dbias:
            expanded = gated(s[:, :rank], gate) if need_db else None
            config = grad_b.default_config(one)
            grad_b.launch_grad_b(dy, b, expanded, None, [out[3]], sums, plain, config, precision)
        dlogits = logits_backward(u, s, gate, gate_bias, token_weight)
        ds = torch.cat((gated(u, gate * scaling), dlogits.to(dtype).unsqueeze(1)), dim=1)
        if need_dx:
            a = _side_by_side((lora_a, gate_weight), 0, dtype)
            out[0] = dy.new_empty((tokens, in_features))
            config = linear.default_config(both)
            linear.launch_linear_bwd_dx(
                dy, weight.to(dtype), ds, a, out[0], masked, seed, config, precision
            )
        if need_da or need_dgate_weight:
            assert x is not None
            grads = _grads((lora_a, gate_weight), (need_da, need_dgate_weight))
            config = grad_a.default_config(both)
            grad_a.launch_grad_a(x, ds, grads, masked, seed, config, precision)
            out[2], out[4] = grads
    if need_dbias and sums is not None:
        out[1] = sums.to(dtype)
    if need_dgate_bias:
        assert gate_bias is not None
        out[5] = dlogits.sum().reshape(1).to(gate_bias.dtype)
    return out
