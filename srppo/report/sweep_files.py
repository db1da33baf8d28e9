"""The files of a sweep: rows as CSV, Parquet and JSON lines, cells and differences as CSV, tables as LaTeX."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from srppo.ablations.analysis import CellResult, SweepResult
from srppo.ablations.spec import label
from srppo.config import canonical_json
from srppo.record.files import storing, write_atomic
from srppo.record.json import plain
from srppo.report.sweep_latex import to_latex
from srppo.report.sweep_layout import metrics_of, primary_metric
from srppo.statistics.intervals import Estimate

Row = Mapping[str, Any]
STATUSES = ("done", "failed", "diverged", "running", "waiting")


def write_files(result: SweepResult, folder: Path) -> list[Path]:
    """Write all of them into a folder and return their paths. Raises StorageError when the disk refuses."""
    rows = even_rows(result.rows)
    texts = {
        "rows.csv": to_csv(rows),
        "rows.jsonl": "".join(canonical_json(plain(row)) + "\n" for row in rows),
        "cells.csv": to_csv(cell_rows(result)),
        "differences.csv": to_csv(difference_rows(result)),
        "trends.csv": to_csv(trend_rows(result)),
        "table.tex": to_latex(result),
    }
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_atomic(folder / name, text)
    write_atomic(folder / "rows.parquet", to_parquet(rows))
    return [*(folder / name for name in texts), folder / "rows.parquet"]


def even_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The same columns in every row, each of one type: what is not numbers throughout becomes text; None stays."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    made = [{key: row.get(key) for key in columns} for row in rows]
    for key in columns:
        kinds = {type(row[key]) for row in made if row[key] is not None}
        if kinds == {int, float}:
            _change(made, key, float)
        elif not (kinds <= {int} or kinds <= {float} or kinds <= {bool} or kinds <= {str}):
            _change(made, key, _text)
    return made


def _change(rows: Sequence[dict[str, Any]], key: str, form: Any) -> None:
    for row in rows:
        row[key] = None if row[key] is None else form(row[key])


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | tuple | dict) else label(value)


def to_csv(rows: Sequence[Row]) -> str:
    """With a head; an empty field is None; "" without rows."""
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_parquet(rows: Sequence[Row]) -> bytes:
    """The rows with their types."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.table({key: [row[key] for row in rows] for key in (rows[0] if rows else ())}), sink)
    return sink.getvalue()


def cell_rows(result: SweepResult) -> list[dict[str, Any]]:
    """A row a cell and metric; a cell without a result has one on the primary metric, its figures empty."""
    made = [
        _cell_row(result, cell, metric)
        for cell in result.cells
        for metric in ([m for m in metrics_of(result) if m in cell.accuracy] or [primary_metric(result.plan.sweep)])
    ]
    return even_rows(made)


def _cell_row(result: SweepResult, cell: CellResult, metric: tuple[str, str]) -> dict[str, Any]:
    sweep, estimate = result.plan.sweep, cell.accuracy.get(metric)
    values = sweep.point(cell.cell.point).values
    row = {"sweep": sweep.name, "point": cell.cell.point, **values, "arm": cell.cell.arm}
    row |= {"group": metric[0], "decoding": metric[1], "primary": metric == primary_metric(sweep)}
    row |= {"accuracy": estimate.mean if estimate else None, **bounds(estimate), "iqm": cell.iqm.get(metric)}
    row |= {"items": estimate.n if estimate else None, "seeds": len(cell.seeds), "planned_seeds": len(sweep.seeds)}
    row |= {status: cell.statuses.get(status, 0) for status in STATUSES}
    row |= {"flops": cell.flops, "selection_flops": cell.selection_flops, "seconds": cell.seconds}
    for key, value in cell.figures.items():
        row[key if key not in row else f"measured_{key}"] = value
    return row | {"reasons": "; ".join(cell.reasons)}


def bounds(estimate: Estimate | None) -> dict[str, float | None]:
    """Columns of a 95% interval; None without an estimate."""
    return {"low": estimate.low if estimate else None, "high": estimate.high if estimate else None}


def difference_rows(result: SweepResult) -> list[dict[str, Any]]:
    """All of the family, those without a result too, then the exploratory ones."""
    family, metric = result.plan.sweep.analysis.family, primary_metric(result.plan.sweep)
    tested = {each.comparison: each for each in result.differences if each.primary}
    found = [(each, metric, tested.get(each)) for each in family]
    found += [(each.comparison, each.metric, each) for each in result.differences if not each.primary]
    made = []
    for comparison, (group, decoding), each in found:
        model, baseline = comparison.model, comparison.baseline
        row: dict[str, Any] = {
            "model_point": model.point,
            "model": model.arm,
            "baseline_point": baseline.point,
            "baseline": baseline.arm,
        }
        row |= {"group": group, "decoding": decoding, "planned": (group, decoding) == metric}
        row |= {"difference": each.difference.mean if each else None, **bounds(each.difference if each else None)}
        row |= {"items": each.difference.n if each else None, "seeds": len(each.seeds) if each else 0}
        row |= {key: getattr(each, key) if each and each.primary else None for key in ("p", "p_holm")}
        row |= {"detectable": each.detectable if each else None}
        verdict = "no result" if each is None else each.verdict if each.primary else "exploratory"
        made.append(row | {"comparisons": len(family), "verdict": verdict})
    return even_rows(made)


def trend_rows(result: SweepResult) -> list[dict[str, Any]]:
    """A row a slope."""
    return even_rows(
        [
            {"what": each.what, "axis": each.axis, "scale": each.scale, "where": each.where, "group": each.metric[0]}
            | {"decoding": each.metric[1], "slope": each.slope.mean, **bounds(each.slope)}
            | {"points": each.points, "seeds": each.seeds}
            for each in result.trends
        ]
    )
