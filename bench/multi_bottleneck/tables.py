"""What a person reads about batched bottleneck adapters."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from ..tables import (
    LOST,
    Row,
    TextTable,
    error_cell,
    lost_in,
    measured,
    memory_table,
    ms,
    name_of,
    not_run_table,
    ratio,
    ratio_cell,
    times,
    trust_cells,
    trust_columns,
)

TITLE = "Batched bottleneck adapters"
HEADING = "T × d → m, stack"
MAIN, FLOOR, RIVAL = "ours", "ln", "loop"
SHORT = {"ln": "layernorm", "ours[torch]": "ours torch", "ours[cpp]": "ours cpp"}
IN_MEMORY = (FLOOR, RIVAL, MAIN)
MODES = {"decode": "forward without gradient", "train": "forward + backward"}


def headlines(rows: Sequence[Row]) -> list[str]:
    """The ratio to the loop, forward and in training."""
    rows, parts = measured(rows, MAIN), []
    for mode, words in MODES.items():
        mine = [ratio(row, MAIN, RIVAL) for row in rows if row["mode"] == mode]
        if mine:
            parts.append(f"{words} {statistics.geometric_mean(mine):.2f}")
    compared, lost = lost_in((row, MAIN, RIVAL) for row in rows)
    if not compared:
        return []
    return [
        f"Time over that of a loop over the adapters of a batch, mean of {compared} rows: {', '.join(parts)}.",
        f"Slower than the loop in {lost} of {compared} rows (marked {LOST}).",
    ]


def tables(rows: Sequence[Row], meta: dict[str, Any]) -> list[TextTable]:
    found, gpu = measured(rows, MAIN), meta["kind"] == "cuda"
    shown = []
    for mode, words in MODES.items():
        table = TextTable(
            f"Batched bottleneck adapters, {words} (ms, medians)",
            [HEADING, "ln", "loop", "ours", "ours / loop", "loop / ours", "error / loop"]
            + trust_columns(gpu),
            wide=("max error", "rounds"),
        )
        for row in found:
            if row["mode"] == mode:
                table.rows.append(
                    [
                        name_of(row),
                        *(ms(row, name) for name in (FLOOR, RIVAL, MAIN)),
                        ratio_cell(row, MAIN, RIVAL),
                        times(row, RIVAL, MAIN),
                        error_cell(row, MAIN),
                        *trust_cells(row, MAIN, gpu),
                    ]
                )
        shown.append(table)
    shown[-1].notes = [
        "LN(up(gelu(down(x))) + x + o), of each token its own adapter of the stack, everything trained. *ln*: "
        "layernorm(x + o), which is there without adapters. *loop*: adapter after adapter on its rows, which were "
        "found beforehand, as the plan of *ours* was made. *error / loop*: mean distance from fp64 over the loop's "
        "own, the worst of y and all gradients."
    ]
    trained = [row for row in found if row["mode"] == "train"]
    return [
        *shown,
        memory_table(
            HEADING, trained, IN_MEMORY, SHORT, lambda row: row["tokens"] * row["features"]
        ),
        not_run_table(HEADING, rows),
    ]
