"""What a person reads about the bottleneck adapter."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from ..tables import (
    LOST,
    Row,
    TextTable,
    contenders_table,
    error_cell,
    has,
    less_exact,
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

TITLE = "Bottleneck adapter"
HEADING = "T × d → m"
MAIN, FLOOR = "ours", "ln"
RIVALS = {"eager": "eager PyTorch", "library": "the adapters library"}
SHORT = {
    "ln": "LN",
    "ours[torch]": "ours torch",
    "ours[cpp]": "ours cpp",
    "ours[triton]": "ours triton",
}
IN_MEMORY = ("ln", "library", "eager", "ours")


def headlines(rows: Sequence[Row]) -> list[str]:
    """Per dtype what the step costs against eager and against the layernorm alone; wins and losses."""
    lines, rows = [], measured(rows, MAIN)
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        count, found = mean_ratios(rows, dtype)
        if count:
            both, alone = found["both", "eager"], found["both", FLOOR]
            lines.append(
                f"{dtype}, mean of {count} row(s): forward and backward take {both:.2f} × eager's time (forward alone "
                f"{found['forward', 'eager']:.2f} ×), which is {alone:.2f} × the layernorm's alone (eager "
                f"{alone / both:.2f} ×)."
            )
    for rival, words in RIVALS.items():
        compared, lost = lost_in((row, MAIN, rival) for row in rows)
        if compared:
            lines.append(f"Slower than {words} in {lost} of {compared} rows (marked {LOST}).")
    known, worse = less_exact(rows, MAIN)
    if known:
        lines.append(f"Further from fp64 than eager, by the mean, in {worse} of {known} rows.")
    return lines


def mean_ratios(rows: Sequence[Row], dtype: str) -> tuple[int, dict[tuple[str, str], float]]:
    """How many rows a dtype has, and our time over another's, by pass and contender: geometric means."""
    rows = [
        r for r in rows if r["dtype"] == dtype and all(has(r, n) for n in (MAIN, FLOOR, "eager"))
    ]
    if not rows:
        return 0, {}
    return len(rows), {
        (pass_, name): statistics.geometric_mean(ratio(row, MAIN, name, pass_) for row in rows)
        for pass_ in ("forward", "both")
        for name in (FLOOR, "eager")
    }


def tables(rows: Sequence[Row], meta: dict[str, Any]) -> list[TextTable]:
    found = measured(rows, MAIN)
    everyone = contenders_table(
        "Adapter, every contender: forward + backward as a multiple of the layernorm alone",
        HEADING,
        found,
        FLOOR,
        SHORT,
    )
    everyone.notes = [
        "*library*: `Adapter` of the adapters library; *eager*: the same in six calls of PyTorch, by hand; "
        "*ours torch*, ...: that backend, asked for by name. –: not in this row, `kernels.csv` says why."
    ]
    return [
        _step_table(found, gpu=meta["kind"] == "cuda"),
        everyone,
        memory_table(HEADING, found, IN_MEMORY, SHORT, lambda row: row["tokens"] * row["features"]),
        not_run_table(HEADING, rows),
    ]


def _step_table(rows: Sequence[Row], gpu: bool) -> TextTable:
    table = TextTable(
        "Bottleneck adapter with residual and layernorm, all trained, forward + backward (ms, medians)",
        [HEADING, "LN", "library", "eager", "ours", "ours / LN", "ours / library", "ours / eager"]
        + ["fwd / LN", "fwd / eager", "error / eager"]
        + trust_columns(gpu),
        wide=("ours / library", "max error", "rounds"),
    )
    for row in rows:
        table.rows.append(
            [
                name_of(row),
                *(ms(row, name) for name in (FLOOR, "library", "eager", MAIN)),
                times(row, MAIN, FLOOR),
                ratio_cell(row, MAIN, "library"),
                ratio_cell(row, MAIN, "eager"),
                times(row, MAIN, FLOOR, "forward"),
                ratio_cell(row, MAIN, "eager", "forward"),
                error_cell(row, MAIN),
                *trust_cells(row, MAIN, gpu),
            ]
        )
    table.notes = [
        "LN(o + up(gelu(down(o))) + x), Houlsby's, where nothing else is said; *pfeiffer* has a second layernorm "
        "before the adapter, *parallel* reads x. *LN*: layernorm(o + x) alone, forward and backward, which is there "
        "without an adapter too. *fwd*: the same of the forward passes alone. *error / eager*: "
        "mean distance from fp64 over eager's, the worst of y and all gradients; *max error*: likewise for the "
        "largest distance. "
        f"{LOST}: slower, or less exact, than the rival by 1 % or more."
    ]
    return table
