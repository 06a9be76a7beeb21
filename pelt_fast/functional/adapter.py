"""The bottleneck adapter as a function of tensors. Arguments are checked here, once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import canonical
from ..autograd import BottleneckAdapterFunction
from ..autograd.adapter import Settings
from ..dispatch import ORDINARY, Explanation, explain_problem
from ..ops.adapter import problem_of
from ..random import keep_scale, new_seed, philox_mask
from .adapter_checks import Activation, check_around, check_rows, check_vectors, once_each
from .checks import check_dtype, check_tensor, shape_of
from .ordinary import short_way


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
    extension = short_way(backend)
    if extension is not None and (name := canonical(activation)) is not None:
        found = extension.ordinary_adapter(
            *(x, down_weight, down_bias, up_weight, up_bias, name, scaling, gate, residual, skip),
            *(pre_ln_weight, pre_ln_bias, pre_ln_eps, ln_weight, ln_bias, eps, dropout_p, training),
        )
        if type(found) is Tensor:
            return found
        if found is not None:
            numbers, second, scale, gates = found
            settings = Settings._make((name, *numbers, ORDINARY))
            return BottleneckAdapterFunction.apply(
                settings,
                new_seed(x.device) if settings.dropout_p else None,
                *(x, second, down_weight, down_bias, up_weight, up_bias, scale, gates),
                *(pre_ln_weight, pre_ln_bias, ln_weight, ln_bias),
            )
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
        arguments = once_each(arguments)
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
    rows = check_rows(x, residual, skip)
    x, d, autocast = rows.x, rows.x.shape[-1], rows.autocast
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
    check_vectors(rows, m, down_bias, up_bias, pre_ln_weight, pre_ln_bias, ln_weight, ln_bias)
    around = check_around(
        *(rows, activation, scaling, gate, pre_ln_eps, eps, dropout_p, training, backend),
        "bottleneck_adapter",
    )
    parameters = (down_weight, down_bias, up_weight, up_bias, around.scale, around.gate)
    layernorms = (pre_ln_weight, pre_ln_bias, ln_weight, ln_bias)
    return _Call(
        around.x, around.skip, (*parameters, *layernorms), around.settings, around.function
    )


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
