"""Options of the kernel tables, and their rows: each is measured once, for all its tests."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.case import Case
from bench.families import family_of
from bench.measure import Limits, Row, measure
from bench.suite import FULL_BUDGET_S, QUICK_BUDGET_S


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pelt_fast kernel tables")
    group.addoption(
        "--bench-full", action="store_true", help="every row, not only the representative ones"
    )
    group.addoption("--bench-budget", type=float, help="seconds for all rows")
    group.addoption("--bench-device", help="cpu or cuda; by default cuda where there is one")


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(_Hooks)


class _Hooks:
    """What a caller of pytest may listen to."""

    def pytest_bench_row(self, row: Row, done: int, total: int) -> None:
        """A row has been measured, or has been left out."""


class Table:
    """Measures rows on demand, of all families, and keeps to the time budget."""

    def __init__(
        self,
        device: torch.device,
        budget_s: float,
        full: bool,
        total: int,
        tell: Callable[[Row, int, int], None],
    ) -> None:
        self._device, self._full, self._total, self._tell = device, full, total, tell
        self._end = time.monotonic() + budget_s
        self._budget_s = budget_s
        self._rows: dict[Case, Row] = {}

    def row(self, case: Case) -> Row:
        if case not in self._rows:
            self._rows[case] = self._measure(case)
            self._tell(self._rows[case], len(self._rows), self._total)
        return self._rows[case]

    def _measure(self, case: Case) -> Row:
        left = self._end - time.monotonic()
        if left <= 0:
            return Row(case, not_run=f"the tables' time budget of {self._budget_s:.0f} s was spent")
        share = left / max(1, self._total - len(self._rows))
        # A part of each share goes into building, checking and watching.
        sample_s = min(0.7 * share, 30.0 if self._full else 6.0)
        limits = Limits(sample_s, round_s=60.0 if self._full else 1.5)
        return measure(family_of(case), case, self._device, limits)


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> Table:
    config = request.config
    full = config.getoption("--bench-full")
    budget = config.getoption("--bench-budget") or (FULL_BUDGET_S if full else QUICK_BUDGET_S)
    total = len(
        {
            item.callspec.params["case"]
            for item in request.session.items
            if "case" in item.callspec.params
        }
    )
    return Table(
        bench_device(config),
        budget,
        full,
        total,
        lambda row, done, total: config.hook.pytest_bench_row(row=row, done=done, total=total),
    )


def bench_device(config: pytest.Config) -> torch.device:
    asked = config.getoption("--bench-device")
    return torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
