"""lm-eval's logged samples to rows of ours, and figures with intervals."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from srppo.statistics.intervals import Estimate, item_interval, ratio_interval

UNITS, CLUSTER = "units", "cluster"
Row = dict[str, Any]


def rows_of(logged: Sequence[Mapping[str, Any]], draw: int, cluster: str | None = None) -> list[Row]:
    """One row a document: item, sample, prompt, response and a float a metric (and filter, where there are several).

    cluster: the documents' field that says which belong together; it becomes the column `cluster`.

    A metric that is a list (IFEval's instruction level) becomes the share of its members, their number stands in
    `units`. Equal documents are told apart by their order.
    """
    several = len({entry["filter"] for entry in logged}) > 1
    by_doc: dict[int, Row] = {}
    seen: dict[str, int] = defaultdict(int)
    for entry in logged:
        row = by_doc.get(entry["doc_id"])
        if row is None:
            seen[entry["doc_hash"]] += 1
            copy = f"#{seen[entry['doc_hash']]}" if seen[entry["doc_hash"]] > 1 else ""
            row = {"item": entry["doc_hash"] + copy, "sample": draw, **_texts(entry), **_cluster(entry["doc"], cluster)}
            by_doc[entry["doc_id"]] = row
        for name in entry["metrics"]:
            row[f"{name},{entry['filter']}" if several else name] = as_float(name, entry[name])
            if isinstance(entry[name], list):
                row[UNITS] = float(len(entry[name]))
    return list(by_doc.values())


def _cluster(doc: Mapping[str, Any], name: str | None) -> Row:
    return {} if name is None else {CLUSTER: str(doc[name])}


def _texts(entry: Mapping[str, Any]) -> Row:
    """Prompt and response; of a choice, the likeliest continuation."""
    arguments, responses = entry["arguments"], entry["resps"]
    first = responses[0][0]
    if isinstance(first, str):
        return {"prompt": arguments[0][0], "response": first}
    if len(arguments[0]) < 2:
        return {"prompt": "", "response": arguments[0][0]}
    best = max(range(len(responses)), key=lambda i: responses[i][0][0])
    return {"prompt": arguments[best][0], "response": arguments[best][1]}


def as_float(name: str, value: Any) -> float:
    """One item's value of a metric; NaN where only the whole set has one, such as F1."""
    if isinstance(value, list):
        return sum(map(float, value)) / len(value) if value else math.nan
    if isinstance(value, tuple) and name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        nats = -float(value[0]) / float(value[1])
        return nats / math.log(2) if name == "bits_per_byte" else math.exp(min(nats, 700.0))
    return float(value) if isinstance(value, int | float | np.number) else math.nan


def figures(rows: Sequence[Row], results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each metric lm-eval's own score (the mean over draws), our 95% interval and the number of items.

    low and high are None where the score is no mean over items (a perplexity, an F1).
    """
    found = {}
    several = len({key.partition(",")[2] for key in results[0] if "," in key}) > 1
    for key in results[0]:
        name, _, rest = key.partition(",")
        if not rest or name.endswith("_stderr") or not isinstance(results[0][key], int | float):
            continue
        column = f"{name},{rest}" if several else name
        value = sum(float(result[key]) for result in results) / len(results)
        estimate = _interval([row for row in rows if not math.isnan(row.get(column, math.nan))], column)
        fits = estimate is not None and math.isclose(estimate.mean, value, rel_tol=1e-6, abs_tol=1e-9)
        low, high = (estimate.low, estimate.high) if estimate and fits else (None, None)
        found[column] = {"value": value, "low": low, "high": high, "n": estimate.n if estimate else 0}
    return found


def _interval(rows: Sequence[Row], column: str) -> Estimate | None:
    """Over items, each the mean of its samples, or over clusters of items. A share of units, and a mean over clusters
    of unequal size, is a ratio of sums, whose units are items or clusters. n counts items.
    """
    values: dict[str, list[float]] = defaultdict(list)
    units: dict[str, float] = {}
    places: dict[str, str] = {}
    for row in rows:
        values[row["item"]].append(row[column])
        units[row["item"]] = row.get(UNITS, 1.0) if column.startswith("inst_level") else 1.0
        places[row["item"]] = str(row.get(CLUSTER) or row["item"])
    if not values:
        return None
    shares = np.array([sum(each) / len(each) for each in values.values()])
    weights = np.array(list(units.values()))
    limits = (0.0, 1.0) if shares.min() >= 0 and shares.max() <= 1 else None
    if (weights == 1).all() and len(set(places.values())) == len(places):
        return item_interval(shares, limits=limits)
    _, members = np.unique(list(places.values()), return_inverse=True)
    sums, sizes = np.bincount(members, weights=shares * weights), np.bincount(members, weights=weights)
    return ratio_interval(sums, sizes, limits=limits)._replace(n=len(shares))


def not_scored_rows(task: Any, skipped: Mapping[int, str], cluster: str | None = None) -> list[Row]:
    """A row for each document that was left out, with the reason and no score."""
    docs = list(task.eval_docs) if skipped else []
    return [
        {
            "item": _item(docs[i]),
            "sample": 0,
            "prompt": str(task.doc_to_text(docs[i])),
            "response": "",
            "not_scored": reason,
            **_cluster(docs[i], cluster),
        }
        for i, reason in sorted(skipped.items())
    ]


def _item(doc: Any) -> str:
    """lm-eval's hash of a document."""
    from lm_eval.utils import handle_non_serializable, hash_string

    return hash_string(json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False))
