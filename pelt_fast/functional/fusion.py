"""AdapterFusion as a function of tensors. Arguments are checked here, once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import canonical
from ..autograd import AdapterFusionFunction
from ..dispatch import Explanation, explain_problem
from ..ops.fusion import problem_of
from ..random import new_seed
from .adapter_checks import once_each
from .fusion_cache import folds as cache
from .fusion_checks import Biases, Call, as_given, check_call, tag_of
from .fusion_fold import (
    NO_ATTENTION,
    Adapters,
    Attention,
    Folded,
    Stacked,
    fold,
    folds,
    stack,
    trains,
    wide_dtype,
)
from .ordinary import short_way


def adapter_fusion(
    x: Tensor,
    down_weights: Sequence[Tensor],
    down_biases: Biases,
    up_weights: Sequence[Tensor],
    up_biases: Biases,
    *,
    query_weight: Tensor | None = None,
    query_bias: Tensor | None = None,
    key_weight: Tensor | None = None,
    key_bias: Tensor | None = None,
    value_weight: Tensor | None = None,
    query: Tensor | None = None,
    activation: str = "relu",
    scaling: float | Tensor | Sequence[float | Tensor] = 1.0,
    temperature: float = 1.0,
    value_residual: Tensor | None = None,
    residual: Tensor | Sequence[Tensor] | None = None,
    skip: Tensor | None = None,
    pre_ln_weight: Tensor | None = None,
    pre_ln_bias: Tensor | None = None,
    pre_ln_eps: float = 1e-5,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    training: bool = False,
    return_attention: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""AdapterFusion: an attention over N bottleneck adapters, with the layernorms and residuals around it.

    With ``v = LN_pre(x + skip)``, ``r_n = scaling_n · (act(v D_nᵀ + b_Dn) U_nᵀ + b_Un) [+ value_residual]``,
    ``q = W_q u + b_q`` of ``u = query`` (v where none is given), ``k_n = W_k r_n + b_k``:

        score_n = drop(q · k_n);   p = softmax(score / temperature);   y = LN(Σ_n p_n W_v r_n + Σ residual)

    What is not given is left out. Pfeiffer et al., "AdapterFusion" (2021), with the semantics of
    ``adapters.methods.modeling.BertFusion``: no division by √d, dropout on the scores. BERT's site with Pfeiffer
    adapters: ``adapter_fusion(o, ..., skip=x, residual=(o, x), pre_ln_weight=g, ..., ln_weight=g, ...)``.

    The computation is re-associated into the bottlenecks (``functional/fusion_fold.py``): per token it costs
    (3 Σm_n + 2 N) · d products instead of N · (2 m + 2 d) · d + d², saves what is T × Σm_n, and makes nothing of size
    T × N × d. Folding W_q, W_k and W_v into the adapters costs (Σm_n + N) · d² for each; where nothing of them needs a
    gradient the result is kept for the next call. A call of fewer tokens than Σm_n + N that would have to fold uses
    the d × d matrices on its tokens instead, and so does one with ``value_residual``, which then holds q and the
    context in memory.

    Args:
        x: (..., d), any strides; float32, bfloat16, float16 or float64: the dtype that is computed in. Under
            ``torch.autocast`` as in ``bottleneck_adapter``.
        down_weights: N tensors (m_n, d); x's dtype, or float32 over a bfloat16 or float16 x, as every parameter below.
        down_biases: N of (m_n,) or None; None: no adapter has one.
        up_weights: N of (d, m_n).
        up_biases: N of (d,) or None; None: no adapter has one.
        query_weight: (d, d) as ``nn.Linear`` has it, or None: the query is u itself. Likewise key and value.
        query_bias: (d,), only beside query_weight; likewise key_bias.
        key_weight: (d, d) or None.
        key_bias: (d,) or None.
        value_weight: (d, d) or None.
        query: x's shape and dtype: where the query comes from, if not from the adapters' input.
        activation: a name in ``functional.ACTIVATIONS`` or an alias of transformers' for it, of all adapters.
        scaling: of what every adapter gives: a finite number, or a tensor of one element or of d; or one for each.
        temperature: a positive number.
        value_residual: x's shape and dtype; added to what every adapter gives, before keys and values.
        residual: a tensor of x's shape and dtype, or a sequence of them, added to the context.
        skip: x's shape and dtype; added to x on the way into the adapters.
        pre_ln_weight: (d,); a layernorm goes before the adapters where it is given.
        pre_ln_bias: (d,) or None.
        pre_ln_eps: added to the variance; not negative.
        ln_weight: (d,); a layernorm of the result where it is given.
        ln_bias: (d,) or None.
        eps: added to the variance; not negative.
        dropout_p: probability in [0, 1] that a score is set to zero; the others are divided by what is left of 1.
        training: dropout acts only when True.
        return_attention: p is wanted too.
        backend: as in ``bottleneck_adapter``.

    Returns:
        y of x's shape, in the dtype that was computed in; with ``return_attention`` also p, (..., N) in the same
        dtype, which carries no gradient.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value.
        BackendUnavailable: the named backend cannot run this call.
        RuntimeError: in a backward of the backward, which has no formula here.
    """
    attention = Attention(query_weight, query_bias, key_weight, key_bias, value_weight)
    adapters = as_given(down_weights, down_biases, up_weights, up_biases, scaling)
    kept: Folded | None = None
    extension = short_way(backend) if adapters is not None and value_residual is None else None
    drops = training and not (type(dropout_p) in (float, int) and dropout_p == 0)
    if adapters is not None and extension is not None and not drops:
        kept = _kept(x, adapters, attention)
        if kept is not None and (name := canonical(activation)) is not None:
            found: tuple[Tensor, Tensor] | None = extension.ordinary_fusion(
                *(*kept, adapters.widths, x, query, name, temperature, residual, skip),
                *(pre_ln_weight, pre_ln_bias, pre_ln_eps, ln_weight, ln_bias, eps),
                *(dropout_p, training),
            )
            if found is not None:
                return found if return_attention else found[0]
    call = check_call(
        *(x, down_weights, down_biases, up_weights, up_biases),
        query_weight=query_weight,
        query_bias=query_bias,
        key_weight=key_weight,
        key_bias=key_bias,
        value_weight=value_weight,
        query=query,
        activation=activation,
        scaling=scaling,
        temperature=temperature,
        value_residual=value_residual,
        residual=residual,
        skip=skip,
        pre_ln_weight=pre_ln_weight,
        pre_ln_bias=pre_ln_bias,
        pre_ln_eps=pre_ln_eps,
        ln_weight=ln_weight,
        ln_bias=ln_bias,
        eps=eps,
        dropout_p=dropout_p,
        training=training,
        backend=backend,
        kept=kept,
    )
    folded = _folded(call)
    y, p = _by_tokens(call) if folded is None else _core(call, folded)
    if not return_attention:
        return y
    return y, p.to(y.dtype).view(*x.shape[:-1], p.shape[-1])


def explain_adapter_fusion(x: Tensor, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend a call of ``adapter_fusion`` would run on; same arguments."""
    call = check_call(x, *args, **kwargs)
    settings = call.settings
    bottleneck = sum(settings.widths)
    thin = call.x.new_empty((bottleneck + len(settings.widths), x.shape[-1]), device="meta")
    return Explanation(
        tuple(
            explain_problem(
                problem_of(
                    name,
                    call.x,
                    math.prod(call.x.shape[:-1]),
                    (thin[:bottleneck], thin, thin),
                    widths=settings.widths,
                    activation=settings.activation,
                    query=call.query is not None,
                    pre_ln=call.layernorms[0] is not None,
                    post_ln=call.layernorms[2] is not None,
                    skip=call.skip is not None,
                    dropout=settings.dropout_p > 0,
                ),
                settings.backend,
            )
            for name in ("adapter_fusion_fwd", "adapter_fusion_bwd")
        )
    )


def _kept(x: Tensor, adapters: Adapters, attention: Attention) -> Folded | None:
    """The folded matrices that the checks would find for a call without dropout, if they are kept."""
    plain = type(x) is Tensor and x.dim() > 0 and not torch.is_autocast_enabled("cpu")
    if not plain or trains(adapters, attention):
        return None
    found: Folded | None = cache.find(adapters, attention, tag_of(x, shift=False, autocast=False))
    return found


def _folded(call: Call) -> Folded | None:
    """The folded matrices, kept ones where there are; None where the call is cheaper without them."""
    if call.kept is not None:
        return call.kept
    if call.value_residual is not None:
        return None
    adapters, attention = call.adapters, call.attention
    if not torch.compiler.is_compiling():
        if trains(adapters, attention):
            cache.forget(adapters, attention)
        else:
            kept = cache.make(adapters, attention, call.tag, lambda: _fold(call))
            if kept is not None:
                return kept
    tokens = math.prod(call.x.shape[:-1])
    return _fold(call) if folds(tokens, adapters, attention) else None


def _fold(call: Call) -> Folded:
    adapters, attention = call.adapters, call.attention
    dtype = wide_dtype((*adapters.up, *adapters.up_bias, *attention))
    with _no_autocast(call.x):
        return fold(_stacked(adapters, dtype), attention, call.shift)


def _stacked(adapters: Adapters, dtype: torch.dtype) -> Stacked:
    """The stacked adapters, kept from step to step where they are frozen and the attention trains."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return stack(adapters, dtype)
    if trains(adapters, NO_ATTENTION):
        cache.forget(adapters, NO_ATTENTION)
        return stack(adapters, dtype)
    found: Stacked | None = cache.find(adapters, NO_ATTENTION, dtype)
    if found is None:
        found = cache.make(adapters, NO_ATTENTION, dtype, lambda: stack(adapters, dtype))
    return stack(adapters, dtype) if found is None else found


def _core(call: Call, folded: Folded) -> tuple[Tensor, Tensor]:
    """The operator, and what does not depend on how its matrices came about."""
    seed = new_seed(call.x.device) if call.settings.dropout_p else None
    arguments: tuple[Tensor | None, ...]
    arguments = (call.x, call.skip, call.query, *folded, *call.layernorms)
    if torch.compiler.is_compiling():
        arguments = once_each(arguments)
    y, p = AdapterFusionFunction.apply(call.settings, seed, *arguments)
    return y, p


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    device_type = x.device.type
    if not torch.amp.is_autocast_available(device_type):  # meta's
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def _by_tokens(call: Call) -> tuple[Tensor, Tensor]:
    """The tokens go through W_q and W_kᵀ on the way into the operator, and through W_v on the way out."""
    attention, settings = call.attention, call.settings
    dtype, d = call.x.dtype, call.x.shape[-1]
    w_q, b_q, w_k, b_k, w_v = (None if t is None else t.to(dtype) for t in attention)
    pre_weight, pre_bias, ln_weight, ln_bias = (
        None if t is None else t.to(dtype) for t in call.layernorms
    )
    with _no_autocast(call.x):
        v = call.x if call.into is None else call.x + call.into
        if pre_weight is not None:
            v = F.layer_norm(v, (d,), pre_weight, pre_bias, settings.pre_eps)
        u = v if call.query is None else call.query
        q = u if w_q is None else F.linear(u, w_q, b_q)
        source = q if w_k is None else q @ w_k
        down, down_bias, r = _stacked(call.adapters, wide_dtype(call.adapters.up))
        scores = r
        if call.shift:
            # one more feature: what all scores of a token have in common
            common = r.new_zeros(*v.shape[:-1], 1)
            for a, b in ((q, b_k), (source, call.value_residual)):
                if b is not None:
                    common = common + (a.to(r.dtype) * b.to(r.dtype)).sum(-1, keepdim=True)
            source = torch.cat((source, common.to(dtype)), -1)
            column = r.new_ones(len(r), 1)
            column[: sum(settings.widths)] = 0.0
            scores = torch.cat((r, column), 1)
    folded = Folded(down, down_bias, scores, None, r)
    inner = call._replace(
        x=v,
        skip=call.value_residual,
        query=source,
        layernorms=(None,) * 4,
        settings=settings._replace(
            skip_in=False, residual_x=False, residual_skip=call.value_residual is not None
        ),
    )
    y, p = _core(inner, folded)
    with _no_autocast(call.x):
        if w_v is not None:
            y = F.linear(y, w_v)
        for term in call.residuals:
            y = y + term
        if ln_weight is not None:
            y = F.layer_norm(y, (d,), ln_weight, ln_bias, settings.eps)
    return y, p
