"""Two yardsticks for one `bottleneck_adapter` call: the exact answer, and what eager PyTorch makes of it.

Results go by name: ``y``, and the gradient of each tensor under its name in `adapter_workloads.NAMES`, in its shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..random import new_seed, philox_mask
from .adapter_workloads import NAMES, AdapterInputs, BlockInputs
from .oracle import Results, run

AnyBlock = TypeVar("AnyBlock", bound=BlockInputs)
# As `transformers.activations.ACT2FN` computes them; not the product's own, which eager has to catch.
EAGER_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda q: F.gelu(q, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "quick_gelu": lambda q: q * torch.sigmoid(1.702 * q),
    "relu2": lambda q: torch.square(F.relu(q)),
    "relu6": F.relu6,
    "mish": F.mish,
    "linear": lambda q: q,
}


def mask(inputs: BlockInputs, seed: Tensor | None) -> Tensor | None:
    """The dropout mask (T, d), True where an element is kept."""
    if seed is None or inputs.dropout_p == 0:
        return None
    return philox_mask(seed, (inputs.tokens, inputs.x.shape[-1]), inputs.dropout_p)


def as_rows(inputs: AdapterInputs) -> AdapterInputs:
    """The same call with x, skip and dy (T, d) and gate (T, 1)."""
    x, skip, *_ = inputs.operands
    assert x is not None
    gate = inputs.operands[NAMES.index("gate")]
    return replace(
        inputs,
        x=x,
        skip=skip,
        dy=inputs.dy.reshape(x.shape),
        gate=None if gate is None else gate[:, None],
    )


def run_with_mask(
    function: Callable[[AnyBlock], Tensor],
    inputs: AnyBlock,
    wanted: Iterable[str] | None = None,
    seed: int = 0,
) -> tuple[Results, Tensor | None]:
    """`run` after ``torch.manual_seed(seed)``, and the dropout mask that ``function`` has drawn."""
    torch.manual_seed(seed)
    keep = mask(inputs, new_seed(inputs.x.device))
    torch.manual_seed(seed)
    return run(function, inputs, wanted), keep


def run_backend(
    module: Any,
    inputs: AdapterInputs,
    seed: Tensor | None = None,
    wanted: Iterable[str] | None = None,
) -> Results:
    """The two functions of a backend's module, called as the operators call them; results fit ``as_rows(inputs)``."""
    wanted = [
        name
        for name, t in zip(NAMES, inputs.operands, strict=True)
        if t is not None and (wanted is None or name in wanted)
    ]
    x, skip, *parameters = inputs.operands
    y, q, *stats = module.bottleneck_adapter_fwd(x, skip, *parameters, seed, *inputs.settings)
    assert x is not None
    dy = inputs.dy.reshape(x.shape)
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    needs = [name in wanted for name in NAMES]
    alike = inputs.skip_in and inputs.residual_x == inputs.residual_skip
    if alike:  # the gradient of x is that of skip
        needs[:2] = [needs[0] or needs[1], False]
    grads = module.bottleneck_adapter_bwd(
        dy, x, skip, q, *stats, *parameters, seed, *inputs.settings, needs
    )
    found = dict(zip(NAMES, grads, strict=True))
    if alike:
        found["skip"] = found["x"]
    if found["gate"] is not None:
        found["gate"] = found["gate"][:, None]
    return {"y": y, **{name: found[name] for name in wanted}}


def exact(
    inputs: AdapterInputs, keep: Tensor | None, wanted: Iterable[str] | None = None
) -> Results:
    """The oracle: `pelt_fast.reference` and its autograd in fp64, on the very numbers of ``inputs``."""
    return run(
        lambda leaves: formula(leaves, keep),
        inputs.map(lambda _, t: t.detach().double()),
        wanted,
    )


def formula(leaves: AdapterInputs, keep: Tensor | None) -> Tensor:
    """The reference's y."""
    x, skip, down, down_bias, up, up_bias, scale, gate, *layernorms = leaves.operands
    assert x is not None
    assert down is not None
    assert up is not None
    pre_weight, pre_bias, ln_weight, ln_bias = layernorms
    y = reference.bottleneck_adapter(
        x,
        down,
        down_bias,
        up,
        up_bias,
        activation=leaves.activation,
        scaling=leaves.scaling,
        scale=scale,
        gate=gate,
        skip=skip,
        skip_in=leaves.skip_in,
        residual_x=leaves.residual_x,
        residual_skip=leaves.residual_skip,
        pre_weight=pre_weight,
        pre_bias=pre_bias,
        pre_eps=leaves.pre_eps,
        ln_weight=ln_weight,
        ln_bias=ln_bias,
        eps=leaves.eps,
        dropout_p=leaves.dropout_p,
        keep=keep,
    )
    return y.reshape(leaves.x.shape)


def eager(
    inputs: AdapterInputs, keep: Tensor | None, wanted: Iterable[str] | None = None
) -> Results:
    """The composition of the `adapters` library in the dtypes of ``inputs``: `pre_forward`, `forward`, `post_forward`.

    Operation for operation those of `adapters.methods.modeling.Adapter` and `ParallelAdapter`, which cast nothing:
    parameters wider than x are cast here.
    """
    return run(lambda leaves: composition(leaves, keep), inputs, wanted)


def composition(leaves: AdapterInputs, keep: Tensor | None) -> Tensor:
    """The library's y."""
    x, skip, d = leaves.x, leaves.skip, (leaves.x.shape[-1],)
    cast = leaves.map(lambda _, t: t.to(x.dtype))
    h = x + skip if leaves.skip_in and skip is not None else x
    if cast.pre_weight is not None:
        h = F.layer_norm(h, d, cast.pre_weight, cast.pre_bias, leaves.pre_eps)
    down = EAGER_ACTIVATIONS[leaves.activation](F.linear(h, cast.down, cast.down_bias))
    output = F.linear(down, cast.up, cast.up_bias)
    output = output * (leaves.scaling if cast.scale is None else cast.scale)
    if keep is not None:
        p, kept = leaves.dropout_p, keep.reshape(output.shape)
        output = output * kept / (1 - p) if p < 1 else output * 0
    if cast.gate is not None:
        output = output * cast.gate
    if leaves.residual_x:
        output = output + x
    if leaves.residual_skip and skip is not None:
        output = output + skip
    if cast.ln_weight is not None:
        output = F.layer_norm(output, d, cast.ln_weight, cast.ln_bias, leaves.eps)
    return output
