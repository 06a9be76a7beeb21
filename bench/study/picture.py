"""The picture of a study: accuracy over K, and what a method costs in time and memory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..style import BLUE, FAINT, GREEN, GREY, GRID, INK, ORANGE, STYLE, WIDTH, caption, heading, plt
from ..tables import MIB
from .methods import METHODS
from .record import Line
from .tables import TIMED, Costs, eager_of, of, relative, settings, sizes

COLORS = dict(zip(METHODS, (INK, GREY, GREEN, "#8e6bbf", "#c9a227", BLUE, ORANGE), strict=True))
COSTS_HEIGHT, ACCURACY_HEIGHT = 6.4, 3.1  # inches


def draw(lines: Sequence[Line], costs: Costs, meta: dict[str, Any], path: Path) -> bool:
    """A panel for each task and protocol, and four for the costs; False when there is nothing to draw."""
    found = settings(lines)
    if not found and not costs:
        return False
    ratios = [ACCURACY_HEIGHT] * len(found) + [COSTS_HEIGHT / 2] * (2 if costs else 0)
    height = 0.75 + sum(ratios)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(WIDTH, height))
        rows = figure.add_gridspec(
            len(ratios), 1, height_ratios=ratios, left=0.15, right=0.985,
            top=1 - 0.95 / height, bottom=0.35 / height, hspace=0.32,
        )  # fmt: skip
        for row, one in zip(rows, found, strict=False):
            _accuracy(figure.add_subplot(row), *one)
        if costs:
            upper, lower = (rows[len(found) + i].subgridspec(1, 2, wspace=0.42) for i in range(2))
            for cell, what in zip((upper[0], upper[1], lower[0]), TIMED, strict=True):
                _times(figure.add_subplot(cell), costs, what)
            _legend(figure.axes[len(found)])
            _memory(figure.add_subplot(lower[1]), costs)
        heading(figure, height, "UniPELT's protocol, method by method", {"meta": meta})
        figure.savefig(path, dpi=160)
        plt.close(figure)
    return True


def _accuracy(axis: Any, task: str, setting: dict[str, str], lines: list[Line]) -> None:
    """Side by side over K; the error bar is the standard deviation over seeds, a dot is a seed."""
    methods = [name for name in METHODS if any(line["method"] == name for line in lines)]
    width = 0.8 / len(methods)
    for place, k in enumerate(sizes(lines)):
        for number, name in enumerate(methods):
            values = [100 * value for value in of(lines, name, k, "eager")]
            if not values:
                continue
            x = place + (number - (len(methods) - 1) / 2) * width
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            axis.errorbar(
                x,
                statistics.fmean(values),
                spread or None,
                fmt="o",
                ms=8,
                color=COLORS[name],
                lw=1.5,
                capsize=3,
                label=METHODS[name].title if place == 0 else None,
            )
            axis.plot([x] * len(values), values, ".", color=INK, ms=3.5, alpha=0.7)
    axis.margins(y=0.15)
    axis.set_xlim(-0.5, len(sizes(lines)) - 0.5)
    axis.set_xticks(range(len(sizes(lines))), [f"K = {k}" for k in sizes(lines)])
    axis.set_ylabel("accuracy, %")
    axis.grid(axis="y", color=GRID, lw=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(length=0)
    rates = float(setting["rate_scale"])
    words = f", {rates:g} × its learning rates" if rates != 1 else ""
    caption(axis, f"{task}: held-out accuracy by samples, up to {setting['epochs']} epochs{words}")
    axis.legend(frameon=False, fontsize=8, ncols=len(methods), loc="upper center",
                bbox_to_anchor=(0.45, -0.09), columnspacing=1, handlelength=1)  # fmt: skip


def _times(axis: Any, costs: Costs, what: str) -> None:
    rows = [
        (name, relative(cost, what, eager_of(name)), relative(cost, what, "accelerated"))
        for name, cost in costs.items()
    ]
    _pairs(axis, rows, "{:.0f}")
    axis.axvline(100, color=FAINT, lw=1, ls=(0, (4, 3)))
    caption(axis, f"{TIMED[what]}, % of fine-tuning")


def _memory(axis: Any, costs: Costs) -> None:
    rows = []
    for name, cost in costs.items():
        peak = cost["peak_bytes"]
        values = (peak.get(eager_of(name)), peak.get("accelerated"))
        rows.append((name, *(value and value / MIB for value in values)))
    if any(row[1] for row in rows):
        _pairs(axis, rows, "{:.0f}")
    caption(axis, "Peak memory of training, MiB")


def _pairs(axis: Any, rows: Sequence[tuple[str, Any, Any]], form: str) -> None:
    """Two bars for each method: eager above accelerated."""
    thick = 0.38
    for y, (_, eager, ours) in enumerate(rows):
        plain = ours is None
        marks = [(y if plain else y - thick / 2, eager, GREY if plain else ORANGE)]
        marks += [] if plain else [(y + thick / 2, ours, BLUE)]
        for at, value, color in marks:
            if value is not None:
                axis.barh(at, value, height=thick, color=color)
                axis.annotate(form.format(value), (value, at), (3, 0), textcoords="offset points",
                              va="center", fontsize=8)  # fmt: skip
    titles = [METHODS[name].title.replace(", ", ",\n") for name, *_ in rows]
    axis.set_yticks(np.arange(len(rows)), titles, fontsize=8)
    axis.invert_yaxis()
    axis.tick_params(length=0, labelsize=8)
    axis.margins(x=0.12)
    axis.spines["left"].set_visible(False)


def _legend(axis: Any) -> None:
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in (ORANGE, BLUE)]
    axis.legend(
        handles,
        ("eager", "accelerated"),
        frameon=False,
        fontsize=8.5,
        ncols=2,
        loc="lower right",
        bbox_to_anchor=(1.02, 1.08),
    )
