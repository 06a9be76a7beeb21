"""Rows of real contenders on tiny shapes: what is gated, what is seen, what is said about what is left out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("adapters")

from bench import conftest as suite_conftest
from bench import gate, measure, memory
from bench.adapter.cases import KINDS, AdapterCase
from bench.case import Case
from bench.contender import Contender, NotHere
from bench.families import FAMILIES, family_of
from bench.family import Family
from bench.lora import FAMILY as LORA
from bench.lora.cases import LoRACase
from bench.multi_lora.cases import MultiLoRACase
from bench.suite import QUICK_BUDGET_S

CPU = torch.device("cpu")
LIMITS = measure.Limits(sample_s=0.02, round_s=60.0)
TRAINED = ("x", "lora_a.0", "lora_b.0")
LORA_EAGER = ("frozen", "peft_base", "peft_dropout", "peft_fp32", "addmm")
ADAPTER_EAGER = ("ln", "library", "eager")
NORMS = ("ln_weight", "ln_bias")
TRAINED_ADAPTER = ("x", "skip", "down", "down_bias", "up", "up_bias", *NORMS)
DTYPES = ("fp32", "bf16")


@pytest.fixture(params=DTYPES)
def case(request: pytest.FixtureRequest) -> LoRACase:
    return LoRACase(request.param, 12, 40, 24)


@pytest.fixture(params=DTYPES)
def row(request: pytest.FixtureRequest) -> measure.Row:
    names = (*LORA_EAGER, "ours_base", "ours_dropout", "ours[torch]")
    return measure.measure(LORA, LoRACase(request.param, 12, 40, 24), CPU, LIMITS, names)


def everyone_is_right_and_timed(row: measure.Row) -> None:
    for name, entry in row.entries.items():
        assert not entry.wrong
        timed = set() if entry.missing else {"forward", "backward", "both"}
        assert set(entry.times) == timed, name
    assert row.rounds >= 3
    assert row.entries["ours[torch]"].ran == "torch"


def test_everyone_is_right_and_timed(row: measure.Row) -> None:
    everyone_is_right_and_timed(row)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_is_right_and_timed(kind: str, dtype: str) -> None:
    names = (*ADAPTER_EAGER, "ours", "ours[torch]")
    case = AdapterCase(dtype, 12, 40, 8, kind=kind)
    row = measure.measure(FAMILIES["adapter"], case, CPU, LIMITS, names)
    everyone_is_right_and_timed(row)
    assert row.entries["ours"].saved_bytes < row.entries["eager"].saved_bytes  # type: ignore[operator]


def test_peft_forms_that_do_not_apply_say_why(row: measure.Row) -> None:
    assert bool(row.entries["peft_fp32"].missing) == (row.case.dtype == "fp32")


@pytest.mark.parametrize(
    "case", [LoRACase("fp32", 3, 16, 8), AdapterCase("fp32", 3, 16, 4)], ids=str
)
def test_who_cannot_run_here_says_why(case: Case) -> None:
    family = family_of(case)
    drawn = family.draw(case, CPU)
    for name in (family.may_fail, "ours[triton]"):
        with pytest.raises(NotHere) as said:
            family.build(name, case, drawn)
        assert str(said.value)


def test_decoding_has_no_backward(case: LoRACase) -> None:
    decode = replace(case, mode="decode")
    row = measure.measure(
        LORA, decode, CPU, LIMITS, ("frozen", "peft_base", "ours_base", "ours_dropout")
    )
    assert list(row.entries["ours_base"].times) == ["forward"]
    assert "dropout" in row.entries["ours_dropout"].missing


@pytest.mark.parametrize(
    "case", [LoRACase("bf16", 3, 16, 8), AdapterCase("bf16", 3, 16, 4)], ids=str
)
def test_a_row_that_would_take_too_long_is_not_run(case: Case) -> None:
    limits = measure.Limits(sample_s=1.0, round_s=0.0)
    row = measure.measure(family_of(case), case, CPU, limits)
    assert "estimated" in row.not_run
    assert not row.entries


@pytest.mark.parametrize(
    ("case", "names", "trained"),
    [
        (LoRACase("fp32", 12, 40, 24), ("addmm", "peft_base", "ours[torch]"), TRAINED),
        (AdapterCase("fp32", 12, 40, 8), ("library", "eager", "ours[torch]"), TRAINED_ADAPTER),
    ],
    ids=["lora", "adapter"],
)
def test_gradients_are_those_of_the_row(case: Case, names: str, trained: tuple[str, ...]) -> None:
    family = family_of(case)
    for name in names:
        contender = family.build(name, case, family.draw(case, CPU))
        assert set(contender.wrt) == set(trained)
        assert all(torch.any(value != 0) for value in contender.run().values())


def test_the_layernorm_alone_trains_what_is_its_own() -> None:
    family, case = FAMILIES["adapter"], AdapterCase("fp32", 12, 40, 8)
    ln = family.build("ln", case, family.draw(case, CPU))
    assert set(ln.wrt) == {"x", "skip", *NORMS}


@pytest.mark.parametrize(
    ("case", "wrong"),
    [(LoRACase(dtype, 12, 40, 24), name) for dtype in DTYPES for name in ("y", *TRAINED)]
    + [(AdapterCase("fp32", 12, 40, 8), name) for name in ("y", *TRAINED_ADAPTER)],
    ids=str,
)
def test_gate_stops_a_wrong_result(case: Case, wrong: str) -> None:
    family = family_of(case)
    drawn = family.draw(case, CPU)
    judge = gate.Gate(family.oracle, family.trained(drawn))
    contender = family.build("ours[torch]", case, drawn)
    results, keep = judge.run(contender)
    judge.check(contender, results, keep)
    results[wrong] = results[wrong] + 0.5 * results[wrong].abs().mean()
    with pytest.raises(gate.WrongResult, match=wrong):
        judge.check(contender, results, keep)


def test_gate_stops_a_missing_gradient_and_nan(case: LoRACase) -> None:
    judge = gate.Gate(LORA.oracle, TRAINED)
    contender = LORA.build("addmm", case, LORA.draw(case, CPU))
    results, keep = judge.run(contender)
    with pytest.raises(gate.WrongResult, match="returned no lora_a"):
        judge.check(contender, {k: v for k, v in results.items() if k != "lora_a.0"}, keep)
    results["x"] = torch.full_like(results["x"], float("nan"))
    with pytest.raises(gate.WrongResult):
        judge.check(contender, results, keep)


def test_gate_knows_our_dropout_mask(case: LoRACase) -> None:
    judge = gate.Gate(LORA.oracle, TRAINED)
    contender = LORA.build("ours_dropout", case, LORA.draw(case, CPU))
    results, keep = judge.run(contender)
    assert not keep[0].all()
    judge.check(contender, results, keep)
    with pytest.raises(gate.WrongResult):
        gate.Gate(LORA.oracle, TRAINED).check(contender, results, [~keep[0]])


def test_who_is_wrong_or_fails_gets_no_time(case: LoRACase) -> None:
    def build(name: str, *args: Any) -> Contender:
        contender = LORA.build(name, *args)
        right = contender.forward
        if name == "addmm":
            contender.forward = lambda: right() * 1.5
        if name == "ours_base":
            contender.forward = lambda: 1 // 0  # type: ignore[assignment]
        return contender

    names = ("frozen", "peft_base", "addmm", "ours_base")
    row = measure.measure(replace(LORA, build=build), case, CPU, LIMITS, names)
    assert "addmm is wrong" in row.entries["addmm"].wrong
    assert "ours_base failed: ZeroDivisionError" in row.entries["ours_base"].wrong
    assert not row.entries["addmm"].times
    assert not row.entries["ours_base"].times
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
        # from 32 MiB on the C library gives memory back as soon as it is freed
        first = torch.ones(48 << 20, dtype=torch.uint8)
        second = first + 1
        del first
        third = second + 1
        del second, third

    peak = memory.peak_bytes(step, CPU)
    assert peak is None or 95 << 20 <= peak < 120 << 20  # pages are counted in batches


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_row_lists(family: Family) -> None:
    for cases in (family.quick(), family.full()):
        assert len(set(map(str, cases))) == len(cases)
        assert any(case.compiled for case in cases) == bool(family.may_fail)
        assert all(family_of(case) is family for case in cases)
    assert set(map(str, family.quick())) <= set(map(str, family.full()))


def test_rows_share_the_budgets_of_their_families(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[Case, float] = {}

    def measured(family: Family, case: Case, device: Any, limits: measure.Limits) -> measure.Row:
        given[case] = limits.sample_s
        return measure.Row(case)

    monkeypatch.setattr(suite_conftest, "measure", measured)
    few = [LoRACase("fp32", tokens, 8, 8) for tokens in range(1, 51)]
    many = [MultiLoRACase("fp32", tokens, 2, 8, 8) for tokens in range(1, 101)]
    seen: list[tuple[int, int]] = []
    table = suite_conftest.Table(CPU, None, False, few + many, lambda row, *n: seen.append(n))
    for case in few + many + few:
        table.row(case)
    assert seen[-1] == (150, 150)
    ratio = (QUICK_BUDGET_S["lora"] / 50) / (QUICK_BUDGET_S["multi_lora"] / 100)
    assert given[few[0]] / given[many[0]] < ratio  # what the first leave is shared by the rest
    assert given[few[0]] == pytest.approx(0.7 * QUICK_BUDGET_S["lora"] / 50, rel=0.01)


def test_a_family_that_takes_longer_leaves_the_others_their_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(suite_conftest.time, "monotonic", lambda: now)
    monkeypatch.setattr(suite_conftest, "measure", lambda family, case, *_: measure.Row(case))
    first = [LoRACase("fp32", tokens, 8, 8) for tokens in (1, 2)]
    last = MultiLoRACase("fp32", 3, 2, 8, 8)
    table = suite_conftest.Table(CPU, None, False, [*first, last], lambda *_: None)
    assert not table.row(first[0]).not_run
    now = QUICK_BUDGET_S["lora"] + 1  # the first row took all that its family had
    assert "was spent" in table.row(first[1]).not_run
    assert not table.row(last).not_run
