"""The rows of batched bottleneck adapters: `pytest bench/test_multi_bottleneck.py`."""

from __future__ import annotations

from typing import Any

import pytest

from bench.case import Case
from bench.multi_bottleneck import FAMILY
from bench.suite import MARKS, parametrize, report

pytestmark = MARKS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, FAMILY)


def test_multi_bottleneck(
    benchmark: Any, table: Any, case: Case, pass_: str, contender: str
) -> None:
    report(benchmark, table, case, pass_, contender)
