"""What a sweep's curves over KL say: the matched differences as a table, in words and as rows of a file. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from srppo.ablations.analysis import SweepResult
from srppo.ablations.curves import CurveResult, Matched
from srppo.ablations.spec import Curves
from srppo.evaluation.comparison import number, p_text, signed
from srppo.report import sweep_tables as tables
from srppo.report.table import NO_RESULT, VERDICT_MARKS, Chart, Column, Row, Table
from srppo.report.words import joined, number_text, span

OUT_OF_REACH = "out of reach"
WORDS = {
    "better": "is better than",
    "worse": "is worse than",
    "same": "is the same as",
    "cannot tell": "cannot be told from",
}
CAPTION = (
    "At equal KL to the SFT model, nats a response, measured on the sampled answers to these items: each arm's "
    "accuracy is read off its curve, linear between its two nearest policies, item by item. Out of reach: at some seed "
    "the arm's largest KL is smaller, and there is no verdict."
)


def curves_answer(result: SweepResult) -> str:
    """The answer to the sweep's question by the planned comparisons, at each KL."""
    analysis = result.plan.sweep.analysis
    primary = next((each for each in result.curves if each.primary), None)
    if primary is None or analysis.curves is None:
        return f"No answer yet: none of the {analysis.comparisons} planned comparisons has a result."
    said = []
    for kl, matched in _by_kl(primary).items():
        by: dict[str, list[str]] = {}
        for each in matched:
            by.setdefault(verdict_of(each), []).append(each.other)
        clauses = [f"{words} {joined(by[verdict])}" for verdict, words in WORDS.items() if verdict in by]
        known = [f"{analysis.curves.model} {', '.join(clauses)}"] if clauses else []
        missing = [f"{why}: {joined(by[why])}" for why in (OUT_OF_REACH, NO_RESULT) if why in by]
        said.append(f"At KL {kl:.2g}: {'; '.join(known + missing)}")
    seeds = span([len(each.seeds) for each in primary.matched], "seed")
    tasks = next((each.tasks for each in primary.matched if each.tasks), None)
    seeds = tables.over_tasks(tasks) + seeds
    holm = f"{analysis.correction} over {analysis.comparisons}"
    return f"{'. '.join(said)} ({tables.metric_words(primary.metric)}; {holm}; {seeds})."


def _by_kl(result: CurveResult) -> dict[float, list[Matched]]:
    found: dict[float, list[Matched]] = {}
    for each in result.matched:
        found.setdefault(each.kl, []).append(each)
    return found


def verdict_of(each: Matched) -> str:
    """The verdict, or why there is none."""
    if each.finding is not None:
        return each.finding.verdict
    return OUT_OF_REACH if each.seeds else NO_RESULT


def matched_table(result: CurveResult, plan: Curves) -> Table:
    """The model minus each other arm, under a heading a KL; tests where the plan has them."""
    known = [each.finding.difference for each in result.matched if each.finding]
    reach = max([0.01, *(abs(v) for e in known for v in (e.mean, e.low, e.high) if v == v)])
    heads: list[str | Column] = ["arm", Column("", only="terminal"), "difference"]
    heads += ["Holm", "detects", "verdict"] if result.primary else []
    heads += [Column("largest KL", "reach")]
    rows: list[Row | str] = []
    for kl, matched in _by_kl(result).items():
        rows.append(f"{plan.model} minus each, at KL {kl:.3g} ({matched[0].share:.0%} of what it reaches)")
        for each in matched:
            found, verdict = each.finding, verdict_of(each)
            chart = Chart(found.difference if found else None, -reach, reach)
            told = ["-", "-", verdict] if found is None else [p_text(found.p_holm), number(found.detectable), verdict]
            cells = [each.other, chart, signed(found.difference) if found else "-" if result.primary else verdict]
            cells += told if result.primary else []
            rows.append(
                Row([*cells, number_text(each.reach, ".3g")], VERDICT_MARKS.get(verdict, "") if result.primary else "")
            )
    return Table.of(f"At equal KL, {tables.metric_words(result.metric)}", heads, rows, [CAPTION])


def matched_records(result: SweepResult) -> Iterator[dict[str, Any]]:
    """A row a metric, KL and arm."""
    plan = result.plan.sweep.analysis.curves
    for curves in result.curves if plan else ():
        for each in curves.matched:
            row: dict[str, Any] = {"model": plan.model if plan else "", "baseline": each.other}
            row |= {"group": curves.metric[0], "decoding": curves.metric[1], "planned": curves.primary}
            row |= {"kl": each.kl, "share": each.share, "largest_kl": each.reach, "seeds": len(each.seeds)}
            found = each.finding
            row |= {key: getattr(found.difference, key) if found else None for key in ("mean", "low", "high")}
            row |= {"confidence": found.confidence if found else None, "tasks": each.tasks}
            row |= {f"these_tasks_{end}": getattr(each.these_tasks, end, None) for end in ("low", "high")}
            row |= {key: getattr(found, key) if found and curves.primary else None for key in ("p", "p_holm")}
            yield row | {"verdict": verdict_of(each) if curves.primary or found is None else "exploratory"}


def point_records(result: SweepResult) -> Iterator[dict[str, Any]]:
    """A row a metric, arm and measured policy: means over seeds."""
    for curves in result.curves:
        for line in curves.lines:
            for kl, accuracy, length in line.points:
                row: dict[str, Any] = {"group": curves.metric[0], "decoding": curves.metric[1], "arm": line.arm}
                yield row | {"kl": kl, "accuracy": accuracy, "length": length, "seeds": line.seeds}
