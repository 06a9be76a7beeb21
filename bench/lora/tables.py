"""What a person reads about the LoRA linear."""

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
    interval_cell,
    less_exact,
    lost_in,
    measured,
    memory_table,
    ms,
    name_of,
    not_run_table,
    overhead_cell,
    overhead_of,
    ran_cell,
    ratio_cell,
    times,
    trust_cells,
    trust_columns,
)

TITLE = "LoRA"
HEADING = "T × in → out"
MAIN, RIVAL, FLOOR = "ours_base", "peft_base", "frozen"
FORMS = {
    "base": "against PEFT with adapters in the base dtype",
    "dropout": "with dropout 0.1",
    "fp32": "against PEFT's default, fp32 adapters",
}
SHORT = {
    "peft_base": "PEFT",
    "peft_dropout": "PEFT drop",
    "peft_fp32": "PEFT fp32",
    "peft_compiled": "compiled",
    "ours_base": "ours",
    "ours_dropout": "ours drop",
    "ours_fp32": "ours fp32",
    "ours[torch]": "ours torch",
    "ours[cpp]": "ours cpp",
    "ours[triton]": "ours triton",
}
IN_MEMORY = ("frozen", "peft_base", "peft_dropout", "peft_fp32", "addmm", "ours_base")
IN_MEMORY += ("ours_dropout", "ours_fp32")


def headlines(rows: Sequence[Row]) -> list[str]:
    """The overhead in a sentence per dtype, wins and losses."""
    lines, rows = [], measured(rows, MAIN)
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        means = [f"{mean:+.2f} {FORMS[form]}" for form, mean in mean_overheads(rows, dtype).items()]
        if means:
            lines.append(f"Mean PELT overhead in {dtype}, T ≥ 512: " + ", ".join(means) + ".")
    compared, lost = lost_in(
        (row, f"ours_{form}", f"peft_{form}") for row in rows for form in FORMS
    )
    if compared:
        lines.append(f"Slower than PEFT in {lost} of {compared} comparisons (marked {LOST}).")
    known, worse = less_exact(rows, MAIN)
    if known:
        lines.append(f"Further from fp64 than PEFT, by the mean, in {worse} of {known} rows.")
    return lines


def mean_overheads(rows: Sequence[Row], dtype: str) -> dict[str, float]:
    """Per form, over the training rows with T ≥ 512 in which it can be told."""
    rows = [row for row in training(rows) if row["tokens"] >= 512 and row["dtype"] == dtype]
    values = {form: [overhead_of(row, f"ours_{form}") for row in rows] for form in FORMS}
    known = {form: [v for v in vs if v is not None] for form, vs in values.items()}
    return {form: statistics.fmean(vs) for form, vs in known.items() if vs}


def training(rows: Sequence[Row]) -> list[Row]:
    return [row for row in measured(rows, MAIN) if row["mode"] == "train"]


def tables(rows: Sequence[Row], meta: dict[str, Any]) -> list[TextTable]:
    trained = training(rows)
    everyone = contenders_table(
        "LoRA, every contender: forward + backward as a multiple of the frozen linear",
        HEADING,
        trained,
        FLOOR,
        SHORT,
    )
    everyone.notes = [
        "*drop*: dropout 0.1; *fp32*: fp32 adapter over a half-precision base; *ours torch*, "
        "...: that backend, asked for by name. –: not in this row, `kernels.csv` says why."
    ]
    return [
        _train_table(trained, gpu=meta["kind"] == "cuda"),
        _decode_table([row for row in measured(rows, MAIN) if row["mode"] == "decode"]),
        everyone,
        memory_table(
            HEADING, trained, IN_MEMORY, SHORT, lambda row: row["tokens"] * row["out_features"]
        ),
        not_run_table(HEADING, rows),
    ]


def _train_table(rows: Sequence[Row], gpu: bool) -> TextTable:
    table = TextTable(
        "LoRA linear, r = 8, forward + backward (ms, medians)",
        [HEADING, "frozen", "PEFT", "ours", "ours / PEFT", "overhead", "p10 to p90", "dropout"]
        + ["fp32 adapter", "error / PEFT"]
        + trust_columns(gpu),
        wide=("p10 to p90", "max error", "rounds"),
    )
    for row in rows:
        table.rows.append(
            [
                name_of(row),
                *(ms(row, name) for name in (FLOOR, RIVAL, MAIN)),
                ratio_cell(row, MAIN, RIVAL),
                overhead_cell(row, MAIN, RIVAL),
                interval_cell(row, MAIN),
                overhead_cell(row, "ours_dropout", "peft_dropout"),
                overhead_cell(row, "ours_fp32", "peft_fp32"),
                error_cell(row, MAIN),
                *trust_cells(row, MAIN, gpu),
            ]
        )
    table.notes = [
        "*overhead* = (ours − frozen) / (PEFT − frozen): 0 is the frozen linear's cost, 1 is "
        "PEFT's, with an interval over resampled rounds; *dropout* and *fp32 adapter*: the same "
        "against PEFT with dropout 0.1, and with its default of an fp32 adapter. Bare ratios (×) "
        "stand where PEFT costs less than 2 % over frozen, and a quotient would be noise. "
        "*error / PEFT*: mean distance from fp64 over PEFT's, the worst of y, dx, dA, dB; *max "
        f"error*: likewise for the largest distance. {LOST}: slower, or less exact, than PEFT by 1 % or more."
    ]
    return table


def _decode_table(rows: Sequence[Row]) -> TextTable:
    table = TextTable(
        "LoRA, decoding, forward without gradient (ms, medians)",
        [HEADING, "frozen", "PEFT", "ours", "ours / frozen", "ours / PEFT", "ran"],
    )
    for row in rows:
        cells = [ms(row, name) for name in (FLOOR, RIVAL, MAIN)]
        cells += [times(row, MAIN, FLOOR), ratio_cell(row, MAIN, RIVAL)]
        table.rows.append([name_of(row), *cells, ran_cell(row["contenders"][MAIN])])
    return table
