"""Batched bottleneck adapters: every token its own. Rows are sorted by adapter once, and each adapter's run as one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..segments import MultiAdapterPlan
from .adapter import bottleneck_adapter
from .adapter_checks import Activation, check_activation, check_eps
from .checks import (
    autocast_dtype,
    backend_name,
    check_dtype,
    check_finite,
    check_input,
    check_input_dtype,
    check_plan,
    check_probability,
    check_tensor,
    check_vector,
    number,
    shape_of,
    tensors,
)


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

    Rows are sorted by adapter, go through ``bottleneck_adapter`` adapter by adapter, and are put back. The lengths of
    the runs are read on the host: on a GPU the call waits for the plan, and cannot be captured in a CUDA graph.

    Args:
        x: (..., d); float32, bfloat16, float16 or float64, as in ``bottleneck_adapter``.
        down_weight: (L, M, d), L adapters of width at most M; x's dtype, or float32 over a half, as all below.
        down_bias: (L, M) or None.
        up_weight: (L, d, M).
        up_bias: (L, d) or None.
        plan: of as many tokens as x has rows, in x's row order, on x's device.
        activation: as in ``bottleneck_adapter``, one for all adapters.
        scaling: a finite number, or (L,), a factor of each adapter; it may require a gradient.
        widths: (L,) integers, 0 to M: the width of each adapter. Beyond it D, b_D and U are not used, whatever they
            hold, and their gradients are zeros. None: M.
        gate: a factor for each token, broadcastable to (..., 1).
        residual: x's shape, or a sequence of such, added to u.
        ln_weight: (d,); a layernorm of the result where it is given, of every row.
        ln_bias: (d,) or None.
        eps: added to the variance.
        dropout_p: probability in [0, 1] that an element of the scaled u is dropped. Each adapter
            that has tokens draws a mask of its own, keyed on a token's place among them.
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
    check_input(x, "d")
    autocast = autocast_dtype(x) is not None
    if not autocast:
        check_input_dtype(x)
    d = x.shape[-1]
    adapters, most = _check_weights(x, down_weight, down_bias, up_weight, up_bias, autocast)
    check_plan(plan, x, adapters)
    each = _widths(widths, adapters, most)
    factors = _scaling(scaling, x, adapters, autocast)
    terms = [] if residual is None else list(tensors("residual", residual))
    for i, term in enumerate(terms):
        name = "residual" if len(terms) == 1 else f"residual[{i}]"
        check_tensor(name, term, x, "x's")
        if term.shape != x.shape:
            raise ValueError(
                f"{name} has shape {shape_of(term)}; expected {shape_of(x)}, x's shape"
            )
        check_dtype(name, term, x, autocast, wider=False)
    for name, vector in (("ln_weight", ln_weight), ("ln_bias", ln_bias)):
        if vector is not None:
            check_tensor(name, vector, x, "(d,)")
            check_vector(name, vector, "d", d)
            check_dtype(name, vector, x, autocast, wider=True)
    if ln_weight is None and ln_bias is not None:
        raise ValueError(
            "ln_bias is given without ln_weight; expected both, the weight alone, or neither"
        )
    gates = None if gate is None else _gate(gate, x, autocast)
    # bottleneck_adapter checks these too, but no token may have an adapter
    check_activation(activation)
    check_eps("eps", eps)
    check_probability("dropout_p", number("dropout_p", dropout_p))
    backend_name(backend)

    tokens = plan.tokens
    _, perm, indptr, *_ = plan.arrays
    order = perm[:tokens].long()
    bounds = indptr.tolist()
    sizes = [end - start for start, end in itertools.pairwise(bounds)]
    in_order = x.reshape(tokens, d)[order]
    # a term that is x itself stays x, so that it is read once
    terms_in_order = [in_order if t is x else t.reshape(tokens, d)[order] for t in terms]
    x_runs = in_order.split(sizes)
    term_runs = [x_runs if t is in_order else t.split(sizes) for t in terms_in_order]
    gate_runs = None if gates is None else gates[order].split(sizes)
    stacks = [
        None if t is None else t.unbind() for t in (down_weight, down_bias, up_weight, up_bias)
    ]
    down, down_biases, up, up_biases = stacks
    assert down is not None
    assert up is not None

    found = []
    for g, size in enumerate(sizes):
        if size == 0:
            continue
        run_terms = [runs[g] for runs in term_runs]
        width = each[g] if g < adapters else 0
        if width == 0:
            found.append(_without(x_runs[g], run_terms, ln_weight, ln_bias, eps))
            continue
        found.append(
            bottleneck_adapter(
                x_runs[g],
                down[g][:width],
                None if down_biases is None else down_biases[g][:width],
                up[g][
                    :, :width
                ].contiguous(),  # changes of all its bytes are noticed, as of other parameters
                None if up_biases is None else up_biases[g],
                activation=activation,
                scaling=factors if isinstance(factors, float) else factors[g],
                gate=None if gate_runs is None else gate_runs[g],
                residual=run_terms or None,
                ln_weight=ln_weight,
                ln_bias=ln_bias,
                eps=eps,
                dropout_p=dropout_p,
                training=training,
                backend=backend,
            )
        )
    if not found:
        return _without(x.reshape(tokens, d), terms, ln_weight, ln_bias, eps).view(x.shape)
    dtype = found[0].dtype
    for t in found[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    with torch.autocast(x.device.type, enabled=False):
        y = torch.cat([t.to(dtype) for t in found])
    back = torch.empty_like(order).scatter_(0, order, torch.arange(tokens, device=order.device))
    return y[back].view(x.shape)


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
    check_tensor("up_weight", up, x, "(L, d, M)")
    wanted = {
        "up_weight": (up, (adapters, d, most)),
        "down_bias": (down_bias, (adapters, most)),
        "up_bias": (up_bias, (adapters, d)),
    }
    check_dtype("down_weight", down, x, autocast, wider=True)
    for name, (value, shape) in wanted.items():
        if value is not None:
            check_tensor(name, value, x, str(shape))
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} has shape {shape_of(value)}; expected {shape}")
            check_dtype(name, value, x, autocast, wider=True)
    return adapters, most


def _widths(widths: Any, adapters: int, most: int) -> list[int]:
    if widths is None:
        return [most] * adapters
    if isinstance(widths, Tensor):
        if widths.is_floating_point() or widths.is_complex() or widths.dtype == torch.bool:
            raise TypeError(f"widths has dtype {widths.dtype}; expected integers")
        widths = widths.tolist() if widths.dim() == 1 else [widths]
    if not isinstance(widths, (list, tuple)) or not all(
        isinstance(w, int) and not isinstance(w, bool) for w in widths
    ):
        raise TypeError(f"widths is {widths!r}; expected (L,) integers")
    if len(widths) != adapters:
        raise ValueError(f"widths has {len(widths)} entries; expected (L,) = ({adapters},)")
    for w in widths:
        if not 0 <= w <= most:
            raise ValueError(f"widths has {w}; expected 0 to {most}, down_weight's")
    return list(widths)


def _scaling(scaling: Any, x: Tensor, adapters: int, autocast: bool) -> float | tuple[Tensor, ...]:
    """A number, or a factor (1,) of each adapter."""
    if not isinstance(scaling, Tensor):
        factor = number("scaling", scaling, "a number or a torch.Tensor of shape (L,)")
        check_finite("scaling", factor)
        return factor
    check_tensor("scaling", scaling, x, "(L,)")
    check_dtype("scaling", scaling, x, autocast, wider=True)
    if scaling.shape != (adapters,):
        raise ValueError(f"scaling has shape {shape_of(scaling)}; expected (L,) = ({adapters},)")
    return scaling.reshape(-1, 1).unbind()


def _gate(gate: Any, x: Tensor, autocast: bool) -> Tensor:
    """(..., 1), broadcastable, to (T, 1)."""
    check_tensor("gate", gate, x, "(..., 1)")
    check_dtype("gate", gate, x, autocast, wider=True)
    shape = (*x.shape[:-1], 1)
    try:
        return gate.expand(shape).reshape(-1, 1)
    except RuntimeError:
        raise ValueError(
            f"gate has shape {shape_of(gate)}; expected one that broadcasts to {tuple(shape)}"
        ) from None


def _without(
    x: Tensor, terms: Sequence[Tensor], ln_weight: Tensor | None, ln_bias: Tensor | None, eps: float
) -> Tensor:
    """Rows that no adapter changes: u = 0."""
    y = sum(terms[1:], terms[0]) if terms else x.new_zeros(x.shape)
    if ln_weight is None:
        return y
    d = x.shape[-1]
    bias = None if ln_bias is None else ln_bias.to(y.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(y, (d,), ln_weight.to(y.dtype), bias, eps)
