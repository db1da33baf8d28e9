"""Scored responses as one offline HTML page, each token in the colour of its log-ratio, with plots and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from srppo.config import canonical_json
from srppo.console import Console
from srppo.record.files import write_atomic
from srppo.record.json import plain
from srppo.report.html import STYLE, bullets, html_table, inline_plot, section, soft_text
from srppo.report.plots import save_figure
from srppo.report.score_text import (
    DOWN,
    UP,
    finding_lines,
    named,
    numbers,
    ranked,
    scale_of,
    score_text,
    shown,
    strength,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from srppo.analysis.score import Scored, ScoreResult, Token

MOST_SHOWN = 200  # responses on the page; the JSON holds all
UP_DOT, WRONG_DOT = "#0072b2", "#d55e00"
STYLE_TOKENS = f"""
.t{{border-radius:3px;padding:.08em 0;box-decoration-break:clone;-webkit-box-decoration-break:clone}}
.up{{background:rgba({UP[0]},{UP[1]},{UP[2]},calc(var(--a)*var(--most)))}}
.dn{{background:rgba({DOWN[0]},{DOWN[1]},{DOWN[2]},calc(var(--a)*var(--most)))}}
:root{{--most:.95}}@media(prefers-color-scheme:dark){{:root{{--most:.55}}}}
.off{{text-decoration:underline wavy var(--bad);text-underline-offset:.2em}}.eos{{font-size:.85em}}
.text{{margin:.5rem 0;white-space:pre-wrap;overflow-wrap:anywhere;
font:1rem/1.75 ui-monospace,Menlo,"DejaVu Sans Mono",monospace}}
.legend .t{{padding:.1rem .45rem;color:var(--ink)}}.head{{display:flex;gap:.2rem 1rem;flex-wrap:wrap}}
.sample details{{margin:.3rem 0 0}}.sample summary{{font-weight:400;font-size:.9rem;color:var(--soft)}}
.sample .wide{{margin:.3rem 0}}.sample th:first-child,.sample td:first-child{{background:none;box-shadow:none}}
"""


def report_score(result: ScoreResult, folder: Path, console: Console, *, top: int = 5, bottom: int = 5) -> Path:
    """Print the responses that the reward likes most and least (one alone: with all its tokens), write index.html,
    scores.json and plots into `folder`; returns the page's path."""
    best, worst = ranked(result.responses, max(top, 1) if len(result.responses) == 1 else top, bottom)
    console.print(score_text(result, best, worst))
    for line in result.warnings:
        console.warn(line)
    folder.mkdir(parents=True, exist_ok=True)
    plots = score_plots(result, folder / "reward")
    page = folder / "index.html"
    html = score_html(result, best, worst, plots[1:])
    page.write_text(html.encode("utf-8", "replace").decode("utf-8"), encoding="utf-8")
    write_atomic(folder / "scores.json", canonical_json(plain(_content(result))) + "\n")
    console.print(f"scores: {folder / 'scores.json'}")
    console.print(f"page: {page}")
    return page


def _content(result: ScoreResult) -> dict[str, object]:
    findings = {name: estimate._asdict() for name, estimate in result.findings.items()}
    models = {"sft": result.sft, "base": result.base, "origin": result.origin}
    rows = [each.as_dict() for each in result.responses]
    return {"schema_version": 1, **models, "findings": findings, "warnings": result.warnings, "responses": rows}


def score_html(result: ScoreResult, best: Sequence[Scored], worst: Sequence[Scored], plots: Sequence[Path]) -> str:
    """The page as text."""
    scale, every = scale_of(result.responses), result.responses
    several = len(every) > 1
    rest = list(every[:MOST_SHOWN]) if several else []
    more = f" (the first {MOST_SHOWN} of {len(every)}; scores.json holds all)" if len(every) > MOST_SHOWN else ""
    listed = "".join(_sample(each, scale) for each in rest)
    body = [
        "<h1>srppo score</h1>",
        soft_text(f"r = log pi_sft - log pi_base, nats, temperature 1. SFT: {result.sft}. Base: {result.base}."),
        soft_text(f"{len(every)} response{'s' if several else ''}, {result.origin}."),
        _page_legend(scale),
        bullets("Warnings", result.warnings, ""),
        section("Over all responses", _findings(result)) if several else "",
        *(inline_plot("Reward against length, and against being right", svg, i) for i, svg in enumerate(plots)),
        section(
            "Most liked" if several else "Response",
            "".join(_sample(each, scale, True, "" if several else " open") for each in best),
        ),
        section("Least liked", "".join(_sample(each, scale, True) for each in worst)),
        section("All", f"<details><summary>Every response{escape(more)}</summary>{listed}</details>") if rest else "",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>srppo score</title><style>{STYLE}{STYLE_TOKENS}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _findings(result: ScoreResult) -> str:
    *lines, note = finding_lines(result)
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>{soft_text(note)}"


def _page_legend(scale: float) -> str:
    swatches = "".join(
        f'<span class="t {"up" if value > 0 else "dn"}" style="--a:{abs(value)}">{value * scale:+.2f}</span> '
        for value in (-1.0, -0.5, 0.5, 1.0)
    )
    return (
        f'<p class="soft legend">{swatches} nats a token: blue where the SFT model finds the token likelier than the '
        'base, orange where less. <span class="off">Wavy</span>: off the base\'s support (it gives the token less than '
        "1e-7).</p>"
    )


def _sample(each: Scored, scale: float, with_table: bool = False, opened: str = "") -> str:
    verdict = "" if each.correct is None else ("✓ right" if each.correct else f"✗ wrong, right: {each.answer}")
    tokens, figures = "".join(_span(token, scale) for token in each.tokens), numbers(each, " · ")
    rows = [
        [named(token), f"{token.log_ratio:+.3f}", f"{share:.0%}", f"{token.base_logprob:.2f}"]
        for token, share in ((each.tokens[i], share) for i, share in each.carriers(len(each.tokens)))
    ]
    table = html_table(["token", "log-ratio", "share", "base log-prob"], rows)
    details = (
        f"<details{opened}><summary>tokens by share of the reward</summary>{table}</details>" if with_table else ""
    )
    return (
        f'<div class="sample"><div class="soft head"><span>{escape(figures)}</span><span>{escape(verdict)}</span>'
        f'</div><pre>{escape(each.prompt)}</pre><div class="text">{tokens}</div>{details}</div>'
    )


def _span(token: Token, scale: float) -> str:
    amount = strength(token, scale)
    kinds = ["t", *(["up" if token.log_ratio > 0 else "dn"] if amount else [])]
    kinds += ["off"] * token.off_support + ["eos"] * token.special
    title = f"{token.log_ratio:+.3f} nats, base {token.base_logprob:.2f}"
    return f'<span class="{" ".join(kinds)}" style="--a:{amount:.2f}" title="{title}">{escape(shown(token))}</span>'


def score_plots(result: ScoreResult, path: Path) -> list[Path]:
    """Reward against length, and its distribution among right and wrong responses; [] for fewer than 3 responses."""
    if len(result.responses) < 3:
        return []
    known = [each for each in result.responses if each.correct is not None]
    kinds = [("right", True, UP_DOT), ("wrong", False, WRONG_DOT)] if known else [("responses", None, UP_DOT)]

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, 2 if known else 1, squeeze=False)[0]
        for label, value, colour in kinds:
            rows = [each for each in result.responses if each.correct is value]
            place = {None: 0.0, True: -0.15, False: 0.15}[value]
            x = [len(each.tokens) + place for each in rows]
            axes[0].plot(x, [e.reward for e in rows], ".", color=colour, ms=5, alpha=0.7, label=label)
        axes[0].set_title("reward, nats, against length")
        axes[0].set_xlabel("length, tokens")
        if known:
            axes[0].legend()
            _shares(axes[1], known)

    return save_figure(draw, path, height=3.6)


def _shares(axis: Axes, known: Sequence[Scored]) -> None:
    """Share right in up to ten equal groups by reward."""
    order = sorted(known, key=lambda each: each.reward)
    bins = min(10, max(len(order) // 10, 1))
    cuts = [len(order) * i // bins for i in range(bins + 1)]
    groups = [order[a:b] for a, b in pairwise(cuts)]
    x = [sum(each.reward for each in group) / len(group) for group in groups]
    y = [sum(bool(each.correct) for each in group) / len(group) for group in groups]
    axis.plot(x, y, "o-", color=UP_DOT, ms=4)
    axis.set_ylim(-0.03, 1.03)
    axis.set_title(f"share right, {bins} equal groups by reward")
    axis.set_xlabel("mean reward of the group, nats")
