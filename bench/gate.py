"""No time without a right result: every contender is compared with fp64 before it is timed."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pelt_fast.random import new_seed
from pelt_fast.testing.inputs import Inputs

from .contender import Contender
from .family import Oracle

SEED = 1234


class WrongResult(AssertionError):
    """A contender is further from fp64 than it may be; its time means nothing."""


@dataclass(frozen=True)
class Error:
    """Distance from fp64, largest and mean over the elements of one tensor."""

    max: float
    mean: float

    @classmethod
    def of(cls, value: Tensor, exact: Tensor) -> Error:
        difference = (value.double() - exact).abs()
        return cls(difference.max().item(), difference.mean().item())


Errors = dict[str, Error]


class Gate:
    """The exact results of one row, computed once, and the eager composition's own errors."""

    def __init__(self, oracle: Oracle, wanted: tuple[str, ...]) -> None:
        """``wanted``: the gradients that are compared, besides y."""
        self._oracle, self._wanted = oracle, wanted
        self._exact: dict[Hashable, dict[str, Tensor]] = {}
        self._eager: dict[str, Errors] = {}

    def run(self, contender: Contender) -> tuple[dict[str, Tensor], Any]:
        """Its results, and the dropout masks that it drew, which follow from the seed."""
        torch.manual_seed(SEED)
        keep = self._oracle.masks(contender.inputs, new_seed(contender.inputs.x.device))
        torch.manual_seed(SEED)
        return contender.run(), keep

    def check(
        self, contender: Contender, results: Mapping[str, Tensor], keep: Any
    ) -> tuple[Errors, Errors]:
        """The contender's errors, and those of the eager composition with the same numbers and masks.

        Raises:
            WrongResult: an error is above what `pelt_fast.testing` allows.
        """
        exact, eager = self._yardsticks(contender.form, contender.inputs, keep)
        missing = [name for name in ("y", *contender.wrt) if name not in results]
        if missing:
            raise WrongResult(f"{contender.name} returned no {', '.join(missing)}")
        errors = {name: Error.of(value, exact[name]) for name, value in results.items()}
        suspects = {
            name: results[name]
            for name, error in errors.items()
            if not (error.max <= 2 * eager[name].max and error.mean <= 2 * eager[name].mean)
        }
        if suspects:
            # Twice eager's error is enough to pass; the whole rule, with its bound derived from the
            # shapes, costs many fp64 evaluations more and is asked only now.
            found = self._oracle.deviations(suspects, contender.inputs, keep)
            wrong = [str(deviation) for deviation in found if not deviation.ok]
            if wrong:
                raise WrongResult(f"{contender.name} is wrong: " + "; ".join(wrong))
        return errors, eager

    def _yardsticks(self, form: str, inputs: Inputs, keep: Any) -> tuple[dict[str, Tensor], Errors]:
        key = self._oracle.exact_key(inputs)
        if key not in self._exact:
            self._exact[key] = self._oracle.exact(inputs, keep, self._wanted)
        exact = self._exact[key]
        if form not in self._eager:
            composed = self._oracle.eager(inputs, keep, self._wanted)
            self._eager[form] = {
                name: Error.of(value, exact[name]) for name, value in composed.items()
            }
        return exact, self._eager[form]


def error_ratio(ours: Errors, eager: Errors) -> Error:
    """Our error over eager's, the worst of all tensors: 1 is eager's own accuracy, less is better."""

    def ratio(mine: float, theirs: float) -> float:
        return mine / theirs if theirs > 0 else (1.0 if mine == 0 else float("inf"))

    return Error(
        max(ratio(error.max, eager[name].max) for name, error in ours.items()),
        max(ratio(error.mean, eager[name].mean) for name, error in ours.items()),
    )
