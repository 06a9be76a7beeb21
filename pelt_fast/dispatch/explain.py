"""What was chosen for a problem, and why not the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .registry import BackendUnavailable
from .select import asked_for, ranked, select


@dataclass(frozen=True)
class Choice:
    """One problem: the backend that runs it (None: none can), and every backend's reasons against it."""

    problem: Any
    asked: str
    chosen: str | None
    rejected: dict[str, list[str]]
    eligible: list[str]
    error: str | None = None

    def __str__(self) -> str:
        how = "" if self.asked == "auto" else f" (asked for: {self.asked})"
        lines = [f"{self.problem} -> {self.chosen or 'none'}{how}"]
        if self.error:
            lines.append("  " + self.error.replace("\n", "\n  "))
        lines += [f"  {name} eligible, lower priority" for name in self.eligible]
        lines += [
            f"  {name} rejected: {'; '.join(reasons)}" for name, reasons in self.rejected.items()
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    """The choices of one call, forward and backward; ``str()`` is the report."""

    choices: tuple[Choice, ...]

    @property
    def backends(self) -> tuple[str | None, ...]:
        """The chosen backend of each pass."""
        return tuple(choice.chosen for choice in self.choices)

    def __str__(self) -> str:
        return "\n".join(map(str, self.choices))


def explain_problem(problem: Any, name: str = "") -> Choice:
    """The choice for one problem, made the way an operation makes it; ``name`` as the operators take it."""
    asked = name or asked_for()
    chosen, error = None, None
    try:
        chosen = select(problem, asked).name
    except BackendUnavailable as unavailable:
        error = str(unavailable)
    table = ranked(problem)
    return Choice(
        problem=problem,
        asked=asked,
        chosen=chosen,
        rejected={b.name: reasons for b, reasons in table if reasons},
        eligible=[b.name for b, reasons in table if not reasons and b.name != chosen],
        error=error,
    )
