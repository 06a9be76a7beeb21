"""Two yardsticks for one `lora_linear` call: the exact answer, and what eager PyTorch makes of it.

Every function here returns results by name: ``y``, and the gradient of each tensor argument under that argument's
name (``x``, ``bias``, ``lora_a.0``, ...). x and dy are taken as rows, (T, in) and (T, out).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..random import new_seed, philox_mask
from .inputs import Inputs
from .workloads import LoRAInputs

AnyInputs = TypeVar("AnyInputs", bound=Inputs)
Results = dict[str, Tensor]
Masks = Sequence[Tensor | None]


def masks(inputs: LoRAInputs, seed: Tensor | None) -> list[Tensor | None]:
    """The dropout mask (T, in) of each adapter, True where an element is kept."""
    shape = (inputs.x[..., 0].numel(), inputs.x.shape[-1])
    return [
        philox_mask(seed, shape, p, index) if seed is not None and p > 0 else None
        for index, p in enumerate(inputs.dropout_p)
    ]


def as_rows(inputs: LoRAInputs) -> LoRAInputs:
    """The same call with x (T, in) and dy (T, out)."""
    tokens = inputs.x[..., 0].numel()
    return replace(
        inputs,
        x=inputs.x.reshape(tokens, inputs.x.shape[-1]),
        dy=inputs.dy.reshape(tokens, inputs.dy.shape[-1]),
    )


def trained(inputs: Inputs) -> list[str]:
    """Names of everything that gets a gradient when only the base weight is frozen."""
    return [name for name, _ in inputs.named_tensors() if name not in ("weight", "dy")]


def run(
    function: Callable[[AnyInputs], Tensor],
    inputs: AnyInputs,
    wanted: Iterable[str] | None = None,
) -> Results:
    """Runs ``function`` forward and backward; ``wanted`` names the gradients (default: `trained`)."""
    wanted = trained(inputs) if wanted is None else list(wanted)
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name in wanted))
    y = function(leaves)
    results = {"y": y.detach()}
    if wanted:
        sources = [tensor for name, tensor in leaves.named_tensors() if name in wanted]
        names = [name for name, _ in leaves.named_tensors() if name in wanted]
        results.update(zip(names, torch.autograd.grad(y, sources, inputs.dy), strict=True))
    return results


def run_with_masks(
    function: Callable[[LoRAInputs], Tensor],
    inputs: LoRAInputs,
    wanted: Iterable[str] | None = None,
    seed: int = 0,
) -> tuple[Results, list[Tensor | None]]:
    """`run` after ``torch.manual_seed(seed)``, and the dropout masks that ``function`` has drawn."""
    torch.manual_seed(seed)
    keep = masks(inputs, new_seed(inputs.x.device))
    torch.manual_seed(seed)
    return run(function, inputs, wanted), keep


def exact(inputs: LoRAInputs, keep: Masks, wanted: Iterable[str] | None = None) -> Results:
    """The oracle: `pelt_fast.reference` and its autograd in fp64, on the very numbers of ``inputs``."""

    def function(leaves: LoRAInputs) -> Tensor:
        return reference.lora_linear(
            *leaves.args, lora_bias=leaves.lora_bias, dropout_p=leaves.dropout_p, keep=keep
        )

    return run(function, as_rows(inputs).map(lambda _, t: t.detach().double()), wanted)


def eager(inputs: LoRAInputs, keep: Masks, wanted: Iterable[str] | None = None) -> Results:
    """PEFT's composition, in the dtypes of ``inputs``: operation for operation `peft.tuners.lora.Linear.forward`."""

    def function(leaves: LoRAInputs) -> Tensor:
        x = leaves.x
        result = F.linear(x, leaves.weight, leaves.bias)
        for i, (a, b, bias) in enumerate(
            zip(leaves.lora_a, leaves.lora_b, leaves.lora_bias, strict=True)
        ):
            dropped, mask, p = x.to(a.dtype), keep[i], leaves.dropout_p[i]
            if mask is not None:
                dropped = dropped * mask / (1 - p) if p < 1 else dropped * 0
            result = result + F.linear(F.linear(dropped, a), b, bias) * leaves.scaling[i]
        return result.to(x.dtype)

    return run(function, as_rows(inputs), wanted)
