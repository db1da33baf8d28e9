"""The page of a sweep: one file, no script, nothing loaded. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from srppo.ablations.analysis import SweepResult
from srppo.config import to_toml
from srppo.report.html import bullets, details, facts, html_table, inline_plot, page, section, soft_text
from srppo.report.sweep_answer import answer, power_lines
from srppo.report.sweep_layout import difference_label, metric_words, metrics_of, primary_metric
from srppo.report.sweep_tables import (
    Table,
    cells_table,
    costs_caption,
    costs_table,
    differences_tables,
    figures_table,
    metrics_table,
    trends_table,
)
from srppo.report.sweep_words import (
    family_line,
    interval_line,
    missing_lines,
    peak_lines,
    progress_line,
    trend_caption,
    trend_lines,
)

STYLE = """
.answer{font-size:1.1rem;font-weight:600;border-left:4px solid var(--soft);padding-left:.8rem;margin:1rem 0}
h3{font-size:1rem;margin:1.2rem 0 .2rem}
"""
BANDS = (
    "Accuracy on test items with 95% intervals over seeds and items. Arms share items and seeds: read the paired "
    "differences, not the overlap of bands."
)
ZERO = "Planned paired differences with 95% intervals against zero. Filled: better or worse by the test of the plan."

EXPLORATORY = (
    "Other groups of items and other decodings than the primary metric's, and the same pairs on them. No test and no "
    "correction: they suggest, they do not show."
)


def sweep_page(
    result: SweepResult, plots: Mapping[str, Path], spent: str, environment: Mapping[str, Any], files: Sequence[str]
) -> str:
    """The whole page. plots: SVG files by name (accuracy, differences), those there are. files: where things lie."""
    sweep = result.plan.sweep
    body = [
        f"<h1>{escape(sweep.name)}</h1><p>{escape(sweep.question)}</p>",
        f'<p class="answer">{escape(answer(result))}</p>',
        *(f"<p>{escape(line)}</p>" for line in power_lines(result)),
        f'<p class="bad">{escape(progress_line(result))}</p>' if progress_line(result) else "",
        bullets("Missing, failed and diverged", missing_lines(result), "bad"),
        section("Accuracy", _accuracy(result, plots)),
        section("Paired differences", _differences(result, plots)),
        section("Trends", _trends(result)),
        section("Training compute", _costs(result, spent)),
        section("What else was measured", _table(figures_table(result)) + soft_text(MEASURED)),
        section("Exploratory: not in the plan", _exploratory(result)),
        bullets("Notes", sweep.notes, ""),
        section("The plan, as sweep.json fixed it", _plan(result)),
        section("Recipe", details("recipe.toml", f"<pre>{escape(to_toml(sweep.recipe))}</pre>")),
        section("Environment of one attempt", facts(environment)),
        bullets("Files", files, ""),
    ]
    return page(f"srppo: {sweep.name}", "".join(body), STYLE)


MEASURED = (
    "Means over seeds, at the kept step. Length: tokens of an answer; ended: by EOS. NLL: of held-out answers, nats a "
    "token. Reward, KL and rollout length: of PPO's own rollouts, nats and tokens."
)


def _table(table: Table) -> str:
    return html_table(*table)


def _plot(plots: Mapping[str, Path], name: str, caption: str, number: int) -> str:
    return inline_plot(caption, plots[name], number) if name in plots else ""


def _accuracy(result: SweepResult, plots: Mapping[str, Path]) -> str:
    explained = f"{interval_line(result)} seeds: measured of planned. TFLOPs: a seed, parents included. Length: tokens."
    return _plot(plots, "accuracy", BANDS, 1) + _table(cells_table(result)) + soft_text(explained)


def _differences(result: SweepResult, plots: Mapping[str, Path]) -> str:
    tables = differences_tables(result, primary_metric(result.plan.sweep))
    if not tables:
        return ""
    html = "".join(f"<h3>{escape(pair)}</h3>{_table(table)}" for pair, table in tables)
    return _plot(plots, "differences", ZERO, 2) + html + soft_text(family_line(result))


def _trends(result: SweepResult) -> str:
    table = _table(trends_table(result)) if result.trends else ""
    lines = [*trend_lines(result)[len(result.trends) :], trend_caption(result)]  # the table says the others
    lines += peak_lines(result)
    return table + "".join(soft_text(line) for line in lines if line)


def _costs(result: SweepResult, spent: str) -> str:
    return _table(costs_table(result)) + soft_text(f"{costs_caption(result)} {spent}")


def _exploratory(result: SweepResult) -> str:
    """All other metrics: accuracy of every cell, then the differences of the plan's pairs, uncorrected."""
    primary, metrics = primary_metric(result.plan.sweep), metrics_of(result)
    decodings = dict.fromkeys(decoding for _, decoding in metrics)
    html = "".join(details(f"accuracy, {each}", _table(metrics_table(result, each))) for each in decodings)
    for metric in metrics:
        if metric != primary:
            tables = differences_tables(result, metric)
            inner = "".join(f"<h3>{escape(pair)}</h3>{_table(table)}" for pair, table in tables)
            html += details(f"differences, {metric_words(metric)} (exploratory: not in the plan)", inner)
    return soft_text(EXPLORATORY) + html if len(metrics) > 1 else ""


def _plan(result: SweepResult) -> str:
    sweep = result.plan.sweep
    analysis = {key: value for key, value in dataclasses.asdict(sweep.analysis).items() if key != "family"}
    plan = {"seeds": sweep.seeds, "arms": [f"{arm.name} ({arm.kind})" for arm in sweep.arms], **analysis}
    family = "".join(f"<li>{escape(difference_label(sweep, each))}</li>" for each in sweep.analysis.family)
    return facts(plan) + details(f"family of {len(sweep.analysis.family)} comparisons", f"<ol>{family}</ol>")
