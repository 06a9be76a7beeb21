"""Options of the kernel tables, and their rows: each is measured once, for all its tests."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
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
        budget_s: float | None,
        full: bool,
        cases: Iterable[Case],
        tell: Callable[[Row, int, int], None],
    ) -> None:
        """``budget_s`` for all of the cases; None: what the suite gives to their families."""
        self._device, self._full, self._tell = device, full, tell
        rows = Counter(case.family for case in cases)
        of_families = FULL_BUDGET_S if full else QUICK_BUDGET_S
        planned = sum(of_families[family] for family in rows)
        self._budget_s = planned if budget_s is None else budget_s
        self._end = time.monotonic() + self._budget_s
        scale = self._budget_s / planned
        self._reserved = {
            family: scale * of_families[family] / count for family, count in rows.items()
        }
        """For each row of a family that waits: no other family's rows use it up."""
        self._left = rows
        self._rows: dict[Case, Row] = {}
        self._total = sum(rows.values())

    def row(self, case: Case) -> Row:
        if case not in self._rows:
            self._rows[case] = self._measure(case)
            self._left[case.family] -= 1
            self._tell(self._rows[case], len(self._rows), self._total)
        return self._rows[case]

    def _measure(self, case: Case) -> Row:
        others = sum(
            self._reserved[family] * count
            for family, count in self._left.items()
            if family != case.family
        )
        left = self._end - time.monotonic() - others
        if left <= 0:
            return Row(case, not_run=f"the tables' time budget of {self._budget_s:.0f} s was spent")
        share = left / self._left[case.family]
        # A part of each share goes into building, checking and watching.
        sample_s = min(0.7 * share, 30.0 if self._full else 6.0)
        limits = Limits(sample_s, round_s=60.0 if self._full else 1.5)
        return measure(family_of(case), case, self._device, limits)


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> Table:
    config = request.config
    items = [item for item in request.session.items if "case" in item.callspec.params]
    return Table(
        bench_device(config),
        config.getoption("--bench-budget"),
        config.getoption("--bench-full"),
        {item.callspec.params["case"] for item in items},
        lambda row, done, total: config.hook.pytest_bench_row(row=row, done=done, total=total),
    )


def bench_device(config: pytest.Config) -> torch.device:
    asked = config.getoption("--bench-device")
    return torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
