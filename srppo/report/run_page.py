"""The page of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from srppo.record.files import write_atomic
from srppo.report.figures import (
    GROUP_MEANING,
    ArmFigures,
    cost_caption,
    decodings_of,
    estimate_text,
    group_words,
    groups_of,
    interval_caption,
    kept_text,
    number_text,
    problem_lines,
    teraflops,
)
from srppo.report.html import bullets, details, facts, html_table, page, section, soft_text

LONG = 200  # characters of an answer that need a wider column


@dataclass(frozen=True)
class Sample:
    """A test prompt and what each arm wrote; `right` says which answers were right, where that is known."""

    prompt: str
    responses: Mapping[str, str]
    answer: str | None = None
    group: str = ""
    right: Mapping[str, bool] | None = None


def write_report(
    path: Path,
    *,
    title: str,
    arms: Sequence[ArmFigures],
    differences: Sequence[ArmFigures] = (),
    differences_caption: str = "",
    results: str = "",
    parts: Sequence[tuple[str, str]] = (),
    samples: Sequence[Sample] = (),
    samples_caption: str = "",
    recipe_toml: str = "",
    environment: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
    missing: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Write the page. results: HTML below the tables of results; parts: (title, HTML) of further sections, left out
    where empty. missing: what should be here and is not, and why, beside the problems of the arms."""
    shown = soft_text(samples_caption) + "".join(map(_sample, samples)) if samples else ""
    body = [
        f"<h1>{escape(title)}</h1>",
        *(f"<p>{escape(note)}</p>" for note in notes),
        bullets("Missing or failed", [*problem_lines(arms), *missing], "bad"),
        bullets("Warnings", warnings, ""),
        section("Results", _accuracy(arms) + _cost(arms) + results),
        section(
            "Paired differences: SRPPO minus",
            _estimates(differences, "+") + soft_text(differences_caption) if differences else "",
        ),
        *(section(name, content) for name, content in parts),
        section("Samples", shown),
        section("Configuration", details("recipe.toml", f"<pre>{escape(recipe_toml)}</pre>") if recipe_toml else ""),
        section("Environment", facts(environment or {})),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page(title, "".join(body)))
    return path


def _accuracy(arms: Sequence[ArmFigures]) -> str:
    meanings = "; ".join(GROUP_MEANING[g] for g in groups_of(arms) if g in GROUP_MEANING)
    return _estimates(arms) + soft_text(interval_caption(arms)) + (soft_text(meanings + ".") if meanings else "")


def _estimates(arms: Sequence[ArmFigures], sign: str = "") -> str:
    groups, html = groups_of(arms), ""
    for decoding in decodings_of(arms):
        rows = []
        for arm in arms:
            cells = [estimate_text(arm.figures.get((group, decoding)), sign) for group in groups]
            if arm.problem and not arm.figures:
                cells = ["no result"] + [""] * (len(groups) - 1)
            rows.append([arm.name, *cells])
        html += html_table(
            [f"{decoding} decoding" if decoding == "greedy" else decoding, *map(group_words, groups)], rows
        )
    return html


def _cost(arms: Sequence[ArmFigures]) -> str:
    several = len({arm.seeds for arm in arms if arm.flops is not None}) > 1
    columns = {
        "seeds": [str(arm.seeds) if several and arm.flops is not None else "-" for arm in arms],
        "TFLOPs": [teraflops(arm.flops) for arm in arms],
        "seconds": [number_text(arm.seconds, ",.0f") for arm in arms],
        "kept step": [kept_text(arm) for arm in arms],
        "length": [number_text(arm.mean_length) for arm in arms],
        "ended by EOS": [number_text(arm.ended_share, ".0%") for arm in arms],
        "held-out NLL": [number_text(arm.nll, ".3f") for arm in arms],
    }
    columns = {head: cells for head, cells in columns.items() if set(cells) != {"-"}}
    if not columns:
        return ""
    rows = [[arm.name, *(cells[i] for cells in columns.values())] for i, arm in enumerate(arms)]
    notes = "".join(soft_text(f"{arm.name}: {arm.note}") for arm in arms if arm.note)
    return html_table(["cost and shape", *columns], rows) + soft_text(cost_caption(arms)) + notes


def _sample(sample: Sample) -> str:
    answers = ""
    for arm, text in sample.responses.items():
        known = sample.right is not None and arm in sample.right
        kind = ("right" if sample.right[arm] else "wrong") if sample.right is not None and known else ""
        verdict = f' <span class="{kind}">{"✓" if kind == "right" else "✗"}&nbsp;{kind}</span>' if kind else ""
        answers += (
            f'<div><span class="soft">{escape(arm)}{verdict}</span><pre>{escape(text) or "(nothing)"}</pre></div>'
        )
    long = max(map(len, sample.responses.values()), default=0) > LONG
    answer = f'<span class="soft">right answer: <code>{escape(sample.answer)}</code></span>' if sample.answer else ""
    return (
        f'<div class="sample"><span class="soft">{escape(sample.group)}</span><pre>{escape(sample.prompt)}</pre>'
        f'{answer}<div class="answers{" long" if long else ""}">{answers}</div></div>'
    )
