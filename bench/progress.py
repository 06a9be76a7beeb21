"""A bar that moves while something runs; where there is no terminal to draw it, a line now and then."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)


def progress_bar(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


class Teller:
    """Moves a progress bar; where there is no terminal to draw it, prints a line now and then."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task, self._last = progress, task, 0.0

    def __call__(self, text: str, done: float) -> None:
        self._progress.update(self._task, description=text, completed=done)
        console = self._progress.console
        if not console.is_terminal and time.monotonic() - self._last > 10:
            self._last = time.monotonic()
            console.print(text, highlight=False, markup=False)
