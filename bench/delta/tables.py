"""What a person reads about diff pruning and masking."""

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
from .cases import KINDS

TITLE = "Diff pruning and masking"
HEADING = "T × in → out"
MAIN, FLOOR, RIVAL = "ours", "full", "eager"
SHORT = {"full": "full fine-tuning", "ours[torch]": "ours torch", "ours[cpp]": "ours cpp"}
IN_MEMORY = (FLOOR, RIVAL, MAIN)


def headlines(rows: Sequence[Row]) -> list[str]:
    """Per method what the step costs against eager and against a weight that trains."""
    lines, rows = [], measured(rows, MAIN)
    for kind in KINDS:
        found = [row for row in rows if row["kind"] == kind]
        if found:
            eager, full = (
                statistics.geometric_mean(ratio(row, MAIN, name) for row in found)
                for name in (RIVAL, FLOOR)
            )
            lines.append(
                f"{kind.capitalize()}, mean of {len(found)} row(s): forward and backward take {eager:.2f} × eager's "
                f"time, {full:.2f} × that of a linear whose weight trains."
            )
    compared, lost = lost_in((row, MAIN, RIVAL) for row in rows)
    if compared:
        lines.append(f"Slower than eager PyTorch in {lost} of {compared} rows (marked {LOST}).")
    return lines


def tables(rows: Sequence[Row], meta: dict[str, Any]) -> list[TextTable]:
    found, gpu = measured(rows, MAIN), meta["kind"] == "cuda"
    step = TextTable(
        "Diff pruning and masking, forward + backward (ms, medians)",
        [HEADING, "full", "eager", "ours", "ours / full", "ours / eager", "error / eager"]
        + trust_columns(gpu),
        wide=("max error", "rounds"),
    )
    for row in found:
        step.rows.append(
            [
                name_of(row),
                *(ms(row, name) for name in (FLOOR, RIVAL, MAIN)),
                times(row, MAIN, FLOOR),
                ratio_cell(row, MAIN, RIVAL),
                error_cell(row, MAIN),
                *trust_cells(row, MAIN, gpu),
            ]
        )
    step.notes = [
        "*full*: a linear whose weight trains, products that diff pruning and masking need too. *eager*: the same by "
        "hand in PyTorch, noise and penalty included. *error / eager*: mean distance from fp64 over the formula's own "
        "in fp32, the worst of y and all gradients."
    ]
    return [
        step,
        memory_table(
            HEADING, found, IN_MEMORY, SHORT, lambda row: row["in_features"] * row["out_features"]
        ),
        not_run_table(HEADING, rows),
    ]
