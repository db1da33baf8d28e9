"""How much of a gain length explains, in the terminal, as a page, and as a section of a run's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from srppo.analysis.explain import STARTS, Explained, ExplainResult, explained, has_lengths
from srppo.config import canonical_json
from srppo.console import Console
from srppo.record.files import write_atomic
from srppo.record.json import plain
from srppo.report.answers import ArmRow
from srppo.report.page import bullets, section, soft_text, write_page
from srppo.report.table import Column, Row, Table, paragraph, to_html
from srppo.report.words import GROUP_WORDS, estimate_text, group_words, joined, number_text, span

NOTABLE = 0.01  # of an arm's answers at lengths that the SFT model never wrote
MEANING = (
    "A policy that differs from the SFT model in the length of its answers alone scores what the SFT model's own "
    "answers score at these lengths; what it scores beyond is better answers among those of one length. A high share "
    "alone convicts no reward of brevity: right answers have lengths of their own, and a policy that answers better "
    "moves to them. One price a token knows nothing of answers: what it gives at the same mean length is brevity (or "
    "verbosity) alone. Of greedy accuracy all this says nothing."
)


def report_explain(result: ExplainResult, folder: Path, console: Console) -> Path:
    """Print table and sentences; write explain.json and explain.html into `folder`; returns the JSON's path."""
    table, said = explain_table(result.found, result.samples), sentences(result.found)
    console.print(table)
    for line in said:
        console.print(paragraph(line, "unsure"))
    path, page = folder / "explain.json", folder / "explain.html"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, canonical_json({"schema_version": 1, **plain(asdict(result)), "sentences": said}) + "\n")
    parts = [
        soft_text(f"Run: {result.run}. SFT: {result.sft}."),
        bullets("What it says", said, ""),
        section(table.title, to_html(table) + soft_text(MEANING)),
    ]
    write_page(page, "srppo explain", parts)
    for file in (path, page):
        console.print(f"explain: {file}")
    return path


def explained_by_record(rows: Sequence[ArmRow]) -> list[Explained]:
    """What recorded answers alone say of every trained arm at its kept step."""
    sampled: Mapping[str, Mapping[int, Sequence[Mapping[str, object]]]] = {
        row.arm: {seed: own for seed, own in row.answers["sampled"].items() if has_lengths(own)}
        for row in rows
        if row.which == "kept"
    }
    arms = [name for name in sampled if name not in STARTS]
    return [each for name in arms for each in explained(name, sampled.get("SFT", {}), sampled[name], fresh=False)]


def explain_table(found: Sequence[Explained], samples: int = 0) -> Table:
    """A row an arm under a heading a group; samples: fresh ones of the SFT model to a question, 0: recorded answers."""
    heads: list[str | Column] = [
        "",
        "accuracy",
        Column("SFT at its lengths", "at its lengths"),
        Column("beyond length", only="page"),
    ]
    heads += [Column("share of the gain", "of the gain"), Column("priced", only="terminal")]
    pages = ("priced", "price a token, nats", "length, tokens", "outside", "other questions", "ESS")
    heads += [Column(head, only="page") for head in pages]
    rows: list[Row | str] = []
    for group in dict.fromkeys(each.group for each in found):
        own = [each for each in found if each.group == group]
        dashes, length = ["-"] * 6, number_text(own[0].lengths[0])
        rows += [group_words(group), Row(["SFT", estimate_text(own[0].sft), *dashes, length, *dashes[3:]])]
        for each in own:
            cells = [each.arm, estimate_text(each.policy), estimate_text(each.at_lengths)]
            cells += [estimate_text(each.beyond, "+.2f"), share_text(each)]
            cells += [number_text(each.priced.mean if each.priced else None, ".2f"), estimate_text(each.priced)]
            cells += [number_text(each.price, "+.2f"), number_text(each.lengths[1]), f"{each.outside:.0%}"]
            cells += [f"{each.borrowed:.0%}" if samples else "-", number_text(each.ess)]
            rows.append(Row(cells, "unsure" if each.mostly else ""))
    return Table.of("What length alone explains", heads, rows, _caption(found, samples) if found else ()).telling()


def _caption(found: Sequence[Explained], samples: int) -> list[str]:
    tasks, seeds = [each.tasks for each in found], [each.seeds for each in found]
    units = "items" if max(tasks) == 1 else f"tasks ({span(tasks)} a group)"
    units += f" and training seeds ({span(seeds)})" if max(seeds) > 1 else ", of one training seed"
    how = (
        f"question by question, from {samples} fresh answers of the SFT model to each"
        if samples
        else "pooled over the questions of a task, from recorded answers; `srppo explain` does it question by question"
    )
    most = max(found, key=lambda each: each.outside)
    outside = f"{most.outside:.0%}, of {most.arm} on {GROUP_WORDS.get(most.group, most.group)}"
    return [
        f"Sampled answers, 95% intervals over {units}. At its lengths: the SFT model's own answers, reweighted to the "
        f"arm's lengths, {how}. Of the gain: (SFT at its lengths - SFT) / (arm - SFT), of a loss where accuracy fell.",
        "Intervals over fewer than eight tasks are wide, and say little of other tasks." * (1 < min(tasks) < 8),
        "Priced: the SFT model under one price a token that gives the arm's mean length; - where too few answers are "
        "left to say." * any(each.priced for each in found),
        "Answers of lengths that the SFT model never wrote are wrong in the means, wrong and right in the bounds: at "
        f"most {outside}." * (most.outside >= NOTABLE),
    ]


def share_text(each: Explained) -> str:
    """`83% [70%, 97%]`; `no gain` where it cannot be told from none."""
    return "no gain" if each.share is None else estimate_text(each.share, ".0%")


def sentences(found: Sequence[Explained]) -> list[str]:
    """A warning for each arm of whose gain length explains more than half."""
    said = []
    for arm in dict.fromkeys(each.arm for each in found):
        own = [each for each in found if each.arm == arm and each.mostly]
        if own:
            shares = joined([f"{share_text(each)} {GROUP_WORDS.get(each.group, each.group)}" for each in own])
            said.append(f"{arm}: length alone explains more than half of the gain in sampled accuracy, {shares}.")
    return said
