"""Diff pruning and masking as functions of tensors. Arguments are checked here, once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import DiffPruningFunction, DiffPruningLinearFunction, MaskedLinearFunction
from ..dispatch import Explanation, explain_problem
from ..ops.delta import problem_of
from ..random import new_seed
from .checks import (
    DTYPES,
    HALVES,
    autocast_dtype,
    backend_name,
    check_dtype,
    check_finite,
    check_input,
    check_input_dtype,
    check_tensor,
    check_there,
    check_vector,
    number,
    shape_of,
)

STRETCH = (-1.5, 1.5)
"""Where Guo et al. stretch a gate's sigmoid to before it is cut to [0, 1]."""


def diff_pruning_weight(
    weight: Tensor,
    diff: Tensor,
    log_alpha: Tensor,
    *,
    group_log_alpha: Tensor | None = None,
    stretch: tuple[float, float] = STRETCH,
    training: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The weight of diff pruning, ``weight + z_group · z ⊙ diff``, and the number of entries expected to differ.

    Semantics of Guo et al., "Parameter-efficient transfer learning with diff pruning" (ACL 2021), with hard concrete
    gates (Louizos et al., 2018, at temperature 1)::

        z = min(1, max(0, lower + (upper - lower) · sigmoid(log_alpha + log u - log(1 - u))))    u uniform in (0, 1)
        count = Σ P(z > 0) = Σ sigmoid(log_alpha - log(-lower / upper))

    With ``group_log_alpha``, structured diff pruning: one more gate for all of ``weight``, drawn alike, multiplies
    every z, and its probability multiplies the count. Add ``count`` times a factor to the loss. One pass over the
    elements makes both; backward makes all gradients in another, with u drawn again from a seed.

    Args:
        weight: any shape and strides; float32, bfloat16, float16 or float64. Usually frozen.
        diff: what may be added, weight's shape and dtype, or float32 over a bfloat16 or float16 weight.
        log_alpha: of each gate, as diff.
        group_log_alpha: one element, float32 or weight's dtype, or None.
        stretch: lower < 0 and upper > 1.
        training: gates are noisy when True; else u = 1/2.
        backend: as ``lora_linear``'s.

    Returns:
        The weight, in weight's dtype, row-major, and the count, float32 (float64 for float64) without dimensions.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value.
        BackendUnavailable: the named backend cannot run this call.
        RuntimeError: in a backward of the backward, which has no formula here.
    """
    _check_weight(weight, weight)
    lower, upper = _check_diff(weight, diff, log_alpha, group_log_alpha, stretch, False)
    name = backend_name(backend)
    scale, is_open = _group_gate(group_log_alpha, lower, upper, training)
    seed = new_seed(weight.device) if training else None
    made, count = DiffPruningFunction.apply(
        weight, diff, log_alpha, scale, seed, lower, upper, name
    )
    return made, count if is_open is None else count * is_open


def diff_pruning_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    diff: Tensor,
    log_alpha: Tensor,
    *,
    group_log_alpha: Tensor | None = None,
    stretch: tuple[float, float] = STRETCH,
    training: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""A linear with the weight of ``diff_pruning_weight``: ``y = x Wᵀ + bias`` and the number of open gates.

    W is made in x's dtype, multiplied and dropped; backward makes it again in the pass that makes the gradients of diff
    and log_alpha. Between the two nothing of W's size is kept but the parameters themselves.

    Args:
        x: (..., in), any strides; float32, bfloat16, float16 or float64, the dtype that is computed in. Under
            ``torch.autocast`` x is cast to the autocast dtype first (float64 is not).
        weight: (out, in), x's dtype (under autocast any floating dtype but float64).
        bias: (out,) or None, weight's dtype; a pruned one comes out of ``diff_pruning_weight``.
        diff: as in ``diff_pruning_weight``, and so are the others.
        log_alpha: likewise.
        group_log_alpha: likewise.
        stretch: likewise.
        training: likewise.
        backend: likewise; it makes the weight, and PyTorch multiplies.

    Returns:
        y of shape (..., out) in the dtype that was computed in, and the count as in ``diff_pruning_weight``.

    Raises:
        TypeError, ValueError, BackendUnavailable, RuntimeError: as ``diff_pruning_weight``.
    """
    x, autocast = _compute_input(x)
    _check_base(x, weight, bias, autocast)
    lower, upper = _check_diff(weight, diff, log_alpha, group_log_alpha, stretch, autocast)
    name = backend_name(backend)
    scale, is_open = _group_gate(group_log_alpha, lower, upper, training)
    seed = new_seed(weight.device) if training else None
    y, count = DiffPruningLinearFunction.apply(
        x, weight, bias, diff, log_alpha, scale, seed, lower, upper, name
    )
    return y, count if is_open is None else count * is_open


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scores: Tensor,
    *,
    threshold: float = 0.01,
    backend: str | None = None,
) -> Tensor:
    r"""A linear whose frozen weight is masked, ``y = x (weight ⊙ [scores ≥ threshold])ᵀ + bias``.

    Semantics of Zhao et al., "Masking as an efficient alternative to finetuning for pretrained language models" (EMNLP
    2020): the gradient of a mask passes to its score as it is (straight through), so a score's gradient is the masked
    weight's times ``weight``. The masked weight is made in x's dtype, and again in backward beside the gradient.

    Args:
        x: as in ``diff_pruning_linear``.
        weight: (out, in), x's dtype (under autocast any floating dtype but float64). One that requires a gradient
            gets that of the masked weight where the mask is open.
        bias: (out,) or None, weight's dtype.
        scores: (out, in), weight's dtype, or float32 over a bfloat16 or float16 weight.
        threshold: a finite number, rounded to the dtype of scores, as PyTorch's comparison does it.
        backend: as in ``diff_pruning_linear``.

    Returns:
        y of shape (..., out) in the dtype that was computed in.

    Raises:
        TypeError, ValueError, BackendUnavailable, RuntimeError: as ``diff_pruning_weight``.
    """
    x, autocast = _compute_input(x)
    _check_base(x, weight, bias, autocast)
    _check_like("scores", scores, weight, autocast)
    level = number("threshold", threshold)
    check_finite("threshold", level)
    y: Tensor = MaskedLinearFunction.apply(x, weight, bias, scores, level, backend_name(backend))
    return y


def explain_diff_pruning_weight(
    weight: Tensor, diff: Tensor, log_alpha: Tensor, *, backend: str | None = None, **options: Any
) -> Explanation:
    """Which backend a call of ``diff_pruning_weight`` would run on; same arguments."""
    _check_weight(weight, weight)
    return _explain("diff_pruning", weight, weight.dtype, backend)


def explain_diff_pruning_linear(
    x: Tensor, weight: Tensor, *others: Any, backend: str | None = None, **options: Any
) -> Explanation:
    """Which backend would make the weight in a call of ``diff_pruning_linear``; same arguments."""
    x, autocast = _compute_input(x)
    _check_base(x, weight, None, autocast)
    return _explain("diff_pruning", weight, x.dtype, backend)


def explain_masked_linear(
    x: Tensor, weight: Tensor, *others: Any, backend: str | None = None, **options: Any
) -> Explanation:
    """Which backend would make the weight in a call of ``masked_linear``; same arguments."""
    x, autocast = _compute_input(x)
    _check_base(x, weight, None, autocast)
    return _explain("masking", weight, x.dtype, backend)


def _explain(name: str, weight: Tensor, dtype: torch.dtype, backend: str | None) -> Explanation:
    asked = backend_name(backend)
    return Explanation(
        tuple(
            explain_problem(problem_of(f"{name}_{direction}", weight, dtype), asked)
            for direction in ("fwd", "bwd")
        )
    )


def _group_gate(
    log_alpha: Tensor | None, lower: float, upper: float, training: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gate of the whole weight, and the probability that it is open; a few operations on one number."""
    if log_alpha is None:
        return None, None
    alpha = log_alpha.reshape(()).to(torch.promote_types(log_alpha.dtype, torch.float32))
    logits = alpha + torch.rand_like(alpha).logit() if training else alpha
    gate = (torch.sigmoid(logits) * (upper - lower) + lower).clamp(0, 1)
    ratio = torch.tensor(-lower / upper, dtype=alpha.dtype, device=alpha.device)
    return gate, torch.sigmoid(alpha - ratio.log())


def _compute_input(x: Tensor) -> tuple[Tensor, bool]:
    """x in the dtype that is computed in, and whether autocast chose it."""
    check_input(x, "in")
    dtype = autocast_dtype(x)
    if dtype is None:
        check_input_dtype(x)
    check_there("x", x)
    return (x, False) if dtype is None else (x.to(dtype), True)


def _check_weight(weight: Any, x: Tensor) -> None:
    if isinstance(weight, Tensor) and weight.dtype not in DTYPES:
        raise TypeError(
            f"weight has dtype {weight.dtype}; expected float32, bfloat16, float16 or float64"
        )
    check_tensor("weight", weight, x, "(out, in)") if weight is not x else _check_alone(weight)
    check_there("weight", weight)


def _check_alone(weight: Any) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight is a {type(weight).__name__}; expected a torch.Tensor")
    check_tensor("weight", weight, weight, "of any kind")


def _check_base(x: Tensor, weight: Tensor, bias: Tensor | None, autocast: bool) -> None:
    _check_weight(weight, x)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or 0 in weight.shape:
        raise ValueError(
            f"weight has shape {shape_of(weight)}; expected (out, in) with in = {x.shape[-1]}, x's last size, "
            "and at least one row and column"
        )
    check_dtype("weight", weight, x, autocast, wider=False)
    if autocast and weight.dtype == torch.float64:
        raise TypeError(f"weight has dtype float64; expected one that autocast casts to {x.dtype}")
    if bias is not None:
        check_tensor("bias", bias, x, "(out,)")
        check_vector("bias", bias, "out", weight.shape[0])
        check_dtype("bias", bias, x, autocast, wider=False)
        check_there("bias", bias)


def _check_diff(
    weight: Tensor,
    diff: Any,
    log_alpha: Any,
    group_log_alpha: Any,
    stretch: Any,
    autocast: bool,
) -> tuple[float, float]:
    _check_like("diff", diff, weight, autocast)
    _check_like("log_alpha", log_alpha, weight, autocast)
    if group_log_alpha is not None:
        check_tensor("group_log_alpha", group_log_alpha, weight, "(1,)")
        if group_log_alpha.numel() != 1:
            raise ValueError(
                f"group_log_alpha has shape {shape_of(group_log_alpha)}; expected one element"
            )
        if group_log_alpha.dtype not in (weight.dtype, torch.float32):
            raise TypeError(
                f"group_log_alpha has dtype {group_log_alpha.dtype}; expected {weight.dtype}, weight's dtype, or "
                "torch.float32"
            )
        check_there("group_log_alpha", group_log_alpha)
    if not isinstance(stretch, (tuple, list)) or len(stretch) != 2:
        raise TypeError(f"stretch is {stretch!r}; expected two numbers, lower and upper")
    lower, upper = (number("stretch", value) for value in stretch)
    if not (lower < 0.0 and upper > 1.0):
        raise ValueError(f"stretch is {(lower, upper)}; expected lower < 0 and upper > 1")
    check_finite("stretch", lower)
    check_finite("stretch", upper)
    return lower, upper


def _check_like(name: str, value: Any, weight: Tensor, autocast: bool) -> None:
    """``value`` has weight's shape, and its dtype or float32 over a half; under autocast any but float64."""
    check_tensor(name, value, weight, "as weight")
    if value.shape != weight.shape:
        raise ValueError(
            f"{name} has shape {shape_of(value)}; expected {shape_of(weight)}, weight's shape"
        )
    if autocast and value.dtype in (torch.float32, *HALVES):
        check_there(name, value)
        return
    check_dtype(name, value, weight, False, wider=True)
    check_there(name, value)
