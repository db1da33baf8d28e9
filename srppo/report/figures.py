"""The figures of one arm, and the words every table, plot and page uses for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from srppo.statistics.intervals import Estimate

GROUP_WORDS = {
    "demonstrated": "in-domain",
    "prompted": "PPO prompts only",
    "unseen": "out-of-domain",
}
GROUP_MEANING = {
    "demonstrated": "in-domain: tasks with demonstrations",
    "prompted": "PPO prompts only: tasks prompted in PPO, never demonstrated",
    "unseen": "out-of-domain: tasks seen by neither",
}
DECODINGS = ("greedy", "sampled")
INTERVAL = "t width from the variance between seeds and between items, shape from resampling both"


@dataclass(frozen=True)
class ArmFigures:
    """What is known of one arm. A missing or failed arm has a `problem`, and whatever figures it got to.

    figures: accuracy by (group, decoding), decoding `greedy` or `sampled`. nll: held-out answers, nats a token.
    flops, seconds: everything trained for this arm, its SFT included; flops are counted. kept_step of steps: the step
    whose weights were measured. mean_length (tokens) and ended_share: of the sampled answers to test items.
    seeds: training seeds behind the figures.
    """

    name: str
    figures: Mapping[tuple[str, str], Estimate] = field(default_factory=dict)
    flops: float | None = None
    seconds: float | None = None
    kept_step: int | None = None
    steps: int | None = None
    mean_length: float | None = None
    ended_share: float | None = None
    nll: float | None = None
    note: str = ""
    problem: str | None = None
    seeds: int = 1


def groups_of(arms: Sequence[ArmFigures]) -> list[str]:
    """Group names of all arms: the embedded three in their order, then others as they come."""
    seen = dict.fromkeys(group for arm in arms for group, _ in arm.figures)
    return [g for g in GROUP_WORDS if g in seen] + [g for g in seen if g not in GROUP_WORDS]


def decodings_of(arms: Sequence[ArmFigures]) -> list[str]:
    """Decodings that any arm has, greedy first."""
    seen = dict.fromkeys(decoding for arm in arms for _, decoding in arm.figures)
    return [d for d in DECODINGS if d in seen] + [d for d in seen if d not in DECODINGS]


def group_words(group: str) -> str:
    """`in-domain (demonstrated)`, or the user's own name."""
    return f"{GROUP_WORDS[group]} ({group})" if group in GROUP_WORDS else group


def estimate_text(estimate: Estimate | None, sign: str = "") -> str:
    """`0.43 [0.38, 0.49]`, or a dash; with sign "+" of a difference, `+0.43 [+0.38, +0.49]`; `0.43 [-, -]` where the
    data do not tell an interval, such as those of one unit."""
    if estimate is None or estimate.n == 0 or not math.isfinite(estimate.mean):
        return "-"
    if not math.isfinite(estimate.low):
        return f"{estimate.mean:{sign}.2f} [-, -]"
    return f"{estimate.mean:{sign}.2f} [{estimate.low:{sign}.2f}, {estimate.high:{sign}.2f}]"


def number_text(value: float | None, form: str = ".1f") -> str:
    """A number, `-` where there is none, exponents where it would grow long."""
    if value is None or not math.isfinite(value):
        return "-"
    text = format(value, form)
    return text if len(text) <= 9 else f"{value:.1e}"


def teraflops(flops: float | None) -> str:
    """Counted operations in units of 10^12, three digits."""
    return "-" if flops is None else number_text(flops / 1e12, ".3g" if abs(flops) < 1e15 else ",.0f")


def kept_text(arm: ArmFigures) -> str:
    """`15 of 20`."""
    if arm.kept_step is None:
        return "-"
    return f"{arm.kept_step}" + (f" of {arm.steps}" if arm.steps is not None else "")


def problem_lines(arms: Sequence[ArmFigures]) -> list[str]:
    """What failed, a line a problem: the rows of an arm share theirs."""
    names: dict[str, list[str]] = {}
    for arm in arms:
        if arm.problem:
            names.setdefault(arm.problem, []).append(arm.name)
    return [f"{'; '.join(rows)}: {problem}" for problem, rows in names.items()]


def interval_words(seeds: Sequence[int]) -> str:
    """What calibrated intervals are over, given how many training seeds each arm has."""
    low, high = min(seeds, default=1), max(seeds, default=1)
    if high == 1:
        return "items, of t width; one training seed, so they say nothing of other seeds."
    count = str(low) if low == high else f"{low} to {high}"
    alone = " With one seed they say nothing of others." if low == 1 else ""
    return f"items and training seeds ({count} seeds): {INTERVAL}.{alone}"


def interval_caption(arms: Sequence[ArmFigures]) -> str:
    """What the cells and intervals are over, and what they do not say."""
    groups = groups_of(arms)
    if not groups:
        return "No items with known answers were given (eval.items), so there is no accuracy: held-out answer NLL only."
    counts: dict[str, set[int]] = {g: set() for g in groups}
    for arm in arms:
        for (group, _), estimate in arm.figures.items():
            counts[group].add(estimate.n)
    sizes = {g: "/".join(str(n) for n in sorted(ns)) for g, ns in counts.items()}
    same = len(set(sizes.values())) == 1
    n = f"n = {sizes[groups[0]]} items a group" if same else "n = " + ", ".join(f"{sizes[g]} {g}" for g in groups)
    words = interval_words([arm.seeds for arm in arms if arm.figures])
    text = f"Exact-match accuracy, {n}, with 95% intervals over {words}"
    if "sampled" in decodings_of(arms):
        text += " Sampled: temperature 1; an item counts by its share of right samples."
    if sum(bool(arm.figures) for arm in arms) > 1:
        text += " Arms share items and seeds: read the paired differences, not the overlap."
    return text


def cost_caption(arms: Sequence[ArmFigures]) -> str:
    """What the columns of cost and shape are, those that are shown."""
    parts = []
    if any(arm.flops is not None for arm in arms):
        parts.append("TFLOPs: counted training operations, 10^12, SFT included")
    if any(arm.mean_length is not None for arm in arms):
        parts.append("length: tokens of a sampled answer; ended: by EOS")
    if any(arm.nll is not None for arm in arms):
        parts.append("NLL: of held-out answers, nats a token")
    return ". ".join(part[0].upper() + part[1:] for part in parts) + "." if parts else ""
