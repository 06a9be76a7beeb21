"""What a person reads about attention over a prefix."""

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
from .cases import HEAD_DIM, HEADS

TITLE = "Attention over a prefix"
HEADING = "B × L → P+S"
MAIN, FLOOR, RIVAL = "ours", "plain", "eager"
SHORT = {"ours[torch]": "ours torch", "ours[cpp]": "ours cpp"}
IN_MEMORY = (FLOOR, RIVAL, MAIN)


def headlines(rows: Sequence[Row]) -> list[str]:
    """What a prefix costs over none, concatenated and folded in."""
    found = measured(rows, MAIN)
    if not found:
        return []
    ours, eager = (
        statistics.geometric_mean(ratio(row, name, FLOOR) for row in found)
        for name in (MAIN, RIVAL)
    )
    lines = [
        f"Attention over a prefix takes {ours:.2f} × the time of attention without one, concatenated {eager:.2f} × "
        f"(mean of {len(found)} row(s), without gradients)."
    ]
    compared, lost = lost_in((row, MAIN, RIVAL) for row in found)
    if compared:
        lines.append(f"Slower than concatenation in {lost} of {compared} rows (marked {LOST}).")
    return lines


def tables(rows: Sequence[Row], meta: dict[str, Any]) -> list[TextTable]:
    found, gpu = measured(rows, MAIN), meta["kind"] == "cuda"
    table = TextTable(
        "Attention over a prefix, forward without gradients (ms, medians)",
        [HEADING, "plain", "eager", "ours", "eager / plain", "ours / plain", "ours / eager"]
        + ["error / eager", *trust_columns(gpu)],
        wide=("max error", "rounds"),
    )
    for row in found:
        table.rows.append(
            [
                name_of(row),
                *(ms(row, name) for name in (FLOOR, RIVAL, MAIN)),
                times(row, RIVAL, FLOOR),
                times(row, MAIN, FLOOR),
                ratio_cell(row, MAIN, RIVAL),
                error_cell(row, MAIN),
                *trust_cells(row, MAIN, gpu),
            ]
        )
    table.notes = [
        f"{HEADS} heads of {HEAD_DIM}. *plain*: attention without a prefix. *eager*: keys, values and mask are "
        "concatenated, as `adapters` does it. *error / eager*: mean distance from fp64 over eager's own."
    ]
    return [
        table,
        memory_table(
            HEADING, found, IN_MEMORY, SHORT, lambda row: row["tokens"] * HEADS * HEAD_DIM
        ),
        not_run_table(HEADING, rows),
    ]
