"""What a person reads about batched multi-LoRA."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from ..tables import (
    LOST,
    MIB,
    NEVER,
    Row,
    TextTable,
    contenders_table,
    error_cell,
    has,
    interval_cell,
    less_exact,
    lost_in,
    measured,
    median,
    memory_table,
    ms,
    name_of,
    not_run_table,
    number,
    overhead_cell,
    overhead_of,
    ratio_cell,
    times,
    trust_cells,
    trust_columns,
)

TITLE = "Batched multi-LoRA"
HEADING = "T × in → out, stack"
MAIN, RIVAL, FLOOR = "ours", "loop", "frozen"
SHORT = {
    "peft": "PEFT",
    "ours_linear": "ours over F.linear",
    "ours_rows": "ours, B by rows",
    "ours[torch]": "ours torch",
    "ours[cpp]": "ours cpp",
    "ours[triton]": "ours triton",
    "ours[cuda]": "ours cuda",
}
IN_MEMORY = ("frozen", "loop", "gather", "ours")
MODES = {"decode": "forward", "train": "forward + backward"}
RIVALS = {"loop": "the loop", "gather": "gathered bmm", "merged": "merging", "peft": "PEFT"}


def of_shapes(rows: Sequence[Row], mode: str) -> list[Row]:
    """Rows that are there for their shape."""
    return [row for row in measured(rows, MAIN) if row["mode"] == mode and not _popularity(row)]


def of_popularities(rows: Sequence[Row]) -> list[Row]:
    return [row for row in measured(rows, MAIN) if _popularity(row)]


def _popularity(row: Row) -> bool:
    """Among stacks of as many adapters as there are tokens, which differ in who names whom."""
    return bool(row["ids"] != "even" and row["adapters"] == row["tokens"])


def headlines(rows: Sequence[Row]) -> list[str]:
    """The overhead in a sentence per dtype, wins and losses."""
    lines, found = [], measured(rows, MAIN)
    for dtype in dict.fromkeys(row["dtype"] for row in found):
        parts = []
        for mode, words in MODES.items():
            mine = [
                row for row in of_shapes(rows, mode) if row["dtype"] == dtype and has(row, MAIN)
            ]
            values = [v for row in mine if (v := overhead_of(row, MAIN)) is not None]
            if values:
                rate = statistics.geometric_mean(
                    median(row, MAIN) / median(row, FLOOR) for row in mine
                )
                parts.append(
                    f"{words} {statistics.fmean(values):+.2f} ({rate:.2f} × the frozen linear)"
                )
        if parts:
            lines.append(
                f"Mean overhead in {dtype}, 0 the frozen linear and 1 a loop over adapters: {', '.join(parts)}."
            )
    for rival, words in RIVALS.items():
        compared, lost = lost_in((row, MAIN, rival) for row in found)
        if compared:
            lines.append(f"Slower than {words} in {lost} of {compared} rows.")
    known, worse = less_exact(found, MAIN)
    if known:
        lines.append(f"Further from fp64 than the loop, by the mean, in {worse} of {known} rows.")
    return lines


def tables(rows: Sequence[Row], meta: dict[str, Any]) -> list[TextTable]:
    gpu, found = meta["kind"] == "cuda", measured(rows, MAIN)
    everyone = contenders_table(
        "Multi-LoRA, every contender as a multiple of the frozen linear",
        HEADING,
        found,
        FLOOR,
        SHORT,
    )
    for line, row in zip(everyone.rows, found, strict=True):
        line[0] += "" if row["mode"] == "train" else " (forward)"
    everyone.notes = [
        "Forward and backward where nothing else is said. *loop*: PEFT's way of mixing, rows found beforehand; "
        "*PEFT*: its layer, which trains no mixed batches; *gather*: a copy of A and B for each token, two bmm; "
        "*merged*: W + BA made for each adapter of the batch; *ours*: `multi_lora_linear`, as in `MultiLoRALinear`; "
        "*over F.linear*: the same adapters over PyTorch's product; *B by rows*: B as (L, out, R) without a gap, not "
        "rank by rank as `MultiLoRALinear` keeps it; *plan*: what is built once for a batch, for all its layers, and "
        "in no other time. –: not in this row, `kernels.csv` says why."
    ]
    trained = of_shapes(rows, "train")
    return [
        _shape_table(of_shapes(rows, "decode"), "forward without gradient", gpu),
        _shape_table(trained, "forward + backward", gpu),
        _popularity_table(of_popularities(rows)),
        everyone,
        memory_table(
            HEADING, trained, IN_MEMORY, SHORT, lambda row: row["tokens"] * row["out_features"]
        ),
        not_run_table(HEADING, rows),
    ]


def _shape_table(rows: Sequence[Row], passes: str, gpu: bool) -> TextTable:
    table = TextTable(
        f"Multi-LoRA over a frozen linear, r = 16, {passes} (ms, medians)",
        [HEADING, "frozen", "loop", "gather", "ours", "ours / frozen", "ours / loop"]
        + ["ours / gather", "overhead", "p10 to p90", "error / loop"]
        + trust_columns(gpu),
        wide=("ours / gather", "p10 to p90", "max error", "rounds"),
    )
    for row in rows:
        table.rows.append(
            [
                name_of(row),
                *(ms(row, name) for name in (FLOOR, RIVAL, "gather", MAIN)),
                times(row, MAIN, FLOOR),
                ratio_cell(row, MAIN, RIVAL),
                ratio_cell(row, MAIN, "gather"),
                overhead_cell(row, MAIN, RIVAL),
                interval_cell(row, MAIN),
                error_cell(row, MAIN),
                *trust_cells(row, MAIN, gpu),
            ]
        )
    table.notes = [
        "A product with the frozen W is in every time: for *frozen* and *loop* `F.linear`, for *ours* that of "
        "`multi_lora_linear`, which packs W once, so that the overhead can be below 0; the table of every contender "
        "has ours over `F.linear` too. *overhead* = (ours − frozen) / (loop − frozen), with an interval over resampled "
        "rounds; bare ratios (×) stand where the loop costs less than 2 % over frozen. *error / loop*: mean distance "
        "from fp64 over "
        "the loop's, the worst of y and all gradients, those of x and of the whole stack. "
        f"{LOST}: slower, or less exact, by 1 % or more."
    ]
    return table


def _popularity_table(rows: Sequence[Row]) -> TextTable:
    table = TextTable(
        "Multi-LoRA, cost by who names whom, forward (ms, medians)",
        [
            "T × in → out",
            "adapters in batch",
            "their MiB",
            "frozen",
            "loop",
            "ours",
            "loop − frozen",
        ]
        + ["ours − frozen", "overhead", "error / loop", "rounds"],
        wide=("loop − frozen", "error / loop", "rounds"),
    )
    for row in rows:
        shape = f"{row['tokens']} × {row['in_features']} → {row['out_features']}"
        table.rows.append(
            [
                f"{row['dtype']} {shape} {row['ids']}, r {row['rank']}",
                str(row["used_adapters"]),
                f"{row['adapter_bytes'] / MIB:.2f}",
                *(ms(row, name) for name in (FLOOR, RIVAL, MAIN)),
                *(_extra_cell(row, name) for name in (RIVAL, MAIN)),
                overhead_cell(row, MAIN, RIVAL),
                error_cell(row, MAIN),
                str(row["rounds"]),
            ]
        )
    table.notes = [
        "One stack of as many adapters as there are tokens; *identical*: one adapter for all tokens; *uniform*: √T of "
        "them; *skewed*: each has 1.5 times as many tokens as the next; *distinct*: each token its own (Punica's "
        "popularities). *their MiB*: A and B of the adapters in the batch; with the rank that is named (r 128 for one "
        "adapter, r 2 for each of 64) it is that of *uniform*, so that the same bytes are read."
    ]
    return table


def extra(row: Row, name: str) -> float:
    """Milliseconds over the frozen linear; NaN for who is not there."""
    return median(row, name) - median(row, FLOOR)


def _extra_cell(row: Row, name: str) -> str:
    found = extra(row, name)
    if found != found:
        return NEVER
    return number(found) if found >= 0 else f"{found:.3f}"
