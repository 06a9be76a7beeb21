"""Tables for the terminal and the README alike, and the cells that all families' tables have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

LOST = "▲"
"""Marks what we lose: slower than the rival, or further from fp64."""
NEVER = "–"
MIB = 1 << 20
Row = dict[str, Any]
"""A row of the results."""


def lost(ratio: float) -> bool:
    """What counts as a loss, everywhere: a ratio of ours to the rival's that is more than 1 when shown, as 1.01.

    Half a percent is less than two runs of the same code differ by.
    """
    return round(ratio, 2) > 1


def marked(text: str, ratio: float) -> str:
    """The text of a cell, with the mark of a loss."""
    return f"{text} {LOST}" if lost(ratio) else text


@dataclass
class TextTable:
    """A table before it knows where it is shown."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wide: tuple[str, ...] = ()
    """Columns that a terminal has no room for."""

    def markdown(self) -> str:
        lines = [f"**{self.title}**", ""]
        lines.append("| " + " | ".join(self.columns) + " |")
        lines.append("|" + "---|" * len(self.columns))
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        lines += ["", *(f"{note}\n" for note in self.notes)] if self.notes else [""]
        return "\n".join(lines)

    def rich(self) -> Any:
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=self.title,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        shown = [i for i, column in enumerate(self.columns) if column not in self.wide]
        for i in shown:
            # headings may break, cells may not; but the last column may hold a sentence
            longest = max((len(row[i]) for row in self.rows), default=0)
            table.add_column(
                Text(self.columns[i]),
                justify="left" if i == 0 else "right",
                no_wrap=i == 0,  # headings shrink instead of it, and no column is pushed out
                min_width=min(longest, 28) if i != shown[-1] else None,
            )
        for row in self.rows:
            red = any(LOST in cell for cell in row)
            table.add_row(*(Text(row[i]) for i in shown), style="red" if red else None)
        return Group(table, *(Text(note.replace("*", ""), style="dim") for note in self.notes))


def print_tables(console: Any, found: Sequence[TextTable]) -> None:
    for table in found:
        console.print(table.rich())
        console.print()


# --- what a row says


def measured(rows: Iterable[Row], main: str) -> list[Row]:
    """Rows in which we were timed, or were wrong."""
    return [
        row
        for row in rows
        if (ours := row["contenders"].get(main)) and (ours["times"] or ours["wrong"])
    ]


def has(row: Row, name: str) -> bool:
    return bool(row["contenders"].get(name, {}).get("times"))


def median(row: Row, name: str, pass_: str = "") -> float:
    """NaN for who is not there."""
    if not has(row, name):
        return float("nan")
    return float(row["contenders"][name]["times"][pass_ or row["main_pass"]]["median"])


def ratio(row: Row, name: str, rival: str, pass_: str = "") -> float:
    return median(row, name, pass_) / median(row, rival, pass_)


def overhead_of(row: Row, name: str) -> float | None:
    found = row["contenders"].get(name, {}).get("overhead", {}).get(row["main_pass"])
    return float(found["value"]) if found else None


def lost_in(pairs: Iterable[tuple[Row, str, str]]) -> tuple[int, int]:
    """Of rows, ours and rivals: how many were compared, and how many of these were lost."""
    ratios = [ratio(*pair) for pair in pairs if has(pair[0], pair[1]) and has(pair[0], pair[2])]
    return len(ratios), sum(map(lost, ratios))


def less_exact(rows: Iterable[Row], main: str) -> tuple[int, int]:
    """How many rows know our error, and in how many of these it is above eager's, by the mean."""
    errors = [row["contenders"][main]["error_ratio"] for row in rows]
    known = [error["mean"] for error in errors if error]
    return len(known), sum(map(lost, known))


# --- cells


def name_of(row: Row) -> str:
    return f"{row['dtype']} {row['label']}"


def number(value: float) -> str:
    """Three digits or so of milliseconds or of a quotient."""
    if value != value:
        return NEVER
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def ms(row: Row, name: str, pass_: str = "") -> str:
    return number(median(row, name, pass_))


def times(row: Row, name: str, floor: str, pass_: str = "") -> str:
    """How many times the floor; no mark, for the floor is no rival."""
    found = ratio(row, name, floor, pass_)
    return NEVER if found != found else f"{found:.2f}"


def ratio_cell(row: Row, name: str, rival: str, pass_: str = "") -> str:
    found = ratio(row, name, rival, pass_)
    return NEVER if found != found else marked(f"{found:.2f}", found)


def overhead_cell(row: Row, name: str, rival: str) -> str:
    found = ratio(row, name, rival)
    if found != found:
        return NEVER
    value = overhead_of(row, name)
    return marked(f"×{found:.2f}" if value is None else f"{value:+.2f}", found)


def interval_cell(row: Row, name: str) -> str:
    found = row["contenders"][name]["overhead"].get(row["main_pass"])
    return f"{found['low']:+.2f} to {found['high']:+.2f}" if found else NEVER


def error_cell(row: Row, name: str) -> str:
    error = row["contenders"][name]["error_ratio"]
    return marked(f"{error['mean']:.2f}", error["mean"]) if error else NEVER


TRUST_COLUMNS = ["max error", "rounds", "ran"]
GPU_COLUMNS = ["GB/s", "TFLOP/s", "host ms"]


def trust_columns(gpu: bool) -> list[str]:
    """What says how far a row may be believed; of a GPU's rows, what their times mean."""
    return TRUST_COLUMNS + (GPU_COLUMNS if gpu else [])


def trust_cells(row: Row, main: str, gpu: bool) -> list[str]:
    ours = row["contenders"][main]
    error = ours["error_ratio"]
    return [
        f"{error['max']:.2f}" if error else NEVER,
        str(row["rounds"]),
        ran_cell(ours),
        *(_gpu_cells(row, main) if gpu else []),
    ]


def ran_cell(entry: dict[str, Any]) -> str:
    return f"WRONG {LOST}" if entry["wrong"] else str(entry["ran"])


def _gpu_cells(row: Row, name: str) -> list[str]:
    """What the time means in bandwidth and arithmetic, and the host's share."""
    seconds, host = median(row, name) / 1e3, row["contenders"][name]["host_ms"]
    return [
        f"{row['bytes'] / seconds / 1e9:.0f}",
        f"{row['flops'] / seconds / 1e12:.1f}",
        f"{host:.3f}" if host else NEVER,
    ]


# --- tables that every family has


def contenders_table(
    title: str, heading: str, rows: Sequence[Row], floor: str, shorts: dict[str, str]
) -> TextTable:
    """Everyone, as a multiple of the floor."""
    names = [n for n in dict.fromkeys(n for row in rows for n in row["contenders"]) if n != floor]
    names = [n for n in names if any(has(row, n) for row in rows)]
    table = TextTable(title, [heading, *(shorts.get(name, name) for name in names)])
    table.rows = [[name_of(row), *(times(row, name, floor) for name in names)] for row in rows]
    return table


def memory_table(
    heading: str,
    rows: Sequence[Row],
    names: Sequence[str],
    shorts: dict[str, str],
    size: Callable[[Row], int],
) -> TextTable:
    """The largest row of each dtype: what is kept for the backward beyond x and weights; peak."""
    table = TextTable(
        "Memory of one step (MiB): saved between forward and backward, peak growth",
        [heading, *(shorts.get(name, name) for name in names)],
        notes=[
            "Saved: new storages only, the inputs and the parameters cost nothing. Peak: results included."
        ],
    )
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        row = max((row for row in rows if row["dtype"] == dtype), key=size)
        table.rows.append(
            [name_of(row), *(_memory(row["contenders"].get(name, {})) for name in names)]
        )
    return table


def _memory(entry: dict[str, Any]) -> str:
    saved, peak = entry.get("saved_bytes"), entry.get("peak_bytes")
    text = f"{saved / MIB:.2f}" if saved is not None else NEVER
    return text + (f", {peak / MIB:.0f}" if peak is not None else "")


def not_run_table(heading: str, rows: Iterable[Row]) -> TextTable:
    table = TextTable("Not run", [heading, "why"])
    table.rows = [[name_of(row), row["not_run"]] for row in rows if row["not_run"]]
    return table
