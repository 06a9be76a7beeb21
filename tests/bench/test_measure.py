"""Rows of real contenders on tiny shapes: what is gated, what is seen, what is said about what is left out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft")

from bench import contenders, gate, measure, memory
from bench.cases import Case, full_cases, quick_cases

CPU = torch.device("cpu")
LIMITS = measure.Limits(sample_s=0.02, round_s=60.0)
TRAINED = ("x", "lora_a.0", "lora_b.0")
EAGER = ("frozen", "peft_base", "peft_dropout", "peft_fp32", "addmm")


@pytest.fixture(params=["fp32", "bf16"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param, 12, 40, 24)


@pytest.fixture
def row(case: Case) -> measure.Row:
    return measure.measure(case, CPU, LIMITS, (*EAGER, "ours_base", "ours_dropout", "ours[torch]"))


def test_everyone_is_right_and_timed(row: measure.Row) -> None:
    for name, entry in row.entries.items():
        assert not entry.wrong
        assert set(entry.times) == (set() if entry.missing else {"forward", "backward", "both"}), (
            name
        )
    assert row.rounds >= 3
    assert row.entries["ours[torch]"].ran == "torch"


def test_peft_forms_that_do_not_apply_say_why(row: measure.Row) -> None:
    assert bool(row.entries["peft_fp32"].missing) == (row.case.dtype == "fp32")


def test_decoding_has_no_backward(case: Case) -> None:
    decode = replace(case, mode="decode")
    row = measure.measure(decode, CPU, LIMITS, ("frozen", "peft_base", "ours_base", "ours_dropout"))
    assert list(row.entries["ours_base"].times) == ["forward"]
    assert "dropout" in row.entries["ours_dropout"].missing


def test_a_row_that_would_take_too_long_is_not_run(case: Case) -> None:
    row = measure.measure(case, CPU, measure.Limits(sample_s=1.0, round_s=0.0))
    assert "estimated" in row.not_run
    assert not row.entries


@pytest.mark.parametrize("name", ["addmm", "peft_base", "ours[torch]"])
def test_gradients_are_those_of_the_row(case: Case, name: str) -> None:
    contender = contenders.build(name, case, contenders.draw(case, CPU))
    assert tuple(contender.wrt) == TRAINED
    assert all(torch.any(value != 0) for value in contender.run().values())


@pytest.mark.parametrize("wrong", ["y", *TRAINED])
def test_gate_stops_a_wrong_result(case: Case, wrong: str) -> None:
    drawn = contenders.draw(case, CPU)
    judge = gate.Gate(drawn, TRAINED)
    contender = contenders.build("ours[torch]", case, drawn)
    results, keep = judge.run(contender)
    judge.check(contender, results, keep)
    results[wrong] = results[wrong] + 0.5 * results[wrong].abs().mean()
    with pytest.raises(gate.WrongResult, match=wrong):
        judge.check(contender, results, keep)


def test_gate_stops_a_missing_gradient_and_nan(case: Case) -> None:
    drawn = contenders.draw(case, CPU)
    judge = gate.Gate(drawn, TRAINED)
    contender = contenders.build("addmm", case, drawn)
    results, keep = judge.run(contender)
    with pytest.raises(gate.WrongResult, match="returned no lora_a"):
        judge.check(contender, {k: v for k, v in results.items() if k != "lora_a.0"}, keep)
    results["x"] = torch.full_like(results["x"], float("nan"))
    with pytest.raises(gate.WrongResult):
        judge.check(contender, results, keep)


def test_gate_knows_our_dropout_mask(case: Case) -> None:
    drawn = contenders.draw(case, CPU)
    judge = gate.Gate(drawn, TRAINED)
    contender = contenders.build("ours_dropout", case, drawn)
    results, keep = judge.run(contender)
    assert not keep[0].all()
    judge.check(contender, results, keep)
    with pytest.raises(gate.WrongResult):
        gate.Gate(drawn, TRAINED).check(contender, results, [~keep[0]])


def test_a_wrong_contender_gets_no_time(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    build = contenders.build

    def broken(name: str, *args: object) -> contenders.Contender:
        contender = build(name, *args)  # type: ignore[arg-type]
        if name == "addmm":
            contender.forward = lambda forward=contender.forward: forward() * 1.5  # type: ignore[misc]
        return contender

    monkeypatch.setattr(contenders, "build", broken)
    row = measure.measure(case, CPU, LIMITS, ("frozen", "peft_base", "addmm"))
    assert "addmm is wrong" in row.entries["addmm"].wrong
    assert not row.entries["addmm"].times
    assert row.entries["peft_base"].times


def test_error_ratio_is_the_worst_tensor() -> None:
    ours = {"y": gate.Error(1.0, 0.2), "x": gate.Error(3.0, 0.1)}
    peft = {"y": gate.Error(2.0, 0.1), "x": gate.Error(2.0, 0.2)}
    assert gate.error_ratio(ours, peft) == gate.Error(1.5, 2.0)


def test_saved_bytes_leave_out_what_was_there() -> None:
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(3, 4)

    def forward() -> torch.Tensor:
        return torch.exp(torch.nn.functional.linear(x, weight))  # exp saves its result, (6, 3)

    assert memory.saved_bytes(forward, [x, weight]) == 6 * 3 * 4
    assert memory.saved_bytes(forward, [x]) == 6 * 3 * 4 + 3 * 4 * 4


def test_peak_sees_what_is_alive_at_once() -> None:
    def step() -> None:
        first = torch.ones(16 << 20, dtype=torch.uint8)
        second = first + 1
        del first
        third = second + 1
        del second, third

    peak = memory.peak_bytes(step, CPU)
    assert peak is None or 31 << 20 <= peak < 44 << 20  # pages are counted in batches


def test_row_lists() -> None:
    for cases in (quick_cases(), full_cases()):
        assert len(set(cases)) == len(cases)
        assert any(case.compiled for case in cases)
    assert {replace(case, compiled=False) for case in quick_cases()} <= {
        replace(case, compiled=False) for case in full_cases()
    }
