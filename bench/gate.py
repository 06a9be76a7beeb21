"""No time without a right result: every contender is compared with fp64 before it is timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pelt_fast.random import new_seed
from pelt_fast.testing import oracle, tolerance
from pelt_fast.testing.workloads import LoRAInputs

from .contenders import Contender

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
    """The exact results of one row, computed once, and PEFT's own errors in its dtypes."""

    def __init__(self, inputs: LoRAInputs, wanted: tuple[str, ...]) -> None:
        """``inputs``: the row's numbers; ``wanted``: the gradients that are compared, besides y."""
        self._inputs, self._wanted = inputs, wanted
        self._exact: dict[float, oracle.Results] = {}
        self._eager: dict[tuple[float, torch.dtype], Errors] = {}

    def run(self, contender: Contender) -> tuple[dict[str, Tensor], oracle.Masks]:
        """Its results, and the dropout masks that it drew, which follow from the seed."""
        torch.manual_seed(SEED)
        keep = oracle.masks(contender.inputs, new_seed(contender.inputs.x.device))
        torch.manual_seed(SEED)
        return contender.run(), keep

    def check(
        self, contender: Contender, results: Mapping[str, Tensor], keep: oracle.Masks
    ) -> tuple[Errors, Errors]:
        """The contender's errors, and those of PEFT's composition with the same numbers and masks.

        Raises:
            WrongResult: an error is above what `pelt_fast.testing.tolerance` allows.
        """
        exact, eager = self._yardsticks(contender.inputs, keep)
        missing = [name for name in ("y", *contender.wrt) if name not in results]
        if missing:
            raise WrongResult(f"{contender.name} returned no {', '.join(missing)}")
        errors = {name: Error.of(value, exact[name]) for name, value in results.items()}
        within = all(
            error.max <= 2 * eager[name].max and error.mean <= 2 * eager[name].mean
            for name, error in errors.items()
        )
        if not within:
            # Twice eager's error is enough to pass; the whole rule, with its bound derived from K,
            # costs four fp64 evaluations more and is asked only now.
            found = tolerance.deviations(dict(results), contender.inputs, keep)
            wrong = [str(deviation) for deviation in found if not deviation.ok]
            if wrong:
                raise WrongResult(f"{contender.name} is wrong: " + "; ".join(wrong))
        return errors, eager

    def _yardsticks(self, inputs: LoRAInputs, keep: oracle.Masks) -> tuple[oracle.Results, Errors]:
        p, adapter_dtype = inputs.dropout_p[0], inputs.lora_a[0].dtype
        if p not in self._exact:
            self._exact[p] = oracle.exact(inputs, keep, self._wanted)
        exact = self._exact[p]
        key = (p, adapter_dtype)
        if key not in self._eager:
            composed = oracle.eager(inputs, keep, self._wanted)
            self._eager[key] = {
                name: Error.of(value, exact[name]) for name, value in composed.items()
            }
        return exact, self._eager[key]


def error_ratio(ours: Errors, eager: Errors) -> Error:
    """Our error over PEFT's, the worst of all tensors: 1 is PEFT's own accuracy, less is better."""

    def ratio(mine: float, theirs: float) -> float:
        return mine / theirs if theirs > 0 else (1.0 if mine == 0 else float("inf"))

    return Error(
        max(ratio(error.max, eager[name].max) for name, error in ours.items()),
        max(ratio(error.mean, eager[name].mean) for name, error in ours.items()),
    )
