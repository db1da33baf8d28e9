"""The forecast as a plot: reward and accuracy of optima and PPO checkpoints against KL to SFT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srppo.report.plots import save_figure
from srppo.style import INK, PAPER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from srppo.forecast import ForecastResult
    from srppo.optimum import Point
    from srppo.stats import Estimate

FRONTIER, TRAINING, SFT_COLOUR, BASE_COLOUR = "#0072b2", "#e69f00", "#7f7f7f", "#009e73"
CHECKPOINTS = ("#d55e00", "#cc79a7")


def frontier_plot(result: ForecastResult, path: Path) -> list[Path]:
    """Reward and accuracy of optima and checkpoints against KL to SFT; .png and .svg."""
    keys = [("reward", "reward, nats a response")]
    keys += [("accuracy", "accuracy, sampled")] if result.start.accuracy else []

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(keys), squeeze=False)[0]
        for axis, (key, title) in zip(axes, keys, strict=True):
            _panel(axis, key, result)
            axis.set_title(title)
            axis.set_xlabel("KL to SFT, nats a response")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=3, handlelength=1.6)

    return save_figure(draw, path, height=4.4)


def _panel(axis: Axes, key: str, result: ForecastResult) -> None:
    for anchor, colour, style in (("sft", FRONTIER, "o-"), ("base", BASE_COLOUR, "s:")):
        points = [p for p in result.points if p.anchor == anchor and p.answered]
        points.sort(key=lambda p: -p.beta)
        label = f"optimum, anchor {anchor}" + (" (beta beside it)" if anchor == result.anchor else "")
        if points:
            _whiskers(axis, key, points, style, colour, label, small=True)
        for point in points if anchor == result.anchor else []:
            _beside(axis, key, point, f"{point.beta:g}" + (" *" if point is result.own else ""))
    if key == "reward" and result.training:
        x, y = ([float(row[name]) for row in result.training] for name in ("kl_sft", "reward"))
        axis.plot(x, y, ".-", color=TRAINING, lw=1, ms=4, label="PPO in training, every step (its own prompts)")
    _whiskers(axis, key, [result.start], "D", SFT_COLOUR, "SFT")
    for point, colour in zip(result.checkpoints, CHECKPOINTS, strict=False):
        _whiskers(axis, key, [point], "D", colour, point.name)


def _whiskers(
    axis: Axes, key: str, points: Sequence[Point], style: str, colour: str, label: str, *, small: bool = False
) -> None:
    values: list[Any] = [getattr(point, key) for point in points]
    kls = [point.kl_sft for point in points]
    axis.errorbar(
        [kl.mean for kl in kls],
        [value.mean for value in values],
        xerr=_lengths(kls),
        yerr=_lengths(values),
        fmt=style,
        color=colour,
        ecolor=colour,
        elinewidth=0.7,
        ms=4 if small else 7,
        lw=1.6,
        label=label,
        zorder=2 if small else 3,
    )


def _lengths(estimates: Sequence[Estimate]) -> list[list[float]]:
    def finite(value: float) -> float:
        return max(value, 0.0) if math.isfinite(value) else 0.0

    return [[finite(e.mean - e.low) for e in estimates], [finite(e.high - e.mean) for e in estimates]]


def _beside(axis: Axes, key: str, point: Point, words: str) -> None:
    place = (point.kl_sft.mean, getattr(point, key).mean)
    box = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.6}  # lines run behind it
    axis.annotate(
        words, place, xytext=(5, -11), textcoords="offset points", fontsize=8.5, color=INK, zorder=5, bbox=box
    )
