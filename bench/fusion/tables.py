"""What a person reads about AdapterFusion."""

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

TITLE = "AdapterFusion"
HEADING = "T × d → N × m"
MAIN, FLOOR, RIVAL = "ours", "ln", "eager"
SHORT = {"ln": "layernorm", "ours[torch]": "ours torch", "ours[cpp]": "ours cpp"}
IN_MEMORY = (FLOOR, RIVAL, MAIN)


def headlines(rows: Sequence[Row]) -> list[str]:
    """What the step costs against eager."""
    rows, lines = measured(rows, MAIN), []
    if rows:
        eager = statistics.geometric_mean(ratio(row, MAIN, RIVAL) for row in rows)
        lines.append(
            f"AdapterFusion, mean of {len(rows)} row(s): a training step of the site takes {eager:.2f} × the time of "
            "the library's order by hand."
        )
    compared, lost = lost_in((row, MAIN, RIVAL) for row in rows)
    if compared:
        lines.append(f"Slower than eager PyTorch in {lost} of {compared} rows (marked {LOST}).")
    return lines


def tables(rows: Sequence[Row], meta: dict[str, Any]) -> list[TextTable]:
    found, gpu = measured(rows, MAIN), meta["kind"] == "cuda"
    step = TextTable(
        "AdapterFusion, forward + backward (ms, medians)",
        [HEADING, "ln", "eager", "ours", "ours / eager", "eager / ours", "error / eager"]
        + trust_columns(gpu),
        wide=("max error", "rounds"),
    )
    for row in found:
        step.rows.append(
            [
                name_of(row),
                *(ms(row, name) for name in (FLOOR, RIVAL, MAIN)),
                ratio_cell(row, MAIN, RIVAL),
                times(row, RIVAL, MAIN),
                error_cell(row, MAIN),
                *trust_cells(row, MAIN, gpu),
            ]
        )
    step.notes = [
        "The site of BERT with N Pfeiffer adapters, which are frozen, and the attention over them, which trains. *ln*: "
        "layernorm(o + x), which is there without any adapter. *eager*: operation for operation what the adapters "
        "library computes. *error / eager*: mean distance from fp64 over eager's own, the worst of y and all gradients."
    ]
    return [
        step,
        memory_table(HEADING, found, IN_MEMORY, SHORT, lambda row: row["tokens"] * row["features"]),
        not_run_table(HEADING, rows),
    ]
