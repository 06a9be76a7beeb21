"""How all pictures look: one style, one heading, one way to show what is off the scale."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from .environment import BUSY_LOAD
from .results import Results

INK, FAINT, GRID = "#1f2430", "#6b7280", "#e5e7eb"
BLUE, ORANGE, GREEN, GREY = "#1b6ca8", "#e07a1f", "#3a9d5d", "#9aa3af"
BETTER, WORSE = "#eef7f0", "#fdf1ee"
"""Backgrounds."""
BETTER_INK, WORSE_INK = "#3f7d54", "#b4533c"
WIDTH = 9.2  # inches
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def heading(figure: Any, height: float, title: str, results: Results) -> None:
    """The title, and below it where the numbers come from."""
    meta = results["meta"]
    figure.text(0.012, 1 - 0.14 / height, title, fontsize=13, fontweight="bold", va="top")
    versions = f"torch {meta['versions']['torch']}, pelt_fast {meta['commit']}, {meta['date'][:10]}"
    if meta.get("load_average", 0) > BUSY_LOAD:
        versions += f", busy: load {meta['load_average']}"
    line = f"{meta['device']} ({meta['instruction_set']}), {versions}"
    figure.text(0.012, 1 - 0.43 / height, line, fontsize=9, color=FAINT, va="top")


def legend(figure: Any, height: float, entries: list[tuple[str, str, str]]) -> None:
    """Below the heading: marker, colour and words of each."""
    handles = [
        plt.Line2D([], [], color=color, marker=marker, ls="", ms=6.5)
        for marker, color, _ in entries
    ]
    figure.legend(
        handles,
        [words for *_, words in entries],
        loc="upper left",
        bbox_to_anchor=(0.008, 1 - 0.68 / height),
        ncols=len(entries),
        frameon=False,
        fontsize=9,
        handletextpad=0.3,
        columnspacing=1.6,
    )


def caption(axis: Any, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold", pad=5)


def above(axis: Any, x: float, words: str, color: str = INK, ha: str = "center") -> None:
    """Words over a panel, at x of its axis."""
    axis.annotate(
        words,
        (x, 1),
        (0, 4),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha=ha,
        va="bottom",
        color=color,
        fontsize=9,
    )


def row_axis(axis: Any, names: list[str], low: float, high: float) -> None:
    """One line for each row, the first on top, between these ends."""
    axis.set_xlim(low, high)
    axis.set_ylim(len(names) - 0.45, -0.55)
    axis.hlines(range(len(names)), low, high, color=GRID, lw=0.7, zorder=0.5)
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(length=0, which="both")
    axis.spines["left"].set_visible(False)


def off_scale(axis: Any, end: float, y: float, text: str, right: bool, color: str) -> None:
    """An arrow with the value, at the end of the scale."""
    axis.annotate(
        f"{text} ▶" if right else f"◀ {text}",
        (end, y),
        (-3 if right else 3, 0),
        textcoords="offset points",
        ha="right" if right else "left",
        va="center",
        color=color,
        fontsize=8,
    )
