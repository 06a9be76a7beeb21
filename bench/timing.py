"""Timing: one sample is one forward and one backward; contenders take turns in one process.

Other work on the machine, frequency changes and cold caches then hit every contender alike, and
ratios between contenders keep their meaning where milliseconds do not.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

PASSES = ("forward", "backward", "both")


class Step(Protocol):
    """What is timed: a forward, and a backward from its output (None: forward alone)."""

    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], Any] | None


@dataclass(frozen=True)
class Sample:
    """Seconds of one step; ``host`` is how long the host was busy with it (on a CPU: all of it)."""

    forward: float
    backward: float
    host: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


class CpuClock:
    """Wall-clock time around each pass."""

    def sample(self, step: Step) -> Sample:
        start = time.perf_counter()
        y = step.forward()
        middle = time.perf_counter()
        grads = step.backward(y) if step.backward is not None else None
        end = time.perf_counter()
        del y, grads  # freed after the clock has stopped
        return Sample(middle - start, end - middle, end - start)


class CudaClock:
    """CUDA events around each pass. Each sample starts from an L2 cache full of something else."""

    def __init__(self, device: torch.device) -> None:
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(2 * l2, 1 << 26), dtype=torch.int8, device=device)

    def sample(self, step: Step) -> Sample:
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda.synchronize()
        self._flush.zero_()
        host = time.perf_counter()
        start.record()
        y = step.forward()
        middle.record()
        grads = step.backward(y) if step.backward is not None else None
        end.record()
        host = time.perf_counter() - host
        torch.cuda.synchronize()
        del y, grads
        return Sample(start.elapsed_time(middle) / 1e3, middle.elapsed_time(end) / 1e3, host)


def clock_for(device: torch.device) -> CpuClock | CudaClock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def turns(names: Sequence[str]) -> Iterator[list[str]]:
    """The order of each round: forward, then reversed: nobody always follows the same other."""
    while True:
        yield list(names)
        yield list(reversed(names))


def interleave(
    steps: Mapping[str, Step],
    clock: CpuClock | CudaClock,
    budget_s: float,
    min_rounds: int = 3,
    max_rounds: int = 60,
) -> dict[str, list[Sample]]:
    """Samples every contender once per round until the budget is spent."""
    samples: dict[str, list[Sample]] = {name: [] for name in steps}
    end = time.perf_counter() + budget_s
    with _no_gc():
        for rounds, order in enumerate(turns(list(steps))):
            if rounds >= max_rounds or (rounds >= min_rounds and time.perf_counter() >= end):
                break
            for name in order:
                samples[name].append(clock.sample(steps[name]))
    return samples


@contextmanager
def _no_gc() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class Stat:
    """Milliseconds: median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Stat:
        p20, median, p80 = np.percentile(np.asarray(seconds) * 1e3, (20, 50, 80))
        return cls(float(median), float(p20), float(p80))


@dataclass(frozen=True)
class Overhead:
    """PELT overhead, (ours - frozen) / (PEFT - frozen); p10 and p90 of a bootstrap over rounds.

    0: tuning costs nothing over the frozen model; 1: as much as with PEFT; below 0: faster than the
    frozen model.
    """

    value: float
    low: float
    high: float


MIN_PEFT_OVERHEAD = 0.02  # of the frozen time; below it a quotient of two differences says nothing


def overhead(
    frozen: Sequence[float], eager: Sequence[float], ours: Sequence[float], resamples: int = 400
) -> Overhead | None:
    """From samples of the same rounds; None where PEFT's own overhead drowns in noise."""
    rounds = np.asarray([frozen, eager, ours])
    f, e, o = np.median(rounds, axis=1)
    if e - f < MIN_PEFT_OVERHEAD * f:
        return None
    value = float((o - f) / (e - f))
    picks = np.random.default_rng(0).integers(rounds.shape[1], size=(resamples, rounds.shape[1]))
    f, e, o = np.median(rounds[:, picks], axis=2)
    sensible = e > f
    low, high = np.percentile(((o - f)[sensible] / (e - f)[sensible]), (10, 90))
    return Overhead(value, float(low), float(high))


class InjectedTimer:
    """A clock for pytest-benchmark that stands still until a sample from elsewhere is injected.

    pytest-benchmark by itself times one function at a time, by the host's clock. With this timer
    its tables and its JSON hold the interleaved samples, CUDA events included.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def inject(self, benchmark: Any, samples: Sequence[float]) -> None:
        """Makes ``samples`` (seconds) the rounds of ``benchmark``, which uses this timer."""
        remaining = iter(samples)

        def advance() -> None:
            self.now += next(remaining, 0.0)

        # starts at zero, so that no digit of a microsecond is lost behind hours
        self.now = 0.0
        benchmark.pedantic(advance, rounds=len(samples), iterations=1)
