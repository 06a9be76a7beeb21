"""AdapterFusion as a function of tensors. Arguments are checked here, once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import activation_name
from ..autograd import AdapterFusionFunction
from ..autograd.fusion import FusionSettings
from ..dispatch import Explanation, explain_problem
from ..ops.fusion import problem_of
from ..random import new_seed
from .adapter_checks import check_eps, check_layernorm, check_like, check_rows, once_each, terms
from .checks import (
    backend_name,
    check_dtype,
    check_finite,
    check_probability,
    check_tensor,
    check_vector,
    number,
    shape_of,
)
from .fusion_cache import folds as fold_cache
from .fusion_fold import Adapters, Attention, Folded, fold, folds, results, stacked_down, wide_dtype

Biases = Sequence[Tensor | None] | None


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
    call = _check(
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
    )
    folded = _folded(call)
    y, p = _by_tokens(call) if folded is None else _core(call, folded)
    if not return_attention:
        return y
    return y, p.to(y.dtype).view(*x.shape[:-1], p.shape[-1])


def explain_adapter_fusion(x: Tensor, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend a call of ``adapter_fusion`` would run on; same arguments."""
    call = _check(x, *args, **kwargs)
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


class _Call(NamedTuple):
    """The arguments of ``adapter_fusion``, checked."""

    x: Tensor
    skip: Tensor | None  # as the operator takes it: see ``terms`` of the adapter
    query: Tensor | None
    value_residual: Tensor | None
    residuals: Sequence[Tensor]
    into: Tensor | None  # what is added to x on the way in
    adapters: Adapters
    attention: Attention
    layernorms: tuple[Tensor | None, ...]  # pre_*, ln_*
    settings: FusionSettings

    shift: bool  # whether what all scores have in common matters: to dropout, and to who trains it
    tag: Any  # what a kept fold depends on besides its tensors
    kept: Folded | None  # found


def _folded(call: _Call) -> Folded | None:
    """The folded matrices, kept ones where there are; None where the call is cheaper without them."""
    if call.kept is not None:
        return call.kept
    if call.value_residual is not None:
        return None
    adapters, attention = call.adapters, call.attention
    if not torch.compiler.is_compiling():
        if _trains(adapters, attention):
            fold_cache.forget(adapters, attention)
        else:
            kept = fold_cache.make(adapters, attention, call.tag, lambda: _fold(call))
            if kept is not None:
                return kept
    tokens = math.prod(call.x.shape[:-1])
    return _fold(call) if folds(tokens, adapters, attention) else None


def _trains(adapters: Adapters, attention: Attention) -> bool:
    """Whether anything that would be folded wants a gradient."""
    if not torch.is_grad_enabled():
        return False
    groups = (*adapters, attention)
    return any(isinstance(t, Tensor) and t.requires_grad for group in groups for t in group)


def _fold(call: _Call) -> Folded:
    with _no_autocast(call.x):
        return fold(call.adapters, call.attention, call.shift)


def _core(call: _Call, folded: Folded) -> tuple[Tensor, Tensor]:
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


def _by_tokens(call: _Call) -> tuple[Tensor, Tensor]:
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
        scores = r = results(call.adapters, wide_dtype(call.adapters.up))
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
    down, down_bias = stacked_down(call.adapters)
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


def _check(
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
    scaling: Any = 1.0,
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
) -> _Call:
    """The arguments of ``adapter_fusion``."""
    attention = Attention(query_weight, query_bias, key_weight, key_bias, value_weight)
    given, others = x, (("query", query), ("value_residual", value_residual))
    x, skip, residuals, autocast = check_rows(x, residual, skip)
    d = x.shape[-1]
    for name, other in others:
        if other is not None:
            check_like(name, other, x)
            check_dtype(name, other, x, autocast, wider=False)
    # what goes into products or into what comes out of them promotes nothing
    query, value_residual = (
        t if t is None else x if t is given else t.to(x.dtype) for t in (query, value_residual)
    )

    rate = number("dropout_p", dropout_p)
    check_probability("dropout_p", rate)
    rate = rate if training else 0.0
    shift = rate > 0 or (
        torch.is_grad_enabled() and isinstance(key_bias, Tensor) and key_bias.requires_grad
    )
    tag = (shift, d, x.dtype, x.device, autocast)
    adapters = _given(down_weights, down_biases, up_weights, up_biases, scaling)
    kept = None
    keeps = value_residual is None and not torch.compiler.is_compiling()
    if keeps and adapters is not None and not _trains(adapters, attention):
        kept = fold_cache.find(adapters, attention, tag)
    if kept is None or adapters is None:
        adapters = _check_adapters(
            x, down_weights, down_biases, up_weights, up_biases, scaling, autocast
        )
        _check_attention(x, attention, autocast)
    vectors = (
        ("pre_ln_weight", pre_ln_weight),
        ("pre_ln_bias", pre_ln_bias),
        ("ln_weight", ln_weight),
        ("ln_bias", ln_bias),
    )
    for name, vector in vectors:
        if vector is not None:
            _check_vector(name, vector, x, "d", d, autocast)
    check_layernorm("pre_ln", pre_ln_weight, pre_ln_bias)
    check_layernorm("ln", ln_weight, ln_bias)
    warmth = number("temperature", temperature)
    if not 0.0 < warmth < float("inf"):
        raise ValueError(f"temperature is {warmth}; expected a positive finite number")
    if not isinstance(activation, str):
        raise TypeError(
            f"activation is a {type(activation).__name__}; expected the name of an activation"
        )
    term, skip_in, residual_x, residual_skip, whole = terms(x, skip, residuals)
    into = skip if whole is x else None  # else it is in it
    settings = FusionSettings(
        activation_name(activation),
        adapters.widths,
        warmth,
        check_eps("pre_ln_eps", pre_ln_eps),
        check_eps("eps", eps),
        rate,
        skip_in,
        residual_x,
        residual_skip,
        backend_name(backend),
    )
    return _Call(
        *(whole, term, query, value_residual, residuals, into, adapters, attention),
        (pre_ln_weight, pre_ln_bias, ln_weight, ln_bias),
        *(settings, shift, tag, kept),
    )


def _given(
    down_weights: Any, down_biases: Any, up_weights: Any, up_biases: Any, scaling: Any
) -> Adapters | None:
    """The arguments as they came, if they are sequences of one length; else checks have something to say."""
    if not isinstance(down_weights, (list, tuple)) or not down_weights:
        return None
    none = [None] * len(down_weights)
    downs = none if down_biases is None else down_biases
    ups = none if up_biases is None else up_biases
    factors = scaling if isinstance(scaling, (list, tuple)) else [scaling] * len(none)
    factors = [float(s) if type(s) in (int, float) else s for s in factors]
    found = Adapters(down_weights, downs, up_weights, ups, factors)
    alike = all(isinstance(t, (list, tuple)) and len(t) == len(none) for t in found)
    return found if alike else None


def _check_adapters(
    x: Tensor,
    down_weights: Any,
    down_biases: Any,
    up_weights: Any,
    up_biases: Any,
    scaling: Any,
    autocast: bool,
) -> Adapters:
    d = x.shape[-1]
    downs = _sequence("down_weights", down_weights, "(m_n, d)")
    if not downs:
        raise ValueError("down_weights is empty; expected at least one adapter")
    n = len(downs)
    ups = _sequence("up_weights", up_weights, "(d, m_n)", n)
    down_biases = (
        [None] * n if down_biases is None else _sequence("down_biases", down_biases, "(m_n,)", n)
    )
    up_biases = [None] * n if up_biases is None else _sequence("up_biases", up_biases, "(d,)", n)
    scalings = list(scaling) if isinstance(scaling, (list, tuple)) else [scaling] * n
    if len(scalings) != n:
        raise ValueError(
            f"scaling has {len(scalings)} entries; expected {n}, as many as down_weights"
        )
    for i, (down, down_bias, up, up_bias) in enumerate(
        zip(downs, down_biases, ups, up_biases, strict=True)
    ):
        name = f"down_weights[{i}]"
        check_tensor(name, down, x, "(m_n, d)")
        if down.dim() != 2 or down.shape[1] != d or 0 in down.shape:
            raise ValueError(
                f"{name} has shape {shape_of(down)}; expected (m_n, d) with d = {d}, x's last size, and m_n >= 1"
            )
        m = down.shape[0]
        check_tensor(f"up_weights[{i}]", up, x, "(d, m_n)")
        if tuple(up.shape) != (d, m):
            raise ValueError(
                f"up_weights[{i}] has shape {shape_of(up)}; expected (d, m_n) = ({d}, {m}), m_n from {name}"
            )
        check_dtype(name, down, x, autocast, wider=True)
        check_dtype(f"up_weights[{i}]", up, x, autocast, wider=True)
        if down_bias is not None:
            _check_vector(f"down_biases[{i}]", down_bias, x, "m_n", m, autocast)
        if up_bias is not None:
            _check_vector(f"up_biases[{i}]", up_bias, x, "d", d, autocast)
        scalings[i] = _check_scaling(
            f"scaling[{i}]" if isinstance(scaling, (list, tuple)) else "scaling",
            *(scalings[i], x, d, autocast),
        )
    return Adapters(downs, down_biases, ups, up_biases, scalings)


def _check_scaling(name: str, scaling: Any, x: Tensor, d: int, autocast: bool) -> float | Tensor:
    if not isinstance(scaling, Tensor):
        factor = number(name, scaling, "a number or a torch.Tensor of one element or of d")
        check_finite(name, factor)
        return factor
    check_tensor(name, scaling, x, "(1,) or (d,)")
    check_dtype(name, scaling, x, autocast, wider=True)
    if scaling.dim() > 1 or scaling.numel() not in (1, d):
        raise ValueError(
            f"{name} has shape {shape_of(scaling)}; expected (), (1,) or (d,) = ({d},)"
        )
    return scaling


def _check_attention(x: Tensor, attention: Attention, autocast: bool) -> None:
    d = x.shape[-1]
    query_weight, query_bias, key_weight, key_bias, value_weight = attention
    for name, weight, bias in (
        ("query", query_weight, query_bias),
        ("key", key_weight, key_bias),
        ("value", value_weight, None),
    ):
        if weight is not None:
            check_tensor(f"{name}_weight", weight, x, "(d, d)")
            if tuple(weight.shape) != (d, d):
                raise ValueError(
                    f"{name}_weight has shape {shape_of(weight)}; expected (d, d) = ({d}, {d})"
                )
            check_dtype(f"{name}_weight", weight, x, autocast, wider=True)
        if bias is not None:
            if weight is None:
                raise ValueError(
                    f"{name}_bias is given without {name}_weight; expected both, the weight alone, or neither"
                )
            _check_vector(f"{name}_bias", bias, x, "d", d, autocast)


def _check_vector(
    name: str, vector: Any, x: Tensor, symbol: str, size: int, autocast: bool
) -> None:
    check_tensor(name, vector, x, f"({symbol},)")
    check_vector(name, vector, symbol, size)
    check_dtype(name, vector, x, autocast, wider=True)


def _sequence(name: str, value: Any, shape: str, count: int | None = None) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(
            f"{name} is a {type(value).__name__}; expected a list or tuple of torch.Tensor {shape}"
        )
    if count is not None and len(value) != count:
        raise ValueError(
            f"{name} has {len(value)} entries; expected {count}, as many as down_weights"
        )
    return list(value)
