"""`python -m bench.study`: UniPELT's protocol on real texts; goes on where it was broken off."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from rich.console import Console

from .. import environment
from ..data import MissingPackage
from ..progress import Teller, progress_bar
from ..report import provenance
from ..tables import print_tables
from . import page, picture
from .cost import cost
from .material import Material, Packages, Tiny
from .methods import METHODS
from .protocol import SAMPLES, SEEDS, Protocol, runs
from .record import Record, line_of
from .tables import tables
from .train import Study

BENCH = Path(__file__).resolve().parent.parent
PAGE = environment.ROOT / "docs" / "study.md"
CACHE = environment.ROOT / "build" / "study"
SMALL = Protocol(
    length=12, batch=8, epochs=2, dev=16, test=16, rate_scale=10.0, source_samples=16, source_epochs=1
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    console = Console() if sys.stdout.isatty() else Console(width=118)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.threads:
        torch.set_num_threads(options.threads)
    folder = options.output or (
        environment.ROOT / "build" / "study-small"
        if options.small
        else BENCH / "results" / environment.slug(device)
    )
    record = Record(folder)
    if options.only != "report":
        material: Material = Tiny() if options.small else Packages()
        cache = options.cache or (folder if options.small else CACHE)
        study = Study(material, SMALL if options.small else _protocol(options), cache, device)
        try:
            if options.only in (None, "runs"):
                _runs(study, record, options, console)
            if options.only in (None, "costs"):
                _costs(study, record, options, console)
        except MissingPackage as missing:
            console.print(f"[red]not run:[/] {missing}", highlight=False)
            return 1
    _present(record, folder, None if options.small else options.page, console)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.study", description=__doc__)
    whole = Protocol()
    parser.add_argument("--samples", type=int, nargs="+", metavar="K", help=f"default {SAMPLES}")
    parser.add_argument("--seeds", type=int, nargs="+", help=f"of the data; default {SEEDS}")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--tasks", nargs="+", choices=tuple(Packages.tasks), default=["sentiment"])
    parser.add_argument("--budget", type=float, help="minutes after which no further run begins")
    parser.add_argument(
        "--accelerated-seeds", type=int, default=2, help="how many seeds are also run accelerated"
    )
    parser.add_argument("--small", action="store_true", help="a tiny model: all of it in seconds")
    parser.add_argument("--only", choices=("runs", "costs", "report"))
    parser.add_argument("--epochs", type=int, default=whole.epochs)
    parser.add_argument("--patience", type=int, default=whole.patience, help="epochs")
    parser.add_argument("--dev", type=int, default=whole.dev, help="samples to develop on")
    parser.add_argument("--test", type=int, default=whole.test, help="held-out texts")
    parser.add_argument("--rate-scale", type=float, default=1.0, help="times the learning rates")
    parser.add_argument("--source-samples", type=int, default=whole.source_samples)
    parser.add_argument("--source-epochs", type=int, default=whole.source_epochs)
    parser.add_argument(
        "--cost-seconds", type=float, default=15.0, help="for each timing of a method"
    )
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--device", help="cpu or cuda; by default cuda where there is one")
    parser.add_argument("--output", type=Path, help="default: bench/results/<device>")
    parser.add_argument("--cache", type=Path, help="of trained adapters; default: build/study")
    parser.add_argument("--page", type=Path, default=PAGE, help="written to between its marks")
    parser.add_argument("--no-page", dest="page", action="store_const", const=None)
    return parser


def _protocol(options: argparse.Namespace) -> Protocol:
    return Protocol(
        epochs=options.epochs,
        patience=options.patience,
        dev=options.dev,
        test=options.test,
        rate_scale=options.rate_scale,
        source_samples=options.source_samples,
        source_epochs=options.source_epochs,
    )


def _runs(study: Study, record: Record, options: argparse.Namespace, console: Console) -> None:
    """What is not in the record yet, until the budget is spent."""
    small = options.small
    wanted = list(
        runs(
            list(Tiny.tasks) if small else options.tasks,
            options.samples or ((16,) if small else SAMPLES),
            options.seeds or (SEEDS[:2] if small else SEEDS),
            options.methods,
            1 if small else options.accelerated_seeds,
            [name for name, method in METHODS.items() if method.in_library],
        )
    )
    left = [run for run in wanted if not record.done(run, study.protocol)]
    console.print(f"{len(left)} of {len(wanted)} runs to do; {record.csv}", highlight=False)
    commit = environment.commit()  # of what runs, whatever is checked out meanwhile
    end = time.monotonic() + 60 * options.budget if options.budget else float("inf")
    with progress_bar(console) as progress:
        whole = progress.add_task("runs", total=len(left))
        one = progress.add_task("", total=1.0)
        for number, run in enumerate(left):
            if time.monotonic() >= end:
                console.print(f"the budget is spent: {len(left) - number} runs are left")
                break
            outcome = study.run(run, Teller(progress, one))
            record.add(line_of(run, study.protocol, outcome, commit, study.material.name))
            progress.advance(whole)
            text = f"{run!s:48} {100 * outcome.test:5.1f} % after {outcome.fitted.best_epoch + 1} epochs"
            console.print(f"{text}, {outcome.seconds:.0f} s", highlight=False)


def _costs(study: Study, record: Record, options: argparse.Namespace, console: Console) -> None:
    """Of each method, anew; those of other methods are kept."""
    seconds = 0.05 if options.small else options.cost_seconds
    task = next(iter(study.material.tasks))
    found: dict[str, Any] = record.load()
    with progress_bar(console) as progress:
        bar = progress.add_task("costs", total=1.0)
        for name in options.methods:
            tell = Teller(progress, bar)
            found.setdefault("costs", {})[name] = cost(study, name, task, seconds, tell)
            found["meta"] = {**environment.describe(study.device), "model": study.material.name}
            record.save(found)


def _present(record: Record, folder: Path, to: Path | None, console: Console) -> None:
    found = record.load()
    costs = found.get("costs", {})
    costs = {name: costs[name] for name in METHODS if name in costs}
    shown = tables(record.lines, costs)
    print_tables(console, shown)
    written = [record.csv, record.json]
    if "meta" in found:
        console.print(provenance(found), style="dim", highlight=False)
        if picture.draw(record.lines, costs, found["meta"], folder / "study.png"):
            written.append(folder / "study.png")
    if to is not None and to.exists() and "meta" in found:
        page.update(to, shown, provenance(found), folder / "study.png")
        written.append(to)
    names = ", ".join(str(path) for path in written)
    console.print(f"written: {names}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
