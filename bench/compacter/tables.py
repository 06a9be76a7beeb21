"""What a person reads about the Compacter adapter."""

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
    ms,
    name_of,
    not_run_table,
    ratio,
    ratio_cell,
    times,
    trust_cells,
    trust_columns,
)

TITLE = "Compacter"
HEADING = "T × d → m"
MAIN, FLOOR, RIVAL = "ours", "ln", "eager"


def headlines(rows: Sequence[Row]) -> list[str]:
    """What a step costs against the library's composition; losses."""
    rows = measured(rows, MAIN)
    compared, lost = lost_in((row, MAIN, RIVAL) for row in rows)
    if not compared:
        return []
    mean = statistics.geometric_mean(ratio(row, MAIN, RIVAL) for row in rows)
    return [
        f"Mean of {compared} row(s): {mean:.2f} × the time of the library's composition, slower in {lost} "
        f"(marked {LOST})."
    ]


def tables(rows: Sequence[Row], meta: dict[str, Any]) -> list[TextTable]:
    gpu = meta["kind"] == "cuda"
    step = TextTable(
        "Compacter adapter with residual and layernorm, 4 products of rank 1 (ms, medians)",
        [HEADING, "LN", "eager", "ours", "ours / LN", "ours / eager", "error / eager"]
        + trust_columns(gpu),
        wide=("max error", "rounds"),
    )
    for row in measured(rows, MAIN):
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
        "LN(o + up(gelu(down(o))) + x), forward and backward, everything trained; or forward alone, without gradients. "
        "*LN*: layernorm(o + x) alone. *eager*: the operations of the library's `PHMLayer`, which builds every "
        "Kronecker product."
    ]
    return [step, not_run_table(HEADING, rows)]
