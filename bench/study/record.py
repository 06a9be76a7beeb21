"""What a study leaves: a line of CSV for each run, appended when it ends, and a JSON file of the costs."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .protocol import COLUMNS, Protocol, Run, key
from .train import Outcome

Line = dict[str, Any]
MEASURED = (
    "test_accuracy", "dev_accuracy", "best_epoch", "epochs_run", "steps", "last_loss", "seconds", "commit", "model",
)  # fmt: skip


def line_of(run: Run, protocol: Protocol, outcome: Outcome, commit: str, model: str) -> Line:
    fitted = outcome.fitted
    return {
        **asdict(run),
        **asdict(protocol),
        "test_accuracy": round(outcome.test, 5),
        "dev_accuracy": round(fitted.dev[fitted.best_epoch], 5),
        "best_epoch": fitted.best_epoch + 1,
        "epochs_run": len(fitted.dev),
        "steps": fitted.steps,
        "last_loss": float(f"{fitted.losses[-1]:.5g}"),
        "seconds": round(outcome.seconds, 1),
        "commit": commit,
        "model": model,
    }


class Record:
    """The files ``study.csv`` and ``study.json`` of a folder."""

    def __init__(self, folder: Path) -> None:
        self.csv, self.json = folder / "study.csv", folder / "study.json"
        self.lines: list[Line] = []
        if self.csv.exists():
            with self.csv.open(newline="", encoding="utf-8") as file:
                self.lines = list(csv.DictReader(file))

    def done(self, run: Run, protocol: Protocol) -> bool:
        wanted = key({**asdict(run), **asdict(protocol)})
        return any(key(line) == wanted for line in self.lines)

    def add(self, line: Line) -> None:
        """At once: a study that is broken off goes on where it was."""
        self.csv.parent.mkdir(parents=True, exist_ok=True)
        with self.csv.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, (*COLUMNS, *MEASURED), lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(line)
        self.lines.append({name: str(value) for name, value in line.items()})

    def load(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.json.read_text()) if self.json.exists() else {}
        return found

    def save(self, costs: dict[str, Any]) -> None:
        self.json.parent.mkdir(parents=True, exist_ok=True)
        self.json.write_text(json.dumps(costs, indent=1) + "\n", encoding="utf-8")
