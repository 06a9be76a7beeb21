"""The users of one model, on a BERT of random weights and random texts."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import pelt_fast
from bench import data
from bench.users import layers, run, serve, tables, tasks, train

CPU = torch.device("cpu")
PLAN = train.Plan(6, 60.0, verified=1, timed=2, present=3, samples=2, length=6, train=12, held_out=6)  # fmt: skip


@pytest.fixture(scope="module")
def base() -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    return BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)


def split(count: int, classes: int, seed: int) -> data.Split:
    ids = torch.randint(50, (count, PLAN.length), generator=torch.Generator().manual_seed(seed))
    return data.Split(ids, torch.ones_like(ids), ids[:, 0] % classes)


SPLITS = [
    (split(PLAN.train, task.classes, i), split(PLAN.held_out, task.classes, 100 + i))
    for i, task in enumerate(tasks.TASKS)
]


@pytest.fixture(scope="module")
def trained(base: nn.Module) -> train.Training:
    return train.train(base, SPLITS, PLAN, CPU, lambda text, done: None)


def test_mixed_is_as_alone(trained: train.Training) -> None:
    assert trained.largest_difference < 1e-4
    assert max(trained.apart.values()) < 1e-2
    equal, count = trained.gradients
    assert equal == count == 2 * 4 * PLAN.present
    assert trained.others_unchanged
    assert sum(map(len, trained.losses["mixed"].values())) == PLAN.steps * PLAN.present
    assert set(trained.seconds) == set(train.KINDS)
    assert len(trained.seconds["mixed"]) == PLAN.steps
    assert len(trained.seconds["loop"]) == PLAN.timed


def test_among_strangers_it_is_bitwise_the_same(trained: train.Training) -> None:
    assert trained.among_strangers == {0: True}


def test_everyone_serves_the_same(base: nn.Module, trained: train.Training) -> None:
    held_out = [s[1] for s in SPLITS]
    served = serve.serve(base, trained.mixed, held_out, 1, 0.0, CPU)
    assert served.wrong == {}
    assert set(served.seconds) == set(serve.NAMES)
    service = serve.Service(base, trained.mixed, CPU)
    stream = serve.stream_of(held_out, 1, CPU)
    answers = {name: way(stream) for name, way in service.ways.items()}
    for name in serve.NAMES[1:]:
        torch.testing.assert_close(answers[name], answers["ours"])
    assert not torch.allclose(answers["none"], answers["ours"])
    results = run.recorded(trained, served, whole=False)
    assert json.loads(json.dumps(results)) == results
    assert results["wrong"] == []
    titles = [table.title for table in tables.tables(results)]
    assert len(titles) == 3
    (first, second) = tables.headlines(results)
    assert first.startswith("64 users on one MiniLM")
    assert "bitwise" in second


def test_what_must_not_be_is_said(base: nn.Module, trained: train.Training) -> None:
    served = serve.Serving(1, 1, {}, {}, {"ours": "far off"})
    assert run.wrong_of(trained, served) == ["serving, ours: far off"]


def test_merging_leaves_no_trace(base: nn.Module, trained: train.Training) -> None:
    merged = serve.Merged(base, trained.mixed.model)
    before = [p.clone() for p in merged.model.parameters()]
    with merged.use(0):
        assert any(
            not torch.equal(p, was)
            for p, was in zip(merged.model.parameters(), before, strict=True)
        )
    assert all(map(torch.equal, merged.model.parameters(), before))


def test_frozen_parameters_are_shared(base: nn.Module) -> None:
    model = layers.stacked(base, 3)
    mine = {p.data_ptr() for p in base.parameters()}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert {p.data_ptr() for p in frozen} == mine
    assert len(layers.stacks(model)) == 4
    assert not layers.stacks(base)


def test_stacked_adamw_is_adamw_for_each_adapter() -> None:
    torch.manual_seed(0)
    start, steps = torch.randn(3, 4, 5, dtype=torch.float64), [[0, 1], [1], [0, 1], [1, 0]]
    stack = nn.Parameter(start.clone())
    ours = layers.StackedAdamW([stack], lr=0.01)
    single = [nn.Parameter(start[g].clone()) for g in range(3)]
    theirs = [torch.optim.AdamW([p], lr=0.01) for p in single]
    for active in steps:
        gradient = torch.randn(3, 4, 5, dtype=torch.float64)
        stack.grad = gradient.clone()
        ours.step(pelt_fast.MultiAdapterPlan(active, 3))
        for g in active:
            single[g].grad = gradient[g].clone()
            theirs[g].step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in single]))
    assert torch.equal(stack[2], start[2])


def test_tasks_label_what_they_say() -> None:
    critics = {"a fine film": 1, "not one word but many , though": 0, "x " * 30: 1}
    words = " ".join("w" * (i + 1) for i in range(30))
    viewers = {f"I saw it. {words} 8/10": 1, f"Bad. {words} 2 out of 10 {words}": 0, "no rating": 1}
    found: dict[str, Any] = {task.name: task.label(critics, viewers) for task in tasks.TASKS}
    assert dict(found["critic"]) == critics
    assert [label for _, label in found["stars"]] == [2, 0]
    assert all("10" not in text and len(text.split()) == 24 for text, _ in found["stars"])
    assert [label for _, label in found["contrast"]] == [0, 1, 0]
    assert [label for _, label in found["negation"]] == [0, 1, 0]
    assert [label for _, label in found["first person"]] == [1, 0, 0]
    assert [label for _, label in found["length"]] == [0, 0, 1]
    assert [label for _, label in found["source"]] == [0, 0, 0, 1, 1, 1]
    assert found["viewer"][0][0].endswith("w 8/10")
    balanced = tasks._balanced(tasks.TASKS[0], critics | {"b": 0, "c": 0}, {}, 4, seed=0)
    assert [label for _, label in balanced] == [0, 1, 0, 1]
    with pytest.raises(ValueError, match="critic has"):
        tasks._balanced(tasks.TASKS[0], critics, {}, 40, seed=0)
