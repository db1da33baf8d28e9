"""The forecast in the terminal and as a page: optima over beta, SFT, PPO's checkpoints, and what they mean in words."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from srppo.analysis.optimum import MIN_ESS
from srppo.config import canonical_json
from srppo.console import Console
from srppo.record.files import write_atomic
from srppo.record.json import plain
from srppo.report.page import bullets, plot, section, soft_text, write_page
from srppo.report.plots import frontier_plot
from srppo.report.table import Column, Row, Table, paragraph, to_html
from srppo.report.words import estimate_text, number_text

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
    table, groups, said = forecast_table(result), groups_table(result), sentences(result)
    console.print(replace(table, caption=(*table.caption, *result.notes)))
    for part in (groups, *map(paragraph, said)):
        console.print(part)
    path, page = folder / "forecast.json", folder / "forecast.html"
    folder.mkdir(parents=True, exist_ok=True)
    content = {"schema_version": 1, **plain(asdict(result)), "sentences": said}
    write_atomic(path, canonical_json(content) + "\n")
    plots = frontier_plot(result, folder / "frontier")
    caption = "Optima and PPO against KL to SFT, with 95% intervals over prompts"
    objective = f"Objective: anchor {result.anchor}, beta {result.beta:g}."
    parts = [
        soft_text(f"SFT: {result.sft}. Base: {result.base}. {objective}"),
        bullets("What it says", said, ""),
        section("Reward and accuracy against KL", plot(caption, plots)),
        section(table.title, to_html(table) + soft_text(MEANING)),
        section(groups.title, to_html(groups)),
        bullets("Notes", result.notes, ""),
    ]
    write_page(page, "srppo forecast", parts)
    for file in [*plots, path, page]:
        console.print(f"forecast: {file}")
    return path


def forecast_table(result: ForecastResult) -> Table:
    """What was measured (SFT and the checkpoints), then the optima of each anchor over beta."""
    anchors = dict.fromkeys(point.anchor for point in result.points)
    optima = [[point for point in result.points if point.anchor == anchor] for anchor in anchors]
    heads = [Column(""), Column("ESS"), Column("reward, nats", "reward"), Column("KL to SFT, nats", "KL to SFT")]
    rows: list[Row | str] = []
    for points in ([result.start, *result.checkpoints], *optima):
        rows += [""] if rows else []
        for point in points:
            ess = f"{point.ess[1]:.0f}" if point.anchor else ""  # of an optimum
            figures = [_narrow(point.reward), _narrow(point.kl_sft), number_text(point.length.mean)]
            cells = [*figures, _narrow(point.accuracy)] if point.answered else [CANNOT, "", "", ""]
            rows.append(Row([_name(point, result), ess, *cells], "own" if point is result.own else ""))
    caption = (
        f"Rows such as `sft 0.5` are the optimum with that anchor and beta, from {result.samples} samples of the SFT "
        f"model a prompt; * is the recipe's own. Means over {result.prompts} prompts with 95% intervals over prompts; "
        "nats a response, tokens; [-, -]: no interval, as of one prompt or of equal ones; accuracy: exact match, "
        "sampled at temperature 1 (PPO: the rollout temperature).",
        f"ESS: effective samples a prompt, harmonic mean over prompts. {CANNOT}: {RULE}.",
    )
    return Table.of("Forecast", [*heads, Column("length, tokens", "len"), Column("accuracy")], rows, caption)


def groups_table(result: ForecastResult) -> Table:
    """Accuracy by group of SFT, the checkpoints and the recipe's own optimum; without rows for a single group."""
    groups, rows = list(result.start.by_group), []
    for point in filter(None, (result.start, *result.checkpoints, result.own) if len(groups) > 1 else ()):
        cells = (estimate_text(point.by_group[group]) if point.answered else CANNOT for group in groups)
        rows.append([_name(point, result), *cells])
    return Table.of("Accuracy by group", ["", *groups], rows)


def _name(point: Point, result: ForecastResult) -> str:
    if point.step is not None:
        return f"PPO {point.step}" if point.arm == "PPO" else point.name
    return f"{point.anchor} {point.beta:g}{'*' if point is result.own else ''}" if point.anchor else "SFT"


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
    return f", and that objective's optimum scores {estimate_text(best.accuracy)}" if best.accuracy else ""


def _reached_line(reached: Reached, result: ForecastResult) -> str:
    """How much of its own objective a checkpoint reached."""
    objective = f"anchor {reached.anchor}, beta {reached.beta:g}"
    best = result.optimum_of(reached.anchor, reached.beta)
    if best is None or not best.answered:
        return f"{reached.name}: cannot say what its objective ({objective}) allows; ESS is too small."
    if reached.share is None:
        return f"{reached.name}: its objective ({objective}) allows no gain over SFT that could be measured."
    point = next(point for point in result.checkpoints if point.name == reached.name)
    theirs = f" (SFT {estimate_text(result.start.accuracy)}, PPO {estimate_text(point.accuracy)})"
    theirs = theirs if best.accuracy else ""
    return (
        f"{reached.name} reached {estimate_text(reached.share, '.0%')} of what its own objective allows (reward - beta "
        f"KL over SFT's; {objective}){_scores(best)}{theirs}."
    )


def _verdict(result: ForecastResult) -> list[str]:
    """An optimiser's failure, a reward's, or neither; "cannot tell" where the interval holds 0."""
    if not result.reached or not result.reached[0].differences:
        return []
    first = result.reached[0]
    better, left = first.differences["optimum - SFT"], first.differences["optimum - PPO"]
    gain = estimate_text(better, "+.2f")
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
    return [line + f"{first.name}, cannot be told from that optimum in accuracy ({estimate_text(left, '+.2f')})."]
