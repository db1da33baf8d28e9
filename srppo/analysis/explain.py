"""How much of a gain length alone explains: the SFT model's own answers, at the lengths of the trained policy's.

    at its lengths = E_x sum_s P_policy(s | x) P_sft(right | x, s)        s: (tokens, EOS included; whether it ended)

Direct standardisation: a policy that differs from pi_sft by a function of the length alone, pi ∝ pi_sft f(s), scores
exactly this, whatever f is. What it scores beyond is better (or worse) answers among those of one length. No torch.

The policy's lengths are its recorded sampled answers, P_sft(right | x, s) is the share of right ones among pi_sft's
answers of that stratum: to the question itself, or, where it has none there, to all questions of its task. With samples
of its own for each side the estimate has no bias but for strata that pi_sft never wrote, which are counted and bounded.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from srppo.analysis.optimum import Draws, enough, optimum
from srppo.config import derive_seed
from srppo.console import Console
from srppo.errors import RecordError, UserError
from srppo.evaluation.items import spread
from srppo.evaluation.meter import Meter, RowsWritten
from srppo.evaluation.results import answers_file
from srppo.record.arms import ArmsOf
from srppo.record.json import read_lines
from srppo.record.store import Stage
from srppo.statistics.intervals import Estimate, calibrated_interval, ratio_interval, within
from srppo.world.items import Item

if TYPE_CHECKING:
    from srppo.models.pair import Pair

SAMPLED = ("kept", "sampled")  # which answers are asked about
SAMPLES = 32  # fresh ones of the SFT model, a question
SHARE, GAP = (0.0, 1.0), (-1.0, 1.0)  # what an accuracy and a difference of two cannot leave
DRAWS = 1000  # of intervals, which decide their shape and not their width
STARTS = ("base", "SFT")  # arms that have no gain over SFT to explain
Floats = NDArray[np.float64]
Rows = Sequence[Mapping[str, Any]]  # of samples.jsonl: an item with its answers each


@dataclass(frozen=True)
class Answers:
    """Sampled answers of one model: K to each of Q items. length: tokens, EOS included; right: 0 or 1."""

    length_QK: NDArray[np.int64]
    ended_QK: NDArray[np.bool_]
    right_QK: Floats

    @classmethod
    def of(cls, rows: Rows) -> Answers:
        """Of the rows of a samples.jsonl."""
        length, ended, right = (np.array([row[key] for row in rows]) for key in ("tokens", "ended", "correct"))
        return cls(length.astype(np.int64), ended.astype(bool), right.astype(float))

    @property
    def stratum_QK(self) -> NDArray[np.int64]:
        """Length and whether it ended, as one number."""
        return 2 * self.length_QK + self.ended_QK


class Standardised(NamedTuple):
    """Of each item: accuracy of pi_sft's answers at the policy's lengths, answers outside counted wrong; the share of
    the policy's answers outside: of strata that pi_sft never wrote; the share whose rate comes from a wider pool than
    the first. weight: of each answer of pi_sft."""

    right_Q: Floats
    outside_Q: Floats
    borrowed_Q: Floats
    weight_QK: Floats


def standardised(sft: Answers, policy: Answers, pools: Sequence[Sequence[Hashable]]) -> Standardised:
    """pi_sft at the policy's lengths. pools: labels of the items, the narrowest first; items of one label share their
    answers, and a stratum takes the first pool in which pi_sft wrote any.

    Items of a pool share the errors of its rates, so each carries its part of them: right_Q is linearised, so that its
    mean is the estimate and its variance between items that of the estimate (a ratio in each stratum: Cochran 1977,
    chapter 6).
    """
    (items, k), j = sft.right_QK.shape, policy.right_QK.shape[1]
    strata = 1 + int(max(sft.stratum_QK.max(), policy.stratum_QK.max()))
    found_QJ = np.zeros((items, j), dtype=bool)
    right_Q, borrowed_Q, weight_QK = np.zeros(items), np.zeros(items), np.zeros((items, k))
    for number, pool in enumerate(pools):
        places = {label: i for i, label in enumerate(dict.fromkeys(pool))}
        start_Q1 = strata * np.array([places[label] for label in pool])[:, None]
        ours_QK, theirs_QJ = start_Q1 + sft.stratum_QK, start_Q1 + policy.stratum_QK
        cells = strata * len(places)
        written = np.bincount(ours_QK.ravel(), minlength=cells)
        rate = np.bincount(ours_QK.ravel(), sft.right_QK.ravel(), minlength=cells) / np.maximum(written, 1)
        new_QJ = ~found_QJ & (written[theirs_QJ] > 0)
        wanted = np.bincount(theirs_QJ[new_QJ], minlength=cells)
        own_QK = (wanted / np.maximum(written, 1))[ours_QK] * (k / j)
        right_Q += (new_QJ * rate[theirs_QJ]).mean(axis=1) + (own_QK * (sft.right_QK - rate[ours_QK])).mean(axis=1)
        borrowed_Q += new_QJ.mean(axis=1) if number else 0.0
        weight_QK += own_QK
        found_QJ |= new_QJ
    return Standardised(right_Q, 1 - found_QJ.mean(axis=1), borrowed_Q, weight_QK)


class Priced(NamedTuple):
    """pi ∝ pi_sft e^(price x tokens), nats a token: accuracy of each item, and whether its weights admit an answer."""

    price: float
    right_Q: Floats
    enough: bool


def priced(sft: Answers, mean_length: float) -> Priced | None:
    """The optimum under one price a token that gives this mean length, tokens; None where no price gives it."""

    def draws(price: float) -> Draws:
        length_QK, none = sft.length_QK.astype(float), np.zeros_like(sft.right_QK)
        return Draws(price * length_QK, none, length_QK, sft.right_QK, none)

    def beyond(price: float) -> float:
        return float(optimum(draws(price), "sft", 1.0, jackknife=False).length_Q.mean()) - mean_length

    most = 100.0 / np.ptp(sft.length_QK) if np.ptp(sft.length_QK) else 0.0  # e^100: one answer holds all the weight
    if not beyond(-most) < 0 < beyond(most):
        return None
    price = float(brentq(beyond, -most, most))
    found = optimum(draws(price), "sft", 1.0)
    assert found.right_Q is not None
    return Priced(price, found.right_Q, enough(found.ess_Q))


# ---- over items and training seeds


@dataclass(frozen=True)
class Explained:
    """One arm on one group of items, sampled answers at temperature 1; means over items, 95% intervals over tasks (over
    items where there is one task) and seeds.

    at_lengths: accuracy of pi_sft at the arm's lengths; beyond: policy - at_lengths; share: (at_lengths - sft) / gain,
    None where the gain cannot be told from none. Answers outside count as wrong in these means, and as wrong and as
    right in the bounds. outside, borrowed: see `Standardised`. ess: equal answers a question that the weighted ones of
    pi_sft are worth. lengths: mean tokens of pi_sft and of the arm. priced: accuracy of pi_sft under one `price` a
    token, nats, at the arm's mean length; None where that was not sought or cannot be said.
    """

    arm: str
    group: str
    sft: Estimate
    policy: Estimate
    gain: Estimate
    at_lengths: Estimate
    beyond: Estimate
    share: Estimate | None
    outside: float
    borrowed: float
    ess: float
    lengths: tuple[float, float]
    priced: Estimate | None
    price: float | None
    tasks: int
    seeds: int

    @property
    def mostly(self) -> bool:
        """Whether length explains more than half of a gain."""
        return self.share is not None and self.gain.mean > 0 and self.share.mean > 0.5


def explained(arm: str, sft: Mapping[int, Rows], policy: Mapping[int, Rows], *, fresh: bool) -> list[Explained]:
    """A group each, over the training seeds that both have, on the same items.

    fresh: pi_sft's answers are many and drawn for this, so each question is compared with itself; else with its task,
    and no price is sought: recorded answers are few.
    """
    seeds = [s for s in policy if s in sft and items_of(policy[s]) == items_of(sft[s]) == items_of(policy[min(policy)])]
    groups = dict.fromkeys(row["group"] for seed in seeds for row in policy[seed])
    pairs = {
        group: [[[row for row in rows[s] if row["group"] == group] for rows in (sft, policy)] for s in seeds]
        for group in groups
    }
    return [_explained(arm, group, of_seeds, fresh) for group, of_seeds in pairs.items()]


def gain_at_lengths(sft: Rows, policy: Rows, group: str) -> dict[str, float]:
    """Of one seed and group, from recorded answers, pooled over the questions of a task: the arm's gain in sampled
    accuracy, and that of pi_sft at the arm's lengths; nothing where there is nothing to compare."""
    ours, theirs = ([row for row in rows if row["group"] == group] for rows in (sft, policy))
    if not (has_lengths(ours) and has_lengths(theirs)) or items_of(ours) != items_of(theirs):
        return {}
    before, after = Answers.of(ours), Answers.of(theirs)
    found, start = standardised(before, after, [[row["task"] for row in ours]]), float(before.right_QK.mean())
    gains = {"sampled_gain": after.right_QK.mean(), "gain_at_lengths": found.right_Q.mean()}
    return {name: float(value) - start for name, value in gains.items()}


def items_of(rows: Rows) -> list[tuple[str, str, str]]:
    """What makes two lists of rows comparable item by item."""
    return [(row["group"], row["task"], row["prompt"]) for row in rows]


def _explained(arm: str, group: str, rows: Sequence[Sequence[Rows]], fresh: bool) -> Explained:
    """rows: of pi_sft and of the arm, on the same items of one group, for each seed."""
    tasks = [row["task"] for row in rows[0][0]]
    clusters = tasks if len(set(tasks)) > 1 else None
    pools: list[Sequence[Hashable]] = [range(len(tasks)), tasks] if fresh else [tasks]
    pairs = [(Answers.of(ours), Answers.of(theirs)) for ours, theirs in rows]
    made = [standardised(*pair, pools) for pair in pairs]
    right_SQ, outside_SQ, borrowed_SQ = (np.array([each[i] for each in made]) for i in range(3))
    before_SQ, after_SQ = (np.array([pair[i].right_QK.mean(axis=1) for pair in pairs]) for i in range(2))
    lengths_S2 = np.array([[each.length_QK.mean() for each in pair] for pair in pairs])
    weights = np.concatenate([each.weight_QK.ravel() for each in made])
    prices = [priced(pair[0], mean) for pair, mean in zip(pairs, lengths_S2[:, 1], strict=True)] if fresh else []
    known = [each for each in prices if each is not None and each.enough]
    said = len(known) == len(pairs)

    def over(values_SQ: Floats, limits: tuple[float, float]) -> Estimate:
        return within(calibrated_interval(values_SQ, clusters, limits=limits, draws=DRAWS), limits)

    gain, share = over(after_SQ - before_SQ, GAP), None
    bounds = (right_SQ, right_SQ + outside_SQ)  # answers outside as wrong, as right
    if gain.low > 0 or gain.high < 0:
        parts = [(each - before_SQ, after_SQ - before_SQ) for each in bounds]
        share = _spanned([ratio_interval(*each, clusters, draws=DRAWS) for each in parts])
    return Explained(
        arm,
        group,
        over(before_SQ, SHARE),
        over(after_SQ, SHARE),
        gain,
        _spanned([over(each, SHARE) for each in bounds]),
        _spanned([over(after_SQ - each, GAP) for each in bounds]),
        share,
        float(outside_SQ.mean()),
        float(borrowed_SQ.mean()),
        float(weights.sum() ** 2 / max((weights**2).sum(), 1e-12) / right_SQ.size),
        (float(lengths_S2[:, 0].mean()), float(lengths_S2[:, 1].mean())),
        over(np.array([each.right_Q for each in known]), SHARE) if said else None,
        float(np.mean([each.price for each in known])) if said else None,
        len(set(tasks)),
        len(pairs),
    )


def _spanned(estimates: Sequence[Estimate]) -> Estimate:
    """The first, with bounds that hold all of them; NaN where any has none."""
    low, high = np.min([each.low for each in estimates]), np.max([each.high for each in estimates])
    return estimates[0]._replace(low=float(low), high=float(high))


# ---- of a run


@dataclass(frozen=True)
class ExplainResult:
    """What the tables and sentences are made of. samples: fresh answers of the SFT model to each question."""

    run: str
    sft: str
    samples: int
    found: tuple[Explained, ...]


def explain_command(
    run: Path | None = None,
    *,
    arms: ArmsOf,
    arm: str | None = None,
    seed: int | None = None,
    samples: int = SAMPLES,
    limit: int | None = None,
    device: str = "cpu",
    console: Console,
) -> ExplainResult:
    """Explain the gains of a run's arms (or of one `arm`) over its SFT model, on its test items.

    `samples` answers of the SFT model are drawn to each item; the arms' are those that the run recorded. arms: what the
    arms of a run are. Raises UserError, in one line, for a run without what that takes.
    """
    from srppo.models.pair import load_pair  # here, since reports use the rest without torch

    if samples < 2:
        raise UserError(f"--samples {samples} is too few to know rates at lengths; give at least 2, rather {SAMPLES}")
    pair = load_pair(run, seed=seed, device=device)
    assert pair.run is not None
    by_arm = arms(pair.run)
    if arm is not None and arm not in by_arm:
        raise UserError(f"{pair.run.path} has no arm {arm!r}; it has {', '.join(by_arm)}")
    answers: dict[str, dict[int, Rows]] = {}
    for name, stages in by_arm.items():
        if name == arm or (arm is None and name not in STARTS):
            of_stages = {stage: recorded(stage) for stage in stages if seed in (None, _seed(stage))}
            if strange := [stage for stage, rows in of_stages.items() if rows and not has_lengths(rows)]:
                file = answers_file(strange[0], *SAMPLED)
                raise RecordError(f"{file} has no lengths (tokens, ended); train again, into another folder")
            answers[name] = {_seed(stage): spread(rows, limit) for stage, rows in of_stages.items() if rows}
    seeds = sorted({each for own in answers.values() for each in own})
    if not seeds:
        raise UserError(
            f"{pair.run.path} recorded no sampled answers of {arm or 'a trained arm'} to test items; give eval.items, "
            "and train to the end"
        )
    drawn = {}
    for each in seeds:
        ours = pair if pair.recipe.seed == each else load_pair(pair.run.path, seed=each, device=device)
        drawn[each] = _fresh(ours, next(own[each] for own in answers.values() if each in own), samples, console)
    found = [each for name, own in answers.items() for each in explained(name, drawn, own, fresh=True)]
    return ExplainResult(str(pair.run.path), pair.sft_name, samples, tuple(found))


def recorded(stage: Stage) -> list[dict[str, Any]]:
    """A finished stage's sampled answers to the test items, at its kept step; none where there are none."""
    return read_lines(answers_file(stage, *SAMPLED)) if stage.done else []


def has_lengths(rows: Rows) -> bool:
    """Whether there are rows, and they say how long answers are, and whether they ended."""
    return bool(rows) and {"tokens", "ended", "correct"} <= rows[0].keys()


def _seed(stage: Stage) -> int:
    return int(stage.identity["config"]["seed"])


def _fresh(pair: Pair, rows: Rows, samples: int, console: Console) -> Rows:
    """`samples` answers of the SFT model to the items of some rows, as `recorded` has them."""
    from srppo.evaluation.development import answer_items
    from srppo.training.rollout import generate

    items = [Item(row["prompt"], row["answer"], row["task"], row["group"]) for row in rows]
    # A seed of its own: recorded answers of all arms share theirs, and rates must not know the policy's draws.
    recipe = pair.recipe.model_copy(update={"seed": derive_seed(pair.recipe.seed, "explain", 0)})
    with Meter(console, f"SFT, seed {pair.recipe.seed}", samples * len(items)) as meter:
        told = RowsWritten(recipe.rollout.max_new_tokens, meter.reach)
        verdicts = answer_items(
            pair.sft,
            pair.tokenizer,
            items,
            recipe,
            samples=samples,
            stops=pair.stops,
            decode=partial(generate, until=told),
        )
        meter.finish(samples * len(items))
    return [vars(verdict) for verdict in verdicts]
