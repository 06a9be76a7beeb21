"""The rows of the bottleneck adapter: `pytest bench/test_bottleneck_adapter.py`."""

from __future__ import annotations

from typing import Any

import pytest

from bench.adapter import FAMILY
from bench.case import Case
from bench.suite import MARKS, parametrize, report

pytestmark = MARKS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, FAMILY)


def test_bottleneck_adapter(
    benchmark: Any, table: Any, case: Case, pass_: str, contender: str
) -> None:
    report(benchmark, table, case, pass_, contender)
