"""The picture of the LoRA linear: between the frozen model's cost (0) and PEFT's (1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..results import Results, rows_of
from ..style import (
    BETTER,
    BETTER_INK,
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    STYLE,
    WIDTH,
    WORSE,
    WORSE_INK,
    above,
    caption,
    heading,
    legend,
    off_scale,
    plt,
    row_axis,
)
from ..tables import Row, overhead_of
from .tables import FORMS, mean_overheads, training

COLORS = {"base": BLUE, "dropout": ORANGE, "fp32": GREEN}
MARKERS = {"base": "o", "dropout": "D", "fp32": "s"}
LABELS = {
    "base": "against PEFT, adapter in the base dtype",
    "dropout": "against PEFT with dropout 0.1",
    "fp32": "against PEFT's default, fp32 adapter",
}
LOW, HIGH = -1.0, 1.75
"""What the axis shows; points outside stand at its ends as arrows, with their value."""
LINE = 0.42  # inches: a row has room for the values of all forms, one above the other


def draw(results: Results, path: Path) -> bool:
    """False when there is no row."""
    rows = [row for row in training(rows_of(results, "lora")) if _forms([row])]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    if not rows:
        return False
    means = {dtype: mean_overheads(rows, dtype) for dtype in dtypes}
    counts = [sum(row["dtype"] == dtype for row in rows) + bool(means[dtype]) for dtype in dtypes]
    height = 1.9 + LINE * sum(counts) + 0.45 * (len(dtypes) - 1)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(dtypes),
            1,
            figsize=(WIDTH, height),
            sharex=True,
            squeeze=False,
            height_ratios=counts,
        )
        for axis, dtype in zip(axes[:, 0], dtypes, strict=True):
            _panel(axis, [row for row in rows if row["dtype"] == dtype], means[dtype])
            caption(axis, dtype)
        above(axes[0, 0], 0.0, "frozen model")
        above(axes[0, 0], 1.0, "PEFT")
        above(axes[0, 0], LOW / 2, "faster than frozen", BETTER_INK)
        above(axes[0, 0], (1 + HIGH) / 2, "slower than PEFT", WORSE_INK)
        axes[-1, 0].set_xlabel(
            "PELT overhead = (ours − frozen) / (PEFT − frozen), forward + backward, r = 8; "
            "rows: tokens × in → out"
        )
        heading(figure, height, "What LoRA costs on top of the frozen linear", results)
        legend(
            figure, height, [(MARKERS[form], COLORS[form], LABELS[form]) for form in _forms(rows)]
        )
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.92 / height), h_pad=1.0)
        figure.savefig(path, dpi=160)
        plt.close(figure)
    return True


def _forms(rows: list[Row]) -> list[str]:
    """Those that have an overhead in some row."""
    return [
        form for form in FORMS if any(overhead_of(row, f"ours_{form}") is not None for row in rows)
    ]


def _panel(axis: Any, rows: list[Row], means: dict[str, float]) -> None:
    names = [row["label"] for row in rows] + (["mean, T ≥ 512"] if means else [])
    row_axis(axis, names, LOW, HIGH)
    if means:
        axis.axhspan(len(rows) - 0.5, len(rows) + 0.55, color=INK, alpha=0.04, lw=0, zorder=0.2)
        axis.get_yticklabels()[-1].set_fontweight("bold")
    axis.axvspan(LOW, 0, color=BETTER, zorder=0)
    axis.axvspan(1, HIGH, color=WORSE, zorder=0)
    axis.axvline(0, color=INK, lw=1.1, zorder=1)
    axis.axvline(1, color=FAINT, lw=1.1, ls=(0, (4, 3)), zorder=1)
    forms = _forms(rows)
    spread = 0.1 * len(forms)
    offsets = dict(zip(forms, np.linspace(-spread, spread, len(forms)), strict=True))
    if len(forms) == 1:
        offsets[forms[0]] = 0.0
    for y, row in enumerate(rows):
        for form in _forms([row]):
            found = row["contenders"][f"ours_{form}"]["overhead"][row["main_pass"]]
            _dot(axis, y + offsets[form], found, form)
    for form, mean in means.items():
        _dot(axis, len(rows) + offsets[form], {"value": mean, "low": mean, "high": mean}, form)


def _dot(axis: Any, y: float, found: dict[str, float], form: str) -> None:
    value, color = found["value"], COLORS[form]
    if not LOW < value < HIGH:
        off_scale(axis, HIGH if value >= HIGH else LOW, y, f"{value:+.1f}", value >= HIGH, color)
        return
    ends = np.clip([found["low"], found["high"]], LOW, HIGH)
    axis.plot(ends, [y, y], color=color, lw=2.4, alpha=0.3, solid_capstyle="round", zorder=2)
    axis.plot(value, y, MARKERS[form], color=color, ms=6, mec="white", mew=0.8, zorder=3)
