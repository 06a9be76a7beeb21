"""A batch of different methods, on a BERT of random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("adapters")

from bench import mixed, report


def test_everyone_computes_the_same() -> None:
    plan = mixed.Plan(layers=1, hidden=96, heads=2, lengths=(5,))
    found = mixed.run(torch.device("cpu"), 0.0, plan)
    assert found["wrong"] == []
    assert [row["train"] for row in found["rows"]] == [False, True]
    (table,) = mixed.tables(found)
    assert len(table.rows) == 2
    assert "–" not in table.rows[0]


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, **options: Any) -> Any:
        ways = right(*args, **options)
        return {**ways, "mixed": lambda: [2 * t for t in ways["mixed"]()]}

    right = mixed.ways_of
    monkeypatch.setattr(mixed, "ways_of", wrong)
    plan = mixed.Plan(layers=1, hidden=96, heads=2, lengths=(5,))
    found = mixed.run(torch.device("cpu"), 0.0, plan)
    assert len(found["wrong"]) == 2
    assert all("mixed" not in row["ms"] for row in found["rows"])
    assert any("WRONG" in line for line in mixed.headlines(found))


def test_report(results: dict[str, Any]) -> None:
    found = [t for t in report.tables(results, "multi_lora") if "different methods" in t.title]
    assert [row[5] for row in found[0].rows] == ["0.50", "1.50 ▲"]
    lines = "\n".join(report.headlines(results, "multi_lora"))
    assert "times 2.00 at 32 tokens in inference, 0.67 at 32 tokens in training" in lines
