"""One way to compute a row, and what building one needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pelt_fast.dispatch import Explanation
from pelt_fast.testing.inputs import Inputs

from .case import Case

BACKENDS = ("torch", "cpp", "triton")


class NotHere(Exception):
    """A contender that does not apply to a row, or cannot run on this machine; says why."""


AnyInputs = TypeVar("AnyInputs", bound=Inputs)


@dataclass
class Contender:
    """Computes a row from the numbers in ``inputs``; see `timing.Step`."""

    name: str
    inputs: Any
    forward: Callable[[], Tensor]
    wrt: dict[str, Tensor]
    """What it differentiates by, under the names of its inputs; empty: forward alone."""
    ran: str
    module: nn.Module | None = None
    form: str = "base"
    """Contenders of one form compute the same from the same numbers."""

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that is there before the step: keeping it for the backward costs nothing."""
        own = list(self.module.parameters()) if self.module is not None else []
        return [tensor for _, tensor in self.inputs.named_tensors()] + own

    @property
    def backward(self) -> Callable[[Tensor], tuple[Tensor, ...]] | None:
        if not self.wrt:
            return None
        sources, dy = list(self.wrt.values()), self.inputs.dy
        return lambda y: torch.autograd.grad(y, sources, dy)

    def run(self) -> dict[str, Tensor]:
        """y and the gradients by name."""
        y = self.forward()
        grads = self.backward(y) if self.backward is not None else ()
        return {"y": y.detach(), **dict(zip(self.wrt, grads, strict=True))}


def leaves_of(inputs: AnyInputs, names: tuple[str, ...]) -> AnyInputs:
    """The same numbers as leaves of autograd, of which ``names`` want a gradient."""
    leaves: AnyInputs = inputs.map(lambda name, t: t.detach().requires_grad_(name in names))
    return leaves


def pick(leaves: Inputs, names: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in leaves.named_tensors() if name in names}


def differentiable(
    name: str,
    case: Case,
    inputs: AnyInputs,
    names: tuple[str, ...],
    function: Callable[[AnyInputs], Tensor],
    ran: str,
    form: str = "base",
) -> Contender:
    """``function`` of the inputs, differentiated by those of them that are named."""
    leaves = leaves_of(inputs, names)
    forward = recorded(case, lambda: function(leaves))
    return Contender(name, leaves, forward, pick(leaves, names), ran, form=form)


def recorded(case: Case, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """In decoding, ``function`` without autograd."""
    if case.train:
        return function

    def without_grad() -> Tensor:
        with torch.no_grad():
            return function()

    return without_grad


def compiling(case: Case) -> None:
    """Makes ready for torch.compile, or raises `NotHere`."""
    if not case.compiled:
        raise NotHere("torch.compile takes part in a few rows only: it compiles for half a minute")
    torch.compiler.reset()


def backend_in(name: str) -> str | None:
    """``ours[cpp]`` asks for cpp by name; None: the automatic choice."""
    return name[len("ours[") : -1] if name.startswith("ours[") else None


def what_runs(explanation: Explanation, case: Case) -> str:
    """The backends of forward and backward, or `NotHere`."""
    choices = explanation.choices if case.train else explanation.choices[:1]
    for choice in choices:
        if choice.chosen is None:
            raise NotHere(choice.error or "no backend can run it")
    return "+".join(dict.fromkeys(str(choice.chosen) for choice in choices))
