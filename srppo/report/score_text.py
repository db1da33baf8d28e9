"""Scored responses in the terminal: tokens in the colour of their log-ratio, and in figures those that carry most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.style import Style
from rich.text import Text

from srppo.report.figures import estimate_text

if TYPE_CHECKING:
    from srppo.analysis.score import Scored, ScoreResult, Token

UP, DOWN = (86, 180, 233), (230, 159, 0)  # Okabe and Ito's sky blue and orange: told apart in any colour vision
SMALLEST_SCALE = 0.1  # nats; below it everything is neutral
FAINT = 0.08  # of the scale; tokens below have no colour
VISIBLE = {"\n": "⏎\n", "\t": "⇥\t", "\r": "␍"}


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
    text = "".join(VISIBLE.get(letter, letter) for letter in token.text)
    return text if text else "·"


def named(token: Token) -> str:
    """A token's text in quotes."""
    return repr(token.text) if token.text else "(part of a character)"


def score_text(result: ScoreResult, best: Sequence[Scored], worst: Sequence[Scored]) -> RenderableType:
    """What the terminal shows; legible without colour, since the tokens that carry a reward stand below it."""
    scale, parts = scale_of(result.responses), []
    head = f"{len(result.responses)} responses, {result.origin}. r = log pi_sft - log pi_base, nats."
    parts.append(Text(head.replace("1 responses", "1 response")))
    parts.append(_legend(scale))
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
    for value in (-1.0, -0.5, 0.5, 1.0):
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
    text.append(f"{_short(each.prompt, 300)}\n", "dim")
    for token in each.tokens:
        value = math.copysign(strength(token, scale), token.log_ratio)
        text.append(shown(token), _style(value, token.off_support))
    text.append("\n")
    for i, share in each.carriers():
        token = each.tokens[i]
        off = "  off the base's support" if token.off_support else ""
        text.append(f"  {token.log_ratio:+7.2f}  {share:4.0%}  base {token.base_logprob:7.2f}  {named(token)}{off}\n")
    off_support = sum(token.off_support for token in each.tokens)
    text.append(f"  {off_support} tokens off the base's support\n" if off_support else "")
    text.rstrip()
    return text


def numbers(each: Scored, between: str = "  ") -> str:
    """Sum, mean, base log-prob and length of one response."""
    count = f"{len(each.tokens)} token{'' if len(each.tokens) == 1 else 's'}{'' if each.ended else ', not ended'}"
    parts = (f"r {each.reward:+.2f}", f"{each.per_token:+.3f} a token", f"base {each.base_logprob:.2f}", count)
    return between.join(parts)


def finding_lines(result: ScoreResult) -> list[str]:
    """The findings in words, one a line."""
    words = {
        "reward": "mean reward, nats",
        "per token": "mean reward a token, nats",
        "length": "mean length, tokens",
        "length correlation": "rank correlation of reward with length",
        "accuracy": "share right",
        "AUC": "AUC, right against wrong, all responses",
        "AUC within a prompt": "AUC among responses to one prompt",
        "rank correlation": "rank correlation of reward with being right",
    }
    lines = [
        f"{words[name]}: {estimate_text(estimate)} (n = {estimate.n} prompts)"
        for name, estimate in result.findings.items()
    ]
    return [*lines, "95% intervals over prompts; AUC 0.5: the reward does not tell right from wrong."]


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
