"""A study in small: a tiny BERT, texts made up for it, every method, eager and accelerated."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("adapters")
pytest.importorskip("transformers")

from bench.study import page, protocol, tables, train
from bench.study.__main__ import SMALL, main
from bench.study.cost import agreement
from bench.study.material import SOURCES, Texts, Tiny
from bench.study.methods import LENGTH, METHODS, OWN, trained
from bench.study.protocol import KINDS, Protocol, Run
from bench.study.record import Record

CPU = torch.device("cpu")
IN_LIBRARY = [name for name, method in METHODS.items() if method.in_library]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a study that was run whole."""
    found = tmp_path_factory.mktemp("study")
    assert main(["--small", "--seeds", "111", "--output", str(found)]) == 0
    return found


@pytest.fixture
def study(tmp_path: Path) -> train.Study:
    return train.Study(Tiny(), SMALL, tmp_path, CPU)


def test_every_method_runs_eager_and_accelerated(folder: Path) -> None:
    with (folder / "study.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    found = {(line["method"], line["kind"]) for line in lines}
    assert found == {(name, "eager") for name in METHODS} | {(n, "accelerated") for n in IN_LIBRARY}
    assert len(lines) == len(found)
    for name in IN_LIBRARY:
        eager, ours = (
            next(line for line in lines if (line["method"], line["kind"]) == (name, kind))
            for kind in KINDS
        )
        assert eager["epochs_run"] == ours["epochs_run"]
    assert (folder / "study.png").stat().st_size > 10_000


def test_costs_are_of_every_method(folder: Path) -> None:
    costs = Record(folder).load()["costs"]
    assert set(costs) == set(METHODS)
    for name, cost in costs.items():
        kinds = {"fine-tuning"}
        kinds |= {"eager"} if name != "fine-tuning" else set()
        kinds |= {"accelerated"} if name in IN_LIBRARY else set()
        assert {what: set(of) for what, of in cost["times_ms"].items()} == dict.fromkeys(
            tables.TIMED, kinds
        )
        assert set(cost["peak_bytes"]) == kinds
        assert (cost["apart"] is not None) == (name in IN_LIBRARY)
        assert cost["apart"] is None or cost["apart"] < 1e-4


def test_what_is_done_is_not_done_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, run: Run, tell: Any) -> None:
        raise AssertionError(run)

    monkeypatch.setattr(train.Study, "run", fails)
    again = ["--small", "--output", str(folder), "--only", "runs", "--methods", "lora", "fusion"]
    assert main([*again, "--seeds", "111"]) == 0
    with pytest.raises(AssertionError, match="seed 222"):
        main([*again, "--seeds", "111", "222"])


def test_the_protocol_is_the_papers() -> None:
    plan = Protocol()
    assert (plan.length, plan.batch, plan.epochs, plan.patience, plan.dev) == (
        128,
        16,
        50,
        10,
        1000,
    )
    assert (protocol.SAMPLES, protocol.SEEDS) == ((100, 500, 1000), (111, 222, 333, 444, 555))
    rates = {name: method.rate for name, method in METHODS.items()}
    assert rates == {
        "fine-tuning": 2e-5, "bitfit": 1e-4, "adapter": 1e-4, "prefix": 2e-4, "lora": 5e-4,
        "unipelt": 5e-4, "fusion": 5e-5,
    }  # fmt: skip


def test_runs_go_seed_by_seed() -> None:
    found = list(protocol.runs(["t"], [100, 500], [1, 2], ["a", "b"], 1, ["b"]))
    first = [Run("t", 100, 1, "a", "eager"), Run("t", 100, 1, "b", "eager")]
    assert found[:3] == [*first, Run("t", 100, 1, "b", "accelerated")]
    assert [run.samples for run in found] == [100] * 5 + [500] * 5
    assert sum(run.kind == "accelerated" for run in found) == 2


def test_no_test_text_is_drawn_and_seeds_draw_others() -> None:
    task = Tiny().task("word", 12, 16)
    train_1, dev_1 = task.draw(32, 16, 111)
    train_2, _ = task.draw(32, 16, 222)
    assert (len(train_1), len(dev_1), len(task.test)) == (32, 16, 16)
    assert train_1.ids != train_2.ids
    assert task.draw(32, 10_000, 111)[1].labels == task.draw(32, 168, 111)[1].labels
    with pytest.raises(ValueError, match="expected fewer than the 200"):
        task.draw(200, 1, 111)


def test_a_batch_is_as_long_as_its_longest_text() -> None:
    batch = Texts([[5, 6, 7], [8], [9] * 9], [0, 1, 0]).batch([0, 1], CPU)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [0, 1]


def test_it_stops_early_and_keeps_the_best(
    monkeypatch: pytest.MonkeyPatch, study: train.Study
) -> None:
    model = study.tuned(METHODS["bitfit"], 2)
    scores = iter([0.5, 0.7, 0.7, 0.6, 0.9])
    seen: list[train.State] = []

    def accuracy(model: Any, *rest: Any) -> float:
        seen.append(train.trained_state(model))
        return next(scores)

    monkeypatch.setattr(train, "accuracy", accuracy)
    texts = study.task("word").pool.take(range(8))
    plan = Protocol(batch=4, epochs=9, patience=2)
    fitted = train.fit(model, texts, texts, 1e-2, plan, CPU, lambda text, done: None)
    assert (fitted.best_epoch, fitted.dev, fitted.steps) == (1, [0.5, 0.7, 0.7, 0.6], 8)
    for name, tensor in train.trained_state(model).items():
        assert torch.equal(tensor, seen[1][name])
    assert any(not torch.equal(seen[1][name], seen[3][name]) for name in seen[1])


def test_fusion_gets_adapters_that_were_trained_alone(study: train.Study) -> None:
    quiet = lambda text, done: None
    states = study._adapters(Run("word", 16, 111, "fusion", "eager"), quiet)
    assert list(states) == [OWN, *SOURCES]
    model = study.tuned(METHODS["fusion"], 2)
    train.fill(model, states)
    found = dict(model.named_parameters())
    compared = 0
    for adapter, state in states.items():
        for name, tensor in state.items():
            if f".adapters.{OWN}." in name:
                renamed = name.replace(f".adapters.{OWN}.", f".adapters.{adapter}.")
                assert torch.equal(found[renamed], tensor)
                assert not found[renamed].requires_grad
                compared += 1
    assert compared == 3 * 2 * 4  # adapters, layers, weights and biases
    up = "bert.encoder.layer.0.output.adapters.{}.adapter_up.weight"
    assert not torch.equal(found[up.format(OWN)], found[up.format("viewer")])


def test_parameters_without_head_and_with_the_prefix_ejected(study: train.Study) -> None:
    counted = {name: trained(study.tuned(method, 2)) for name, method in METHODS.items()}
    layers, hidden = 2, 32
    assert counted["prefix"].ejected == LENGTH * layers * 2 * hidden
    assert counted["prefix"].total > counted["prefix"].ejected
    saved = counted["prefix"].total - counted["prefix"].ejected
    assert counted["unipelt"].total - counted["unipelt"].ejected == saved
    assert counted["lora"].total == counted["lora"].ejected == layers * 2 * 2 * 8 * hidden
    whole = sum(p.numel() for p in Tiny().model(2).parameters())
    assert counted["fine-tuning"].total == whole - 2 * (hidden + 1)


@pytest.mark.parametrize("name", ["adapter", "unipelt"])
def test_agreement_sees_a_wrong_layer(
    name: str, study: train.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    def accelerate(model: Any) -> None:
        hook = lambda module, args, output: 1.01 * output
        model.bert.encoder.layer[0].output.dense.register_forward_hook(hook)

    monkeypatch.setattr(train.pelt_fast, "accelerate", accelerate)
    assert agreement(study, name, "word") > 1e-4


def test_tables_say_seeds_and_what_was_changed() -> None:
    setting = {
        name: str(value) for name, value in vars(Protocol(epochs=3, rate_scale=10.0)).items()
    }
    lines = [
        {"task": "word", "samples": "100", "seed": str(seed), "method": "lora", "kind": "eager",
         "model": "a model", "test_accuracy": value, **setting}
        for seed, value in ((111, "0.5"), (222, "0.6"))
    ]  # fmt: skip
    (table,) = tables.tables(lines, {})
    assert table.rows == [["LoRA", "55.0 ± 7.1 (2)"]]
    assert "10 × the paper's learning rates" in table.notes[0]
    assert "up to 3 epochs" in table.notes[0]


def test_the_page_keeps_what_is_around_the_marks(tmp_path: Path) -> None:
    path = tmp_path / "study.md"
    path.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    page.update(path, [], "some CPU.", tmp_path / "none.png")
    text = path.read_text()
    assert text == f"before\n{page.BEGIN}\nCosts: some CPU.\n{page.END}\nafter\n"
    path.write_text("no marks")
    with pytest.raises(ValueError, match="no <!-- study:begin"):
        page.update(path, [], "", tmp_path / "none.png")
