"""The picture of the users: throughput, the time of a training step, and eight losses, mixed and alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..results import Results
from ..style import BLUE, FAINT, GREEN, GREY, GRID, INK, ORANGE, STYLE, WIDTH, caption, heading, plt
from .tables import SERVED, TRAINED

HEIGHT = 6.4
SERVED_COLORS = {
    "none": GREY,
    "ours": BLUE,
    "loop": ORANGE,
    "merged": "#c9a227",
    "merged by user": GREEN,
}
TRAINED_COLORS = {"frozen": GREY, "mixed": BLUE, "loop": ORANGE, "alone": GREEN}


def draw(results: Results, path: Path) -> bool:
    users = results.get("users")
    if not users:
        return False
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(WIDTH, HEIGHT))
        left, right = figure.add_gridspec(
            1, 2, left=0.2, right=0.985, top=0.85, bottom=0.6, wspace=0.85
        )
        _throughput(figure.add_subplot(left), users)
        _steps(figure.add_subplot(right), users)
        below = {"left": 0.055, "right": 0.985, "top": 0.455, "bottom": 0.05}
        small = figure.add_gridspec(2, 4, hspace=0.55, wspace=0.24, **below)
        for number, task in enumerate(users["tasks"]):
            _loss(figure.add_subplot(small[number // 4, number % 4]), task)
        words = "Training loss (mean of up to 10 steps) and held-out accuracy of each user's task: "
        figure.text(0.012, 0.515, words, fontsize=9)
        figure.legend(
            *figure.axes[-1].get_legend_handles_labels(),
            loc="center left",
            bbox_to_anchor=(0.62, 0.521),
            ncols=2,
            frameon=False,
            fontsize=9,
        )
        heading(figure, HEIGHT, f"{users['users']} users on one frozen MiniLM", results)
        figure.savefig(path, dpi=160)
        plt.close(figure)
    return True


def _bars(
    axis: Any, names: list[str], values: list[float], colors: list[str], texts: list[str]
) -> None:
    axis.barh(range(len(names)), values, color=colors, height=0.66)
    axis.set_yticks(range(len(names)), names, fontsize=8.5)
    axis.invert_yaxis()
    most = max(values)
    for y, (value, text) in enumerate(zip(values, texts, strict=True)):
        inside = value > 0.45 * most
        axis.annotate(
            text,
            (value, y),
            (-5 if inside else 5, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            color="white" if inside else INK,
            fontweight="bold",
            fontsize=8.5,
        )
    axis.tick_params(length=0)
    axis.spines["left"].set_visible(False)
    axis.set_xlim(0, 1.04 * most)


def _throughput(axis: Any, users: dict[str, Any]) -> None:
    served = users["serving"]
    stream = {name: stat["median"] for name, stat in served["stream_ms"].items()}
    names = [name for name in SERVED if name in stream]
    values = [1e3 * served["requests"] / stream[name] for name in names]
    _bars(
        axis,
        [
            SERVED[name].replace(" of a batch", "\nof a batch").replace(", ", ",\n")
            for name in names
        ],
        values,
        [SERVED_COLORS[name] for name in names],
        [f"{value:.0f}" for value in values],
    )
    if "none" in stream:
        axis.axvline(values[0], color=FAINT, lw=1, ls=(0, (4, 3)))
    caption(axis, "Requests a second")


def _steps(axis: Any, users: dict[str, Any]) -> None:
    step = {kind: stat["median"] for kind, stat in users["step_ms"].items()}
    kinds = [kind for kind in TRAINED if kind in step]
    values = [step[kind] for kind in kinds]
    _bars(
        axis,
        [TRAINED[k].replace(" of the batch", "\nof the batch").replace(", ", ",\n") for k in kinds],
        values,
        [TRAINED_COLORS[kind] for kind in kinds],
        [f"{value:.0f} ms" for value in values],
    )
    if "frozen" in step:
        axis.axvline(values[0], color=FAINT, lw=1, ls=(0, (4, 3)))
    present, samples = users["plan"]["present"], users["plan"]["samples"]
    caption(axis, f"Training step, {present} × {samples} samples")


def _loss(axis: Any, task: dict[str, Any]) -> None:
    # alone broad and pale below, mixed thin and dark above: where they agree, both are seen
    for kind, words, look in (
        ("alone", "alone", {"color": GREEN, "lw": 4.5, "alpha": 0.4}),
        ("mixed", "in mixed batches", {"color": BLUE, "lw": 1.3}),
    ):
        curve = _smooth(task[kind])
        axis.plot(np.arange(1, len(curve) + 1), curve, label=words, solid_capstyle="round", **look)
    axis.set_title(f"{task['name']}  {100 * task['accuracy']:.0f} %", loc="left", fontsize=9, pad=4)
    axis.grid(axis="y", color=GRID, lw=0.7)
    axis.tick_params(length=0, labelsize=8)
    axis.margins(y=0.15)
    axis.xaxis.set_major_locator(plt.MaxNLocator(4, integer=True))


def _smooth(losses: list[float], window: int = 10) -> np.ndarray:
    total = np.cumsum(np.insert(np.asarray(losses, dtype=float), 0, 0.0))
    end = np.arange(1, len(losses) + 1)
    start = np.maximum(0, end - window)
    return (total[end] - total[start]) / np.maximum(end - start, 1)
