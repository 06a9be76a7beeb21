"""Who runs in a row: a linear whose weight trains, eager PyTorch, ours per backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pelt_fast
from pelt_fast import functional as PF
from pelt_fast.functional.delta import STRETCH
from pelt_fast.testing.inputs import Inputs
from pelt_fast.testing.inputs import draw as drawn_tensor

from ..case import DTYPES
from ..contender import BACKENDS, Contender, backend_in, leaves_of, pick, recorded, what_runs
from .cases import DeltaCase

NAMES = ("full", "eager", "ours", *(f"ours[{name}]" for name in BACKENDS))
FACTOR = 1e-3
"""Of the penalty in the loss."""
THRESHOLD = 0.01


@dataclass(frozen=True)
class DeltaInputs(Inputs):
    """The tensors of a row: of diff pruning diff and log_alpha, of masking scores."""

    weight: Tensor
    bias: Tensor
    deltas: tuple[Tensor, ...]


@dataclass
class Penalised(Contender):
    """A step whose loss has the count of open gates in it, which ``forward`` leaves in ``counts``."""

    counts: list[Tensor] = field(default_factory=list)

    @property
    def backward(self) -> Callable[[Tensor], tuple[Tensor, ...]] | None:
        if not self.wrt:
            return None
        sources, dy = list(self.wrt.values()), self.inputs.dy

        def run(y: Tensor) -> tuple[Tensor, ...]:
            count = self.counts.pop()
            return torch.autograd.grad((y, count), sources, (dy, torch.full_like(count, FACTOR)))

        return run


def draw(case: DeltaCase, device: torch.device) -> DeltaInputs:
    generator, dtype = torch.Generator().manual_seed(0), DTYPES[case.dtype]
    n_in, n_out = case.in_features, case.out_features

    def tensor(*shape: int, std: float = 1.0) -> Tensor:
        return drawn_tensor(shape, std, "contiguous", dtype, device, generator)

    matrix = (n_out, n_in)
    deltas = (
        (tensor(*matrix, std=0.02), tensor(*matrix))
        if case.kind == "diff pruning"
        else (tensor(*matrix, std=0.02),)
    )
    return DeltaInputs(
        tensor(case.tokens, n_in),
        tensor(case.tokens, n_out),
        tensor(*matrix, std=n_in**-0.5),
        tensor(n_out),
        deltas,
    )


def trained(inputs: DeltaInputs) -> tuple[str, ...]:
    """x and what is tuned."""
    return ("x", *(f"deltas.{i}" for i in range(len(inputs.deltas))))


def build(name: str, case: DeltaCase, inputs: DeltaInputs) -> Contender:
    """Raises `NotHere` with the reason when this contender has no place in this row."""
    names = ("x", "weight") if name == "full" else trained(inputs)
    leaves = leaves_of(inputs, names)
    counts: list[Tensor] = []
    function, ran = _function(name, case, leaves, counts)
    kind = Penalised if case.kind == "diff pruning" and name != "full" else Contender
    contender = kind(name, leaves, recorded(case, function), pick(leaves, names), ran)
    if isinstance(contender, Penalised):
        contender.counts = counts
    return contender


def _function(
    name: str, case: DeltaCase, i: DeltaInputs, counts: list[Tensor]
) -> tuple[Callable[[], Tensor], str]:
    diff_pruning = case.kind == "diff pruning"
    if name == "full":
        return lambda: F.linear(i.x, i.weight, i.bias), "torch"
    if name == "eager":
        made = _eager_diff_pruning if diff_pruning else _eager_masking
        return lambda: F.linear(i.x, made(i, counts), i.bias), "torch"
    backend = backend_in(name)
    operation = "diff_pruning_linear" if diff_pruning else "masked_linear"
    arguments: tuple[Any, ...] = (i.x, i.weight, i.bias, *i.deltas)
    ran = what_runs(pelt_fast.explain(operation, *arguments, backend=backend), case)

    def forward() -> Tensor:
        if not diff_pruning:
            return PF.masked_linear(*arguments, threshold=THRESHOLD, backend=backend)
        y, count = PF.diff_pruning_linear(*arguments, training=True, backend=backend)
        counts[:] = [count]
        return y

    return forward, ran


def _eager_diff_pruning(i: DeltaInputs, counts: list[Tensor]) -> Tensor:
    """As it is written: noise from torch's generator, one operation after the other."""
    (diff, log_alpha), (lower, upper) = i.deltas, STRETCH
    u = torch.empty_like(log_alpha).uniform_(1e-6, 1 - 1e-6)
    gates = torch.sigmoid(torch.log(u) - torch.log(1 - u) + log_alpha)
    gates = (gates * (upper - lower) + lower).clamp(0, 1)
    counts[:] = [torch.sigmoid(log_alpha).sum()]  # -lower / upper is 1, its logarithm 0
    return i.weight + gates * diff


class _Binarise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        return (scores >= THRESHOLD).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _eager_masking(i: DeltaInputs, counts: list[Tensor]) -> Tensor:
    mask: Tensor = _Binarise.apply(i.deltas[0])
    return i.weight * mask
