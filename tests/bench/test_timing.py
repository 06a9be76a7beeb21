from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.timing import CpuClock, CudaClock, Sample, Stat, interleave, overhead, turns

SAMPLES = [0.003, 0.001, 0.002, 7.0]
ROOT = Path(__file__).resolve().parents[2]


def test_injected_samples_are_what_pytest_benchmark_reports(
    tmp_path: Path, interpreters: Any
) -> None:
    """In a pytest of its own: pytest-benchmark does nothing under pytest-xdist."""
    (tmp_path / "test_injected.py").write_text(f"""
import pytest
from bench.timing import InjectedTimer

TIMER = InjectedTimer()

@pytest.mark.benchmark(timer=TIMER)
def test_it(benchmark):
    TIMER.inject(benchmark, {SAMPLES})
""")
    report = tmp_path / "report.json"
    options = [
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir",
        str(tmp_path),
    ]
    arguments = [*options, f"--benchmark-json={report}", str(tmp_path)]
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    program = f"import pytest\nsys.exit(pytest.main({arguments!r}))"
    done = interpreters(program, ROOT, cwd=tmp_path, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(report.read_text())["benchmarks"]
    assert found["stats"]["data"] == pytest.approx(SAMPLES, abs=1e-12)
    assert found["stats"]["median"] == pytest.approx(0.0025)


def test_passes_are_timed_apart(steps: Any) -> None:
    def slow(seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    step = steps(lambda: slow(0.002), lambda y: slow(0.02))
    sample = CpuClock().sample(step)
    assert sample.forward >= 0.002
    assert sample.backward >= 0.02
    assert sample.both == pytest.approx(sample.host, rel=1e-3)


def test_forward_alone(steps: Any) -> None:
    assert CpuClock().sample(steps(lambda: torch.zeros(1))).backward < 0.01


def test_cuda_clock_flushes_and_reads_events(monkeypatch: pytest.MonkeyPatch, steps: Any) -> None:
    log: list[str] = []

    class Event:
        count = 0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at, Event.count = Event.count, Event.count + 1
            log.append("event")

        def elapsed_time(self, end: Event) -> float:
            return 5.0 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1024)
    )
    clock = CudaClock(torch.device("cpu"))
    assert clock._flush.numel() == 64 << 20
    clock._flush = SimpleNamespace(zero_=lambda: log.append("flush"))  # type: ignore[assignment]
    sample = clock.sample(steps(lambda: log.append("forward"), lambda y: log.append("backward")))
    assert log == ["wait", "flush", "event", "forward", "event", "backward", "event", "wait"]
    assert (sample.forward, sample.backward) == (0.005, 0.005)


def test_contenders_take_turns_in_both_directions() -> None:
    calls: list[str] = []

    class Clock:
        def sample(self, step: str) -> Sample:
            calls.append(step)
            return Sample(1.0, 2.0, 3.0)

    taken = interleave({n: n for n in "abc"}, Clock(), budget_s=0.0, min_rounds=2, max_rounds=9)  # type: ignore[arg-type, misc]
    assert "".join(calls) == "abccba"
    assert {name: len(samples) for name, samples in taken.items()} == {"a": 2, "b": 2, "c": 2}


def test_rounds_end_at_the_maximum() -> None:
    clock = SimpleNamespace(sample=lambda step: Sample(0.0, 0.0, 0.0))
    taken = interleave({"a": None}, clock, budget_s=60.0, max_rounds=7)  # type: ignore[arg-type, dict-item]
    assert len(taken["a"]) == 7


def test_turns_alternate() -> None:
    rounds = turns(["x", "y"])
    assert [next(rounds) for _ in range(3)] == [["x", "y"], ["y", "x"], ["x", "y"]]


def test_stat_is_in_milliseconds() -> None:
    stat = Stat.of([0.001, 0.002, 0.003, 0.004, 0.005])
    assert (stat.p20, stat.median, stat.p80) == pytest.approx((1.8, 3.0, 4.2))


@pytest.mark.parametrize(
    ("frozen", "eager", "ours", "expected"),
    [
        (10, 14, 10, 0.0),
        (10, 14, 14, 1.0),
        (10, 14, 11, 0.25),
        (10, 14, 8, -0.5),
        (10, 14, 18, 2.0),
    ],
)
def test_overhead_is_zero_at_frozen_and_one_at_peft(
    frozen: float, eager: float, ours: float, expected: float
) -> None:
    found = overhead([frozen] * 5, [eager] * 5, [ours] * 5)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((expected,) * 3)


def test_overhead_takes_medians_and_knows_its_spread() -> None:
    found = overhead([10, 10, 10, 99], [14, 14, 14, 14], [11, 12, 13, 12])
    assert found is not None
    assert found.value == pytest.approx(0.5)
    assert found.low < 0.5 < found.high


@pytest.mark.parametrize("eager", [10.0, 10.1, 9.0])
def test_no_overhead_where_peft_has_none(eager: float) -> None:
    assert overhead([10.0] * 3, [eager] * 3, [9.5] * 3) is None
