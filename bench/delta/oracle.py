"""What judges a row: the reference in fp64, and the same formula in the dtype of the row."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from pelt_fast import reference
from pelt_fast.functional.delta import STRETCH
from pelt_fast.random import philox_odds
from pelt_fast.testing.tolerance import Deviation, compare

from .contenders import FACTOR, THRESHOLD, DeltaInputs

Results = dict[str, Tensor]


def noise(inputs: DeltaInputs, seed: Tensor) -> Tensor | None:
    """The odds of each gate's noise; None for masks."""
    if len(inputs.deltas) == 1:
        return None
    return philox_odds(seed, inputs.weight.shape, torch.float64)


def exact(inputs: DeltaInputs, odds: Tensor | None, wanted: Iterable[str]) -> Results:
    """In fp64."""
    return _run(inputs.map(lambda _, t: t.detach().double()), odds, wanted)


def eager(inputs: DeltaInputs, odds: Tensor | None, wanted: Iterable[str]) -> Results:
    """One operation after the other, in the dtype of the inputs."""
    return _run(inputs, None if odds is None else odds.to(inputs.x.dtype), wanted)


def deviations(results: Results, inputs: DeltaInputs, odds: Tensor | None) -> list[Deviation]:
    """Twice eager's error is all that is allowed."""
    wanted = [name for name in results if name != "y"]
    ideal = exact(inputs, odds, wanted)
    zero = torch.zeros((), dtype=torch.float64)
    bounds = dict.fromkeys(results, (zero, zero))
    return compare(results, ideal, eager(inputs, odds, wanted), bounds)


def _run(inputs: DeltaInputs, odds: Tensor | None, wanted: Iterable[str]) -> Results:
    names = list(wanted)
    i = inputs.map(lambda name, t: t.detach().requires_grad_(name in names))
    outputs: list[Tensor] = []
    if len(i.deltas) == 1:
        made = reference.masked_weight(i.weight, i.deltas[0], THRESHOLD)
    else:
        lower, upper = STRETCH
        made, count = reference.diff_pruning_weight(
            i.weight, *i.deltas, scale=None, odds=odds, lower=lower, upper=upper
        )
        outputs.append(count)
    y = F.linear(i.x, made, i.bias)
    factors = [torch.full_like(count, FACTOR) for count in outputs]
    sources = {name: t for name, t in i.named_tensors() if name in names}
    grads = (
        torch.autograd.grad([y, *outputs], list(sources.values()), [i.dy, *factors])
        if sources
        else ()
    )
    return {"y": y.detach(), **dict(zip(sources, grads, strict=True))}
