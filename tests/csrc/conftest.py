"""The C++ backend, with its settings put back after every test."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch

from pelt_fast.dispatch import backend
from pelt_fast.env import CPU_ISAS


@pytest.fixture
def cpp(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    found = backend("cpp", "lora")
    if found.module is None:
        required = "cpp" in request.config.getoption("--require-backends").split(",")
        (pytest.fail if required else pytest.skip)(f"cpp: {found.missing}")
    module = importlib.import_module("pelt_fast.backends.cpp")
    isa = module.isa()
    module.clear_packed()
    yield module
    module.set_isa(isa)
    module.set_packed_limit(4096 << 20)
    module.clear_packed()


# the tiles and layouts of AMX with plain products: its code without its hardware
EMULATED = "amx_emulated"


@pytest.fixture(params=[*CPU_ISAS, EMULATED])
def isa(request: pytest.FixtureRequest, cpp: ModuleType) -> str:
    """Each instruction set in turn, in use."""
    if request.param not in (*cpp.available_isas(), EMULATED):
        pytest.skip(f"this machine has {', '.join(cpp.available_isas())}")
    cpp.set_isa(request.param)
    assert cpp.isa() == request.param
    return request.param


@pytest.fixture
def run_on(isa: str) -> Callable[[torch.dtype], None]:
    """Skips a dtype that has no kernel of its own under the set in use."""

    def check(dtype: torch.dtype) -> None:
        if isa in ("amx", EMULATED) and dtype != torch.bfloat16:
            pytest.skip("AMX multiplies bf16; other dtypes run as under the next lower set")

    return check
