"""The C++ backend, with its settings put back after every test."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType

import pytest

from pelt_fast.dispatch import backend


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
