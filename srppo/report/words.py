"""Numbers, estimates and groups of items as every table, plot and page writes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srppo.statistics.intervals import Estimate

GROUP_WORDS = {
    "demonstrated": "in-domain",
    "prompted": "PPO prompts only",
    "unseen": "out-of-domain",
    "absent": "new to the base",
}
GROUP_MEANING = {
    "demonstrated": "in-domain: tasks with demonstrations",
    "prompted": "PPO prompts only: tasks prompted in PPO, never demonstrated",
    "unseen": "out-of-domain: tasks seen by neither",
    "absent": "new to the base: tasks that not even its corpus held",
}
DECODINGS = ("greedy", "sampled")
INTERVAL = "t width from the variance between seeds and between items, shape from resampling both"


def group_words(group: str) -> str:
    """`in-domain (demonstrated)`, or the user's own name."""
    return f"{GROUP_WORDS[group]} ({group})" if group in GROUP_WORDS else group


def estimate_text(estimate: Estimate | None, form: str = ".2f") -> str:
    """`0.43 [0.38, 0.49]`, or a dash; in the form "+.2f" of a difference `+0.43 [+0.38, +0.49]`; `0.43 [-, -]` where
    the data do not tell an interval, such as those of one unit."""
    if estimate is None or estimate.n == 0 or not math.isfinite(estimate.mean):
        return "-"
    bounds = f"{estimate.low:{form}}, {estimate.high:{form}}" if math.isfinite(estimate.low) else "-, -"
    return f"{estimate.mean:{form}} [{bounds}]"


def number_text(value: float | None, form: str = ".1f") -> str:
    """A number, `-` where there is none, exponents where it would grow long."""
    if value is None or not math.isfinite(value):
        return "-"
    text = format(value, form)
    return text if len(text) <= 9 else f"{value:.1e}"


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def short_number(value: float) -> str:
    """3,541,760 as 3.54M; small numbers as they are."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e5, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:g}"


def teraflops(flops: float | None) -> str:
    """Counted operations in units of 10^12, three digits."""
    return "-" if flops is None else number_text(flops / 1e12, ".3g" if abs(flops) < 1e15 else ",.0f")


def span(counts: Sequence[int], noun: str = "") -> str:
    """`8 to 10`, `10`; with a noun `10 seeds`, `1 seed`."""
    low, high = min(counts), max(counts)
    text = str(low) if low == high else f"{low} to {high}"
    return f"{text} {noun}{'' if high == 1 else 's'}" if noun else text


def joined(texts: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else list(texts))


def verdict_words(tests: str, units: str, comparisons: int, of: str, alpha: float) -> str:
    """How verdicts come about, and which intervals stand beside them; `of`: whose comparisons these are."""
    holm = together = first = ""
    if comparisons > 1:
        holm = f" Holm: p corrected over the {comparisons} comparisons {of}."
        together = f", which hold all together with {100 * (1 - alpha):.4g}%"
        first = ", as the first in Holm's order"
    return (
        f"p: the larger of {tests} and t over {units}, two-sided.{holm} "
        f"{100 * (1 - alpha / comparisons):.4g}% intervals{together}; drawn to 0 where the first test does not exclude "
        "it, cut where tests exclude more. Better, worse: without 0. Same: within the margin, by two one-sided tests. "
        f"Detects: the true difference that 80% of such data would show{first}."
    )


def interval_words(seeds: Sequence[int]) -> str:
    """What calibrated intervals are over, given how many training seeds each arm has."""
    if max(seeds, default=1) == 1:
        return "items, of t width; one training seed, so they say nothing of other seeds."
    alone = " With one seed they say nothing of others." if min(seeds) == 1 else ""
    return f"items and training seeds ({span(seeds)} seeds): {INTERVAL}.{alone}"
