"""`python -m bench`: the fine-tunes, the users, the kernel tables, and what is written about them."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from . import environment, mixed, plots, report, whole
from .data import MissingPackage
from .families import FAMILIES, family_of
from .finetune import FineTune, finetune, plans
from .measure import Row
from .methods import METHODS
from .progress import Teller, progress_bar
from .results import Results, collect, load, merged, save
from .suite import FULL_BUDGET_S, QUICK_BUDGET_S
from .tables import print_tables
from .users import run as users

BENCH = Path(__file__).resolve().parent
QUICK_S = {
    "finetune": dict.fromkeys(METHODS, 60.0),
    "table": QUICK_BUDGET_S,
    "users": {report.USERS_FAMILY: users.QUICK_S},
    "mixed": {report.USERS_FAMILY: mixed.QUICK_S},
    "whole": {report.WHOLE_FAMILY: whole.QUICK_S},
}
FULL_S = {
    "finetune": dict.fromkeys(METHODS, 450.0),
    "table": FULL_BUDGET_S,
    "users": {report.USERS_FAMILY: users.WHOLE_S},
    "mixed": {report.USERS_FAMILY: mixed.WHOLE_S},
    "whole": {report.WHOLE_FAMILY: whole.WHOLE_S},
}
"""By part and family."""


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    console = Console() if sys.stdout.isatty() else Console(width=118)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = options.output or BENCH / "results" / environment.slug(device)
    if options.only == "report":
        _present(load(folder), folder, options.readme, console)
        return 0
    at_length = options.full or options.users or options.only == "whole"
    seconds = FULL_S if at_length else QUICK_S
    meta = environment.describe(device)
    meta["mode"] = "full" if options.full else "quick"
    console.print(f"[bold]pelt_fast benchmark[/] on {meta['device']} ({meta['instruction_set']})")
    only = "users" if options.users else options.only
    families = [name for name in FAMILIES if options.family in (None, name)]
    budget = {
        part: options.budget or sum(of[family] for family in families if family in of)
        for part, of in seconds.items()
        if only in (None, part) and any(family in of for family in families)
    }
    minutes = sum(budget.values()) / 60
    about = f"about {minutes:.0f} minutes" if minutes >= 1.5 else "about a minute"
    console.print(f"{about}; results go to {folder}\n", highlight=False, soft_wrap=True)
    failed = False
    rows: list[Row] = []
    tunes: list[FineTune] = []
    served: dict[str, Any] | None = None
    together: dict[str, Any] | None = None
    models: dict[str, Any] | None = None
    try:
        if "finetune" in budget:
            tunes = _finetune(families, device, budget["finetune"], options.full, console)
        if "users" in budget:
            served = _users(device, budget["users"], at_length, console)
            failed |= bool(served["wrong"])
    except MissingPackage as missing:
        failed = True
        console.print(f"[red]fine-tune not run:[/] {missing}", highlight=False)
    if "mixed" in budget:
        together = _mixed(device, budget["mixed"], console)
        failed |= bool(together["wrong"])
    if "whole" in budget:
        models = _whole(device, budget["whole"], at_length, console)
        failed |= bool(models["wrong"])
    if "table" in budget:
        rows, ok = _table(families, device, budget["table"], options.full, console)
        failed |= not ok
    results = merged(collect(meta, rows, tunes, served, together, models), folder)
    save(results, folder)
    _present(load(folder), folder, options.readme, console)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--full", action="store_true", help="every row, more steps and seeds: an hour and a half"
    )
    parser.add_argument(
        "--only",
        choices=("finetune", "table", "users", "mixed", "whole", "report"),
        help="a part; report: from the last results",
    )
    parser.add_argument(
        "--users", action="store_true", help="64 users on one model alone, whole: about 5 minutes"
    )
    parser.add_argument(
        "--family", choices=tuple(FAMILIES), help="of one kernel family; the others' are kept"
    )
    parser.add_argument("--device", help="cpu or cuda; by default cuda where there is one")
    parser.add_argument("--budget", type=float, help="seconds for each part")
    parser.add_argument(
        "--output", type=Path, help="folder of the results (default: bench/results/<device>)"
    )
    parser.add_argument(
        "--readme",
        type=Path,
        help="where to write the results between the marks",
        default=environment.ROOT / "README.md",
    )
    parser.add_argument(
        "--no-readme",
        dest="readme",
        action="store_const",
        const=None,
        help="leave the README alone",
    )
    return parser


def _finetune(
    methods: Sequence[str], device: torch.device, budget_s: float, full: bool, console: Console
) -> list[FineTune]:
    found = []
    methods = [method for method in methods if method in METHODS]
    for plan in (p for m in methods for p in plans(m, device, budget_s / len(methods), full)):
        what = f"fine-tune {plan.method} {plan.dtype}"
        with progress_bar(console) as progress:
            one = finetune(plan, device, Teller(progress, progress.add_task(what, total=1.0)))
        found.append(one)
        console.print(f"{what}\n{one.replaced}", style="dim", highlight=False)
    return found


def _said_what_is_wrong(found: dict[str, Any], part: str, console: Console) -> dict[str, Any]:
    for text in found["wrong"]:
        console.print(f"{part}: {text}", style="red", highlight=False, markup=False)
    return found


def _users(device: torch.device, budget_s: float, whole: bool, console: Console) -> dict[str, Any]:
    with progress_bar(console) as progress:
        tell = Teller(progress, progress.add_task("users", total=1.0))
        found = users.run(device, budget_s, whole, tell)
    return _said_what_is_wrong(found, "users", console)


def _mixed(device: torch.device, budget_s: float, console: Console) -> dict[str, Any]:
    with progress_bar(console) as progress:
        progress.add_task("mixed batches", total=None)
        found = mixed.run(device, budget_s)
    return _said_what_is_wrong(found, "mixed batches", console)


def _whole(
    device: torch.device, budget_s: float, at_length: bool, console: Console
) -> dict[str, Any]:
    plan = whole.WHOLE if at_length else whole.QUICK
    with progress_bar(console) as progress:
        tell = Teller(progress, progress.add_task("whole models", total=1.0))
        found = whole.run(device, budget_s, plan, tell)
    return _said_what_is_wrong(found, "whole models", console)


SUITES = {
    "lora": "test_lora_linear.py",
    "adapter": "test_bottleneck_adapter.py",
    "multi_lora": "test_multi_lora.py",
    "multi_bottleneck": "test_multi_bottleneck.py",
    "compacter": "test_compacter.py",
    "delta": "test_delta.py",
    "prefix": "test_prefix.py",
    "fusion": "test_fusion.py",
}


def _table(
    families: Sequence[str], device: torch.device, budget_s: float, full: bool, console: Console
) -> tuple[list[Row], bool]:
    """Runs the pytest-benchmark suite in this process; a line per row replaces its tables."""
    with progress_bar(console) as progress:
        listener = _Listener(progress)
        arguments = [
            *(str(BENCH / SUITES[family]) for family in families),
            "-q",
            "--no-header",
            "--no-summary",
            "--capture=no",  # or the lines of the rows are swallowed
            "--benchmark-quiet",
            "-p",
            "no:cacheprovider",
            f"--bench-device={device}",
            f"--bench-budget={budget_s}",
            *(["--bench-full"] if full else []),
        ]
        code = pytest.main(arguments, plugins=[listener])
    for failure in listener.failures:
        console.print(failure, style="red", highlight=False, markup=False)
    return listener.rows, code == pytest.ExitCode.OK


class _Listener:
    """Listens to the suites: collects the rows and shows progress."""

    def __init__(self, progress: Progress) -> None:
        self.rows: list[Row] = []
        self.failures: list[str] = []
        self._progress = progress
        self._task = progress.add_task("kernel tables", total=None)
        self._began = time.monotonic()

    def pytest_bench_row(self, row: Row, done: int, total: int) -> None:
        self.rows.append(row)
        self._progress.update(
            self._task, description=f"kernel tables {done}/{total}", completed=done, total=total
        )
        self._progress.console.print(
            f"{row.case!s:46} {_line(row)}", highlight=False, markup=False, soft_wrap=True
        )

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """No dots: they would run through the lines of the rows."""
        if report.when == "call" or report.skipped or report.failed:
            return (report.outcome, "", "")
        return None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            text = str(report.longrepr).strip().splitlines()
            self.failures.append(f"{report.nodeid}: {text[-1] if text else 'failed'}")


def _line(row: Row) -> str:
    if row.not_run:
        return f"not run: {row.not_run}"
    family = family_of(row.case)
    ours = row.entries.get(family.main)
    if ours is None or not ours.times:
        return ours.wrong or ours.missing if ours else "not measured"
    pass_, rival = row.case.main_pass, family.rivals[family.main]
    overhead = ours.overhead.get(pass_)
    text = "  ".join(
        f"{name} {row.entries[name].ms(pass_):8.3f}" for name in (family.floor, rival, family.main)
    )
    text += " ms" + (f"  overhead {overhead.value:+.2f}" if overhead else "")
    return text + f"  ({ours.ran}, {row.rounds} rounds)"


def _present(results: Results, folder: Path, readme: Path | None, console: Console) -> None:
    drawn = plots.plot_all(results, folder)
    console.print()
    for family in FAMILIES:
        print_tables(console, report.tables(results, family))
    for line in report.summary(results):
        console.print(line.replace("**", ""), style="bold", highlight=False)
    console.print(report.provenance(results), style="dim", highlight=False)
    written = [
        folder / "results.json",
        folder / "kernels.csv",
        folder / "finetune.csv",
        folder / "users.csv",
        *drawn,
    ]
    if readme is not None and readme.exists() and report.update_readme(readme, results, folder):
        written.append(readme)
    names = ", ".join(str(path) for path in written)
    console.print(f"\nwritten: {names}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
