"""One bottleneck adapter as the `adapters` library (1.3.0) computes it, in as few fused calls as its flags allow.

For whoever holds such an adapter's tensors: ``nn.BottleneckAdapter`` and the integration of `adapters` models. Stable
interface:

    spec = BottleneckSpec(down_weight, down_bias, up_weight, up_bias, activation, ...)   # tensors, norms and flags
    y = bottleneck_block(spec, hidden_states, input_tensor, layer_norm, training)   # pre_forward .. post_forward
    y = bottleneck_core(spec, x, residual_input, training)                          # Adapter.forward: its output
    g = adapter_gate(spec, x)                                                       # the gating score, (B, 1, 1)
    activation = resolve_activation("gelu_new")                                     # a kernel's name, or a callable

With o = hidden_states, x = input_tensor, LN = layer_norm, u = dropout(scaling · (U act(D norm_before(·)))) · gate:

    sequential  h = LN(o + x) with original_ln_before, else o (no LN: o + x without the LN; no x: o)
                r = o, or o + x for residual_before_ln="post_add", or h for False
                c = norm_after(u(h) + r) with adapter_residual_before_ln, else norm_after(u(h)) + r
                y = LN(c + x) with original_ln_after (no LN: c + x), else c
    parallel    c = norm_after(u(x)) + o;   y = LN(c + x) with original_ln_after (no LN: c + x), else c

``functional.bottleneck_adapter`` computes post(u(pre(a [+ b])) [+ a] [+ b]) with at most one layernorm before and one
after, so that one call is all of it for Pfeiffer, Houlsby and parallel adapters, with or without an LN. What is more
than that goes through the modules around the call: an LN that is no plain ``nn.LayerNorm``, an input that a gate or
a residual needs in memory, norm_after together with LN, tensors of different dtypes. Sums are rounded once where the
library rounds each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from ..functional import PHM

Activation = str | Callable[[Tensor], Tensor]


class BottleneckSpec(NamedTuple):
    """Tensors and flags of one adapter, under the names of the library's ``BnConfig`` where it has one.

    d features, m bottleneck. Parameters in the hidden states' dtype, or float32 over half precision.
    """

    down_weight: Any  # a Tensor (m, d); or a PHM, the factors of one, as up_weight then is
    down_bias: Tensor | None  # (m,)
    up_weight: Any  # (d, m)
    up_bias: Tensor | None  # (d,)
    activation: Activation = "relu"  # from resolve_activation
    scaling: float | Tensor = 1.0  # a tensor: (1,) or (d,)
    gate_weight: Tensor | None = None  # (1, d); None: no gating
    gate_bias: Tensor | None = None  # (1,)
    norm_before: nn.Module | None = None  # the adapter's own layernorms
    norm_after: nn.Module | None = None
    dropout: float = 0.0
    stochastic_depth: float = 0.0  # not in parallel adapters, as in the library
    is_parallel: bool = False
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: bool | str = True  # or "post_add"
    adapter_residual_before_ln: bool = False
    token_weight: Tensor | None = (
        None  # (batch, tokens): of the gate's mean; None: all count the same
    )


def bottleneck_block(
    spec: BottleneckSpec,
    hidden_states: Tensor,
    input_tensor: Tensor | None,
    layer_norm: nn.Module | None,
    training: bool,
) -> Tensor:
    """The library's ``pre_forward``, ``forward`` and ``post_forward`` of one adapter.

    Args:
        spec: the adapter.
        hidden_states: (..., d), the sub-layer's output. A gate expects (batch, tokens, d).
        input_tensor: (..., d), the residual stream before the sub-layer, or None where the model has none.
        layer_norm: the model's own norm after the sub-layer, or None where the model or a hook applies none.
        training: whether dropout and stochastic depth act.

    Returns:
        (..., d).

    Raises:
        ValueError: flags ask for an input_tensor or a layer_norm that is None.
    """
    o, x = hidden_states, input_tensor
    _check_block(spec, x, layer_norm)
    inputs, pre, residuals, total = _before(spec, o, x, layer_norm)
    outer = [x] if spec.original_ln_after and x is not None else []
    post = layer_norm if spec.original_ln_after else None
    if spec.norm_after is None:
        residuals = _folded(residuals + outer, [o, x], total)
        return _adapter(spec, inputs, pre, residuals, post, training)
    if spec.adapter_residual_before_ln and not spec.is_parallel:
        y = _adapter(spec, inputs, pre, residuals, spec.norm_after, training)
    else:
        y = _adapter(spec, inputs, pre, [], spec.norm_after, training)
        outer = _folded(residuals + outer, [o, x], total)
    y = _sum([y, *outer])
    return y if post is None else post(y)


def bottleneck_core(
    spec: BottleneckSpec, x: Tensor, residual_input: Tensor, training: bool
) -> Tensor:
    """The library's ``Adapter.forward``, or ``ParallelAdapter.forward``, which adds no residual: its first output.

    Args:
        spec: the adapter; flags of the block around it (``original_ln_*``, ``residual_before_ln``) are not read.
        x: (..., d), the adapter's input. A gate expects (batch, tokens, d).
        residual_input: (..., d).
        training: whether dropout and stochastic depth act.

    Returns:
        (..., d).
    """
    if spec.is_parallel:
        return _adapter(spec, [x], spec.norm_before, [], spec.norm_after, training)
    if spec.norm_after is None or spec.adapter_residual_before_ln:
        return _adapter(spec, [x], spec.norm_before, [residual_input], spec.norm_after, training)
    return _adapter(spec, [x], spec.norm_before, [], spec.norm_after, training) + residual_input


def adapter_gate(spec: BottleneckSpec, x: Tensor) -> Tensor | None:
    """Mean over the tokens of σ(w·x + b), by weights or of all: x (B, T, d) -> (B, 1, 1). None without a gate."""
    if spec.gate_weight is None:
        return None
    bias = spec.gate_bias
    score = nn.functional.linear(
        x, spec.gate_weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    )
    if spec.token_weight is None:
        return torch.sigmoid(score).mean(dim=1).unsqueeze(-1)
    weight = spec.token_weight.unsqueeze(-1)
    gates = torch.sigmoid(score.masked_fill(weight == 0, 0.0))  # whatever the others hold
    return (gates * weight).sum(dim=1).unsqueeze(-1).to(score.dtype)


def resolve_activation(name: str) -> Activation:
    """What the library's ``non_linearity`` names: a canonical name of the kernels', else transformers' own callable.

    Raises:
        TypeError: the name is no string.
        ValueError: nobody knows it; the message lists the names that kernels know.
    """
    if not isinstance(name, str):
        raise TypeError(f"activation is a {type(name).__name__}; expected a name")
    try:
        return functional.activation_name(name)
    except ValueError:
        found = _transformers_activation(name.lower())
        if found is None:
            raise
        return found


def _transformers_activation(name: str) -> Callable[[Tensor], Tensor] | None:
    try:
        from transformers.activations import get_activation

        found: Callable[[Tensor], Tensor] = get_activation(name)
    except (ImportError, KeyError):
        return None
    return found


def _check_block(spec: BottleneckSpec, x: Tensor | None, layer_norm: nn.Module | None) -> None:
    """Combinations in which the library itself fails, in words."""
    sums = spec.original_ln_after or (spec.original_ln_before and layer_norm is not None)
    if x is None and (spec.is_parallel or sums):
        flag = "is_parallel" if spec.is_parallel else "original_ln_before or original_ln_after"
        raise ValueError(f"input_tensor is None; expected a tensor, since {flag} is set")
    if spec.is_parallel or isinstance(spec.residual_before_ln, bool):
        return
    if spec.residual_before_ln != "post_add":
        raise ValueError(
            f"residual_before_ln is {spec.residual_before_ln!r}; expected True, False or 'post_add'"
        )
    if not spec.original_ln_before or layer_norm is None:
        raise ValueError(
            "residual_before_ln is 'post_add'; expected original_ln_before and a layer_norm beside it"
        )


def _before(
    spec: BottleneckSpec, o: Tensor, x: Tensor | None, layer_norm: nn.Module | None
) -> tuple[list[Tensor], nn.Module | None, list[Tensor], Tensor | None]:
    """pre_forward: the adapter's inputs (to be summed), the norm of that sum, the residuals; o + x if it was made."""
    if spec.is_parallel:
        return [x], spec.norm_before, [o], None  # type: ignore[list-item]
    inputs = [o, x] if spec.original_ln_before and x is not None else [o]
    residuals = inputs if spec.residual_before_ln == "post_add" else [o]
    if not spec.original_ln_before or layer_norm is None:
        return inputs, spec.norm_before, residuals if spec.residual_before_ln else inputs, None
    needed = spec.gate_weight is not None or spec.norm_before is not None
    if spec.residual_before_ln and not needed:
        return inputs, layer_norm, residuals, None
    total = _sum(inputs)
    h = layer_norm(total)
    return [h], spec.norm_before, residuals if spec.residual_before_ln else [h], total


def _adapter(
    spec: BottleneckSpec,
    inputs: list[Tensor],
    pre: nn.Module | None,
    residuals: list[Tensor],
    post: nn.Module | None,
    training: bool,
) -> Tensor:
    """post(u(pre(Σ inputs)) + Σ residuals) of 1 or 2 inputs, in one call and what does not fit it."""
    separate = pre is not None and not _fuses(pre, inputs[0])
    fused_post = not separate if post is pre else post is None or _fuses(post, inputs[0])
    if len(inputs) == 2:
        needed = separate or spec.gate_weight is not None or not _alike(*inputs)
        if needed or _without(residuals, inputs):
            total = _sum(inputs)
            inputs, residuals = [total], _folded(residuals, inputs, total)
    x, skip = inputs[0], inputs[1] if len(inputs) == 2 else None
    gate = adapter_gate(spec, x)
    if training and spec.stochastic_depth > 0.0 and not spec.is_parallel:
        kept = _kept_samples(x, spec.stochastic_depth)
        gate = kept if gate is None else gate * kept
    if pre is not None and separate:
        x, pre = pre(x), None
    apart = [] if all(_alike(r, x) for r in residuals) else residuals
    fused_post = fused_post and not apart
    adapter: Callable[..., Tensor] = functional.bottleneck_adapter
    if isinstance(spec.down_weight, PHM):
        adapter = functional.compacter
    y = adapter(
        x,
        spec.down_weight,
        spec.down_bias,
        spec.up_weight,
        spec.up_bias,
        activation=spec.activation,
        scaling=spec.scaling,
        gate=gate,
        residual=None if apart or not residuals else residuals,
        skip=skip,
        dropout_p=spec.dropout,
        training=training,
        **_norm("pre_ln_", pre),
        **(_norm("ln_", post) if fused_post else {}),
    )
    y = _sum([y, *apart])
    return y if post is None or fused_post else post(y)


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether the fused call adds them; what else PyTorch broadcasts or promotes is added outside of it.

    T5 keeps a projection in float32, and a residual stream may be wider. Under autocast the call itself promotes.
    """
    return a.shape == b.shape and (a.dtype == b.dtype or torch.is_autocast_enabled(a.device.type))


def _sum(tensors: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)


def _without(tensors: list[Tensor], taken: Sequence[Tensor | None]) -> list[Tensor]:
    """``tensors`` less one occurrence, by identity, of each of ``taken``."""
    left = list(tensors)
    for tensor in taken:
        for i, candidate in enumerate(left):
            if candidate is tensor:
                del left[i]
                break
    return left


def _folded(
    tensors: list[Tensor], pair: Sequence[Tensor | None], total: Tensor | None
) -> list[Tensor]:
    """``tensors`` with their sum ``total`` in place of a ``pair`` that is among them."""
    rest = _without(tensors, pair)
    return tensors if total is None or len(tensors) - len(rest) < 2 else [total, *rest]


def _kept_samples(x: Tensor, p: float) -> Tensor:
    """torchvision's StochasticDepth, mode "row": 0 or 1 / (1 - p) for each sample, (B, 1, ...)."""
    kept = x.new_empty([x.shape[0]] + [1] * (x.dim() - 1)).bernoulli_(1.0 - p)
    return kept.div_(1.0 - p) if p < 1.0 else kept


def _fuses(norm: nn.Module, x: Tensor) -> bool:
    """Whether calling the module is no more than ``F.layer_norm`` over the last dimension with its own tensors."""
    return (
        isinstance(norm, nn.LayerNorm)
        and type(norm).forward is nn.LayerNorm.forward
        and "forward" not in norm.__dict__
        and not (norm._forward_hooks or norm._forward_pre_hooks)
        and not (norm._backward_hooks or norm._backward_pre_hooks)
        and norm.weight is not None
        and tuple(norm.normalized_shape) == (x.shape[-1],)
    )


def _norm(prefix: str, norm: nn.Module | None) -> dict[str, Any]:
    if norm is None:
        return {}
    eps = "eps" if prefix == "ln_" else f"{prefix}eps"
    return {f"{prefix}weight": norm.weight, f"{prefix}bias": norm.bias, eps: norm.eps}
