"""What a person reads about a study."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from ..tables import MIB, NEVER, TextTable, marked
from .methods import FINE_TUNING, METHODS
from .protocol import Protocol
from .record import Line

Costs = dict[str, Any]
"""By method."""
SETTING = tuple(field.name for field in fields(Protocol))


def tables(lines: Sequence[Line], costs: Costs) -> list[TextTable]:
    found = [_accuracy_table(*one) for one in settings(lines)]
    found += [_cost_table(costs), _time_table(costs)] if costs else []
    return [table for table in found if table.rows]


def settings(lines: Iterable[Line]) -> list[tuple[str, dict[str, str], list[Line]]]:
    """The lines by task and protocol, those that were run first on top."""
    found: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        found.setdefault((line["task"], *(line[name] for name in SETTING)), []).append(line)
    return [(of[0]["task"], {name: of[0][name] for name in SETTING}, of) for of in found.values()]


def of(lines: Iterable[Line], method: str, samples: int, kind: str) -> list[float]:
    """Accuracies on the test, one for each seed."""
    return [
        float(line["test_accuracy"])
        for line in lines
        if (line["method"], int(line["samples"]), line["kind"]) == (method, samples, kind)
    ]


def sizes(lines: Iterable[Line]) -> list[int]:
    return sorted({int(line["samples"]) for line in lines})


def _accuracy_table(task: str, setting: dict[str, str], lines: list[Line]) -> TextTable:
    accelerated = any(line["kind"] == "accelerated" for line in lines)
    kinds = ("eager", "accelerated") if accelerated else ("eager",)
    columns = [(k, kind) for k in sizes(lines) for kind in kinds]
    table = TextTable(
        f"{task}: accuracy on {setting['test']} held-out texts, mean ± standard deviation over data seeds (%)",
        [
            "",
            *(
                f"K = {k}" + (", accelerated" if kind == "accelerated" else "")
                for k, kind in columns
            ),
        ],
    )
    for name, method in METHODS.items():
        cells = [_accuracy_cell(of(lines, name, k, kind)) for k, kind in columns]
        if set(cells) != {NEVER}:
            table.rows.append([method.title, *cells])
    table.notes = [f"{lines[0]['model']}. {_note(setting)} In brackets: how many seeds."]
    return table


def _note(setting: dict[str, str]) -> str:
    """The protocol, and where it differs from the paper's."""
    text = (
        f"At most {setting['length']} tokens, batches of {setting['batch']}, up to {setting['epochs']} epochs with "
        f"patience {setting['patience']}, {setting['dev']} samples to develop on, "
    )
    scale = float(setting["rate_scale"])
    text += f"fusion's other adapters from {setting['source_samples']} samples each, "
    return text + (
        "the paper's learning rates." if scale == 1 else f"{scale:g} × the paper's learning rates."
    )


def _accuracy_cell(found: Sequence[float]) -> str:
    if not found:
        return NEVER
    text = f"{100 * statistics.fmean(found):.1f}"
    if len(found) > 1:
        text += f" ± {100 * statistics.stdev(found):.1f}"
    return f"{text} ({len(found)})"


def relative(cost: dict[str, Any], what: str, kind: str) -> float | None:
    """In % of fine-tuning."""
    times = cost["times_ms"][what]
    if kind not in times:
        return None
    return 100 * float(times[kind]["fastest"] / times[FINE_TUNING]["fastest"])


def _cost_table(costs: Costs) -> TextTable:
    table = TextTable(
        "Parameters and memory",
        [
            "",
            "trained",
            "prefix ejected",
            "% of the model",
            "peak MiB",
            "accelerated",
            "losses apart",
        ],
        notes=[
            "Trained: without the head, which all train. Peak: weights, Adam's state, gradients and activations of a "
            "training step. Losses apart: largest relative difference of eager and accelerated losses over the same "
            "steps without dropout."
        ],
    )
    whole = costs.get(FINE_TUNING, {}).get("total")
    for name, cost in _in_order(costs):
        peak = cost["peak_bytes"]
        mine, ours = peak.get(eager_of(name)), peak.get("accelerated")
        table.rows.append(
            [
                METHODS[name].title,
                f"{cost['total']:,}",
                f"{cost['ejected']:,}" if cost["ejected"] != cost["total"] else NEVER,
                f"{100 * cost['ejected'] / whole:.2f}" if whole else NEVER,
                f"{mine / MIB:.0f}" if mine else NEVER,
                marked(f"{ours / MIB:.0f}", ours / mine) if ours and mine else NEVER,
                f"{cost['apart']:.0e}" if cost["apart"] is not None else NEVER,
            ]
        )
    return table


TIMED = {"train": "T train", "infer": "T infer", "infer_small": "T infer, one short text"}


def _time_table(costs: Costs) -> TextTable:
    table = TextTable(
        "Time in % of fine-tuning's, eager → accelerated",
        ["", *TIMED.values()],
        notes=[
            "A training step (forward, backward, AdamW) and an inference of full batches; one text of 32 tokens."
        ],
    )
    for name, cost in _in_order(costs):
        table.rows.append([METHODS[name].title, *(_time_cell(name, cost, what) for what in TIMED)])
    return table


def _time_cell(name: str, cost: dict[str, Any], what: str) -> str:
    mine, ours = relative(cost, what, eager_of(name)), relative(cost, what, "accelerated")
    assert mine is not None
    return f"{mine:.0f}" + (marked(f" → {ours:.0f}", ours / mine) if ours is not None else "")


def eager_of(name: str) -> str:
    return FINE_TUNING if name == FINE_TUNING else "eager"


def _in_order(costs: Costs) -> list[tuple[str, dict[str, Any]]]:
    return [(name, costs[name]) for name in METHODS if name in costs]
