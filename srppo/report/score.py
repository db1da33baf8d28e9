"""`srppo score`: responses with each token in the colour of its log-ratio, in the terminal and as one offline page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.style import Style
from rich.text import Text

from srppo.config import canonical_json
from srppo.console import Console
from srppo.record.files import write_atomic
from srppo.record.json import plain
from srppo.report.page import bullets, details, plot, section, soft_text, write_page
from srppo.report.plots import score_plot
from srppo.report.table import Table, to_html
from srppo.report.words import estimate_text, span

if TYPE_CHECKING:
    from srppo.analysis.score import Scored, ScoreResult, Token

UP, DOWN = (86, 180, 233), (230, 159, 0)  # Okabe and Ito's sky blue and orange, told apart by all; so in page.css
SMALLEST_SCALE = 0.1  # nats; below it everything is neutral
FAINT = 0.08  # of the scale; tokens below have no colour
VISIBLE = str.maketrans({"\n": "⏎\n", "\t": "⇥\t", "\r": "␍"})
MOST_SHOWN = 200  # responses on the page; the JSON holds all
LEGEND = (-1.0, -0.5, 0.5, 1.0)  # of the scale
FINDINGS = {
    "reward": "mean reward, nats",
    "per token": "mean reward a token, nats",
    "length": "mean length, tokens",
    "length correlation": "rank correlation of reward with length",
    "accuracy": "share right",
    "AUC": "AUC, right against wrong, all responses",
    "AUC within a prompt": "AUC among responses to one prompt",
    "rank correlation": "rank correlation of reward with being right",
}
"""Findings in words."""


def report_score(result: ScoreResult, folder: Path, console: Console, *, top: int = 5, bottom: int = 5) -> Path:
    """Print the responses that the reward likes most and least (one alone: with all its tokens), write index.html,
    scores.json and plots into `folder`; returns the page's path."""
    best, worst = ranked(result.responses, max(top, 1) if len(result.responses) == 1 else top, bottom)
    console.print(score_text(result, best, worst))
    for line in result.warnings:
        console.warn(line)
    page = write_page(folder / "index.html", "srppo score", page_parts(result, folder, best, worst))
    content = {
        **{"schema_version": 1, "sft": result.sft, "base": result.base, "origin": result.origin},
        "findings": {name: estimate._asdict() for name, estimate in result.findings.items()},
        "warnings": result.warnings,
        "responses": [each.as_dict() for each in result.responses],
    }
    write_atomic(folder / "scores.json", canonical_json(plain(content)) + "\n")
    console.print(f"scores: {folder / 'scores.json'}")
    console.print(f"page: {page}")
    return page


def ranked(responses: Sequence[Scored], top: int, bottom: int) -> tuple[list[Scored], list[Scored]]:
    """(most liked first, least liked first), each response of a prompt once, none in both."""
    distinct = {(each.prompt, each.response, each.ended): each for each in responses}
    order = sorted(distinct.values(), key=lambda each: -each.reward)
    best = order[:top]
    return best, order[max(len(best), len(order) - bottom) :][::-1]


def scale_of(responses: Sequence[Scored]) -> float:
    """The log-ratio of full colour: the 95% quantile of |log-ratio| over tokens, nats."""
    sizes = sorted(abs(token.log_ratio) for each in responses for token in each.tokens)
    return max(sizes[min(int(0.95 * len(sizes)), len(sizes) - 1)] if sizes else 0.0, SMALLEST_SCALE)


def strength(token: Token, scale: float) -> float:
    """How much colour a token has: |log-ratio| / scale, at most 1; 0 where it is faint."""
    share = min(abs(token.log_ratio) / scale, 1.0)
    return share if share >= FAINT else 0.0


def shown(token: Token) -> str:
    """A token's text with what cannot be seen made visible; `·` where it holds only part of a character."""
    return token.text.translate(VISIBLE) or "·"


def named(token: Token) -> str:
    """A token's text in quotes."""
    return repr(token.text) if token.text else "(part of a character)"


def numbers(each: Scored, between: str = "  ") -> str:
    """Sum, mean, base log-prob and length of one response."""
    count = span([len(each.tokens)], "token") + ("" if each.ended else ", not ended")
    parts = (f"r {each.reward:+.2f}", f"{each.per_token:+.3f} a token", f"base {each.base_logprob:.2f}", count)
    return between.join(parts)


def finding_lines(result: ScoreResult) -> list[str]:
    """The findings in words, one a line."""
    known = result.findings.items()
    lines = [f"{FINDINGS[name]}: {estimate_text(each)} (n = {each.n} prompts)" for name, each in known]
    return [*lines, "95% intervals over prompts; AUC 0.5: the reward does not tell right from wrong."]


# ---- terminal


def score_text(result: ScoreResult, best: Sequence[Scored], worst: Sequence[Scored]) -> RenderableType:
    """What the terminal shows; legible without colour, since the tokens that carry a reward stand below it."""
    scale, count = scale_of(result.responses), span([len(result.responses)], "response")
    parts = [Text(f"{count}, {result.origin}. r = log pi_sft - log pi_base, nats."), _legend(scale)]
    for title, group in (("The reward likes most", best), ("and least", worst)):
        if len(result.responses) > 1 and group:
            parts.append(Text(f"\n{title}", "bold"))
        parts += [_response(each, scale) for each in group]
    if len(result.responses) > 1:
        parts.append(Text("\nOver all of them", "bold"))
        parts += [Text(line) for line in finding_lines(result)]
    return Group(*parts)


def _legend(scale: float) -> Text:
    text = Text("colours: ")
    for value in LEGEND:
        text.append(f" {value * scale:+.2f} ", _style(value)).append(" ")
    return text.append("nats a token; underlined: off the base's support")


def _style(value: float, off: bool = False) -> Style:
    """Black on a pastel, so that it reads in light and dark terminals alike; no colour at 0."""
    if value == 0:
        return Style(underline=off)
    colour = UP if value > 0 else DOWN
    mixed = [round(255 + (channel - 255) * (0.25 + 0.75 * abs(value))) for channel in colour]
    return Style(color="#000000", bgcolor=f"rgb({mixed[0]},{mixed[1]},{mixed[2]})", underline=off)


def _response(each: Scored, scale: float) -> Text:
    verdict = "" if each.correct is None else ("  right" if each.correct else f"  wrong (right: {each.answer})")
    text = Text(f"\n{numbers(each)}{verdict}\n", "bold")
    prompt = each.prompt if len(each.prompt) <= 300 else f"{each.prompt[:300]}..."
    text.append(f"{prompt}\n", "dim")
    for token in each.tokens:
        value = math.copysign(strength(token, scale), token.log_ratio)
        text.append(shown(token), _style(value, token.off_support))
    text.append("\n")
    for i, share in each.carriers():
        token = each.tokens[i]
        off = "  off the base's support" if token.off_support else ""
        text.append(f"  {token.log_ratio:+7.2f}  {share:4.0%}  base {token.base_logprob:7.2f}  {named(token)}{off}\n")
    if off_support := sum(token.off_support for token in each.tokens):
        text.append(f"  {span([off_support], 'token')} off the base's support\n")
    text.rstrip()
    return text


# ---- the page


def page_parts(result: ScoreResult, folder: Path, best: Sequence[Scored], worst: Sequence[Scored]) -> list[str]:
    """HTML; the plot is written into `folder`."""
    scale, every = scale_of(result.responses), result.responses
    several = len(every) > 1
    more = f" (the first {MOST_SHOWN} of {len(every)}; scores.json holds all)" if len(every) > MOST_SHOWN else ""
    listed = "".join(_sample(each, scale) for each in every[:MOST_SHOWN]) if several else ""
    *lines, note = finding_lines(result)
    opened = "" if several else " open"
    return [
        soft_text(f"r = log pi_sft - log pi_base, nats, temperature 1. SFT: {result.sft}. Base: {result.base}."),
        soft_text(f"{span([len(every)], 'response')}, {result.origin}."),
        _page_legend(scale),
        bullets("Warnings", result.warnings, ""),
        bullets("Over all responses", lines, "") + soft_text(note) if several else "",
        plot("Reward against length, and against being right", score_plot(result, folder / "reward")),
        section("Most liked" if several else "Response", "".join(_sample(each, scale, opened) for each in best)),
        section("Least liked", "".join(_sample(each, scale, "") for each in worst)),
        section("All", details(f"Every response{more}", listed)),
    ]


def _page_legend(scale: float) -> str:
    swatches = "".join(
        f'<span class="t {"up" if value > 0 else "dn"}" style="--a:{abs(value)}">{value * scale:+.2f}</span> '
        for value in LEGEND
    )
    return (
        f'<p class="soft legend">{swatches} nats a token: blue where the SFT model finds the token likelier than the '
        'base, orange where less. <span class="off">Wavy</span>: off the base\'s support (it gives the token less than '
        "1e-7).</p>"
    )


def _sample(each: Scored, scale: float, table: str | None = None) -> str:
    """A response; table: with its tokens in figures, behind a line that is closed ("") or open (" open")."""
    verdict = "" if each.correct is None else ("✓ right" if each.correct else f"✗ wrong, right: {each.answer}")
    tokens, below = "".join(_span(token, scale) for token in each.tokens), ""
    if table is not None:
        carriers = ((each.tokens[i], f"{share:.0%}") for i, share in each.carriers(len(each.tokens)))
        rows = [[named(t), f"{t.log_ratio:+.3f}", share, f"{t.base_logprob:.2f}"] for t, share in carriers]
        figures = to_html(Table.of("", ["token", "log-ratio", "share", "base log-prob"], rows))
        below = f"<details{table}><summary>tokens by share of the reward</summary>{figures}</details>"
    return (
        f'<div class="sample"><div class="soft head"><span>{escape(numbers(each, " · "))}</span>'
        f"<span>{escape(verdict)}</span></div><pre>{escape(each.prompt)}</pre>"
        f'<div class="text">{tokens}</div>{below}</div>'
    )


def _span(token: Token, scale: float) -> str:
    amount = strength(token, scale)
    kinds = ["t", *(["up" if token.log_ratio > 0 else "dn"] if amount else [])]
    kinds += ["off"] * token.off_support + ["eos"] * token.special
    title = f"{token.log_ratio:+.3f} nats, base {token.base_logprob:.2f}"
    return f'<span class="{" ".join(kinds)}" style="--a:{amount:.2f}" title="{title}">{escape(shown(token))}</span>'
