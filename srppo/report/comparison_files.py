"""A comparison as Markdown, CSV and JSON: the same figures, none rounded in CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from srppo.evaluation.comparison import Aggregate, ComparisonResult, Difference, number, p_text, signed
from srppo.record.json import plain
from srppo.report.comparison_table import aggregate_sentence, average, captions, remarks
from srppo.statistics.intervals import Estimate

SCHEMA_VERSION = 1
COLUMNS = (
    *("kind", "decoding", "task", "group", "metric", "baseline", "model", "baseline_mean", "model_mean"),
    *("difference", "low", "high", "p", "p_holm", "comparisons", "test", "detectable", "verdict"),
    *("items", "clusters", "seeds", "left_out", "sentence"),
)


def to_markdown(found: ComparisonResult, notes: Sequence[str] = ()) -> str:
    """Tables for each decoding, the sentences, and what the columns mean."""
    lines = [f"# {', '.join(found.models)} against {found.baseline}", ""]
    heads = ["task", "model", found.baseline, "model's", "difference", "p", "Holm", "detects", "verdict"]
    for decoding in dict.fromkeys(each.decoding for each in found.differences):
        rows = [each for each in found.differences if each.decoding == decoding]
        whole = [each for each in found.aggregates if each.decoding == decoding]
        lines += [f"## {decoding}", "", _row(heads), _row(["---"] * 2 + ["---:"] * 6 + ["---"])]
        lines += [_row(_cells(each)) for each in rows] + [_row(_average_cells(each)) for each in whole]
        lines += ["", *(f"- {_safe(each.sentence)}" for each in rows)]
        lines += [*(f"- {_safe(aggregate_sentence(each))}" for each in whole), ""]
    said = [*captions(found), *(line for each in found.differences for line in remarks(each)), *found.notes, *notes]
    return "\n".join([*lines, *(f"{_safe(line)}\n" for line in dict.fromkeys(said))])


def _cells(each: Difference) -> list[str]:
    figures = [number(each.baseline_mean), number(each.model_mean), signed(each.difference)]
    return [each.task, each.model, *figures, p_text(each.p), p_text(each.p_holm), number(each.detectable), each.verdict]


def _average_cells(each: Aggregate) -> list[str]:
    means = [number(each.iqm.baseline.mean), number(each.iqm.model.mean)]
    return [average(each), each.model, *means, signed(each.iqm.difference), "", "", "", ""]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_safe, cells))} |"


def _safe(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "".join(f"\\{each}" if each in "|*_`<#" else " " if each in "\r\n" else each for each in text)


def to_csv(found: ComparisonResult, notes: Sequence[str] = ()) -> str:
    """A row a difference (kind difference) and a row an aggregate (kind iqm); left_out counts items."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for each in found.differences:
        row: dict[str, Any] = {key: value for key, value in asdict(each).items() if key in COLUMNS}
        row |= _estimate(each.difference) | {
            "kind": "difference",
            "items": each.difference.n,
            "clusters": each.clusters,
        }
        row |= {"seeds": len(each.seeds), "left_out": len({i for items in each.left_out.values() for i in items})}
        writer.writerow(row)
    for one in found.aggregates:
        row = {key: value for key, value in asdict(one).items() if key in COLUMNS} | _estimate(one.iqm.difference)
        row |= {"kind": "iqm", "task": "+".join(one.tasks), "sentence": aggregate_sentence(one)}
        writer.writerow(row | {"baseline_mean": one.iqm.baseline.mean, "model_mean": one.iqm.model.mean})
    return text.getvalue()


def _estimate(value: Estimate) -> dict[str, float]:
    return {"difference": value.mean, "low": value.low, "high": value.high}


def to_json(found: ComparisonResult, notes: Sequence[str] = ()) -> str:
    """Everything, items left out by name included; numbers that are not finite are strings, as in the record."""
    content = {"schema_version": SCHEMA_VERSION, **_fields(found), "notes": [*found.notes, *notes]}
    return json.dumps(plain(content), indent=1, ensure_ascii=False) + "\n"


def _fields(value: Any) -> Any:
    """Dataclasses and named tuples as mappings."""
    if hasattr(value, "_asdict"):
        return {key: _fields(each) for key, each in value._asdict().items()}
    if hasattr(value, "__dataclass_fields__"):
        return {key: _fields(getattr(value, key)) for key in value.__dataclass_fields__}
    return [_fields(each) for each in value] if isinstance(value, list | tuple) else value
