"""One row of the table: build the contenders, check them, watch their memory, time them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import gate, memory
from .case import Case
from .contender import Contender, NotHere
from .family import Family
from .probe import seconds
from .timing import Overhead, Sample, Stat, clock_for, interleave, overhead


@dataclass
class Entry:
    """One contender of a row."""

    name: str
    ran: str = ""
    """The backend that really ran, forward and backward; or why there is no time."""
    times: dict[str, Stat] = field(default_factory=dict)
    host_ms: float | None = None
    overhead: dict[str, Overhead] = field(default_factory=dict)
    errors: gate.Errors = field(default_factory=dict)
    error_ratio: gate.Error | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    missing: str = ""
    wrong: str = ""
    samples: list[Sample] = field(default_factory=list)
    """The raw samples: for pytest-benchmark, not for the record."""

    def ms(self, pass_: str) -> float:
        return self.times[pass_].median if pass_ in self.times else math.nan


@dataclass
class Row:
    """A case with everything measured about it."""

    case: Case
    rounds: int = 0
    not_run: str = ""
    entries: dict[str, Entry] = field(default_factory=dict)


MIN_ROUNDS = 3
"""Of a row of which a round takes less than the time given to the row."""


@dataclass(frozen=True)
class Limits:
    """How long a row may take."""

    sample_s: float
    """For the samples of all contenders; one round of them is the least."""
    round_s: float
    """A row whose single round would take longer is listed as not run, with the estimate: checking
    and watching its memory take four more."""


def measure(
    family: Family,
    case: Case,
    device: torch.device,
    limits: Limits,
    names: Sequence[str] | None = None,
) -> Row:
    row = Row(case)
    names = family.contenders if names is None else names
    estimate = estimate_round_s(case, device, names)
    if estimate > limits.round_s:
        row.not_run = f"estimated {estimate:.0f} s for each round of its contenders"
        return row
    drawn = family.draw(case, device)
    built = _build(family, row, drawn, names)
    _check(family, row, built, drawn)
    _watch_memory(family, row, built, device)
    _time(row, built, device, limits)
    _compare(family, row)
    return row


def _build(family: Family, row: Row, drawn: Any, names: Sequence[str]) -> dict[str, Contender]:
    built = {}
    for name in names:
        entry = row.entries[name] = Entry(name)
        try:
            built[name] = family.build(name, row.case, drawn)
        except NotHere as reason:
            entry.missing = str(reason)
        else:
            entry.ran = built[name].ran
    return built


def _check(family: Family, row: Row, built: dict[str, Contender], drawn: Any) -> None:
    """The first call of each contender: the results must be right before a clock starts."""
    judge = gate.Gate(family.oracle, family.trained(drawn) if row.case.train else ())
    for name, contender in list(built.items()):
        entry = row.entries[name]
        try:
            results, keep = judge.run(contender)
            if name not in family.unjudged:
                entry.errors, eager = judge.check(contender, results, keep)
                entry.error_ratio = gate.error_ratio(entry.errors, eager)
        except gate.WrongResult as wrong:
            entry.wrong = str(wrong)
            del built[name]
        except Exception as error:
            text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
            if name == family.may_fail:
                entry.missing = text
            else:
                entry.wrong = f"{name} failed: {text}"
            del built[name]


def _watch_memory(
    family: Family, row: Row, built: dict[str, Contender], device: torch.device
) -> None:
    if not row.case.train:
        return
    for name, contender in built.items():
        entry = row.entries[name]
        entry.peak_bytes = memory.peak_bytes(contender.run, device)
        if name == family.may_fail:
            continue  # compiled, it keeps its saved tensors out of sight of the hooks
        entry.saved_bytes = memory.saved_bytes(contender.forward, contender.tensors)


def _time(row: Row, built: dict[str, Contender], device: torch.device, limits: Limits) -> None:
    # checking and watching were the warm-up
    slow = estimate_round_s(row.case, device, list(built)) > limits.sample_s
    samples = interleave(
        built, clock_for(device), limits.sample_s, min_rounds=1 if slow else MIN_ROUNDS
    )
    row.rounds = len(next(iter(samples.values()), []))
    for name, taken in samples.items():
        entry = row.entries[name]
        entry.samples = taken
        for pass_ in row.case.passes:
            entry.times[pass_] = Stat.of([getattr(sample, pass_) for sample in taken])
        if device.type == "cuda":
            entry.host_ms = Stat.of([sample.host for sample in taken]).median


def _compare(family: Family, row: Row) -> None:
    def seconds_of(name: str, pass_: str) -> list[float]:
        return [getattr(sample, pass_) for sample in row.entries[name].samples]

    for name, rival in family.rivals.items():
        three = (family.floor, rival, name)
        if not all(n in row.entries and row.entries[n].samples for n in three):
            continue
        for pass_ in row.case.passes:
            found = overhead(*(seconds_of(n, pass_) for n in three))
            if found is not None:
                row.entries[name].overhead[pass_] = found


def estimate_round_s(case: Case, device: torch.device, names: Sequence[str]) -> float:
    """Seconds for one round, as if PyTorch's contenders each did an eager step, and ours nothing.

    Where a round takes seconds at all, ours is far faster: PyTorch lacks fast kernels there.
    """
    if device.type == "cuda":
        return 0.0
    eager = [name for name in names if name == "ours[torch]" or not name.startswith("ours")]
    return seconds(*case.work, case.dtype, case.train) * len(eager)
