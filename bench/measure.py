"""One row of the table: build the contenders, check them, watch their memory, time them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import contenders, gate, memory
from .cases import Case
from .contenders import Contender
from .probe import seconds_per_flop
from .timing import Overhead, Sample, Stat, clock_for, interleave, overhead

PEFT_OF = {f"ours_{form}": f"peft_{form}" for form in contenders.FORMS} | {
    f"ours[{backend}]": "peft_base" for backend in contenders.BACKENDS
}
"""Whom each of ours is compared with."""


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

    @property
    def main_pass(self) -> str:
        return "both" if self.case.train else "forward"


MIN_ROUNDS = 3
"""Of a row of which a round takes less than the time given to the row."""


@dataclass(frozen=True)
class Limits:
    """How long a row may take."""

    sample_s: float
    """For the samples of all contenders; one round of them is the least."""
    round_s: float
    """A row whose single round would take longer is listed as not run, with the estimate."""


def measure(
    case: Case, device: torch.device, limits: Limits, names: Sequence[str] = contenders.NAMES
) -> Row:
    row = Row(case)
    drawn = contenders.draw(case, device)
    built = _build(row, drawn, names)
    estimate = estimate_round_s(case, device, len(built))
    if estimate > limits.round_s:
        row.not_run = f"estimated {estimate:.0f} s for each round of {len(built)} contenders"
        row.entries.clear()
        return row
    _check(row, built, drawn)
    _watch_memory(row, built, device)
    _time(row, built, device, limits)
    return row


def _build(row: Row, drawn: Any, names: Sequence[str]) -> dict[str, Contender]:
    built = {}
    for name in names:
        entry = row.entries[name] = Entry(name)
        try:
            built[name] = contenders.build(name, row.case, drawn)
        except contenders.NotHere as reason:
            entry.missing = str(reason)
        else:
            entry.ran = built[name].ran
    return built


def _check(row: Row, built: dict[str, Contender], drawn: Any) -> None:
    """The first call of each contender: the results must be right before a clock starts."""
    judge = gate.Gate(drawn, ("x", "lora_a.0", "lora_b.0") if row.case.train else ())
    for name, contender in list(built.items()):
        entry = row.entries[name]
        try:
            results, keep = judge.run(contender)
            # Not judged: the frozen linear computes something else, and PEFT's dropout draws masks
            # of its own.
            if name not in ("frozen", "peft_dropout"):
                entry.errors, eager = judge.check(contender, results, keep)
                entry.error_ratio = gate.error_ratio(entry.errors, eager)
        except gate.WrongResult as wrong:
            entry.wrong = str(wrong)
            del built[name]
        except Exception as error:
            # torch.compile needs a C++ compiler, which a machine may lack; of ours, every failure
            # is a failure
            if name != "peft_compiled":
                raise
            entry.missing = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            del built[name]


def _watch_memory(row: Row, built: dict[str, Contender], device: torch.device) -> None:
    if not row.case.train:
        return
    for name, contender in built.items():
        entry = row.entries[name]
        entry.peak_bytes = memory.peak_bytes(contender.run, device)
        if name == "peft_compiled":
            continue  # keeps its saved tensors out of sight of the hooks
        entry.saved_bytes = memory.saved_bytes(contender.forward, contender.tensors)


def _time(row: Row, built: dict[str, Contender], device: torch.device, limits: Limits) -> None:
    # checking and watching were the warm-up
    slow = estimate_round_s(row.case, device, len(built)) > limits.sample_s
    samples = interleave(
        built, clock_for(device), limits.sample_s, min_rounds=1 if slow else MIN_ROUNDS
    )
    row.rounds = len(next(iter(samples.values())))
    for name, taken in samples.items():
        entry = row.entries[name]
        entry.samples = taken
        for pass_ in row.case.passes:
            entry.times[pass_] = Stat.of([getattr(sample, pass_) for sample in taken])
        if device.type == "cuda":
            entry.host_ms = Stat.of([sample.host for sample in taken]).median
    _compare(row)


def _compare(row: Row) -> None:
    def seconds(name: str, pass_: str) -> list[float]:
        return [getattr(sample, pass_) for sample in row.entries[name].samples]

    for name, rival in PEFT_OF.items():
        if not all(n in row.entries and row.entries[n].samples for n in ("frozen", name, rival)):
            continue
        for pass_ in row.case.passes:
            found = overhead(seconds("frozen", pass_), seconds(rival, pass_), seconds(name, pass_))
            if found is not None:
                row.entries[name].overhead[pass_] = found


def estimate_round_s(case: Case, device: torch.device, contenders_count: int) -> float:
    """Seconds for one round of all contenders, from a small frozen step in the same dtype."""
    if device.type == "cuda":
        return 0.0
    return case.frozen_flops * seconds_per_flop(case.dtype, case.train) * contenders_count
