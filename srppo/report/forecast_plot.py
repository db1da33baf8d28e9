"""The forecast as a plot: reward and accuracy of optima and PPO checkpoints against KL to SFT."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srppo.report.plots import save_figure
from srppo.report.style import INK, PAPER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from srppo.analysis.forecast import ForecastResult
    from srppo.analysis.optimum import Point
    from srppo.statistics.intervals import Estimate

FRONTIER, SFT_COLOUR, BASE_COLOUR = "#0072b2", "#7f7f7f", "#009e73"
SEEN = ("demonstrated", "prompted")  # groups that PPO prompts come from
ARMS = ("#d55e00", "#cc79a7", "#e69f00", "#56b4e9")  # PPO stages; they take turns


def frontier_plot(result: ForecastResult, path: Path) -> list[Path]:
    """Reward and accuracy of optima and checkpoints against KL to SFT, and what training measured; .png and .svg."""
    keys = [("reward", "reward, nats a response")]
    keys += [("accuracy", "accuracy, sampled")] if result.start.accuracy else []
    counts = [sum(_development(row) is not None for row in rows) for rows in result.training.values()]
    keys += [("development", "accuracy in training, greedy")] if max(counts, default=0) > 1 else []

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(keys), squeeze=False)[0]
        for axis, (key, title) in zip(axes, keys, strict=True):
            _panel(axis, key, result)
            axis.set_title(title)
            axis.set_xlabel("KL to SFT, nats a response")
        entries = {label: h for axis in axes for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend([*entries.values()], [*entries], loc="outside lower left", ncols=2, handlelength=1.6)

    return save_figure(draw, path, height=4.4 + 0.2 * len(result.training))


def _panel(axis: Axes, key: str, result: ForecastResult) -> None:
    names = dict.fromkeys([*(point.arm for point in result.checkpoints), *result.training])
    colours = dict(zip(names, cycle(ARMS), strict=False))
    if key != "development":
        _optima(axis, key, result)
        _whiskers(axis, key, [result.start], "D", SFT_COLOUR, "SFT")
    for name, colour in colours.items():
        if key != "accuracy":
            _training(axis, key, name, result.training.get(name, ()), colour)
        points = [point for point in result.checkpoints if point.arm == name and key != "development"]
        for i, point in enumerate(points):
            _whiskers(axis, key, [point], "D", colour, f"{name}, checkpoints (step beside)" if i == 0 else "_")
            _beside(axis, key, point, f"{point.step}" + (" kept" if point.name.endswith("(kept)") else ""))


def _optima(axis: Axes, key: str, result: ForecastResult) -> None:
    for anchor, colour, style in (("sft", FRONTIER, "o-"), ("base", BASE_COLOUR, "s:")):
        points = [p for p in result.points if p.anchor == anchor and p.answered]
        points.sort(key=lambda p: -p.beta)
        label = f"optimum, anchor {anchor}" + (" (beta beside it)" if anchor == result.anchor else "")
        if points:
            _whiskers(axis, key, points, style, colour, label, small=True)
        for point in points if anchor == result.anchor else []:
            _beside(axis, key, point, f"{point.beta:g}" + (" *" if point is result.own else ""))


def _training(axis: Axes, key: str, name: str, rows: Sequence[Mapping[str, Any]], colour: str) -> None:
    """What training measured by step: the reward of its own rollouts, or greedy accuracy on development items."""
    of = _development if key == "development" else lambda row: row["reward"]
    points = [(row["kl_sft"], value) for row in rows if (value := of(row)) is not None]
    if points:
        x, y = zip(*points, strict=True)
        axis.plot(x, y, ".-", color=colour, lw=0.9, ms=4, alpha=0.7, label=f"{name}, as measured in training, by step")


def _development(row: Mapping[str, Any]) -> float | None:
    """Mean of the groups that PPO sees, or over all items where no group is named so; None where none was measured."""
    values = [float(row[f"dev/{group}"]) for group in SEEN if f"dev/{group}" in row]
    return sum(values) / len(values) if values else row.get("dev/accuracy")


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
