"""The forecast in the terminal and as a page: optima over beta, SFT, PPO's checkpoints, and what they mean in words."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from srppo.analysis.optimum import MIN_ESS
from srppo.config import canonical_json
from srppo.console import Console
from srppo.record.files import write_atomic
from srppo.record.json import plain
from srppo.report.figures import estimate_text, number_text
from srppo.report.forecast_plot import frontier_plot
from srppo.report.html import bullets, html_table, inline_plot, page, section, soft_text
from srppo.report.terminal import Narrow

if TYPE_CHECKING:
    from srppo.analysis.forecast import ForecastResult
    from srppo.analysis.optimum import Point, Reached
    from srppo.statistics.intervals import Estimate

CANNOT = "cannot say"
RULE = f"too few to answer, which takes {MIN_ESS:g}"
MEANING = (
    f"{CANNOT}: the optimum is estimated by weighing samples of the SFT model, and where a few samples hold nearly all "
    "the weight, those few would decide the figures. Effective samples (ESS) say how many equal ones the weighted ones "
    f"are worth; below {MIN_ESS:g} a prompt, as a harmonic mean over prompts, no figure is given. That is no word for "
    "or against that optimum: more samples (--samples) or a larger beta, which stays nearer to SFT, may answer."
)


def report_forecast(result: ForecastResult, folder: Path, console: Console) -> Path:
    """Print tables and sentences; write forecast.json, forecast.html and the plot into `folder`; returns the JSON's
    path."""
    console.print(forecast_table(result))
    for line in sentences(result):
        console.print(Narrow(Text(line)))
    path = folder / "forecast.json"
    folder.mkdir(parents=True, exist_ok=True)
    content = {"schema_version": 1, **plain(asdict(result)), "sentences": sentences(result)}
    write_atomic(path, canonical_json(content) + "\n")
    plots = frontier_plot(result, folder / "frontier")
    write_atomic(folder / "forecast.html", forecast_html(result, plots[1]))
    for file in [*plots, path, folder / "forecast.html"]:
        console.print(f"forecast: {file}")
    return path


def forecast_table(result: ForecastResult) -> RenderableType:
    """Optima over beta, SFT and the checkpoints; accuracy by group where there are several; at most 80 columns."""
    table = _table("Forecast")
    for head, width in (("", 9), ("ESS", 4), ("reward", 18), ("KL to SFT", 16), ("len", 4), ("accuracy", 16)):
        table.add_column(head, width=width, justify="right" if head else "left", overflow="fold")
    for points in _blocks(result):
        for point in points:
            style = "bold" if point is result.own else ""
            table.add_row(_name(point, result), _ess(point), *_cells(point), style=style)
        table.add_section()
    groups = _group_table(result)
    return Group(table, *([groups] if groups else []), *(Narrow(Text(line, "dim")) for line in captions(result)))


def _blocks(result: ForecastResult) -> list[list[Point]]:
    """What was measured, then the optima of each anchor."""
    anchors = dict.fromkeys(point.anchor for point in result.points)
    optima = [[point for point in result.points if point.anchor == anchor] for anchor in anchors]
    return [[result.start, *result.checkpoints], *optima]


def captions(result: ForecastResult) -> list[str]:
    """What rows and columns of the table mean, and what to know of this forecast."""
    return [
        f"Rows such as `sft 0.5` are the optimum with that anchor and beta, from {result.samples} samples of the SFT "
        f"model a prompt; * is the recipe's own. Means over {result.prompts} prompts with 95% intervals over prompts; "
        "nats a response, tokens; [-, -]: no interval, as of one prompt or of equal ones; accuracy: exact match, "
        "sampled at temperature 1 (PPO: the rollout temperature).",
        f"ESS: effective samples a prompt, harmonic mean over prompts. {CANNOT}: {RULE}.",
        *result.notes,
    ]


def forecast_html(result: ForecastResult, plot: Path) -> str:
    """The page as text: sentences, plot, tables, and what "cannot say" means."""
    rows = [[_name(p, result).plain, _ess(p), *_cells(p)] for points in _blocks(result) for p in points]
    groups, by_group = _by_group(result)
    table = html_table(["", "ESS", "reward, nats", "KL to SFT, nats", "length, tokens", "accuracy"], rows)
    caption = "Optima and PPO against KL to SFT, with 95% intervals over prompts"
    body = [
        "<h1>srppo forecast</h1>",
        soft_text(f"SFT: {result.sft}. Base: {result.base}. Objective: anchor {result.anchor}, beta {result.beta:g}."),
        bullets("What it says", sentences(result), ""),
        section("Reward and accuracy against KL", inline_plot(caption, plot, 0)),
        section("Forecast", table + "".join(map(soft_text, captions(result)[:2])) + soft_text(MEANING)),
        section("Accuracy by group", html_table(["", *groups], by_group) if by_group else ""),
        bullets("Notes", result.notes, ""),
    ]
    return page("srppo forecast", "".join(body))


def _by_group(result: ForecastResult) -> tuple[list[str], list[list[str]]]:
    """(groups, rows): accuracy of SFT, the checkpoints and the recipe's own optimum; no rows for a single group."""
    groups = list(result.start.by_group)
    shown = [p for p in (result.start, *result.checkpoints, result.own) if p is not None and len(groups) > 1]
    rows = [
        [_name(p, result).plain, *(estimate_text(p.by_group[g]) if p.answered else CANNOT for g in groups)]
        for p in shown
    ]
    return groups, rows


def _group_table(result: ForecastResult) -> Table | None:
    groups, rows = _by_group(result)
    if not rows:
        return None
    table = _table("Accuracy by group")
    table.add_column("", width=9)
    for group in groups:
        table.add_column(Text(group), justify="right", width=17, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _ess(point: Point) -> str:
    """Effective samples of an optimum; nothing for what was measured itself."""
    return f"{point.ess[1]:.0f}" if point.anchor else ""


def _table(title: str) -> Table:
    style: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0)}
    return Table(title=Text(title), title_style="bold", title_justify="left", **style)


def _name(point: Point, result: ForecastResult) -> Text:
    if point.step is not None:
        return Text(f"PPO {point.step}" if point.arm == "PPO" else point.name)
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
    lines = [_reached_line(reached, result) for reached in result.reached]
    scores = _scores(own)
    if not result.checkpoints:
        gain = estimate_text(own.objective)
        lines.append(f"The optimum of the recipe's objective ({objective}) has reward - beta KL {gain}{scores}.")
    return lines + _verdict(result)


def _scores(best: Point) -> str:
    return f", and that objective's optimum scores {_accuracy(best)}" if best.accuracy else ""


def _reached_line(reached: Reached, result: ForecastResult) -> str:
    """How much of its own objective a checkpoint reached."""
    objective = f"anchor {reached.anchor}, beta {reached.beta:g}"
    best = result.optimum_of(reached.anchor, reached.beta)
    if best is None or not best.answered:
        return f"{reached.name}: cannot say what its objective ({objective}) allows; ESS is too small."
    if reached.share is None:
        return f"{reached.name}: its objective ({objective}) allows no gain over SFT that could be measured."
    point = next(point for point in result.checkpoints if point.name == reached.name)
    theirs = f" (SFT {_accuracy(result.start)}, PPO {_accuracy(point)})" if best.accuracy else ""
    return (
        f"{reached.name} reached {_percent(reached.share)} of what its own objective allows (reward - beta KL over "
        f"SFT's; {objective}){_scores(best)}{theirs}."
    )


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
    if not better.low > 0:
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
    bounds = f"{share.low:.0%}, {share.high:.0%}" if math.isfinite(share.low) else "-, -"
    return f"{share.mean:.0%} [{bounds}]"
