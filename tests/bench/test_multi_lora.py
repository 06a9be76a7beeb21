"""Batched multi-LoRA in the benchmark: who names whom, its own oracle, rows on tiny shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft")

from bench import gate, measure
from bench.contender import NotHere
from bench.families import FAMILIES
from bench.multi_lora import contenders, oracle
from bench.multi_lora.cases import DISTRIBUTIONS, EQUAL_BYTES, MIXED, RANK, MultiLoRACase
from pelt_fast.testing import multi_lora_oracle

CPU = torch.device("cpu")
FAMILY = FAMILIES["multi_lora"]
LIMITS = measure.Limits(sample_s=0.02, round_s=60.0)
TRAINED = ("x", "lora_a.0", "lora_b.0")
DTYPES = ("fp32", "bf16")


@pytest.fixture(params=DTYPES)
def case(request: pytest.FixtureRequest) -> MultiLoRACase:
    return MultiLoRACase(request.param, 12, 5, 40, 24, 4)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("tokens", [1, 7, 64, 100])
def test_every_token_has_an_adapter(kind: str, tokens: int) -> None:
    counts = DISTRIBUTIONS[kind](tokens, 128)
    assert sum(counts) == tokens
    assert len(counts) <= 128
    ids = MultiLoRACase("fp32", tokens, 128, 8, 8, ids=kind).token_adapters
    assert len(ids) == tokens
    assert all(0 <= g < 128 for g in ids)
    assert sorted(map(ids.count, set(ids)), reverse=True) == sorted(filter(None, counts))[::-1]


def test_popularities_are_those_of_punica() -> None:
    assert DISTRIBUTIONS["uniform"](64, 64) == [8] * 8
    assert DISTRIBUTIONS["skewed"](64, 64) == [17, 17, 11, 7, 5, 3, 2, 1, 1]


def test_equal_bytes_are_equal() -> None:
    cases = [MultiLoRACase("fp32", *MIXED, rank, ids=ids) for ids, rank in EQUAL_BYTES.items()]
    assert len({case.adapter_bytes for case in cases}) == 1
    assert cases[1].rank == RANK


@pytest.mark.parametrize("mode", ["train", "decode"])
def test_everyone_is_right_and_timed(case: MultiLoRACase, mode: str) -> None:
    row = measure.measure(FAMILY, replace(case, mode=mode), CPU, LIMITS)
    for name, entry in row.entries.items():
        assert not entry.wrong, name
        assert bool(entry.times) != bool(entry.missing), name
    missing = {name for name, entry in row.entries.items() if entry.missing}
    assert missing >= {"ours[triton]", "ours[cuda]"}
    assert ("peft" in missing) == ("merged" in missing) == (mode == "train")
    assert row.entries["ours"].error_ratio is not None


def test_its_oracle_is_that_of_the_tests(case: MultiLoRACase) -> None:
    inputs = contenders.draw(case, CPU)
    mine = oracle.exact(inputs, [None], TRAINED)
    base = inputs.map(lambda _, t: t.double())
    frozen = torch.nn.functional.linear(base.x, base.weight, base.bias)
    theirs = multi_lora_oracle.exact(inputs, [None], TRAINED)
    torch.testing.assert_close(mine["y"], theirs["y"] + frozen)
    torch.testing.assert_close(mine["x"], theirs["x"] + base.dy @ base.weight)
    for name in TRAINED[1:]:
        torch.testing.assert_close(mine[name], theirs[name])


@pytest.mark.parametrize("name", ["loop", "gather", "ours", "ours[torch]"])
def test_gradients_are_those_of_the_whole_stack(name: str, case: MultiLoRACase) -> None:
    case = replace(case, adapters=9, ids="identical")
    drawn = contenders.draw(case, CPU)
    results = contenders.build(name, case, drawn).run()
    assert set(results) == {"y", *TRAINED}
    used = torch.arange(9) == drawn.ids[0]
    for of_stack in (results["lora_a.0"], results["lora_b.0"]):
        assert len(of_stack) == 9
        assert torch.equal(of_stack.flatten(1).any(1), used)


@pytest.mark.parametrize("wrong", ["y", *TRAINED])
@pytest.mark.parametrize("name", ["loop", "ours[torch]"])
def test_gate_stops_a_wrong_result(case: MultiLoRACase, name: str, wrong: str) -> None:
    judge = gate.Gate(FAMILY.oracle, TRAINED)
    contender = contenders.build(name, case, contenders.draw(case, CPU))
    results, keep = judge.run(contender)
    judge.check(contender, results, keep)
    results[wrong] = results[wrong] + 0.5 * results[wrong].abs().mean()
    with pytest.raises(gate.WrongResult, match=wrong):
        judge.check(contender, results, keep)


def test_what_is_too_large_says_so() -> None:
    case = MultiLoRACase("fp32", contenders.MOST_GATHERED + 1, 3, 8, 8, 2)
    with pytest.raises(NotHere, match="memory"):
        contenders.build("gather", case, contenders.draw(case, CPU))
    case = MultiLoRACase("fp32", 4, contenders.MOST_OF_PEFT + 1, 8, 8, 2, mode="decode")
    with pytest.raises(NotHere, match="PEFT"):
        contenders.build("peft", case, contenders.draw(case, CPU))
    with pytest.raises(NotHere, match="few rows"):
        contenders.build("merged", replace(case, merging=False), contenders.draw(case, CPU))
