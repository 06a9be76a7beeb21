"""The LoRA linear with UniPELT's gate as a function of tensors. Arguments are checked here, once."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from ..autograd import GatedLoRALinearFunction
from ..dispatch import ORDINARY, Explanation, explain_problem
from ..ops.gated_lora import problem_of
from ..random import new_seed
from .checks import (
    check_dtype,
    check_finite,
    check_probability,
    check_tensor,
    check_vector,
    number,
    shape_of,
)
from .lora import base_backend, check_adapter, check_base, compute_input
from .ordinary import short_way


def gated_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    scaling: float = 1.0,
    *,
    token_weight: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    return_gate: bool = False,
    backend: str | None = None,
) -> Any:
    r"""A LoRA linear gated for each sample, ``y = x Wᵀ + b + g · scaling · drop(x) Aᵀ Bᵀ``.

    ``g = Σ_t token_weight_t · sigmoid(x_t · gate_weight + gate_bias)``, the mean over all tokens of the sample where
    no weights are given. Semantics of UniPELT (Mao et al. 2022) as ``adapters.methods.lora.LoRA`` with ``use_gating``
    has them: there padding counts in the mean, and scaling is 1 whatever alpha is. The paper's mean over real tokens
    is ``token_weight = mask / mask.sum(-1, keepdim=True)``.

    The gate's projection is read off x together with A's, and the gate acts on (T, r).

    Args:
        x: (..., L, in), two to many dimensions: samples of L tokens; any strides; float32, bfloat16, float16 or
            float64, the dtype that is computed in. Under ``torch.autocast`` x is cast to the autocast dtype first.
        weight: (out, in), x's dtype. Meant to be frozen; one that requires a gradient gets it, on ``torch``.
        bias: (out,) or None, weight's dtype.
        lora_a: (r, in), 1 <= r <= 256; x's dtype, or float32 over a bfloat16 or float16 x.
        lora_b: (out, r), as lora_a.
        gate_weight: (1, in), as lora_a.
        gate_bias: (1,) or None, as lora_a.
        scaling: a finite number.
        token_weight: (..., L) or None, floating: what each token counts in its sample's gate; no gradient. A token of
            weight 0 counts for nothing, whatever it holds.
        dropout_p: probability in [0, 1] that an element of x is dropped on its way into A; the gate sees all.
        training: dropout acts only when True.
        return_gate: the gates too, (...,) in float32 (float64 for a float64 x), without a gradient of their own.
        backend: "auto", "torch", "cpp", "triton", "cuda" or "reference"; None: what ``use_backend`` or
            ``PELT_FAST_BACKEND`` says. Naming one that cannot run raises ``BackendUnavailable`` with its reasons.

    Returns:
        y of shape (..., L, out) in the dtype that was computed in; with ``return_gate`` a pair of it and the gates.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value.
        BackendUnavailable: the named backend cannot run this call.
        RuntimeError: in a backward of the backward, which has no formula here.
    """
    extension = short_way(backend)
    if extension is not None and not return_gate and token_weight is None:
        found = extension.ordinary_gated_lora_linear(
            *(x, weight, bias, lora_a, lora_b, gate_weight, gate_bias, scaling, dropout_p),
            training,
        )
        if type(found) is Tensor:
            return found
        if found is not None:
            factor, rate, samples = found
            return GatedLoRALinearFunction.apply(
                *(x, weight, bias, lora_a, lora_b, gate_weight, gate_bias, None),
                *(new_seed(x.device) if rate else None, factor, rate, samples, ORDINARY),
            )[0]
    call = _check(
        *(x, weight, bias, lora_a, lora_b, gate_weight, gate_bias, scaling, token_weight),
        *(dropout_p, training, backend),
    )
    seed = new_seed(call.x.device) if call.dropout_p else None
    y, gate = GatedLoRALinearFunction.apply(
        *(call.x, weight, bias, lora_a, lora_b, gate_weight, gate_bias, call.token_weight),
        *(seed, call.scaling, call.dropout_p, call.samples, call.backend),
    )
    return (y, gate.detach().view(x.shape[:-2])) if return_gate else y


class _Call(NamedTuple):
    """The arguments of ``gated_lora_linear``, checked."""

    x: Tensor
    token_weight: Tensor | None  # (samples, L)
    scaling: float
    dropout_p: float
    samples: int
    backend: str


def explain_gated_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    scaling: float = 1.0,
    *,
    token_weight: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    return_gate: bool = False,
    backend: str | None = None,
) -> Explanation:
    """Which backend a call of ``gated_lora_linear`` would run on; same arguments."""
    call = _check(
        *(x, weight, bias, lora_a, lora_b, gate_weight, gate_bias, scaling, token_weight),
        *(dropout_p, training, backend),
    )
    tokens = math.prod(call.x.shape[:-1])
    return Explanation(
        tuple(
            explain_problem(
                problem_of(name, call.x, weight, lora_a, call.dropout_p > 0, tokens), call.backend
            )
            for name in ("gated_lora_linear_fwd", "gated_lora_linear_bwd")
        )
    )


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    scaling: float,
    token_weight: Tensor | None,
    dropout_p: float,
    training: bool,
    backend: str | None,
) -> _Call:
    x, autocast = compute_input(x)
    if x.dim() < 2:
        raise ValueError(f"x has shape {shape_of(x)}; expected (..., L, in), samples of L tokens")
    check_base(x, weight, bias, autocast)
    check_adapter(None, x, weight, lora_a, lora_b, autocast)
    check_tensor("gate_weight", gate_weight, x, "(1, in)")
    if tuple(gate_weight.shape) != (1, x.shape[-1]):
        raise ValueError(
            f"gate_weight has shape {shape_of(gate_weight)}; expected (1, in) = (1, {x.shape[-1]})"
        )
    check_dtype("gate_weight", gate_weight, x, autocast, wider=True)
    if gate_bias is not None:
        check_tensor("gate_bias", gate_bias, x, "(1,)")
        check_vector("gate_bias", gate_bias, "1", 1)
        check_dtype("gate_bias", gate_bias, x, autocast, wider=True)
    samples = math.prod(x.shape[:-2])
    weights = None
    if token_weight is not None:
        check_tensor("token_weight", token_weight, x, "(..., L)")
        if token_weight.shape != x.shape[:-1]:
            raise ValueError(
                f"token_weight has shape {shape_of(token_weight)}; expected {tuple(x.shape[:-1])}, x's but the last"
            )
        if not token_weight.is_floating_point():
            raise TypeError(
                f"token_weight has dtype {token_weight.dtype}; expected a floating dtype"
            )
        weights = token_weight.detach().reshape(samples, x.shape[-2])
    factor = number("scaling", scaling)
    check_finite("scaling", factor)
    rate = number("dropout_p", dropout_p)
    check_probability("dropout_p", rate)
    return _Call(
        x, weights, factor, rate if training else 0.0, samples, base_backend(weight, backend)
    )
