"""The picture of batched multi-LoRA: every way as a multiple of the frozen linear, and the cost by popularity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..results import Results, rows_of
from ..style import (
    BETTER,
    BLUE,
    FAINT,
    GREEN,
    GREY,
    GRID,
    INK,
    ORANGE,
    STYLE,
    WIDTH,
    above,
    caption,
    heading,
    legend,
    off_scale,
    plt,
    row_axis,
)
from ..tables import Row, has, lost, overhead_of, ratio
from .cases import DISTRIBUTIONS, RANK
from .tables import FLOOR, MAIN, MODES, RIVAL, extra, of_popularities, of_shapes

SHOWN = {
    "peft": ("D", "#f0b27a", "PEFT"),
    "merged": ("v", GREY, "merged per adapter"),
    "gather": ("s", GREEN, "gathered bmm"),
    RIVAL: ("o", ORANGE, "loop over adapters"),
    MAIN: ("o", BLUE, "ours"),
}
TICKS = (0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)
LEAST, MOST = 0.5, 40.0
"""The axis goes no further than this; points outside stand at its end as arrows."""


def draw(results: Results, path: Path) -> bool:
    """False when there is no row."""
    found = rows_of(results, "multi_lora")
    rows = [row for mode in MODES for row in of_shapes(found, mode) if _shown(row)]
    kinds = [row for row in of_popularities(found) if _shown(row)]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    if not rows:
        return False
    panels = [(dtype, mode) for dtype in dtypes for mode in MODES]
    panels = [p for p in panels if any((row["dtype"], row["mode"]) == p for row in rows)]
    counts = [sum((row["dtype"], row["mode"]) == p for row in rows) for p in panels]
    below = 2.6 if kinds else 0.0
    height = 1.75 + 0.34 * sum(counts) + 0.55 * len(panels) + below
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(WIDTH, height))
        upper = (1 - 1.15 / height, (below + 0.55) / height)
        grid = figure.add_gridspec(
            len(panels), 1, left=0.32, right=0.985, top=upper[0], bottom=upper[1],
            height_ratios=counts, hspace=0.42 * len(panels) / max(1, sum(counts)) / 0.34,
        )  # fmt: skip
        for place, panel in zip(grid, panels, strict=True):
            mine = [row for row in rows if (row["dtype"], row["mode"]) == panel]
            axis = figure.add_subplot(place)
            _panel(axis, mine)
            caption(axis, f"{panel[0]}, {MODES[panel[1]]}")
        axis.set_xlabel("time, as a multiple of the frozen linear alone, r = 16", labelpad=2)
        if kinds:
            _popularities(figure, kinds, height)
        heading(figure, height, "What a batch of many adapters costs", results)
        shown = [name for name in SHOWN if any(has(row, name) for row in rows)]
        legend(figure, height, [SHOWN[name] for name in shown])
        figure.savefig(path, dpi=160)
        plt.close(figure)
    return True


def _shown(row: Row) -> bool:
    return all(has(row, name) for name in (FLOOR, RIVAL, MAIN))


def _panel(axis: Any, rows: list[Row]) -> None:
    costs = [{n: ratio(row, n, FLOOR) for n in SHOWN if has(row, n)} for row in rows]
    every = [cost for one in costs for cost in one.values()]
    low = max(LEAST, min(0.9, min(every) / 1.1))
    high = min(MOST, max(2.0, max(every) * 1.15))
    end = high * (high / low) ** 0.17
    axis.set_xscale("log", base=2)
    # the overheads stand in a column of their own, behind the scale
    row_axis(axis, [row["label"] for row in rows], low, end)
    axis.tick_params(axis="y", labelsize=8.5)
    ticks = [t for t in TICKS if low <= t <= high]
    axis.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    axis.xaxis.set_minor_locator(plt.NullLocator())
    axis.axvspan(low, 1, color=BETTER, zorder=0)
    axis.axvline(1, color=INK, lw=1.1, zorder=1)
    above(axis, end, "overhead", FAINT, ha="right")
    for y, (row, one) in enumerate(zip(rows, costs, strict=True)):
        ours, loop = np.clip([one[MAIN], one[RIVAL]], low, high)
        axis.plot([ours, loop], [y, y], color=BLUE, lw=2.4, alpha=0.25, zorder=2)
        for name, cost in one.items():
            marker, color, _ = SHOWN[name]
            if low <= cost <= high:
                size, order = (6.5, 4) if name == MAIN else (5.5, 3)
                axis.plot(cost, y, marker, color=color, ms=size, mec="white", mew=0.8, zorder=order)
            else:
                label = f"{cost:.0f}×" if cost >= 10 else f"{cost:.2g}×"
                off_scale(axis, high if cost > high else low, y, label, cost > high, color)
        value = overhead_of(row, MAIN)
        axis.annotate(
            f"{value:+.2f}" if value is not None else "–",
            (1, y),
            (-2, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="center",
            color=ORANGE if lost(ratio(row, MAIN, RIVAL)) else BLUE,
            fontweight="bold",
            fontsize=8.5,
        )


def _popularities(figure: Any, rows: list[Row], height: float) -> None:
    """Milliseconds over the frozen linear; filled: one rank, hollow: the same bytes of adapters."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))[:2]
    first = rows[0]
    shape = (first["tokens"], first["in_features"], first["out_features"])
    rows = [r for r in rows if (r["tokens"], r["in_features"], r["out_features"]) == shape]
    grid = figure.add_gridspec(
        1, len(dtypes), left=0.07, right=0.985, top=2.05 / height, bottom=0.62 / height, wspace=0.16
    )
    for place, dtype in zip(grid, dtypes, strict=True):
        axis = figure.add_subplot(place)
        mine = [row for row in rows if row["dtype"] == dtype]
        kinds = [kind for kind in DISTRIBUTIONS if any(row["ids"] == kind for row in mine)]
        usual = {row["ids"]: row for row in mine if row["rank"] == RANK}
        equal = {row["ids"]: row for row in mine if row["rank"] != RANK}
        if "uniform" in usual and equal:
            equal["uniform"] = usual["uniform"]
        for name in (RIVAL, MAIN):
            marker, color, _ = SHOWN[name]
            for group, look in (
                (usual, {"color": color, "ls": "-"}),
                (equal, {"color": color, "ls": ":", "mfc": "white", "alpha": 0.85}),
            ):
                there = [k for k in kinds if k in group and has(group[k], name)]
                values = [extra(group[k], name) for k in there]
                axis.plot([kinds.index(k) for k in there], values, marker=marker, ms=5.5, lw=1.4, **look)  # fmt: skip
        labels = [f"{k}\n{usual[k]['used_adapters']}" if k in usual else k for k in kinds]
        axis.set_xticks(range(len(kinds)), labels)
        axis.axhline(0, color=INK, lw=1)
        axis.grid(axis="y", color=GRID, lw=0.7)
        axis.tick_params(length=0, labelsize=8.5)
        caption(axis, f"{dtype}, {shape[0]} × {shape[1]} → {shape[2]}: ms over the frozen linear")
    figure.text(
        0.012,
        0.1 / height,
        "Loop and ours; below the names: adapters in the batch. Solid: r = 16. Dotted: ranks with which "
        "the same bytes are read, 128, 16 and 2.",
        fontsize=8.5,
        color=FAINT,
    )
