"""When a model computes what its library computes, as accurately: for outputs, gradients, steps.

Judge is the same model in fp64. Per tensor, for the norm of the error and its largest element, both
relative to those of the tensor:

    our error <= 2 · the library's error + u · √(3L) + a · √(LK)

where the library's error is the one in that tensor or the median of those in all tensors, whichever
is larger: in one tensor of a hundred the library is lucky, and luck is no yardstick. The rest is
``rounding_of``.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

LONGEST_SUM = 128  # the feature and token counts of the models are below

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Precision:
    """Dtype of the base weights, of the adapters, and whether autocast is on."""

    name: str
    weights: torch.dtype
    adapters_fp32: bool = True
    autocast: bool = False

    @property
    def computed(self) -> torch.dtype:
        return torch.bfloat16 if self.autocast else self.weights

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            yield


FP32 = Precision("fp32", torch.float32)
BF16 = Precision("bf16", torch.bfloat16)
AUTOCAST = Precision("autocast", torch.float32, autocast=True)
PRECISIONS = [
    FP32,
    BF16,
    Precision("bf16-adapters-too", torch.bfloat16, adapters_fp32=False),
    AUTOCAST,
    Precision("autocast-bf16-base", torch.bfloat16, autocast=True),
]


def pairs(
    names: Sequence[str], precisions: Sequence[Precision], always: Sequence[Precision]
) -> Any:
    """Every model in every precision; quick are all of the first, and of the rest these and one more in turn."""
    others = [precision for precision in precisions if precision not in always]
    return pytest.mark.parametrize(
        ("name", "precision"),
        [
            pytest.param(
                name,
                precision,
                id=f"{name}-{precision.name}",
                marks=[]
                if i == 0 or precision in (*always, others[i % len(others)])
                else [pytest.mark.slow],
            )
            for i, name in enumerate(names)
            for precision in precisions
        ],
    )


def gradients(model: nn.Module) -> Results:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def one_step(model: nn.Module, batch: dict[str, Tensor]) -> Results:
    """Loss, logits, and the gradient of everything that trains."""
    model.zero_grad(set_to_none=True)
    output = model(**batch)
    output.loss.backward()
    return {"loss": output.loss.detach(), "logits": output.logits.detach(), **gradients(model)}


def three_steps(model: nn.Module, batches: list[dict[str, Tensor]]) -> Results:
    """The loss of each step, and how far each parameter has moved."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1, momentum=0.9)
    results = {}
    for index, batch in enumerate(batches):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        results[f"loss.{index}"] = loss.detach()
    results.update({name: p.detach() - start[name] for name, p in trained.items()})
    return results


def rounding_of(dtype: torch.dtype, layers: int) -> float:
    """How far apart two ways to compute the same may be, relative to its size: u · √(3L) + a · √(LK).

    u is the unit roundoff of the dtype that is computed in, a that of fp32, L the adapted layers, K the
    longest sum in them. In each layer the three operands of the adapter path (A, B, the rank-r
    intermediate; down, up, the bottleneck) are rounded to that dtype, which PEFT's float32 adapters
    over a half-precision base leave alone, and sums of K terms run in another order. The errors of
    the layers are independent and add up by squares.
    """
    operands = torch.finfo(dtype).eps / 2 * math.sqrt(3 * layers)
    return operands + torch.finfo(torch.float32).eps / 2 * math.sqrt(layers * LONGEST_SUM)


def assert_equal_but_for_rounding(
    actual: Tensor, expected: Tensor, name: str = "result", layers: int = 14
) -> None:
    assert actual.dtype is expected.dtype
    assert actual.shape == expected.shape
    error = torch.linalg.vector_norm((actual - expected).double()).item()
    allowed = (
        rounding_of(expected.dtype, layers) * torch.linalg.vector_norm(expected.double()).item()
    )
    assert error <= allowed, f"{name}: {error:.3g}, allowed {allowed:.3g}"


def assert_as_accurate(
    ours: Results,
    theirs: Results,
    exact: Results,
    dtype: torch.dtype,
    layers: int,
) -> None:
    assert_as_accurate_in_the_middle([(ours, theirs, exact)], dtype, layers)


def assert_as_accurate_in_the_middle(
    runs: Sequence[tuple[Results, Results, Results]], dtype: torch.dtype, layers: int
) -> None:
    """Of several runs (ours, theirs, exact) that differ in their data, the median error of each result counts.

    Over several steps a rounding can move a sum past the kink of a relu, in one run of many: an error that jumps.
    """
    for ours, theirs, exact in runs:
        assert ours.keys() == theirs.keys() == exact.keys()
        assert all(ours[name].dtype is theirs[name].dtype for name in exact)
    slack = rounding_of(dtype, layers)
    wrong = []
    for measure in (torch.linalg.vector_norm, _largest):
        errors, peers = (
            {
                name: statistics.median(
                    relative_error(run[i][name], run[2][name], measure) for run in runs
                )
                for name in runs[0][2]
            }
            for i in (0, 1)
        )
        typical = statistics.median(peers.values())
        for name, error in errors.items():
            allowed = 2 * max(peers[name], typical) + slack
            if not error <= allowed:
                wrong.append(f"{name}: {error:.3g}, allowed {allowed:.3g}")
    assert not wrong, "\n".join(wrong)


def relative_error(actual: Tensor, exact: Tensor, measure: Callable[[Tensor], Tensor]) -> float:
    assert actual.shape == exact.shape
    exact = exact.double()
    size = measure(exact).item()
    error = measure(actual.double() - exact).item()
    return error / size if size else error


def _largest(tensor: Tensor) -> Tensor:
    return tensor.abs().max()


def distance(actual: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Of all tensors as one vector, relative to its length."""
    assert actual.keys() == right.keys()
    errors = sum((actual[key].double() - right[key]).square().sum().item() for key in right)
    return math.sqrt(errors / sum(value.square().sum().item() for value in right.values()))
