"""The benchmark of whole models, on a tiny one."""

import pytest
import torch

pytest.importorskip("adapters")

from bench import report, whole

TINY = whole.Plan(
    layers=2, hidden=128, vocabulary=50, passes=((1, 8, False), (2, 8, False), (2, 8, True))
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def found():
    return whole.run(CPU, 0.1, TINY, lambda text, done: None)


def test_every_method_and_pass_has_its_row(found) -> None:
    assert found["wrong"] == []
    rows = {(r["method"], r["samples"], r["tokens"], r["train"]) for r in found["rows"]}
    assert rows == {(method, *pass_) for method in whole.METHODS for pass_ in TINY.passes}
    for row in found["rows"]:
        assert row["rounds"] >= 3
        for name in ("none", "library", "ours"):
            assert 0 < row["fastest_ms"][name] <= row["median_ms"][name]
        assert 0 < row["errors"]["library"] < 1e-5


def test_a_wrong_model_is_not_timed(monkeypatch) -> None:
    def spoil(model):
        with torch.no_grad():
            model.classifier.weight.mul_(1.001)

    monkeypatch.setattr(whole.pelt_fast, "accelerate", spoil)
    monkeypatch.setattr(whole, "METHODS", ("lora",))
    found = whole.run(CPU, 0.01, TINY, lambda text, done: None)
    assert found["rows"] == []
    assert len(found["wrong"]) == len(TINY.passes)
    assert whole.headlines(found)[-1].startswith("WRONG")


def test_fine_tuning_trains_all_and_a_method_little() -> None:
    counts = {}
    for name in (None, "fusion", "lora"):
        model = whole.base_of(TINY)
        if name is not None:
            model = whole.tuned(model, name)
        counts[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if name == "fusion":
            trained = [n for n, p in model.named_parameters() if p.requires_grad]
            assert all("adapter_fusion_layer" in n or n.startswith("classifier") for n in trained)
    assert counts[None] == sum(p.numel() for p in whole.base_of(TINY).parameters())
    assert counts["lora"] < counts[None] / 2


def test_tables_and_merging(found) -> None:
    (text,) = whole.tables(found)
    assert len(text.rows) == len(found["rows"])
    assert len(whole.headlines(found)) == len(TINY.passes)
    short = {**found, "rows": [r for r in found["rows"] if r["samples"] == 1]}
    assert whole.merged(short, found)["rows"] == sorted(
        found["rows"],
        key=lambda r: (r["train"], r["samples"], r["tokens"], whole.METHODS.index(r["method"])),
    )
    assert whole.merged(None, found) is found
    assert whole.tables(None) == [] == whole.headlines(None)


def test_report(results) -> None:
    (text,) = (t for t in report.tables(results, "fusion") if "without a method" in t.title)
    assert [row[3:5] for row in text.rows] == [["150 %", "90 %"], ["120 %", "130 % ▲"]]
    lines = report.headlines(results, "fusion")
    assert "UniPELT 150 → 90" in lines[0]
    assert "% of full fine-tuning, adapters library → ours: UniPELT 120 → 130" in lines[1]
