"""Batched bottleneck adapters as a function of tensors: every token its own. Arguments are checked here, once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import canonical
from ..autograd import MultiBottleneckFunction
from ..autograd.multi_bottleneck import MultiBottleneckSettings
from ..dispatch import Explanation, explain_problem
from ..ops.multi_bottleneck import problem_of
from ..random import keep_scale, new_seed, philox_mask
from ..segments import MultiAdapterPlan
from .adapter_checks import (
    Activation,
    check_activation,
    check_composed,
    check_eps,
    check_gate,
    check_layernorm,
    check_rows,
    once_each,
    terms,
)
from .checks import (
    backend_name,
    check_dtype,
    check_finite,
    check_plan,
    check_probability,
    check_tensor,
    check_there,
    check_vector,
    number,
    served,
    shape_of,
)
from .ordinary import short_way

_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def multi_bottleneck(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    plan: MultiAdapterPlan,
    *,
    activation: Activation = "relu",
    scaling: float | Tensor = 1.0,
    widths: Tensor | Sequence[int] | None = None,
    gate: Tensor | None = None,
    residual: Tensor | Sequence[Tensor] | None = None,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Bottleneck adapters of which every token names its own: ``bottleneck_adapter`` row by row, g the plan's.

    ``u_t = gate_t · drop(scaling_g · (act(x_t D_gᵀ + b_D) U_gᵀ + b_U))``; ``y_t = LN(u_t + Σ residual_t)``. A token
    without an adapter, and one whose adapter has width 0, has u = 0. With ``multi_lora`` and the same plan a batch
    holds rows with a LoRA (rank > 0), with an adapter (width > 0), with both, and base rows.

    An adapter's gradients are bitwise those of a batch that holds its tokens alone, and adapters without a token get
    zeros (``plan.active`` names them).

    Args:
        x: (..., d); float32, bfloat16, float16 or float64, as in ``bottleneck_adapter``.
        down_weight: (L, M, d), L adapters of width at most M; x's dtype, or float32 over a half, as all below.
        down_bias: (L, M) or None.
        up_weight: (L, d, M).
        up_bias: (L, d) or None.
        plan: of as many tokens as x has rows, in x's row order, on x's device.
        activation: as in ``bottleneck_adapter``, one for all adapters.
        scaling: a finite number, or (L,), a factor of each adapter; it may require a gradient.
        widths: (L,) integers, the width of each adapter, 0 to M (in a tensor others are clamped). Beyond it D, b_D and
            U are not used, whatever they hold, and their gradients are zeros. None: M.
        gate: a factor for each token, broadcastable to (..., 1).
        residual: x's shape, or a sequence of such, added to u.
        ln_weight: (d,); a layernorm of the result where it is given, of every row.
        ln_bias: (d,) or None.
        eps: added to the variance.
        dropout_p: probability in [0, 1] that an element of the scaled u is dropped. The mask of a token depends on
            its row, not on its neighbours' adapters.
        training: dropout acts only when True.
        backend: as in ``bottleneck_adapter``.

    Returns:
        y of x's shape, in the dtype that was computed in.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value.
        BackendUnavailable: the named backend cannot run this call.
        RuntimeError: in a backward of the backward, which has no formula here.
    """
    extension = short_way(backend)
    name = None if extension is None else canonical(activation)
    if name is not None and type(plan) is MultiAdapterPlan:
        found = extension.ordinary_multi_bottleneck(
            *(x, down_weight, down_bias, up_weight, up_bias, plan._arrays, plan.tokens),
            *(plan.num_adapters, name, scaling, widths, gate, residual, ln_weight, ln_bias),
            *(eps, dropout_p, training),
        )
        if type(found) is Tensor:
            return found
    call = _check(
        *(x, down_weight, down_bias, up_weight, up_bias, plan, activation, scaling, widths, gate),
        *(residual, ln_weight, ln_bias, eps, dropout_p, training, backend),
    )
    seed = new_seed(call.x.device) if call.settings.dropout_p else None
    if call.function is not None:
        return _compose(call, call.function, plan, seed)
    operands = (call.x, call.residual, *call.parameters)
    if torch.compiler.is_compiling():
        operands = once_each(operands)
    return MultiBottleneckFunction.apply(call.settings, seed, *operands, call.widths, *plan.arrays)


def explain_multi_bottleneck(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    plan: MultiAdapterPlan,
    *,
    activation: Activation = "relu",
    scaling: float | Tensor = 1.0,
    widths: Tensor | Sequence[int] | None = None,
    gate: Tensor | None = None,
    residual: Tensor | Sequence[Tensor] | None = None,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str | None = None,
) -> Explanation:
    """Which backend a call of ``multi_bottleneck`` would run on; same arguments."""
    call = _check(
        *(x, down_weight, down_bias, up_weight, up_bias, plan, activation, scaling, widths, gate),
        *(residual, ln_weight, ln_bias, eps, dropout_p, training, backend),
    )
    down, _, up, *_ = call.parameters
    return Explanation(
        tuple(
            explain_problem(
                problem_of(
                    *(name, call.x, plan.tokens, down, up),
                    activation=call.settings.activation,
                    post_ln=ln_weight is not None,
                    residual=call.residual is not None,
                    gate=gate is not None,
                    dropout=call.settings.dropout_p > 0,
                ),
                call.settings.backend,
            )
            for name in ("multi_bottleneck_fwd", "multi_bottleneck_bwd")
        )
    )


class _Call(NamedTuple):
    """The arguments of ``multi_bottleneck``, checked, as the operator takes them."""

    x: Tensor
    residual: Tensor | None  # but x
    parameters: tuple[Any, ...]  # down, down_bias, up, up_bias, scale, gate, ln_weight, ln_bias
    widths: Tensor
    settings: MultiBottleneckSettings
    function: Callable[[Tensor], Tensor] | None  # an activation that no kernel has


def _check(
    x: Tensor,
    down_weight: Any,
    down_bias: Any,
    up_weight: Any,
    up_bias: Any,
    plan: Any,
    activation: Activation,
    scaling: Any,
    widths: Any,
    gate: Any,
    residual: Any,
    ln_weight: Any,
    ln_bias: Any,
    eps: float,
    dropout_p: float,
    training: bool,
    backend: str | None,
) -> _Call:
    rows = check_rows(x, residual, None)
    x, d, autocast = rows.x, rows.x.shape[-1], rows.autocast
    adapters, most = _check_weights(x, down_weight, down_bias, up_weight, up_bias, autocast)
    check_plan(plan, x, adapters)
    sizes = _widths(widths, x, adapters, most)
    factor, scale = _scaling(scaling, x, adapters, autocast)
    for name, vector in (("ln_weight", ln_weight), ("ln_bias", ln_bias)):
        if vector is not None:
            check_tensor(name, vector, x, "(d,)")
            check_vector(name, vector, "d", d)
            check_dtype(name, vector, x, autocast, wider=True)
    check_layernorm("ln", ln_weight, ln_bias)
    gates = None if gate is None else check_gate(gate, x, autocast)
    name, function = check_activation(activation)
    rate = number("dropout_p", dropout_p)
    check_probability("dropout_p", rate)
    chosen = backend_name(backend)
    if function is not None:
        check_composed("multi_bottleneck", chosen)
    other, _, residual_x, _, x = terms(x, None, rows.residuals)
    settings = MultiBottleneckSettings(
        *(name, factor, check_eps("eps", eps), rate if training else 0.0, residual_x, chosen)
    )
    parameters: tuple[Any, ...] = (down_weight, down_bias, up_weight, up_bias, scale, gates)
    parameters += (ln_weight, ln_bias)
    if autocast:
        parameters = tuple(None if p is None else served(p, x) for p in parameters)
    return _Call(x, other, parameters, sizes, settings, function)


def _check_weights(
    x: Tensor, down: Any, down_bias: Any, up: Any, up_bias: Any, autocast: bool
) -> tuple[int, int]:
    """L and M."""
    d = x.shape[-1]
    check_tensor("down_weight", down, x, "(L, M, d)")
    if down.dim() != 3 or down.shape[2] != d or 0 in down.shape:
        raise ValueError(
            f"down_weight has shape {shape_of(down)}; expected (L, M, d) with d = {d}, x's last size, L and M >= 1"
        )
    adapters, most = down.shape[:2]
    check_dtype("down_weight", down, x, autocast, wider=True)
    for name, value, symbols, shape in (
        ("up_weight", up, "(L, d, M)", (adapters, d, most)),
        ("down_bias", down_bias, "(L, M)", (adapters, most)),
        ("up_bias", up_bias, "(L, d)", (adapters, d)),
    ):
        if value is None and name != "up_weight":
            continue
        check_tensor(name, value, x, symbols)
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{name} has shape {shape_of(value)}; expected {symbols} = {tuple(shape)}"
            )
        check_dtype(name, value, x, autocast, wider=True)
    return adapters, most


def _widths(widths: Any, x: Tensor, adapters: int, most: int) -> Tensor:
    """(L,) int32 on x's device."""
    if widths is None:
        return torch.full((adapters,), most, dtype=torch.int32, device=x.device)
    if not isinstance(widths, Tensor):
        if not isinstance(widths, (list, tuple)) or not all(
            isinstance(w, int) and not isinstance(w, bool) for w in widths
        ):
            raise TypeError(f"widths is {widths!r}; expected (L,) integers")
        if len(widths) != adapters:
            raise ValueError(f"widths has {len(widths)} entries; expected (L,) = ({adapters},)")
        for w in widths:
            if not 0 <= w <= most:
                raise ValueError(f"widths has {w}; expected 0 to {most}, down_weight's")
        return torch.tensor(widths, dtype=torch.int32, device=x.device)
    check_tensor("widths", widths, x, "(L,)")
    if widths.dtype not in _INTEGERS:
        raise TypeError(f"widths has dtype {widths.dtype}; expected integers")
    if widths.shape != (adapters,):
        raise ValueError(f"widths has shape {shape_of(widths)}; expected (L,) = ({adapters},)")
    if widths.dtype == torch.int32:  # clamped where it is used
        return widths
    check_there("widths", widths)
    return widths.long().clamp(0, most).to(torch.int32)


def _scaling(scaling: Any, x: Tensor, adapters: int, autocast: bool) -> tuple[float, Tensor | None]:
    """The factor, and the tensor (L,) of one that is each adapter's."""
    if not isinstance(scaling, Tensor):
        factor = number("scaling", scaling, "a number or a torch.Tensor of shape (L,)")
        check_finite("scaling", factor)
        return factor, None
    check_tensor("scaling", scaling, x, "(L,)")
    check_dtype("scaling", scaling, x, autocast, wider=True)
    if scaling.shape != (adapters,):
        raise ValueError(f"scaling has shape {shape_of(scaling)}; expected (L,) = ({adapters},)")
    return 1.0, scaling


def _compose(
    call: _Call, function: Callable[[Tensor], Tensor], plan: MultiAdapterPlan, seed: Tensor | None
) -> Tensor:
    """The call out of PyTorch's own operators, adapter by adapter, for an activation that only PyTorch has."""
    dtype, d, s = call.x.dtype, call.x.shape[-1], call.settings
    x = call.x.reshape(-1, d)
    down, down_bias, up, up_bias, scale, gate, ln_weight, ln_bias = (
        None if p is None else p.to(dtype) for p in call.parameters
    )
    assert down is not None
    assert up is not None
    _, perm, indptr, *_ = plan.arrays
    order, bounds = perm[: plan.tokens].long(), indptr.tolist()
    widths = [*call.widths.clamp(0, down.shape[1]).tolist(), 0]
    with torch.autocast(x.device.type, enabled=False):
        runs = x[order].split([end - start for start, end in itertools.pairwise(bounds)])
        parts = []
        for g, (run, m) in enumerate(zip(runs, widths, strict=True)):
            if m == 0 or len(run) == 0:
                parts.append(torch.zeros_like(run))
                continue
            q = F.linear(run, down[g, :m], None if down_bias is None else down_bias[g, :m])
            u = F.linear(function(q), up[g, :, :m], None if up_bias is None else up_bias[g])
            u = u * s.scaling if scale is None else u * scale[g]
            where = order[bounds[g] : bounds[g + 1]]
            if seed is not None:
                keep = philox_mask(seed, (plan.tokens, d), s.dropout_p)[where]
                u = torch.where(keep, u, 0.0) * keep_scale(s.dropout_p)
            parts.append(u if gate is None else u * gate[where, None])
        y = torch.cat(parts)[torch.argsort(order)].view(call.x.shape)
        if s.residual_x:
            y = y + call.x
        if call.residual is not None:
            y = y + call.residual
        return y if ln_weight is None else F.layer_norm(y, (d,), ln_weight, ln_bias, s.eps)
