"""The picture of the bottleneck adapter: its cost in units of the layernorm that stands there anyway."""

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
from ..tables import Row, has, lost, measured, ratio
from .tables import FLOOR, HEADING, MAIN

SHOWN = {
    "library": ("D", "#f0b27a", "adapters library"),
    "eager": ("o", ORANGE, "eager PyTorch"),
    "compiled": ("s", GREEN, "torch.compile"),
    MAIN: ("o", BLUE, "ours"),
}
PASSES = {"forward": "forward", "both": "forward + backward"}
TICKS = (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256)
FINE_TICKS = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8)
LEAST, MOST = 0.25, 256.0
"""The axis goes no further than this; points outside stand at its end as arrows."""


def draw(results: Results, path: Path) -> bool:
    """False when there is no row."""
    rows = [
        row
        for row in measured(rows_of(results, "adapter"), MAIN)
        if all(has(row, name) for name in (FLOOR, "eager", MAIN))
    ]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    if not rows:
        return False
    counts = [sum(row["dtype"] == dtype for row in rows) for dtype in dtypes]
    height = 2.0 + 0.33 * sum(counts) + 0.6 * (len(dtypes) - 1)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(dtypes), 2, figsize=(WIDTH, height), squeeze=False, height_ratios=counts
        )
        for line, dtype in zip(axes, dtypes, strict=True):
            mine = [row for row in rows if row["dtype"] == dtype]
            ends = _ends(mine)
            for axis, (pass_, words) in zip(line, PASSES.items(), strict=True):
                _panel(axis, mine, pass_, ends)
                caption(axis, f"{dtype}, {words}")
            line[1].set_yticklabels([])
        for axis in axes[-1]:
            axis.set_xlabel("time, as a multiple of layernorm(x + residual) alone")
        axes[0, 0].annotate(
            HEADING, (0, 1), (-8, 5), xycoords="axes fraction", textcoords="offset points",
            ha="right", va="bottom", color=FAINT, fontsize=9,
        )  # fmt: skip
        heading(
            figure, height, "What a bottleneck adapter costs, in units of its layernorm", results
        )
        shown = [name for name in SHOWN if any(has(row, name) for row in rows)]
        legend(figure, height, [SHOWN[name] for name in shown])
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.98 / height), h_pad=1.2, w_pad=1.5)
        figure.savefig(path, dpi=160)
        plt.close(figure)
    return True


def _ends(rows: list[Row]) -> tuple[float, float]:
    """Of a dtype's panels, so that forward and both can be compared."""
    names = [(row, name) for row in rows for name in SHOWN if has(row, name)]
    found = [ratio(row, name, FLOOR, pass_) for row, name in names for pass_ in PASSES]
    return max(LEAST, min(0.8, min(found) / 1.15)), min(MOST, max(2.2, max(found) * 1.15))


def _panel(axis: Any, rows: list[Row], pass_: str, ends: tuple[float, float]) -> None:
    low, high = ends
    axis.set_xscale("log", base=2)
    # the speed-ups stand in a column of their own, behind the scale
    row_axis(axis, [row["label"] for row in rows], low, high * (high / low) ** 0.2)
    ticks = [t for t in (FINE_TICKS if high < 10 * low else TICKS) if low <= t <= high]
    axis.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    axis.xaxis.set_minor_locator(plt.NullLocator())
    axis.axvspan(low, 1, color=BETTER, zorder=0)
    axis.axvline(1, color=INK, lw=1.1, zorder=1)
    above(axis, high * (high / low) ** 0.2, "eager / ours", FAINT, ha="right")
    for y, row in enumerate(rows):
        costs = {name: ratio(row, name, FLOOR, pass_) for name in SHOWN if has(row, name)}
        ours, eager = np.clip([costs[MAIN], costs["eager"]], low, high)
        axis.plot([ours, eager], [y, y], color=BLUE, lw=2.4, alpha=0.25, zorder=2)
        for name, cost in costs.items():
            _dot(axis, y, cost, ends, name)
        times = ratio(row, "eager", MAIN, pass_)
        worse = lost(1 / times)
        axis.annotate(
            f"{times:.1f}×" if times >= 1.05 or worse else f"{times:.2f}×",
            (1, y),
            (-2, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="center",
            color=ORANGE if worse else BLUE,
            fontweight="bold",
            fontsize=8.5,
        )


def _dot(axis: Any, y: float, cost: float, ends: tuple[float, float], name: str) -> None:
    marker, color, _ = SHOWN[name]
    low, high = ends
    if low <= cost <= high:
        size = 6.5 if name == MAIN else 5.5
        axis.plot(
            cost, y, marker, color=color, ms=size, mec="white", mew=0.8, zorder=3 + (name == MAIN)
        )
    else:
        off_scale(axis, high if cost > high else low, y, f"{cost:.0f}×", cost > high, color)
