"""Fixtures for every test: the backends with their own reasons to skip, and memory that is poisoned with NaN."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import pelt_fast
from pelt_fast import functional as PF
from pelt_fast.env import BACKENDS
from pelt_fast.testing.workloads import LoRAInputs


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the tensors of the tests live: cpu or cuda")
    parser.addoption(
        "--require-backends",
        default="",
        metavar="NAMES",
        help="comma-separated backends that must run: what would be a skip is a failure",
    )


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")


@dataclass(frozen=True)
class Backend:
    """One backend under test. What it cannot run, by its own account, is skipped with its reasons."""

    name: str
    required: bool

    def require(self, inputs: LoRAInputs) -> None:
        explanation = pelt_fast.explain("lora_linear", *inputs.args, **inputs.kwargs, backend=self.name)
        errors = [choice.error for choice in explanation.choices if choice.error]
        if errors:
            (pytest.fail if self.required else pytest.skip)("\n".join(errors))

    def __call__(self, inputs: LoRAInputs) -> Tensor:
        self.require(inputs)
        return PF.lora_linear(*inputs.args, **inputs.kwargs, backend=self.name)


@pytest.fixture(params=[name for name in BACKENDS if name != "auto"])
def backend(request: pytest.FixtureRequest) -> Backend:
    required = request.config.getoption("--require-backends").split(",")
    return Backend(request.param, request.param in required)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN, in Python and in C++ (`at::empty` obeys it too): an element that is not written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
