"""Fixtures for every test: the backends with their own reasons to skip, and memory that is poisoned with NaN."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import pelt_fast
from pelt_fast import functional as PF
from pelt_fast.env import env
from pelt_fast.testing import adapter_oracle, fusion_oracle, multi_lora_oracle, oracle
from pelt_fast.testing.adapter_workloads import BlockInputs
from pelt_fast.testing.fusion_workloads import FusionInputs
from pelt_fast.testing.inputs import Inputs
from pelt_fast.testing.multi_lora_workloads import MultiLoRAInputs

from .interpreters import Interpreters

# cuBLAS is deterministic, as `poisoned_memory` demands, only with a workspace of its own.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", help="where the tensors of the tests live: cpu or cuda"
    )
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

    def require(self, inputs: Inputs) -> None:
        explanation = pelt_fast.explain(
            inputs.operation, *inputs.args, **inputs.kwargs, backend=self.name
        )
        # Without the line that names the problem, so that pytest folds equal reasons into one.
        reasons = {
            line.strip()
            for choice in explanation.choices
            for line in (choice.error or "").splitlines()[1:]
        }
        if reasons:
            (pytest.fail if self.required else pytest.skip)(f"{self.name}: {' '.join(reasons)}")

    def __call__(self, inputs: Inputs) -> Tensor:
        self.require(inputs)
        function = getattr(PF, inputs.operation)
        y = function(*inputs.args, **inputs.kwargs, backend=self.name)
        return multi_lora_oracle.joined(y) if isinstance(inputs, MultiLoRAInputs) else y

    def run(
        self, inputs: Inputs, wanted: Iterable[str] | None = None, seed: int = 0
    ) -> tuple[oracle.Results, Any]:
        """y and the gradients by name, and the dropout mask or masks that the call drew."""
        if isinstance(inputs, BlockInputs):
            return adapter_oracle.run_with_mask(self, inputs, wanted, seed)
        if isinstance(inputs, FusionInputs):
            return fusion_oracle.run_with_mask(self, inputs, wanted, seed)
        if isinstance(inputs, MultiLoRAInputs):
            return multi_lora_oracle.run_with_masks(self, inputs, wanted, seed)
        return oracle.run_with_masks(self, inputs, wanted, seed)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a GPU every test that takes a device is one of the GPU's."""
    if config.getoption("--device") != "cpu":
        for item in items:
            if "device" in getattr(item, "fixturenames", ()):
                item.add_marker("gpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        on_gpu = metafunc.config.getoption("--device") != "cpu"
        names = ["reference", "torch", *(["triton"] if on_gpu or env.triton_cpu else ["cpp"])]
        metafunc.parametrize("backend", names, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Backend:
    required = request.config.getoption("--require-backends").split(",")
    return Backend(request.param, request.param in required)


@pytest.fixture(scope="session")
def interpreters() -> Iterator[Interpreters]:
    """Runs programs outside of this process."""
    found = Interpreters()
    yield found
    found.close()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """On a busy machine the threads of tiny operations wait for each other ten times longer than they compute."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN, in Python and in C++ (`at::empty` obeys it too): an element that is not written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
