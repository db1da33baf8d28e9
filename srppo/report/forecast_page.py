"""The forecast in the terminal and as a plot: optima over beta, SFT, PPO's checkpoints, and what they mean in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from srppo.checkpoint import write_atomic
from srppo.config import canonical_json
from srppo.console import Console
from srppo.optimum import MIN_ESS
from srppo.records import plain
from srppo.report.figures import estimate_text, number_text
from srppo.report.plots import save_figure
from srppo.report.terminal import Narrow
from srppo.style import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from srppo.forecast import ForecastResult
    from srppo.optimum import Point
    from srppo.stats import Estimate

CANNOT = "cannot say"
RULE = f"too few to answer, which takes {MIN_ESS:g}"
FRONTIER, TRAINING, SFT_COLOUR, BASE_COLOUR = "#0072b2", "#e69f00", "#7f7f7f", "#009e73"
CHECKPOINTS = ("#d55e00", "#cc79a7")


def report_forecast(result: ForecastResult, folder: Path, console: Console) -> Path:
    """Print tables and sentences; write forecast.json and the plot into `folder`; returns the JSON's path."""
    console.print(forecast_table(result))
    for line in sentences(result):
        console.print(Narrow(Text(line)))
    path = folder / "forecast.json"
    folder.mkdir(parents=True, exist_ok=True)
    content = {"schema_version": 1, **plain(asdict(result)), "sentences": sentences(result)}
    write_atomic(path, canonical_json(content) + "\n")
    for file in [*frontier_plot(result, folder / "frontier"), path]:
        console.print(f"forecast: {file}")
    return path


def forecast_table(result: ForecastResult) -> RenderableType:
    """Optima over beta, SFT and the checkpoints; accuracy by group where there are several; at most 80 columns."""
    table = _table("Forecast")
    for head, width in (("", 9), ("ESS", 4), ("reward", 18), ("KL to SFT", 16), ("len", 4), ("accuracy", 16)):
        table.add_column(head, width=width, justify="right" if head else "left", overflow="fold")
    for point in (result.start, *result.checkpoints):
        table.add_row(_name(point, result), "", *_cells(point))
    for anchor in dict.fromkeys(point.anchor for point in result.points):
        table.add_section()
        for point in (p for p in result.points if p.anchor == anchor):
            style = "bold" if point is result.own else ""
            table.add_row(_name(point, result), f"{point.ess[1]:.0f}", *_cells(point), style=style)
    captions = [
        f"Rows such as `sft 0.5` are the optimum with that anchor and beta, from {result.samples} samples of the SFT "
        f"model a prompt; * is the recipe's own. Means over {result.prompts} prompts with 95% intervals over prompts; "
        "nats a response, tokens; accuracy: exact match, sampled at temperature 1 (PPO: the rollout temperature).",
        f"ESS: effective samples a prompt, harmonic mean over prompts. {CANNOT}: {RULE}.",
        *result.notes,
    ]
    groups = _group_table(result)
    return Group(table, *([groups] if groups else []), *(Narrow(Text(line, "dim")) for line in captions))


def _group_table(result: ForecastResult) -> Table | None:
    groups = list(result.start.by_group)
    shown = [p for p in (result.start, *result.checkpoints, result.own) if p is not None]
    if len(groups) < 2:
        return None
    table = _table("Accuracy by group")
    table.add_column("", width=9)
    for group in groups:
        table.add_column(Text(group), justify="right", width=17, overflow="fold")
    for point in shown:
        cells = [estimate_text(point.by_group[group]) if point.answered else CANNOT for group in groups]
        table.add_row(_name(point, result), *cells)
    return table


def _table(title: str) -> Table:
    style: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0)}
    return Table(title=Text(title), title_style="bold", title_justify="left", **style)


def _name(point: Point, result: ForecastResult) -> Text:
    if point.step is not None:
        return Text(f"PPO {point.step}")
    return Text(f"{point.anchor} {point.beta:g}{'*' if point is result.own else ''}" if point.anchor else "SFT")


def _cells(point: Point) -> list[str]:
    if not point.answered:
        return [CANNOT, "", "", ""]
    figures = [_narrow(estimate) for estimate in (point.reward, point.kl_sft)]
    return [*figures, number_text(point.length.mean), _narrow(point.accuracy)]


def _narrow(estimate: Estimate | None) -> str:
    return estimate_text(estimate).replace(", ", ",")


def sentences(result: ForecastResult) -> list[str]:
    """What the figures mean: how much of its objective PPO reached, and whether the optimum is any better."""
    own = result.own
    if own is None:
        return ["reward.beta = 0 has no closed-form optimum, so there is nothing to hold PPO against."]
    objective = f"anchor {own.anchor}, beta {own.beta:g}"
    if not own.answered:
        advice = f"About {own.needed} samples a prompt might do (--samples)."
        if not own.needed:
            advice = "Samples of the SFT model do not reach that optimum; a larger beta stays nearer to it."
        return [
            f"Cannot say what the recipe's objective ({objective}) allows: {result.samples} samples a prompt are worth "
            f"{own.ess[1]:.1f} effective ones, {RULE}. {advice}"
        ]
    lines = []
    scores = f", and that objective's optimum scores {_accuracy(own)}" if own.accuracy else ""
    for reached, point in zip(result.reached, result.checkpoints, strict=True):
        theirs = f" (SFT {_accuracy(result.start)}, PPO {_accuracy(point)})" if own.accuracy else ""
        if reached.share is None:
            lines.append(f"{reached.name}: its objective ({objective}) allows no gain over SFT that could be measured.")
            continue
        lines.append(
            f"{reached.name} reached {_percent(reached.share)} of what its own objective allows (reward - beta KL "
            f"over SFT's; {objective}){scores}{theirs}."
        )
    if not result.checkpoints:
        gain = estimate_text(own.objective)
        lines.append(f"The optimum of the recipe's objective ({objective}) has reward - beta KL {gain}{scores}.")
    return lines + _verdict(result)


def _verdict(result: ForecastResult) -> list[str]:
    """An optimiser's failure, a reward's, or neither; "cannot tell" where the interval holds 0."""
    if not result.reached or not result.reached[0].differences:
        return []
    first = result.reached[0]
    better, left = first.differences["optimum - SFT"], first.differences["optimum - PPO"]
    gain = estimate_text(better, "+")
    if better.high < 0:
        return [
            f"The reward fails: its optimum is less accurate than SFT, by {gain}. A better optimiser would not help."
        ]
    if better.low <= 0:
        return [f"Cannot tell whether the reward helps: its optimum against SFT is {gain} in accuracy."]
    line = f"The reward points the right way: its optimum beats SFT by {gain} in accuracy. "
    if left.low > 0:
        return [line + f"{first.name}, is short of it by {estimate_text(left)}: that is the optimiser's part."]
    if left.high < 0:
        return [line + f"{first.name}, is more accurate than that optimum, which it is not at."]
    return [line + f"{first.name}, cannot be told from that optimum in accuracy ({estimate_text(left, '+')})."]


def _accuracy(point: Point) -> str:
    return estimate_text(point.accuracy)


def _percent(share: Estimate) -> str:
    return f"{share.mean:.0%} [{share.low:.0%}, {share.high:.0%}]"


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
        figure.legend(handles, labels, loc="outside lower center", ncols=3, handlelength=1.6)

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
    axis.annotate(words, place, xytext=(4, -11), textcoords="offset points", fontsize=8, color=INK)
