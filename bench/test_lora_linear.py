"""The rows of the LoRA linear: `pytest bench/test_lora_linear.py` (`--bench-full`, `-k bf16`, ...)."""

from __future__ import annotations

from typing import Any

import pytest

from bench.case import Case
from bench.lora import FAMILY
from bench.suite import MARKS, parametrize, report

pytestmark = MARKS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, FAMILY)


def test_lora_linear(benchmark: Any, table: Any, case: Case, pass_: str, contender: str) -> None:
    report(benchmark, table, case, pass_, contender)
