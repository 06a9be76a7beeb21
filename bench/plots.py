"""The pictures: overhead by shape, and the fine-tune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

from .finetune import mean_and_spread
from .report import FORMS, mean_overheads, overhead_of, run_rows
from .results import Results

INK, FAINT, GRID = "#1f2430", "#6b7280", "#e5e7eb"
COLORS = {"base": "#1b6ca8", "dropout": "#e07a1f", "fp32": "#3a9d5d"}
MARKERS = {"base": "o", "dropout": "D", "fp32": "s"}
LABELS = {
    "base": "against PEFT, adapter in the base dtype",
    "dropout": "against PEFT with dropout 0.1",
    "fp32": "against PEFT's default, fp32 adapter",
}
KIND_COLORS = {"frozen": "#9aa3af", "accelerated": "#1b6ca8", "eager": "#e07a1f"}
KIND_LABELS = {"frozen": "frozen, head only", "accelerated": "accelerated", "eager": "PEFT eager"}
LOW, HIGH = -1.0, 1.75
"""What the axis shows; points outside stand at its ends as arrows, with their value."""

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


def plot_overhead(results: Results, path: Path) -> bool:
    """Dots between the frozen model's cost (0) and PEFT's (1); False when there is no row."""
    rows = [
        row
        for row in run_rows(results)
        if row["mode"] == "train"
        and any(overhead_of(row, f"ours_{form}") is not None for form in FORMS)
    ]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    if not rows:
        return False
    means = {dtype: mean_overheads(results, dtype) for dtype in dtypes}
    counts = [sum(row["dtype"] == dtype for row in rows) + bool(means[dtype]) for dtype in dtypes]
    height = 1.9 + 0.36 * sum(counts) + 0.45 * (len(dtypes) - 1)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(dtypes), 1, figsize=(9.2, height), sharex=True, squeeze=False, height_ratios=counts
        )
        for axis, dtype in zip(axes[:, 0], dtypes, strict=True):
            _overhead_panel(
                axis,
                [row for row in rows if row["dtype"] == dtype],
                dtype,
                means[dtype],
            )
        words = (
            (0.0, "frozen model", INK),
            (1.0, "PEFT", INK),
            (LOW / 2, "faster than frozen", "#3f7d54"),
        )
        for x, text, color in (*words, ((1 + HIGH) / 2, "slower than PEFT", "#b4533c")):
            axes[0, 0].annotate(
                text,
                (x, 1),
                (0, 4),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
                va="bottom",
                color=color,
                fontsize=9,
            )
        axes[-1, 0].set_xlabel(
            "PELT overhead = (ours − frozen) / (PEFT − frozen), forward + backward, r = 8; "
            "rows: tokens × in → out"
        )
        _title(figure, height, "What LoRA costs on top of the frozen linear", results)
        handles, labels = [], []
        for form in FORMS:
            if any(overhead_of(row, f"ours_{form}") is not None for row in rows):
                handles.append(
                    plt.Line2D([], [], color=COLORS[form], marker=MARKERS[form], ls="", ms=6.5)
                )
                labels.append(LABELS[form])
        figure.legend(
            handles,
            labels,
            loc="upper left",
            bbox_to_anchor=(0.008, 1 - 0.68 / height),
            ncols=3,
            frameon=False,
            fontsize=9,
            handletextpad=0.3,
            columnspacing=1.6,
        )
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.92 / height), h_pad=1.0)
        figure.savefig(path, dpi=160)
        plt.close(figure)
    return True


def _overhead_panel(
    axis: Any, rows: list[dict[str, Any]], dtype: str, means: dict[str, float]
) -> None:
    axis.set_xlim(LOW, HIGH)
    names = [f"{row['tokens']} × {row['in_features']} → {row['out_features']}" for row in rows]
    if means:
        names.append("mean, T ≥ 512")
        axis.axhspan(len(rows) - 0.5, len(rows) + 0.55, color=INK, alpha=0.04, lw=0, zorder=0.2)
    axis.set_ylim(len(names) - 0.45, -0.55)
    axis.axvspan(LOW, 0, color="#eef7f0", zorder=0)
    axis.axvspan(1, HIGH, color="#fdf1ee", zorder=0)
    axis.axvline(0, color=INK, lw=1.1, zorder=1)
    axis.axvline(1, color=FAINT, lw=1.1, ls=(0, (4, 3)), zorder=1)
    axis.hlines(range(len(rows)), LOW, HIGH, color=GRID, lw=0.7, zorder=0.5)
    forms = [
        form for form in FORMS if any(overhead_of(row, f"ours_{form}") is not None for row in rows)
    ]
    offsets = dict(
        zip(forms, np.linspace(-0.2, 0.2, len(forms)) if len(forms) > 1 else [0.0], strict=True)
    )
    for y, row in enumerate(rows):
        for form in forms:
            found = row["contenders"].get(f"ours_{form}", {}).get("overhead", {}).get("both")
            if found:
                _dot(axis, y + offsets[form], found, form)
    for form, mean in means.items():
        _dot(
            axis,
            len(rows) + offsets.get(form, 0.0),
            {"value": mean, "low": mean, "high": mean},
            form,
        )
    axis.set_yticks(range(len(names)), names)
    if means:
        axis.get_yticklabels()[-1].set_fontweight("bold")
    axis.tick_params(length=0)
    axis.spines["left"].set_visible(False)
    axis.set_title(dtype, loc="left", fontsize=10.5, fontweight="bold", pad=5)


def _dot(axis: Any, y: float, found: dict[str, float], form: str) -> None:
    value, color = found["value"], COLORS[form]
    if LOW < value < HIGH:
        ends = np.clip([found["low"], found["high"]], LOW, HIGH)
        axis.plot(ends, [y, y], color=color, lw=2.4, alpha=0.3, solid_capstyle="round", zorder=2)
        axis.plot(value, y, MARKERS[form], color=color, ms=6, mec="white", mew=0.8, zorder=3)
        return
    right = value >= HIGH
    # side by side: at the end of the axis the numbers of one row would stand on each other
    aside = 3 + 34 * list(FORMS).index(form)
    axis.annotate(
        f"{value:+.1f} ▶" if right else f"◀ {value:+.1f}",
        (HIGH if right else LOW, y),
        (-aside if right else aside, 0),
        textcoords="offset points",
        ha="right" if right else "left",
        va="center",
        color=color,
        fontsize=8,
    )


def plot_finetune(results: Results, path: Path) -> bool:
    """Loss curves and step times of the trained dtypes; False when nothing was trained."""
    trained = [one for one in results["finetune"] if one["trained"]]
    if not trained:
        return False
    height = 1.15 + 2.75 * len(trained)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(trained), 2, figsize=(9.2, height), squeeze=False, width_ratios=(1.55, 1)
        )
        for (left, right), one in zip(axes, trained, strict=True):
            _loss_panel(left, one)
            _step_panel(right, one)
        _title(
            figure,
            height,
            "LoRA fine-tune of MiniLM on movie reviews, PEFT eager and accelerated",
            results,
        )
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.62 / height), w_pad=2.5, h_pad=1.5)
        figure.savefig(path, dpi=160)
        plt.close(figure)
    return True


def _loss_panel(axis: Any, one: dict[str, Any]) -> None:
    # eager broad and pale below, accelerated thin and dark above: where they agree, both are seen
    looks = {
        "frozen": {"lw": 1.4, "alpha": 0.9},
        "eager": {"lw": 5.0, "alpha": 0.45},
        "accelerated": {"lw": 1.5},
    }
    for kind, look in looks.items():
        curve = _smooth(one["runs"][kind]["losses"][0])
        axis.plot(
            np.arange(1, len(curve) + 1),
            curve,
            color=KIND_COLORS[kind],
            label=KIND_LABELS[kind],
            solid_capstyle="round",
            **look,
        )
    axis.set_title(
        f"{one['plan']['dtype']}: training loss, same data and seed",
        loc="left",
        fontsize=10.5,
        fontweight="bold",
    )
    axis.set_xlabel("step (mean of the last 10)")
    axis.grid(axis="y", color=GRID, lw=0.7)
    axis.tick_params(length=0)
    axis.legend(frameon=False, fontsize=9)


def _smooth(losses: list[float], window: int = 10) -> np.ndarray:
    total = np.cumsum(np.insert(np.asarray(losses), 0, 0.0))
    end = np.arange(1, len(losses) + 1)
    start = np.maximum(0, end - window)
    return (total[end] - total[start]) / (end - start)


def _step_panel(axis: Any, one: dict[str, Any]) -> None:
    kinds = ["frozen", "accelerated", "eager"]
    stats = [one["runs"][kind]["model_ms"] for kind in kinds]
    medians = np.array([stat["median"] for stat in stats])
    errors = [[s["median"] - s["p20"] for s in stats], [s["p80"] - s["median"] for s in stats]]
    colors = [KIND_COLORS[kind] for kind in kinds]
    axis.barh(
        kinds, medians, color=colors, height=0.62, xerr=errors, error_kw={"ecolor": FAINT, "lw": 1}
    )
    for y, median in enumerate(medians):
        axis.annotate(
            f"{median:.1f} ms",
            (0, y),
            (7, 0),
            textcoords="offset points",
            va="center",
            color="white",
            fontweight="bold",
        )
    axis.axvline(medians[0], color=INK, lw=1, ls=(0, (4, 3)))
    axis.set_yticks(range(3), [_kind_label(kind, one["runs"][kind]["accuracy"]) for kind in kinds])
    axis.invert_yaxis()
    overhead = one["overhead"]
    title = (
        f"{100 * (1 - overhead['value']):.0f} % of PEFT's overhead gone"
        if overhead
        else "Step time"
    )
    axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
    axis.set_xlabel("forward + backward, ms (median, p20 to p80)")
    axis.tick_params(length=0)
    axis.spines["left"].set_visible(False)


def _kind_label(kind: str, accuracy: list[float]) -> str:
    """With the held-out accuracy, over seeds where there are several."""
    if not accuracy:
        return KIND_LABELS[kind]
    mean, spread = mean_and_spread(accuracy)
    text = f"{KIND_LABELS[kind]}\n{100 * mean:.1f}"
    return text + (f" ± {100 * spread:.1f} % right" if len(accuracy) > 1 else " % right")


def _title(figure: Any, height: float, title: str, results: Results) -> None:
    meta = results["meta"]
    figure.text(0.012, 1 - 0.14 / height, title, fontsize=13, fontweight="bold", va="top")
    versions = f"torch {meta['versions']['torch']}, pelt_fast {meta['commit']}, {meta['date'][:10]}"
    if meta.get("load_average", 0) > 0.5:
        versions += f", busy: load {meta['load_average']}"
    line = f"{meta['device']} ({meta['instruction_set']}), {versions}"
    figure.text(0.012, 1 - 0.43 / height, line, fontsize=9, color=FAINT, va="top")


def plot_all(results: Results, folder: Path) -> list[Path]:
    """Draws what the results allow; an earlier picture that they do not allow is removed."""
    drawn = []
    for name, plot in (("overhead.png", plot_overhead), ("finetune.png", plot_finetune)):
        path = folder / name
        if plot(results, path):
            drawn.append(path)
        else:
            path.unlink(missing_ok=True)
    return drawn
