"""The Compacter adapter and the PHM linear layer as functions of tensors. Arguments are checked here, once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..activations import canonical
from ..autograd import CompacterFunction
from ..autograd.adapter import Settings
from ..dispatch import ORDINARY, Explanation, explain_problem
from ..ops.compacter import problem_of
from ..phm import PHM, dense, parts, pays, turned
from ..random import new_seed
from .adapter import bottleneck_adapter, explain_bottleneck_adapter
from .adapter_checks import (
    Activation,
    Around,
    Rows,
    check_around,
    check_rows,
    check_vectors,
    once_each,
)
from .checks import (
    autocast_dtype,
    check_dtype,
    check_input,
    check_input_dtype,
    check_tensor,
    check_vector,
    shape_of,
)
from .ordinary import short_way


def compacter(
    x: Tensor,
    down: PHM,
    down_bias: Tensor | None,
    up: PHM,
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
    r"""``bottleneck_adapter`` whose projections are sums of Kronecker products, which are never built.

    ``D = Σ_i rule_i ⊗ (left_i right_i)``, (d, m), takes the place of ``Dᵀ`` there, and likewise ``U``, (m, d).
    Semantics of ``PHMLayer`` in `adapters` 1.3.0 and of Mahabadi et al., "Compacter" (NeurIPS 2021).

    Where the factors save no products (a weight that is not factorized, large ranks) and where the activation is a
    callable, D and U are built, and the call is one of ``bottleneck_adapter``.

    Args:
        x: (..., d), as in ``bottleneck_adapter``.
        down: a ``functional.PHM``: ``rule`` (n, n, n), ``left`` (n, d / n, k), ``right`` (n, k, m / n), or ``right``
            None and ``left`` (n, d / n, m / n); in x's dtype, or float32 over a bfloat16 or float16 x.
        down_bias: (m,) or None.
        up: likewise, from m to d features, of the same n; its rule may be the very tensor that ``down`` has.
        up_bias: (d,) or None.
        activation: this and all that follows is as in ``bottleneck_adapter``.
        scaling: likewise.
        gate: likewise.
        residual: likewise.
        skip: likewise.
        pre_ln_weight: likewise.
        pre_ln_bias: likewise.
        pre_ln_eps: likewise.
        ln_weight: likewise.
        ln_bias: likewise.
        eps: likewise.
        dropout_p: likewise.
        training: likewise.
        backend: likewise.

    Returns:
        y of x's shape, in the dtype that was computed in.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value.
        BackendUnavailable: the named backend cannot run this call.
        RuntimeError: in a backward of the backward, which has no formula here.
    """
    extension = short_way(backend)
    if (
        extension is not None
        and (name := canonical(activation)) is not None
        and isinstance(down, PHM)
        and isinstance(up, PHM)
    ):
        found = extension.ordinary_compacter(
            *(x, *down, down_bias, *up, up_bias, name, scaling, gate, residual, skip),
            *(pre_ln_weight, pre_ln_bias, pre_ln_eps, ln_weight, ln_bias, eps, dropout_p, training),
        )
        if type(found) is Tensor:
            return found
        if found is not None:
            numbers, second, scale, gates = found
            settings = Settings._make((name, *numbers, ORDINARY))
            return CompacterFunction.apply(
                settings,
                new_seed(x.device) if settings.dropout_p else None,
                *(x, second, *down, down_bias, *up, up_bias, scale, gates),
                *(pre_ln_weight, pre_ln_bias, ln_weight, ln_bias),
            )
    options: dict[str, Any] = {
        "activation": activation,
        "scaling": scaling,
        "gate": gate,
        "residual": residual,
        "skip": skip,
        "pre_ln_weight": pre_ln_weight,
        "pre_ln_bias": pre_ln_bias,
        "pre_ln_eps": pre_ln_eps,
        "ln_weight": ln_weight,
        "ln_bias": ln_bias,
        "eps": eps,
        "dropout_p": dropout_p,
        "training": training,
        "backend": backend,
    }
    rows = check_rows(x, residual, skip)
    _check_pair(rows, down, up)
    if callable(activation) or not pays(down, up):
        return bottleneck_adapter(x, _matrix(down), down_bias, _matrix(up), up_bias, **options)
    around, arguments = _check(rows, down, down_bias, up, up_bias, options)
    seed = new_seed(around.x.device) if around.settings.dropout_p else None
    if torch.compiler.is_compiling():
        arguments = once_each(arguments)
    return CompacterFunction.apply(around.settings, seed, *arguments)


def explain_compacter(
    x: Tensor, down: PHM, down_bias: Tensor | None, up: PHM, up_bias: Tensor | None, **options: Any
) -> Explanation:
    """Which backend a call of ``compacter`` would run on; same arguments."""
    options = {**_DEFAULTS, **options}
    rows = check_rows(x, options["residual"], options["skip"])
    _check_pair(rows, down, up)
    if callable(options["activation"]) or not pays(down, up):
        dense_ = (_matrix(down), down_bias, _matrix(up), up_bias)
        return explain_bottleneck_adapter(x, *dense_, **options)
    around, _ = _check(rows, down, down_bias, up, up_bias, options)
    return Explanation(
        tuple(
            explain_problem(
                problem_of(
                    name,
                    around.x,
                    math.prod(around.x.shape[:-1]),
                    (*down, *up),  # type: ignore[arg-type]  # both are factorized
                    activation=around.settings.activation,
                    pre_ln=options["pre_ln_weight"] is not None,
                    post_ln=options["ln_weight"] is not None,
                    skip=around.skip is not None,
                    gate=around.gate is not None,
                    dropout=around.settings.dropout_p > 0,
                ),
                around.settings.backend,
            )
            for name in ("compacter_fwd", "compacter_bwd")
        )
    )


_DEFAULTS = dict(compacter.__kwdefaults__ or {})


def phm_linear(x: Tensor, weight: PHM, bias: Tensor | None = None) -> Tensor:
    """y = x Σ_i rule_i ⊗ (left_i right_i) + bias, out of products with the factors where they are fewer.

    Semantics of ``PHMLayer`` in `adapters` 1.3.0. Composed of PyTorch's operators, which differentiate it, twice too.

    Args:
        x: (..., in), float32, bfloat16, float16 or float64; under ``torch.autocast`` computed in the autocast dtype.
        weight: ``functional.PHM``: ``rule`` (n, n, n), ``left`` (n, in / n, k), ``right`` (n, k, out / n), or ``right``
            None and ``left`` (n, in / n, out / n); in x's dtype, or float32 over a bfloat16 or float16 x.
        bias: (out,) or None.

    Returns:
        (..., out), in the dtype that was computed in.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape or device.
    """
    check_input(x, "in")
    dtype = autocast_dtype(x)
    if dtype is None:
        check_input_dtype(x)
    _check_phm("weight", weight, x, dtype is not None)
    inputs, outputs = weight.features
    if x.shape[-1] != inputs:
        raise ValueError(f"x has shape {shape_of(x)}; expected (..., {inputs}), as weight has it")
    if bias is not None:
        check_tensor("bias", bias, x, "(out,)")
        check_vector("bias", bias, "out", outputs)
        check_dtype("bias", bias, x, dtype is not None, wider=True)
    dtype = dtype or x.dtype
    with torch.autocast(x.device.type, enabled=False):
        y = _product(x.to(dtype), weight)
        return y if bias is None else y + bias.to(dtype)


def _product(x: Tensor, weight: PHM) -> Tensor:
    """The cheapest of: contraction first, expansion last, H."""
    inputs, outputs = weight.features
    n = weight.rule.shape[0]
    if weight.right is not None:
        width = n * weight.left.shape[2]
        costs = (inputs * width + n * width * outputs, n * width * inputs + width * outputs)
        if min(costs) < inputs * outputs:
            if costs[0] <= costs[1]:
                c, m = parts(weight, x.dtype)
                return (x.unflatten(-1, (n, -1)) @ c.T).flatten(-2) @ m
            c, m = parts(turned(weight), x.dtype)
            return ((x @ m.T).unflatten(-1, (n, -1)) @ c).flatten(-2)
    return x @ _matrix(weight).to(x.dtype).T


def _matrix(weight: PHM) -> Tensor:
    """The dense weight (out, in), in the wider dtype of the factors."""
    dtype = weight.rule.dtype
    for factor in weight[1:]:
        dtype = dtype if factor is None else torch.promote_types(dtype, factor.dtype)
    cast = PHM(*(None if f is None else f.to(dtype) for f in weight))  # type: ignore[arg-type]
    with torch.autocast(weight.rule.device.type, enabled=False):
        return dense(cast)


def _check(
    rows: Rows,
    down: PHM,
    down_bias: Tensor | None,
    up: PHM,
    up_bias: Tensor | None,
    options: dict[str, Any],
) -> tuple[Around, tuple[Any, ...]]:
    """What is not the projections', and the operator's tensors."""
    o = options
    layernorms = (o["pre_ln_weight"], o["pre_ln_bias"], o["ln_weight"], o["ln_bias"])
    check_vectors(rows, down.features[1], down_bias, up_bias, *layernorms)
    around = check_around(
        *(rows, o["activation"], o["scaling"], o["gate"], o["pre_ln_eps"], o["eps"]),
        *(o["dropout_p"], o["training"], o["backend"], "compacter"),
    )
    factors = (*down, down_bias, *up, up_bias, around.scale, around.gate)
    return around, (around.x, around.skip, *factors, *layernorms)


def _check_pair(rows: Rows, down: Any, up: Any) -> None:
    """d and m of the two go together, and so do the numbers of their products."""
    d = rows.x.shape[-1]
    for name, weight in (("down", down), ("up", up)):
        _check_phm(name, weight, rows.x, rows.autocast)
    inputs, m = down.features
    if inputs != d:
        raise ValueError(f"down takes {inputs} features; expected d = {d}, x's last size")
    n = down.rule.shape[0]
    if up.rule.shape[0] != n:
        raise ValueError(f"up has a rule of {up.rule.shape[0]}; expected n = {n}, as down has")
    if up.features != (m, d):
        raise ValueError(
            f"up goes from {up.features[0]} to {up.features[1]} features; expected {m} to {d}"
        )


def _check_phm(name: str, weight: Any, x: Tensor, autocast: bool) -> None:
    """The tensors of one PHM weight."""
    if not isinstance(weight, PHM):
        raise TypeError(f"{name} is a {type(weight).__name__}; expected a functional.PHM")
    rule, left, right = weight
    parts_ = [("rule", rule, "(n, n, n)"), ("left", left, "(n, in / n, k)")]
    if right is not None:
        parts_.append(("right", right, "(n, k, out / n)"))
    for part, tensor, shape in parts_:
        check_tensor(f"{name}.{part}", tensor, x, shape)
        if tensor.dim() != 3 or 0 in tensor.shape:
            raise ValueError(f"{name}.{part} has shape {shape_of(tensor)}; expected {shape}")
        check_dtype(f"{name}.{part}", tensor, x, autocast, wider=True)
    n = rule.shape[0]
    if tuple(rule.shape) != (n, n, n):
        raise ValueError(f"{name}.rule has shape {shape_of(rule)}; expected (n, n, n)")
    if left.shape[0] != n:
        raise ValueError(f"{name}.left has shape {shape_of(left)}; expected n = {n} first")
    if right is not None and (right.shape[0] != n or right.shape[1] != left.shape[2]):
        raise ValueError(
            f"{name}.right has shape {shape_of(right)}; expected (n, k, out / n) with n, k = {n}, {left.shape[2]}"
        )
