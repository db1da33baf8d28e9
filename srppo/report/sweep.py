"""`srppo report` of a sweep: reads its record, prints, and writes page, figures and files. No torch."""

from __future__ import annotations

import dataclasses
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from srppo.ablations.analysis import CellResult, Metric, SweepResult, analyse
from srppo.ablations.ledger import Ledger
from srppo.ablations.plan import Plan
from srppo.ablations.run import load_sweep
from srppo.config import canonical_json, to_toml
from srppo.console import Console
from srppo.record.files import storing, write_atomic
from srppo.record.json import plain
from srppo.record.store import Stage
from srppo.report import sweep_tables as tables
from srppo.report import sweep_words as says
from srppo.report.history import environment_of
from srppo.report.page import bullets, details, facts, plot, section, soft_text, text, write_page
from srppo.report.plots import curves_plot, differences_plot, sweep_plot
from srppo.report.sweep_curves import matched_records, matched_table, point_records
from srppo.report.table import Column, Table, paragraph, records, to_csv, to_html, to_latex, to_parquet
from srppo.statistics.intervals import Estimate

TESTS = ("p", "p_holm", "p_same", "p_same_holm", "detectable")
STATUSES = ("done", "failed", "diverged", "running", "waiting")
CELLS = (
    "seeds: measured of planned. fail, div: failed, diverged. TFLOPs: counted training operations, 10^12, parents "
    "included. len: tokens of a test answer. end: answers that ended."
)
BANDS = (
    "Accuracy on test items with 95% intervals over seeds and items. Arms share items and seeds: read the paired "
    "differences, not the overlap of bands."
)
CURVES = (
    "Accuracy and length over KL to the SFT model, each arm as far as every seed reaches, with 95% intervals over "
    "seeds, on these items. Dots: means over seeds of the policies that were measured. Dotted: where arms are compared."
)
ZERO = (
    "Planned paired differences against zero, with the intervals that verdicts are read from, simultaneous over the "
    "family. Filled: better or worse."
)
EXPLORATORY = (
    "Other groups of items and other decodings than the primary metric's, and the same pairs on them. No test and no "
    "correction: they suggest, they do not show."
)
MEASURED = (
    "Means over seeds, at the kept step. Length: tokens of an answer; ended: by EOS. NLL: of held-out answers, nats a "
    "token. Reward, KL and rollout length: of PPO's own rollouts, nats and tokens. Sampled gain: accuracy over SFT, "
    "primary group; of it by length: what SFT's own answers gain at these lengths, pooled over the questions of a task."
)


def report_sweep(folder: Path, console: Console) -> Path:
    """Print what a sweep says, write page, figures and files into its folder `report`, name each, return the page.

    A sweep that is half finished, or has failed in part, is reported as far as it goes. Raises RecordError, in one
    line, for a folder that holds no record or a damaged one, StorageError when the disk refuses.
    """
    plan, ledger = load_sweep(folder)
    result, stages, out = analyse(plan, ledger), stages_of(plan, ledger), folder / "report"
    sweep, spent = plan.sweep, says.spent_line(stages.values())
    console.print(sweep_text(result, spent))
    primary = next((each for each in result.curves if each.primary), None)
    accuracy = curves_plot(primary, out / "curves") if primary else sweep_plot(result, out / "accuracy")
    differences = differences_plot(result, out / "differences")
    files = [path.name for path in (*write_files(result, out), *accuracy, *differences)]
    environment = next((found for stage in stages.values() if (found := environment_of(stage))), {})
    intervals = f"{says.interval_line(result)} seeds: measured of planned. TFLOPs: a seed, parents included."
    tested = tables.differences_table(result, tables.primary_metric(sweep), [says.family_line(result)])
    parts = [
        text(sweep.question),
        text(says.answer(result), "answer"),
        *map(text, says.power_lines(result)),
        text(says.progress_line(result), "bad"),
        bullets("Missing, failed and diverged", says.missing_lines(result), "bad"),
        section("At equal distance from the SFT model", plot(CURVES, accuracy) + _curves(result)) if primary else "",
        section(
            "Accuracy",
            ("" if primary else plot(BANDS, accuracy))
            + to_html(tables.cells_table(result, [f"{intervals} Length: tokens."])),
        ),
        section("Paired differences", plot(ZERO, differences) + to_html(tested)),
        section("Trends", to_html(trends_table(result)) + "".join(map(soft_text, says.peak_lines(result)))),
        bullets("The closed form's forecast", [says.forecast_sentence(each) for each in result.forecasts], ""),
        section("Training compute", to_html(tables.costs_table(result)) + soft_text(spent)),
        section("What else was measured", to_html(tables.figures_table(result)) + soft_text(MEASURED)),
        section("Exploratory: not in the plan", _exploratory(result)),
        bullets("Notes", sweep.notes, ""),
        section("The plan, as sweep.json fixed it", _plan(result)),
        section("Recipe", details("recipe.toml", f"<pre>{escape(to_toml(sweep.recipe))}</pre>")),
        section("Environment of one attempt", facts(environment)),
        bullets("Files", [*files, f"record: {folder}", f"made by: srppo report {folder}"], ""),
    ]
    page = write_page(out / "index.html", sweep.name, parts)
    for path in sorted(out.iterdir()):
        if path.is_file() and path != page:
            console.print(f"written: {path}")
    console.print(f"report: {page}")
    return page


def stages_of(plan: Plan, ledger: Ledger) -> dict[str, Stage]:
    """Every stage of a sweep that has begun, once, by its id."""
    found = (ledger.stage(task) for task in plan.tasks.values())
    return {stage.id: stage for stage in found if stage is not None}


def sweep_text(result: SweepResult, spent: str) -> RenderableType:
    """Everything that is printed, legible in a plain log and in ASCII; `spent` is the line on core-hours."""
    sweep = result.plan.sweep
    caption = " ".join([says.family_line(result), says.exploratory_line(result)]).strip()
    parts = [
        paragraph(f"{sweep.name}: {sweep.question}", "dim"),
        paragraph(says.answer(result), "bold"),
        *map(paragraph, says.power_lines(result)),
        *([paragraph(says.progress_line(result), "bold yellow")] if says.progress_line(result) else []),
        Text(""),
        tables.cells_table(result, [f"{says.interval_line(result)} {CELLS}"]),
        *(
            matched_table(each, sweep.analysis.curves)
            for each in result.curves
            if each.primary and sweep.analysis.curves
        ),
        tables.differences_table(result, tables.primary_metric(sweep), [caption]),
        trends_table(result),
        *map(paragraph, [*says.peak_lines(result), ""] if result.peaks else []),
        *map(paragraph, map(says.forecast_sentence, result.forecasts)),
        tables.costs_table(result),
        *(paragraph(line, "red") for line in says.missing_lines(result)),
        *(paragraph(f"Note: {note}", "dim") for note in sweep.notes),
        paragraph(spent, "dim"),
    ]
    return Group(*parts)


def trends_table(result: SweepResult) -> Table:
    """A row a slope: in the terminal a sentence with the course of the means, on the page its parts."""
    heads = [Column(head, only="page") for head in ("what", "where", "slope", "unit", "points", "seeds", "in words")]
    heads += [Column("", only="terminal"), Column("course", only="terminal")]
    rows = []
    for each, line in zip(result.trends, says.trend_lines(result), strict=False):
        counts = [str(each.points), str(each.seeds)]
        cells = [each.what, each.where or "-", says.slope_text(each), says.per(each), *counts, says.direction(each)]
        rows.append([*cells, line, tables.course(result, each.what, each.where)])
    unfitted = says.trend_lines(result)[len(result.trends) :]
    return Table.of("Trends", heads, rows, [*unfitted, says.trend_caption(result)])


# ---- parts of the page


def _exploratory(result: SweepResult) -> str:
    """All other metrics: accuracy of every cell, then the differences of the plan's pairs, uncorrected."""
    primary, metrics = tables.primary_metric(result.plan.sweep), tables.metrics_of(result)
    found = [tables.metrics_table(result, each) for each in dict.fromkeys(decoding for _, decoding in metrics)]
    html = "".join(details(table.title, to_html(table)) for table in found)
    for metric in metrics if result.plan.sweep.analysis.family else ():
        if metric != primary:
            inner = to_html(tables.differences_table(result, metric))
            html += details(f"differences, {tables.metric_words(metric)} (exploratory: not in the plan)", inner)
    return soft_text(EXPLORATORY) + html if len(metrics) > 1 else ""


def _curves(result: SweepResult) -> str:
    """The matched differences on the primary metric, then on all others, untested."""
    plan = result.plan.sweep.analysis.curves
    found = [(each, to_html(matched_table(each, plan))) for each in result.curves if plan]
    return "".join(
        html if each.primary else details(f"at equal KL, {tables.metric_words(each.metric)} (exploratory)", html)
        for each, html in found
    )


def _plan(result: SweepResult) -> str:
    sweep = result.plan.sweep
    analysis = {key: value for key, value in dataclasses.asdict(sweep.analysis).items() if key != "family"}
    plan = {"seeds": sweep.seeds, "arms": [f"{arm.name} ({arm.kind})" for arm in sweep.arms], **analysis}
    family = "".join(f"<li>{escape(tables.difference_label(sweep, each))}</li>" for each in sweep.analysis.family)
    return facts(plan) + details(f"family of {len(sweep.analysis.family)} comparisons", f"<ol>{family}</ol>")


# ---- files


def write_files(result: SweepResult, folder: Path) -> list[Path]:
    """Rows as CSV, Parquet and JSON lines, rows by task as Parquet, cells, differences and slopes as CSV, tables as
    LaTeX; returns the paths."""
    rows = records(result.rows)
    texts = {
        "rows.csv": to_csv(rows),
        "rows.jsonl": "".join(canonical_json(plain(row)) + "\n" for row in rows),
        "cells.csv": to_csv(cell_records(result)),
        "differences.csv": to_csv(difference_records(result)),
        "trends.csv": to_csv(trend_records(result)),
        **({"matched.csv": to_csv(records(matched_records(result)))} if result.curves else {}),
        **({"curves.csv": to_csv(records(point_records(result)))} if result.curves else {}),
        "table.tex": latex(result),
    }
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, content in texts.items():
        write_atomic(folder / name, content)
    columnar = {"rows.parquet": rows, "tasks.parquet": records(result.tasks)}
    for name, of_all in columnar.items():
        write_atomic(folder / name, to_parquet(of_all))
    return [folder / name for name in (*texts, *columnar)]


def cell_records(result: SweepResult) -> list[dict[str, Any]]:
    """A row a cell and metric; a cell without a result has one on the primary metric, its figures empty."""
    primary, metrics = tables.primary_metric(result.plan.sweep), tables.metrics_of(result)
    return records(
        _cell_record(result, cell, metric)
        for cell in result.cells
        for metric in ([metric for metric in metrics if metric in cell.accuracy] or [primary])
    )


def _cell_record(result: SweepResult, cell: CellResult, metric: Metric) -> dict[str, Any]:
    sweep, estimate = result.plan.sweep, cell.accuracy.get(metric)
    values = sweep.point(cell.cell.point).values
    row = {"sweep": sweep.name, "point": cell.cell.point, **values, "arm": cell.cell.arm}
    row |= {"group": metric[0], "decoding": metric[1], "primary": metric == tables.primary_metric(sweep)}
    row |= {"accuracy": estimate.mean if estimate else None, **_bounds(estimate), "iqm": cell.iqm.get(metric)}
    row |= {"items": estimate.n if estimate else None, "seeds": len(cell.seeds), "planned_seeds": len(sweep.seeds)}
    row |= {status: cell.statuses.get(status, 0) for status in STATUSES}
    row |= {"flops": cell.flops, "selection_flops": cell.selection_flops, "seconds": cell.seconds}
    for key, value in cell.figures.items():
        row[key if key not in row else f"measured_{key}"] = value
    return row | {"reasons": "; ".join(cell.reasons)}


def _bounds(estimate: Estimate | None) -> dict[str, float | None]:
    """Columns of a 95% interval; None without an estimate."""
    return {"low": estimate.low if estimate else None, "high": estimate.high if estimate else None}


def difference_records(result: SweepResult) -> list[dict[str, Any]]:
    """All of the family, those without a result too, then the exploratory ones."""
    family, metric = result.plan.sweep.analysis.family, tables.primary_metric(result.plan.sweep)
    tested = {each.comparison: each for each in result.differences if each.primary}
    found = [(each, metric, tested.get(each)) for each in family]
    found += [(each.comparison, each.metric, each) for each in result.differences if not each.primary]
    made = []
    for comparison, (group, decoding), each in found:
        row: dict[str, Any] = {"model_point": comparison.model.point, "model": comparison.model.arm}
        row |= {"baseline_point": comparison.baseline.point, "baseline": comparison.baseline.arm}
        row |= {"group": group, "decoding": decoding, "planned": (group, decoding) == metric}
        said = each.finding if each else None
        row |= {"difference": said.difference.mean if said else None, **_bounds(said.difference if said else None)}
        row["confidence"] = said.confidence if said else None
        row |= {f"these_tasks_{end}": bound for end, bound in _bounds(each.these_tasks if each else None).items()}
        row |= {"items": said.difference.n if said else None, "tasks": each.tasks if each else None}
        row["seeds"] = len(each.seeds) if each else 0
        row |= {key: getattr(said, key) if each and each.primary else None for key in TESTS}
        row |= {"margin": result.plan.sweep.analysis.margin, "comparisons": len(family)}
        verdict = "no result" if each is None else each.finding.verdict if each.primary else "exploratory"
        made.append(row | {"verdict": verdict})
    return records(made)


def trend_records(result: SweepResult) -> list[dict[str, Any]]:
    """A row a slope."""
    return records(
        {"what": each.what, "axis": each.axis, "scale": each.scale, "where": each.where, "group": each.metric[0]}
        | {"decoding": each.metric[1], "slope": each.slope.mean, **_bounds(each.slope)}
        | {"points": each.points, "seeds": each.seeds}
        for each in result.trends
    )


def latex(result: SweepResult) -> str:
    """The cells and the planned differences, two tables."""
    sweep, metric = result.plan.sweep, tables.primary_metric(result.plan.sweep)
    missing = "; ".join(says.missing_lines(result))
    caption = [
        *(
            f"{sweep.name}: {sweep.question}",
            says.answer(result),
            says.progress_line(result),
            says.interval_line(result),
        ),
        f"Accuracy, {tables.metric_words(metric)}. TFLOPs are counted training operations, parents included.",
        f"Without all their seeds: {missing}." if missing else "",
    ]
    made = to_latex(tables.cells_table(result, caption), f"tab:{sweep.name}")
    if not sweep.analysis.family:
        return made
    head = f"{sweep.name}: paired differences of accuracy, {tables.metric_words(metric)}."
    table = tables.differences_table(result, metric, [head, says.interval_line(result), says.family_line(result)])
    return made + "\n" + to_latex(table, f"tab:{sweep.name}-differences")
