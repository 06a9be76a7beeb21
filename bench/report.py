"""From results to what a person reads: tables, the same in the terminal and in the README."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cases import Case, sort_key
from .finetune import mean_and_spread
from .results import Results

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
LOST = "▲"
"""Marks what we lose: slower than PEFT, or further from fp64."""
MIB = 1 << 20


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
            lost = any(LOST in cell for cell in row)
            table.add_row(*(Text(row[i]) for i in shown), style="red" if lost else None)
        return Group(table, *(Text(note.replace("*", ""), style="dim") for note in self.notes))


def tables(results: Results) -> list[TextTable]:
    """Every table that has a row."""
    found = [
        _finetune_table(results),
        _train_table(results),
        _decode_table(results),
        _contenders_table(results),
        _memory_table(results),
        _not_run_table(results),
    ]
    return [table for table in found if table.rows]


def headlines(results: Results) -> list[str]:
    """The overhead in a sentence per dtype, wins and losses."""
    lines = []
    lines += [_finetune_headline(one) for one in results["finetune"]]
    for dtype in dict.fromkeys(row["dtype"] for row in run_rows(results)):
        means = [
            f"{mean:+.2f} {FORMS[form]}" for form, mean in mean_overheads(results, dtype).items()
        ]
        if means:
            lines.append(f"Mean PELT overhead in {dtype}, T ≥ 512: " + ", ".join(means) + ".")
    compared, lost = _comparisons(results)
    if compared:
        lines.append(f"Slower than PEFT in {lost} of {compared} comparisons (marked {LOST}).")
    errors = [row["contenders"]["ours_base"]["error_ratio"] for row in run_rows(results)]
    if any(errors):
        worse = sum(map(_less_exact, errors))
        lines.append(f"Further from fp64 than PEFT, by the mean, in {worse} of {len(errors)} rows.")
    return lines


def _finetune_headline(one: dict[str, Any]) -> str:
    eager, ours = (one["runs"][kind]["model_ms"]["median"] for kind in ("eager", "accelerated"))
    text = f"MiniLM fine-tune in {one['plan']['dtype']}: forward and backward take "
    text += f"{ours / eager:.2f} × PEFT's time"
    if not one["trained"]:
        return text + " (timed in a few steps, not trained)."
    if one["overhead"]:
        overhead = one["overhead"]["value"]
        text += f", PELT overhead {overhead:+.2f}: {100 * (1 - overhead):.0f} % of PEFT's is gone"
    return text + "."


def mean_overheads(results: Results, dtype: str) -> dict[str, float]:
    """Per form, over the training rows with T ≥ 512 in which it can be told."""
    rows = [
        r
        for r in run_rows(results)
        if r["mode"] == "train" and r["tokens"] >= 512 and r["dtype"] == dtype
    ]
    values = {form: [overhead_of(row, f"ours_{form}") for row in rows] for form in FORMS}
    known = {form: [v for v in vs if v is not None] for form, vs in values.items()}
    return {form: statistics.fmean(vs) for form, vs in known.items() if vs}


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


def provenance(results: Results) -> str:
    meta = results["meta"]
    versions = ", ".join(f"{name} {v}" for name, v in meta["versions"].items() if v)
    busy = meta.get("load_average", 0) > 0.5
    return (
        f"{meta['device']} ({meta['instruction_set']}, {meta['threads']} threads), {meta['date']}, "
        f"commit {meta['commit'] or 'unknown'}; {versions}."
        + (
            f" The machine was not idle at the start: load average {meta['load_average']}."
            if busy
            else ""
        )
    )


def update_readme(readme: Path, results: Results, folder: Path) -> bool:
    """Writes the results between the two marks; False when the README has no marks."""
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        return False
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(
        before + BEGIN + "\n" + markdown(results, folder, readme.parent) + END + after,
        encoding="utf-8",
    )
    return True


def markdown(results: Results, folder: Path, root: Path) -> str:
    """The results section, with its pictures linked relative to ``root``."""
    parts = [provenance(results), ""]
    parts += [f"- {line}" for line in headlines(results)] + [""]
    for name, alt in (
        ("overhead.png", "PELT overhead by shape"),
        ("finetune.png", "MiniLM fine-tune, loss and step time"),
    ):
        if (folder / name).exists():
            parts += [f"![{alt}]({Path(os.path.relpath(folder / name, root)).as_posix()})", ""]
    parts += [table.markdown() for table in tables(results)]
    return "\n".join(parts) + "\n"


# --- tables


def _train_table(results: Results) -> TextTable:
    gpu = results["meta"]["kind"] == "cuda"
    table = TextTable(
        "LoRA linear, r = 8, forward + backward (ms, medians)",
        ["T × in → out", "frozen", "PEFT", "ours", "ours / PEFT"]
        + [
            "overhead",
            "p10 to p90",
            "dropout",
            "fp32 adapter",
            "error / PEFT",
            "max error",
            "rounds",
        ]
        + ["ran"]
        + (["GB/s", "TFLOP/s", "host ms"] if gpu else []),
        wide=("p10 to p90", "max error", "rounds"),
    )
    for row in run_rows(results):
        if row["mode"] != "train":
            continue
        ours = row["contenders"]["ours_base"]
        error = ours["error_ratio"]
        cells = [
            _name(row),
            *(_ms(row, name) for name in ("frozen", "peft_base", "ours_base")),
            _ratio_cell(row, "ours_base", "peft_base"),
            _overhead_cell(row, "ours_base"),
            _interval_cell(row, "ours_base"),
            _overhead_cell(row, "ours_dropout"),
            _overhead_cell(row, "ours_fp32"),
            _error_cell(error),
            f"{error['max']:.2f}" if error else "–",
            str(row["rounds"]),
            ours["ran"] if not ours["wrong"] else f"WRONG {LOST}",
        ]
        if gpu:
            seconds = _median(row, "ours_base") / 1e3
            cells += [f"{row['bytes'] / seconds / 1e9:.0f}", f"{row['flops'] / seconds / 1e12:.1f}"]
            cells += [f"{ours['host_ms']:.3f}" if ours["host_ms"] else "–"]
        table.rows.append(cells)
    table.notes = [
        "*overhead* = (ours − frozen) / (PEFT − frozen): 0 is the frozen linear's cost, 1 is "
        "PEFT's, with an interval over resampled rounds; *dropout* and *fp32 adapter*: the same "
        "against PEFT with dropout 0.1, and with its default of an fp32 adapter. Bare ratios (×) "
        "stand where PEFT costs less than 2 % over frozen, and a quotient would be noise. "
        "*error / PEFT*: mean distance from fp64 over PEFT's, the worst of y, dx, dA, dB; *max "
        "error*: likewise for the largest distance. "
        f"{LOST}: slower, or less exact, than PEFT.",
    ]
    return table


def _decode_table(results: Results) -> TextTable:
    table = TextTable(
        "Decoding, forward without gradient (ms, medians)",
        ["T × in → out", "frozen", "PEFT", "ours", "ours / frozen", "ours / PEFT", "ran"],
    )
    for row in run_rows(results):
        if row["mode"] == "decode":
            table.rows.append(
                [
                    _name(row),
                    *(_ms(row, name) for name in ("frozen", "peft_base", "ours_base")),
                    f"{_median(row, 'ours_base') / _median(row, 'frozen'):.2f}",
                    _ratio_cell(row, "ours_base", "peft_base"),
                    row["contenders"]["ours_base"]["ran"],
                ]
            )
    return table


def _contenders_table(results: Results) -> TextTable:
    """Everyone, relative to the frozen linear, in the largest rows that each dtype has."""
    rows = [row for row in run_rows(results) if row["mode"] == "train"]
    names = [
        n for n in dict.fromkeys(n for row in rows for n in row["contenders"]) if n != "frozen"
    ]
    names = [n for n in names if any(_has(row, n) for row in rows)]
    table = TextTable(
        "Every contender, forward + backward, as a multiple of the frozen linear",
        ["T × in → out", *(SHORT.get(name, name) for name in names)],
    )
    for row in rows:
        cells = [
            f"{_median(row, n) / _median(row, 'frozen'):.2f}" if _has(row, n) else "–"
            for n in names
        ]
        table.rows.append([_name(row), *cells])
    if table.rows:
        table.notes = [
            "*drop*: dropout 0.1; *fp32*: fp32 adapter over a half-precision base; *ours torch*, "
            "...: that backend, asked for by name. –: not in this row, `kernels.csv` says why."
        ]
    return table


def _memory_table(results: Results) -> TextTable:
    """The largest row of each dtype: what is kept for the backward beyond x and weights; peak."""
    wanted = (
        "frozen",
        "peft_base",
        "peft_dropout",
        "peft_fp32",
        "addmm",
        "ours_base",
        "ours_dropout",
        "ours_fp32",
    )
    table = TextTable(
        "Memory of one step (MiB): saved between forward and backward, peak growth",
        ["T × in → out", *(SHORT.get(name, name) for name in wanted)],
    )
    for dtype in dict.fromkeys(row["dtype"] for row in run_rows(results)):
        rows = [
            row for row in run_rows(results) if row["dtype"] == dtype and row["mode"] == "train"
        ]
        if rows:
            row = max(rows, key=lambda row: row["tokens"] * row["out_features"])
            cells = []
            for name in wanted:
                entry = row["contenders"].get(name, {})
                saved, peak = entry.get("saved_bytes"), entry.get("peak_bytes")
                text = f"{saved / MIB:.2f}" if saved is not None else "–"
                cells.append(text + (f", {peak / MIB:.0f}" if peak is not None else ""))
            table.rows.append([_name(row), *cells])
    table.notes = [
        "Saved: new storages only, x and the parameters cost nothing. Peak: results included."
    ]
    return table


KEYS = {"overhead": "model_ms", "step_overhead": "step_ms"}


def _finetune_table(results: Results) -> TextTable:
    table = TextTable(
        "Fine-tune: MiniLM-L6, Rotten Tomatoes, LoRA r = 8 on every linear (ms, medians)",
        ["", "forward + backward", "p20 to p80", "overhead", "whole step", "its overhead"]
        + ["accuracy", "last loss", "saved MiB", "peak MiB"],
        wide=("p20 to p80", "saved MiB"),
    )
    for one in results["finetune"]:
        plan, runs = one["plan"], one["runs"]
        slower = runs["accelerated"]["model_ms"]["median"] > runs["eager"]["model_ms"]["median"]
        for kind, run in runs.items():

            def overhead(key: str, kind: str = kind, one: dict[str, Any] = one) -> str:
                times = [one["runs"][k][KEYS[key]]["median"] for k in ("accelerated", "eager")]
                bare = f"×{times[0] / times[1]:.2f}"
                ours = f"{one[key]['value']:+.2f}" if one[key] else bare
                return {"eager": "1", "frozen": "0"}.get(kind, ours)

            model, step = run["model_ms"], run["step_ms"]
            table.rows.append(
                [
                    f"{plan['dtype']} {kind}" + (", head only" if kind == "frozen" else ""),
                    f"{model['median']:.1f}",
                    f"{model['p20']:.1f} to {model['p80']:.1f}",
                    overhead("overhead") + (f" {LOST}" if kind == "accelerated" and slower else ""),
                    f"{step['median']:.1f}",
                    overhead("step_overhead"),
                    _accuracy(run["accuracy"]),
                    f"{statistics.fmean(run['losses'][0][-10:]):.3f}" if one["trained"] else "–",
                    *(
                        f"{run[key] / MIB:.0f}" if run[key] else "–"
                        for key in ("saved_bytes", "peak_bytes")
                    ),
                ]
            )
        steps, seeds = len(runs["eager"]["losses"][0]), len(runs["eager"]["losses"])
        note = plan["note"] or f"{seeds} seed(s), accuracy on {plan['held_out']} held-out texts"
        table.notes.append(
            f"{plan['dtype']}: {steps} steps of {plan['batch']} × {plan['length']} tokens; {note}."
        )
    return table


def _accuracy(values: list[float]) -> str:
    if not values:
        return "–"
    mean, spread = mean_and_spread(values)
    return f"{100 * mean:.1f} %" + (f" ± {100 * spread:.1f}" if len(values) > 1 else "")


def _not_run_table(results: Results) -> TextTable:
    table = TextTable("Not run", ["T × in → out", "why"])
    table.rows = [[_name(row), row["not_run"]] for row in _sorted_rows(results) if row["not_run"]]
    return table


# --- cells


def _name(row: dict[str, Any]) -> str:
    return f"{row['dtype']} {row['tokens']} × {row['in_features']} → {row['out_features']}"


def _sorted_rows(results: Results) -> list[dict[str, Any]]:
    def key(row: dict[str, Any]) -> Any:
        return sort_key(
            Case(row["dtype"], row["tokens"], row["in_features"], row["out_features"], row["mode"])
        )

    return sorted(results["kernels"], key=key)


def run_rows(results: Results) -> Iterator[dict[str, Any]]:
    """Rows in which we were timed, or were wrong."""
    for row in _sorted_rows(results):
        ours = row["contenders"].get("ours_base")
        if ours and (ours["times"] or ours["wrong"]):
            yield row


def _main_pass(row: dict[str, Any]) -> str:
    return "both" if row["mode"] == "train" else "forward"


def _has(row: dict[str, Any], name: str) -> bool:
    return bool(row["contenders"].get(name, {}).get("times"))


def _median(row: dict[str, Any], name: str) -> float:
    if not _has(row, name):
        return float("nan")
    return float(row["contenders"][name]["times"][_main_pass(row)]["median"])


def overhead_of(row: dict[str, Any], name: str) -> float | None:
    found = row["contenders"].get(name, {}).get("overhead", {}).get(_main_pass(row))
    return float(found["value"]) if found else None


def _rival(name: str) -> str:
    return name.replace("ours_", "peft_")


def _ms(row: dict[str, Any], name: str) -> str:
    value = _median(row, name)
    return (
        "–"
        if value != value
        else (f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}")
    )


def _ratio_cell(row: dict[str, Any], name: str, rival: str) -> str:
    ratio = _median(row, name) / _median(row, rival)
    return "–" if ratio != ratio else f"{ratio:.2f}" + (f" {LOST}" if ratio > 1 else "")


def _overhead_cell(row: dict[str, Any], name: str) -> str:
    if not _has(row, name) or not _has(row, _rival(name)):
        return "–"
    ratio = _median(row, name) / _median(row, _rival(name))
    value = overhead_of(row, name)
    text = f"×{ratio:.2f}" if value is None else f"{value:+.2f}"
    return text + (f" {LOST}" if ratio > 1 else "")


def _less_exact(error: dict[str, float] | None) -> bool:
    return error is not None and error["mean"] > 1.005


def _error_cell(error: dict[str, float] | None) -> str:
    return f"{error['mean']:.2f}" + (f" {LOST}" if _less_exact(error) else "") if error else "–"


def _interval_cell(row: dict[str, Any], name: str) -> str:
    found = row["contenders"][name]["overhead"].get(_main_pass(row))
    return f"{found['low']:+.2f} to {found['high']:+.2f}" if found else "–"


def _comparisons(results: Results) -> tuple[int, int]:
    """How often we were compared with PEFT in the same form, and how often we were slower."""
    ratios = [
        _median(row, f"ours_{form}") / _median(row, f"peft_{form}")
        for row in run_rows(results)
        for form in FORMS
        if _has(row, f"ours_{form}") and _has(row, f"peft_{form}")
    ]
    return len(ratios), sum(ratio > 1 for ratio in ratios)


def print_tables(console: Any, found: Sequence[TextTable]) -> None:
    for table in found:
        console.print(table.rich())
        console.print()
