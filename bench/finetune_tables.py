"""What a person reads about the fine-tunes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from .finetune import mean_and_spread
from .methods import METHODS
from .tables import MIB, NEVER, TextTable, marked

One = dict[str, Any]
"""A fine-tune of the results."""
KEYS = {"overhead": "model_ms", "step_overhead": "step_ms"}


def headline(one: One) -> str:
    plan, times = (
        one["plan"],
        {kind: run["model_ms"]["median"] for kind, run in one["runs"].items()},
    )
    rival = METHODS[plan["method"]].library
    text = f"MiniLM fine-tune in {plan['dtype']}: forward and backward take "
    text += f"{times['accelerated'] / times['eager']:.2f} × {rival}'s time"
    if not one["trained"]:
        return text + " (timed in a few steps, not trained)."
    if one["overhead"]:
        overhead = one["overhead"]["value"]
        text += f", PELT overhead {overhead:+.2f}: {100 * (1 - overhead):.0f} % of it is gone"
    return text + "."


def table(found: Sequence[One]) -> TextTable:
    """Of one method, a line for each dtype and kind of model."""
    title = METHODS[found[0]["plan"]["method"]].title if found else ""
    made = TextTable(
        f"Fine-tune: MiniLM-L6, Rotten Tomatoes, {title} (ms, medians)",
        ["", "forward + backward", "p20 to p80", "overhead", "whole step", "its overhead"]
        + ["accuracy", "last loss", "saved MiB", "peak MiB"],
        wide=("p20 to p80", "saved MiB"),
    )
    for one in found:
        made.rows += [_cells(one, kind) for kind in one["runs"]]
        made.notes.append(_note(one))
    return made


def _cells(one: One, kind: str) -> list[str]:
    run = one["runs"][kind]
    model, step = run["model_ms"], run["step_ms"]
    return [
        f"{one['plan']['dtype']} {kind}" + (", head only" if kind == "frozen" else ""),
        f"{model['median']:.1f}",
        f"{model['p20']:.1f} to {model['p80']:.1f}",
        _overhead(one, kind, "overhead"),
        f"{step['median']:.1f}",
        _overhead(one, kind, "step_overhead"),
        _accuracy(run["accuracy"]),
        f"{statistics.fmean(run['losses'][0][-10:]):.3f}" if one["trained"] else NEVER,
        *(f"{run[key] / MIB:.0f}" if run[key] else NEVER for key in ("saved_bytes", "peak_bytes")),
    ]


def _overhead(one: One, kind: str, key: str) -> str:
    if kind != "accelerated":
        return {"eager": "1", "frozen": "0"}[kind]
    ours, eager = (one["runs"][k][KEYS[key]]["median"] for k in ("accelerated", "eager"))
    text = f"{one[key]['value']:+.2f}" if one[key] else f"×{ours / eager:.2f}"
    return marked(text, ours / eager)


def _note(one: One) -> str:
    plan, losses = one["plan"], one["runs"]["eager"]["losses"]
    note = plan["note"] or f"{len(losses)} seed(s), accuracy on {plan['held_out']} held-out texts"
    tokens = f"{plan['batch']} × {plan['length']} tokens"
    return f"{plan['dtype']}: {len(losses[0])} steps of {tokens}; {note}."


def _accuracy(values: list[float]) -> str:
    if not values:
        return NEVER
    mean, spread = mean_and_spread(values)
    return f"{100 * mean:.1f} %" + (f" ± {100 * spread:.1f}" if len(values) > 1 else "")
