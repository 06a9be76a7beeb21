"""The picture of the fine-tunes: loss curves, and what a step takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .finetune import mean_and_spread
from .methods import METHODS
from .results import Results
from .style import BLUE, FAINT, GREY, GRID, INK, ORANGE, STYLE, WIDTH, caption, heading, plt

COLORS = {"frozen": GREY, "accelerated": BLUE, "eager": ORANGE}
LABELS = {"frozen": "frozen, head only", "accelerated": "accelerated", "eager": "eager"}


def draw(results: Results, path: Path) -> bool:
    """A line of panels for each method and dtype that was trained; False when none was."""
    trained = [one for one in results["finetune"] if one["trained"]]
    if not trained:
        return False
    height = 1.15 + 2.75 * len(trained)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(trained), 2, figsize=(WIDTH, height), squeeze=False, width_ratios=(1.55, 1)
        )
        for (left, right), one in zip(axes, trained, strict=True):
            _loss_panel(left, one)
            _step_panel(right, one)
        heading(
            figure, height, "Fine-tunes of MiniLM on movie reviews, eager and accelerated", results
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
            color=COLORS[kind],
            label=LABELS[kind],
            solid_capstyle="round",
            **look,
        )
    method = METHODS[one["plan"]["method"]]
    caption(axis, f"{method.words}, {one['plan']['dtype']}: training loss")
    axis.set_xlabel("step, same data for all (mean of the last 10)")
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
    colors = [COLORS[kind] for kind in kinds]
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
    axis.set_yticks(range(3), [_with_accuracy(kind, one) for kind in kinds])
    axis.invert_yaxis()
    gone = one["overhead"] and f"{100 * (1 - one['overhead']['value']):.0f} % of the overhead gone"
    caption(axis, gone or "Step time")
    axis.set_xlabel("forward + backward, ms (median, p20 to p80)")
    axis.tick_params(length=0)
    axis.spines["left"].set_visible(False)


def _with_accuracy(kind: str, one: dict[str, Any]) -> str:
    """On held-out text, over seeds where there are several."""
    accuracy, label = one["runs"][kind]["accuracy"], LABELS[kind]
    if not accuracy:
        return label
    mean, spread = mean_and_spread(accuracy)
    text = f"{label}\n{100 * mean:.1f}"
    return text + (f" ± {100 * spread:.1f} % right" if len(accuracy) > 1 else " % right")
