"""Attention over a prefix as a function of tensors. Arguments are checked here, once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..backends.torch_.prefix import concatenated
from ..dispatch import BackendUnavailable, Choice, Explanation, explain_problem
from ..ops import prefix_attention as prefix_attention_op
from ..ops.prefix import problem_of
from .checks import (
    autocast_dtype,
    backend_name,
    check_finite,
    check_probability,
    check_tensor,
    number,
    shape_of,
)


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    gate: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Attention over a prefix and a sequence, without concatenating their keys and values.

    ``softmax(scale · query [g_k · prefix_key; key]ᵀ + mask) [g_v · prefix_value; value]``, where no mask acts on the
    prefix: prefix tuning (Li and Liang 2021), and with a gate its form in UniPELT (Mao et al. 2022). The same as
    ``scaled_dot_product_attention`` of concatenated keys, values and mask, as `adapters`' ``PrefixTuningLayer`` makes
    them.

    In C++ on a CPU the prefix is folded into the sequence's attention by the log of its denominator. PyTorch
    concatenates instead: on other devices; where a gradient is needed or dropout acts, key has fewer heads than query
    or a size is 0; and, unless another backend is named, of so few keys that it costs less.

    Args:
        query: (B, H, L, D); float32, bfloat16, float16 or float64. Under ``torch.autocast`` all is computed in the
            autocast dtype.
        key: (B, H_kv, S, D), H a multiple of H_kv; query's dtype, as all below.
        value: (B, H_kv, S, D).
        prefix_key: (B, H_kv, P, D); or (1, H_kv, P, D), one prefix for the batch.
        prefix_value: the shape of prefix_key.
        attn_mask: of the sequence alone: 2 to 4 dimensions, broadcastable to (B, H, L, S). Bool: True where a key is
            seen; float: added.
        is_causal: query i sees the prefix and keys 0 to i.
        scale: of the products; None: 1 / √D.
        gate: (B, 1): a factor of each sample's prefix; or (B, 2): one of its keys and one of its values. See
            ``prefix_gate``.
        dropout_p: probability in [0, 1] that an attention probability is dropped.
        training: dropout acts only when True.
        backend: "auto", "torch", "cpp" or "reference"; None: what ``use_backend`` or ``PELT_FAST_BACKEND`` says.

    Returns:
        (B, H, L, D), in the dtype that was computed in.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value.
        BackendUnavailable: the named backend cannot run this call.
    """
    call = (query, key, value, prefix_key, prefix_value)
    tensors, mask, factor, rate, chosen = _check(
        call, attn_mask, is_causal, scale, gate, dropout_p, training, backend
    )
    reason = _composed(tensors, mask, rate)
    if reason is None:
        mask = _finite(mask, tensors[0])
        out: Tensor = prefix_attention_op(*tensors, mask, is_causal, factor, chosen)
        return out.transpose(1, 2)
    if chosen not in ("", "auto", "torch"):
        raise BackendUnavailable(f"backend {chosen!r} cannot run prefix_attention: {reason}")
    return concatenated(*tensors, mask, is_causal, factor, rate)


def explain_prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    gate: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str | None = None,
) -> Explanation:
    """Which backend a call of ``prefix_attention`` would run on; same arguments."""
    call = (query, key, value, prefix_key, prefix_value)
    tensors, mask, _, rate, chosen = _check(
        call, attn_mask, is_causal, scale, gate, dropout_p, training, backend
    )
    query, key, _, prefix_key, _ = tensors
    problem = problem_of(query, key, prefix_key, mask=mask is not None, is_causal=is_causal)
    reason = _composed(tensors, mask, rate)
    if reason is None:
        return Explanation((explain_problem(problem, chosen),))
    return Explanation((Choice(problem, chosen, "torch", {"cpp": [reason]}, []),))


_Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _check(
    call: _Tensors,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    gate: Tensor | None,
    dropout_p: float,
    training: bool,
    backend: str | None,
) -> tuple[_Tensors, Tensor | None, float, float, str]:
    query, key, value, prefix_key, prefix_value = call
    if not isinstance(query, Tensor):
        raise TypeError(f"query is a {type(query).__name__}; expected a torch.Tensor (B, H, L, D)")
    check_tensor("query", query, query, "(B, H, L, D)")
    if query.dim() != 4 or query.shape[3] == 0:
        raise ValueError(f"query has shape {shape_of(query)}; expected (B, H, L, D), D >= 1")
    dtype = autocast_dtype(query)
    if dtype is None and query.dtype not in _FLOATS:
        raise TypeError(f"query has dtype {query.dtype}; expected one of {_FLOAT_NAMES}")
    batch, heads, _, features = query.shape
    others = (
        ("key", key, "(B, H_kv, S, D)"),
        ("value", value, "(B, H_kv, S, D)"),
        ("prefix_key", prefix_key, "(B, H_kv, P, D)"),
        ("prefix_value", prefix_value, "(B, H_kv, P, D)"),
    )
    for name, tensor, shape in others:
        check_tensor(name, tensor, query, shape)
        _check_dtype(name, tensor, query, dtype is not None)
    if key.dim() != 4 or key.shape[0] != batch or key.shape[3] != features:
        raise ValueError(
            f"key has shape {shape_of(key)}; expected (B, H_kv, S, D) with B = {batch}, D = {features} of query"
        )
    kv_heads = key.shape[1]
    if (kv_heads == 0 and heads) or (kv_heads and heads % kv_heads):
        raise ValueError(
            f"key has {kv_heads} heads; expected a number that divides {heads}, query's heads"
        )
    if value.shape != key.shape:
        raise ValueError(f"value has shape {shape_of(value)}; expected {shape_of(key)}, key's")
    if (
        prefix_key.dim() != 4
        or prefix_key.shape[0] not in (1, batch)
        or prefix_key.shape[1] != kv_heads
        or prefix_key.shape[3] != features
    ):
        raise ValueError(
            f"prefix_key has shape {shape_of(prefix_key)}; expected (B, H_kv, P, D) or (1, H_kv, P, D) with "
            f"B = {batch}, H_kv = {kv_heads}, D = {features}"
        )
    if prefix_value.shape != prefix_key.shape:
        raise ValueError(
            f"prefix_value has shape {shape_of(prefix_value)}; expected {shape_of(prefix_key)}, prefix_key's"
        )
    if attn_mask is not None:
        _check_mask(attn_mask, query, key)
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal is a {type(is_causal).__name__}; expected a bool")
    if is_causal and attn_mask is not None:
        raise ValueError("is_causal is True and attn_mask is given; expected one of them")
    factor = 1 / math.sqrt(features) if scale is None else number("scale", scale)
    check_finite("scale", factor)
    rate = number("dropout_p", dropout_p)
    check_probability("dropout_p", rate)
    if gate is not None:
        key_gate, value_gate = _gates(gate, query, dtype is not None)
        prefix_key, prefix_value = prefix_key * key_gate, prefix_value * value_gate
    if prefix_key.shape[0] != batch:
        prefix_key = prefix_key.expand(batch, -1, -1, -1)
        prefix_value = prefix_value.expand(batch, -1, -1, -1)
    tensors = (query, key, value, prefix_key, prefix_value)
    if dtype is not None:
        query, key, value, prefix_key, prefix_value = (t.to(dtype) for t in tensors)
        tensors = (query, key, value, prefix_key, prefix_value)
    return tensors, attn_mask, factor, rate if training else 0.0, backend_name(backend)


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FLOAT_NAMES = "float32, bfloat16, float16 or float64"


def _check_dtype(name: str, tensor: Tensor, query: Tensor, autocast: bool) -> None:
    if tensor.dtype == query.dtype or (autocast and tensor.dtype in _FLOATS):
        return
    raise TypeError(f"{name} has dtype {tensor.dtype}; expected {query.dtype}, query's dtype")


def _check_mask(mask: Any, query: Tensor, key: Tensor) -> None:
    check_tensor("attn_mask", mask, query, "broadcastable to (B, H, L, S)")
    if mask.dtype is not torch.bool and mask.dtype not in _FLOATS:
        raise TypeError(f"attn_mask has dtype {mask.dtype}; expected bool or {_FLOAT_NAMES}")
    shape = (*query.shape[:3], key.shape[2])
    fits = 2 <= mask.dim() <= 4 and all(
        size in (1, wanted)
        for size, wanted in zip(reversed(mask.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"attn_mask has shape {shape_of(mask)}; expected 2 to 4 dimensions that broadcast to (B, H, L, S) = "
            f"{tuple(shape)}"
        )


def _gates(gate: Any, query: Tensor, autocast: bool) -> tuple[Tensor, Tensor]:
    """The factors (B, 1, 1, 1) of keys and of values."""
    check_tensor("gate", gate, query, "(B, 1) or (B, 2)")
    _check_dtype("gate", gate, query, autocast)
    if gate.dim() != 2 or gate.shape[0] != query.shape[0] or gate.shape[1] not in (1, 2):
        raise ValueError(
            f"gate has shape {shape_of(gate)}; expected (B, 1) or (B, 2) with B = {query.shape[0]}"
        )
    return gate[:, :1, None, None], gate[:, -1:, None, None]


def _composed(tensors: _Tensors, mask: Tensor | None, dropout_p: float) -> str | None:
    """Why PyTorch composes the call; None where an operator of ours computes it."""
    query, key, _, prefix_key, _ = tensors
    if query.device.type not in ("cpu", "meta"):
        return f"the tensors are on {query.device}"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*tensors, mask)):
        return "a gradient is needed"
    if dropout_p:
        return "dropout acts"
    if query.shape[1] != key.shape[1]:
        return "key has fewer heads than query"
    if 0 in query.shape or 0 in key.shape or 0 in prefix_key.shape:
        return "a size is 0"
    return None


def _finite(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """An additive mask without -∞, of 2 or 4 dimensions.

    Of a row that is masked whole torch's attention gives 0 for the log of its denominator, and not -∞; with the lowest
    number in its place the prefix gets all of the weight.
    """
    if mask is None:
        return None
    if mask.dim() == 3:
        mask = mask.unsqueeze(0)
    if mask.dtype is torch.bool:
        lowest = torch.finfo(query.dtype).min
        return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, lowest)
    if mask.dtype not in (query.dtype, torch.float32) or query.dtype is torch.float64:
        mask = mask.to(query.dtype)
    return mask.clamp(min=torch.finfo(mask.dtype).min)
