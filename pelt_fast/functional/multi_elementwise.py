"""IA³ and BitFit with an adapter for each token, as a function of tensors. Arguments are checked here, once."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from ..autograd import MultiElementwiseFunction
from ..dispatch import Explanation, explain_problem
from ..ops.multi_elementwise import problem_of
from ..segments import MultiAdapterPlan
from .checks import (
    autocast_dtype,
    backend_name,
    check_dtype,
    check_input,
    check_input_dtype,
    check_plan,
    check_tensor,
    check_there,
    shape_of,
)
from .ordinary import short_way

_ARRAYS = 3  # of the plan's: what is about tokens, not about tiles


def multi_elementwise(
    x: Tensor,
    scales: Tensor | None,
    biases: Tensor | None,
    plan: MultiAdapterPlan,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Scales and biases by element, of an adapter for each token: ``y_t = x_t · scales_g + biases_g``, g the plan's.

    With scales it is IA³ (Liu et al. 2022), ``peft.tuners.ia3.Linear`` row by row: x is a linear's output, or the input
    of a feedforward one. With biases it is BitFit (Ben-Zaken et al. 2022): what an adapter adds to the model's own
    bias. On ``multi_lora``'s plan, so that a batch holds rows of these methods and of LoRA. A token without an adapter
    keeps x, bit by bit. It trains: an adapter's gradients are bitwise those of a batch that holds its tokens alone, and
    adapters without a token get zeros.

    Args:
        x: (..., features); float32, bfloat16, float16 or float64, the dtype of the result. Half precision is computed
            in float32 and rounded once. ``torch.autocast`` leaves x as it is, as it does for PyTorch's own products.
        scales: (L, features) or None; x's dtype, or float32 over a half; under autocast any of the four.
        biases: (L, features) or None, likewise. One of the two at least.
        plan: of as many tokens as x has rows, in x's row order, on x's device.
        backend: "auto", "torch", "cpp" or "reference"; None: what ``use_backend`` or ``PELT_FAST_BACKEND`` says.

    Returns:
        y of x's shape and dtype.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value.
        BackendUnavailable: the named backend cannot run this call.
        RuntimeError: in a backward of the backward, which has no formula here.
    """
    extension = short_way(backend)
    if extension is not None and type(plan) is MultiAdapterPlan:
        done = extension.ordinary_multi_elementwise(
            x, scales, biases, plan._arrays, plan.tokens, plan.num_adapters
        )
        if done is not None:
            return cast("Tensor", done)
    chosen = _check(x, scales, biases, plan, backend)
    y: Tensor = MultiElementwiseFunction.apply(x, scales, biases, chosen, *plan.arrays[:_ARRAYS])
    return y


def explain_multi_elementwise(
    x: Tensor,
    scales: Tensor | None,
    biases: Tensor | None,
    plan: MultiAdapterPlan,
    *,
    backend: str | None = None,
) -> Explanation:
    """Which backend a call of ``multi_elementwise`` would run on; same arguments."""
    chosen = _check(x, scales, biases, plan, backend)
    return Explanation(
        tuple(
            explain_problem(
                problem_of(name, x, plan.tokens, plan.num_adapters, scaled=scales is not None),
                chosen,
            )
            for name in ("multi_elementwise_fwd", "multi_elementwise_bwd")
        )
    )


def _check(
    x: Tensor,
    scales: Any,
    biases: Any,
    plan: MultiAdapterPlan,
    backend: str | None,
) -> str:
    check_input(x, "features")
    check_input_dtype(x)
    autocast = autocast_dtype(x) is not None
    given = {
        name: value for name, value in (("scales", scales), ("biases", biases)) if value is not None
    }
    if not given:
        raise ValueError("scales and biases are both None; expected one of them at least")
    features, adapters = x.shape[-1], None
    for name, value in given.items():
        check_tensor(name, value, x, "(L, features)")
        if value.dim() != 2 or value.shape[1] != features or 0 in value.shape:
            raise ValueError(
                f"{name} has shape {shape_of(value)}; expected (L, features) with features = {features}, x's last "
                "size, both at least 1"
            )
        if adapters not in (None, value.shape[0]):
            raise ValueError(
                f"{name} has {value.shape[0]} rows; expected {adapters}, as many as scales"
            )
        adapters = value.shape[0]
        check_dtype(name, value, x, autocast, wider=True)
        check_there(name, value)
    assert adapters is not None
    check_plan(plan, x, adapters)
    check_there("x", x)
    return backend_name(backend)
