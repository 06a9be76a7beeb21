"""The bottleneck adapter as a function of tensors. Arguments are checked here, once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import activation_name
from ..autograd import BottleneckAdapterFunction
from ..autograd.adapter import Settings
from ..dispatch import BackendUnavailable, Explanation, explain_problem
from ..ops.adapter import problem_of
from ..random import keep_scale, new_seed, philox_mask
from .checks import (
    autocast_dtype,
    backend_name,
    check_dtype,
    check_finite,
    check_input,
    check_input_dtype,
    check_probability,
    check_tensor,
    check_vector,
    number,
    shape_of,
    tensors,
)

Activation = str | Callable[[Tensor], Tensor]
_COMPOSED = "callable"  # the activation of a problem whose activation no kernel can have


def bottleneck_adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    activation: Activation = "relu",
    scaling: float | Tensor = 1.0,
    gate: Tensor | None = None,
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
    backend: str | None = None,
) -> Tensor:
    r"""A bottleneck adapter with the layernorms and residuals around it, in one operation.

    ``v = LN_pre(x + skip)``; ``u = gate · drop(scaling · (act(v Dᵀ + b_D) Uᵀ + b_U))``; ``y = LN(u + Σ residual)``;
    what is not given is left out. Semantics of ``adapters.methods.modeling.Adapter`` and the sub-layer around it:

    - Pfeiffer: ``bottleneck_adapter(o, ..., skip=x, residual=(o, x), pre_ln_weight=g, ..., ln_weight=g, ...)``
    - Houlsby: ``bottleneck_adapter(o, ..., residual=(o, x), ln_weight=g, ...)``
    - parallel (MAM): ``bottleneck_adapter(x, ..., residual=(x, o), ln_weight=g, ...)``

    A residual that is the very tensor ``x`` or ``skip`` is read once, and its gradient is made in the same pass.
    Products and statistics accumulate in fp32 (fp64 for fp64); gradients return in the parameters' own dtypes.

    Args:
        x: (..., d), one to many dimensions, any strides; float32, bfloat16, float16 or float64: the dtype that is
            computed in. Under ``torch.autocast`` the computation is in the autocast dtype, or in the wider one of the
            tensors that are added to each other.
        down_weight: (m, d); x's dtype, or float32 over a bfloat16 or float16 x, as every parameter below.
        down_bias: (m,) or None.
        up_weight: (d, m).
        up_bias: (d,) or None.
        activation: a name in ``functional.ACTIVATIONS`` or an alias of transformers' for it, in any case; or a
            callable, elementwise and differentiable, with which PyTorch composes the call step by step.
        scaling: a finite number; or a tensor of one element, or of d: a factor for each feature.
        gate: broadcastable to (..., 1): a factor for each token, or for each sample as (B, 1, 1).
        residual: a tensor of x's shape and dtype, or a sequence of them, added to u.
        skip: x's shape and dtype; added to x on the way into the adapter.
        pre_ln_weight: (d,); a layernorm goes before the adapter where it is given.
        pre_ln_bias: (d,) or None.
        pre_ln_eps: added to the variance; not negative.
        ln_weight: (d,); a layernorm of the result where it is given.
        ln_bias: (d,) or None.
        eps: added to the variance; not negative.
        dropout_p: probability in [0, 1] that an element of the scaled u is dropped.
        training: dropout acts only when True.
        backend: "auto", "torch", "cpp", "triton", "cuda" or "reference"; None: what ``use_backend`` or
            ``PELT_FAST_BACKEND`` says. Naming one that cannot run raises ``BackendUnavailable`` with its reasons.

    Returns:
        y of x's shape, in the dtype that was computed in.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value.
        BackendUnavailable: the named backend cannot run this call.
        RuntimeError: in a backward of the backward, which has no formula here.
    """
    call = _check(
        *(x, down_weight, down_bias, up_weight, up_bias, activation, scaling, gate, residual),
        *(skip, pre_ln_weight, pre_ln_bias, pre_ln_eps, ln_weight, ln_bias, eps, dropout_p),
        *(training, backend),
    )
    seed = new_seed(call.x.device) if call.settings.dropout_p else None
    if call.function is not None:
        return _compose(call, call.function, seed)
    arguments = (call.x, call.skip, *call.parameters)
    if torch.compiler.is_compiling():
        arguments = _once_each(arguments)
    return BottleneckAdapterFunction.apply(call.settings, seed, *arguments)


def explain_bottleneck_adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    activation: Activation = "relu",
    scaling: float | Tensor = 1.0,
    gate: Tensor | None = None,
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
    backend: str | None = None,
) -> Explanation:
    """Which backend a call of ``bottleneck_adapter`` would run on; same arguments."""
    call = _check(
        *(x, down_weight, down_bias, up_weight, up_bias, activation, scaling, gate, residual),
        *(skip, pre_ln_weight, pre_ln_bias, pre_ln_eps, ln_weight, ln_bias, eps, dropout_p),
        *(training, backend),
    )
    down, _, up, *_ = call.parameters
    return Explanation(
        tuple(
            explain_problem(
                problem_of(
                    name,
                    call.x,
                    math.prod(call.x.shape[:-1]),
                    (down, up),
                    activation=call.settings.activation,
                    pre_ln=pre_ln_weight is not None,
                    post_ln=ln_weight is not None,
                    skip=call.skip is not None,
                    gate=gate is not None,
                    dropout=call.settings.dropout_p > 0,
                ),
                call.settings.backend,
            )
            for name in ("bottleneck_adapter_fwd", "bottleneck_adapter_bwd")
        )
    )


def _once_each(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Repeats as views: Dynamo takes no Function that gets a tensor twice, as Pfeiffer's gets its layernorm."""
    return tuple(
        t.view_as(t) if t is not None and any(t is u for u in tensors[:i]) else t
        for i, t in enumerate(tensors)
    )


class _Call(NamedTuple):
    """The arguments of ``bottleneck_adapter``, checked, as the operator takes them."""

    x: Tensor
    skip: Tensor | None
    parameters: tuple[Any, ...]  # down, down_bias, up, up_bias, scale, gate, pre_*, ln_*
    settings: Settings
    function: Callable[[Tensor], Tensor] | None  # an activation that no kernel has


def _check(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    activation: Activation,
    scaling: float | Tensor,
    gate: Tensor | None,
    residual: Tensor | Sequence[Tensor] | None,
    skip: Tensor | None,
    pre_ln_weight: Tensor | None,
    pre_ln_bias: Tensor | None,
    pre_ln_eps: float,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    dropout_p: float,
    training: bool,
    backend: str | None,
) -> _Call:
    check_input(x, "d")
    d = x.shape[-1]
    residuals = () if residual is None else tensors("residual", residual)
    for i, value in enumerate(residuals):
        _check_like("residual" if len(residuals) == 1 else f"residual[{i}]", value, x)
    if skip is not None:
        _check_like("skip", skip, x)
    x, skip, residuals, autocast = _in_one_dtype(x, skip, residuals)

    check_tensor("down_weight", down_weight, x, "(m, d)")
    if down_weight.dim() != 2 or down_weight.shape[1] != d or 0 in down_weight.shape:
        raise ValueError(
            f"down_weight has shape {shape_of(down_weight)}; expected (m, d) with d = {d}, x's last size, and m >= 1"
        )
    m = down_weight.shape[0]
    check_tensor("up_weight", up_weight, x, "(d, m)")
    if up_weight.dim() != 2 or up_weight.shape[0] != d or up_weight.shape[1] != m:
        raise ValueError(
            f"up_weight has shape {shape_of(up_weight)}; expected (d, m) = ({d}, {m}), m from down_weight"
        )
    check_dtype("down_weight", down_weight, x, autocast, wider=True)
    check_dtype("up_weight", up_weight, x, autocast, wider=True)
    vectors = (
        ("down_bias", down_bias, "m", m),
        ("up_bias", up_bias, "d", d),
        ("pre_ln_weight", pre_ln_weight, "d", d),
        ("pre_ln_bias", pre_ln_bias, "d", d),
        ("ln_weight", ln_weight, "d", d),
        ("ln_bias", ln_bias, "d", d),
    )
    for name, vector, symbol, size in vectors:
        if vector is not None:
            check_tensor(name, vector, x, f"({symbol},)")
            check_vector(name, vector, symbol, size)
            check_dtype(name, vector, x, autocast, wider=True)
    _check_layernorm("pre_ln", pre_ln_weight, pre_ln_bias)
    _check_layernorm("ln", ln_weight, ln_bias)

    factor, scale = _scaling(scaling, x, d, autocast)
    rate = number("dropout_p", dropout_p)
    check_probability("dropout_p", rate)
    name, function = check_activation(activation)
    chosen = backend_name(backend)
    if function is not None and chosen not in ("", "auto", "torch"):
        raise BackendUnavailable(
            f"backend {chosen!r} cannot run bottleneck_adapter with a callable as activation; expected the name of "
            "an activation, or backend 'torch', which composes the call of PyTorch's own operators"
        )
    skip, skip_in, residual_x, residual_skip, x = _terms(x, skip, residuals)
    settings = Settings(
        name,
        factor,
        check_eps("pre_ln_eps", pre_ln_eps),
        check_eps("eps", eps),
        rate if training else 0.0,
        skip_in,
        residual_x,
        residual_skip,
        chosen,
    )
    gates = None if gate is None else _gate(gate, x, autocast)
    parameters = (down_weight, down_bias, up_weight, up_bias, scale, gates)
    layernorms = (pre_ln_weight, pre_ln_bias, ln_weight, ln_bias)
    return _Call(x, skip, (*parameters, *layernorms), settings, function)


def _check_like(name: str, value: Any, x: Tensor) -> None:
    check_tensor(name, value, x, "x's")
    if value.shape != x.shape:
        raise ValueError(f"{name} has shape {shape_of(value)}; expected {shape_of(x)}, x's shape")


def _in_one_dtype(
    x: Tensor, skip: Tensor | None, residuals: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None, Sequence[Tensor], bool]:
    """The tensors of size T × d in the dtype that is computed in, and whether autocast chose it.

    Under autocast what is added keeps its precision, as it does in PyTorch: there a bf16 product plus an fp32 residual
    is fp32.
    """
    dtype = autocast_dtype(x)
    autocast = dtype is not None
    if not autocast:
        check_input_dtype(x)
    for i, value in enumerate(residuals):
        name = "residual" if len(residuals) == 1 else f"residual[{i}]"
        check_dtype(name, value, x, autocast, wider=False)
    if skip is not None:
        check_dtype("skip", skip, x, autocast, wider=False)
    if dtype is None:
        return x, skip, residuals, False
    added = [*residuals] if skip is None else [*residuals, skip, x]
    for value in added:
        dtype = torch.promote_types(dtype, value.dtype)
    cast = {id(value): value.to(dtype) for value in (x, *added)}  # identities are kept
    return (
        cast[id(x)],
        None if skip is None else cast[id(skip)],
        [cast[id(r)] for r in residuals],
        True,
    )


def _check_layernorm(name: str, weight: Tensor | None, bias: Tensor | None) -> None:
    if weight is None and bias is not None:
        raise ValueError(
            f"{name}_bias is given without {name}_weight; expected both, the weight alone, or neither"
        )


def _scaling(
    scaling: float | Tensor, x: Tensor, d: int, autocast: bool
) -> tuple[float, Tensor | None]:
    """The factor, and the tensor (1,) or (d,) of one that is learned."""
    if not isinstance(scaling, Tensor):
        factor = number("scaling", scaling, "a number or a torch.Tensor of one element or of d")
        check_finite("scaling", factor)
        return factor, None
    check_tensor("scaling", scaling, x, "(1,) or (d,)")
    check_dtype("scaling", scaling, x, autocast, wider=True)
    if scaling.dim() > 1 or scaling.numel() not in (1, d):
        raise ValueError(
            f"scaling has shape {shape_of(scaling)}; expected (), (1,) or (d,) = ({d},)"
        )
    return 1.0, scaling.reshape(-1)


def check_eps(name: str, value: float) -> float:
    """``value`` as a float, finite and not negative."""
    eps = number(name, value)
    if not 0.0 <= eps < float("inf"):
        raise ValueError(f"{name} is {eps}; expected a finite number that is not negative")
    return eps


def check_activation(activation: Activation) -> tuple[str, Callable[[Tensor], Tensor] | None]:
    """The name of the activation; a function too where it is one that no kernel has."""
    if isinstance(activation, str):
        return activation_name(activation), None
    if callable(activation):
        return _COMPOSED, activation
    raise TypeError(
        f"activation is a {type(activation).__name__}; expected the name of an activation or a callable"
    )


def _gate(gate: Tensor, x: Tensor, autocast: bool) -> Tensor:
    """(..., 1), broadcastable, to (T,)."""
    check_tensor("gate", gate, x, "(..., 1)")
    check_dtype("gate", gate, x, autocast, wider=True)
    shape = (*x.shape[:-1], 1)
    fits = gate.dim() <= len(shape) and all(
        size in (1, wanted)
        for size, wanted in zip(reversed(gate.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"gate has shape {shape_of(gate)}; expected one that broadcasts to {tuple(shape)}: a factor for each "
            "token, or for each sample"
        )
    return gate.expand(shape).reshape(-1)


def _terms(
    x: Tensor, skip: Tensor | None, residuals: Sequence[Tensor]
) -> tuple[Tensor | None, bool, bool, bool, Tensor]:
    """skip, skip_in, residual_x, residual_skip, x of the operator: two tensors and where each is added.

    What does not fit (a tensor twice among the residuals, a third tensor) is summed first.
    """
    residual_x = any(r is x for r in residuals)
    others = [r for r in residuals if r is not x]
    if sum(1 for r in residuals if r is x) > 1:
        residual_x, others = False, list(residuals)
    if skip is not None:
        if all(r is skip for r in others) and len(others) <= 1:
            return skip, True, residual_x, len(others) == 1, x
        others = list(residuals)
        x, residual_x = x + skip, False
    if not others:
        return None, False, residual_x, False, x
    total = others[0]
    for other in others[1:]:
        total = total + other
    return total, False, residual_x, True, x


def _compose(call: _Call, function: Callable[[Tensor], Tensor], seed: Tensor | None) -> Tensor:
    """The call out of PyTorch's own operators, for an activation that only PyTorch has."""
    x, skip, s = call.x, call.skip, call.settings
    dtype, d = x.dtype, x.shape[-1]
    down, down_bias, up, up_bias, scale, gate, pre_weight, pre_bias, ln_weight, ln_bias = (
        None if p is None else p.to(dtype) for p in call.parameters
    )
    assert down is not None
    assert up is not None
    with torch.autocast(x.device.type, enabled=False):
        v = x + skip if s.skip_in and skip is not None else x
        if pre_weight is not None:
            v = F.layer_norm(v, (d,), pre_weight, pre_bias, s.pre_eps)
        y = F.linear(function(F.linear(v, down, down_bias)), up, up_bias) * s.scaling
        if scale is not None:
            y = y * scale
        if seed is not None:
            rows = y.numel() // d
            keep = philox_mask(seed, (rows, d), s.dropout_p).view(y.shape)
            y = torch.where(keep, y, 0.0) * keep_scale(s.dropout_p)
        if gate is not None:
            y = y * gate.view(*x.shape[:-1], 1)
        if s.residual_x:
            y = y + x
        if s.residual_skip and skip is not None:
            y = y + skip
        return y if ln_weight is None else F.layer_norm(y, (d,), ln_weight, ln_bias, s.eps)
