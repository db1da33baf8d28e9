"""Answers chosen from samples by their reward, by hand: the weighted set, and the best of n."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from srppo.analysis.optimum import Draws
from srppo.config import RewardConfig
from srppo.errors import ConfigError
from srppo.evaluation.development import Answer
from srppo.stages.resampling import (
    Sampled,
    best_of,
    check_ranks,
    check_resamples,
    ess_of,
    most_weighted,
    normalised_weights,
    resampled,
    vote,
)

TEXTS = ["a", "b", "a", "c"]


def sampled_of(reward: list[float], log_ratio: list[float] | None = None, copies: int = 1) -> Sampled:
    """The same four samples for each of `copies` items."""
    reward_QK = np.array([reward] * copies)
    ratio_QK = reward_QK if log_ratio is None else np.array([log_ratio] * copies)
    answers = [[Answer(text, True, k + 1) for k, text in enumerate(TEXTS)] for _ in range(copies)]
    return Sampled(answers, Draws(reward_QK, ratio_QK, np.ones_like(reward_QK), None, 0 * reward_QK), 120.0, 10.0)


def test_weights_and_effective_samples_by_hand() -> None:
    """r = log 1, 2, 1, 4 at beta 0.5: exp(r / beta) = 1, 4, 1, 16 and exp(r / beta - r) = 1, 2, 1, 4."""
    some = sampled_of(np.log([1.0, 2.0, 1.0, 4.0]).tolist())
    at_sft = normalised_weights(some.draws, RewardConfig(anchor="sft", beta=0.5))
    at_base = normalised_weights(some.draws, RewardConfig(anchor="base", beta=0.5))
    assert at_sft == pytest.approx(np.array([[1, 4, 1, 16]]) / 22)
    assert at_base == pytest.approx(np.array([[1, 2, 1, 4]]) / 8)
    # a clipped reward r' = min(r, log 2) is not the log-ratio: exp(r'/beta - r) = 1, 2, 1, 4/4
    clipped = sampled_of(np.log([1.0, 2.0, 1.0, 2.0]).tolist(), np.log([1.0, 2.0, 1.0, 4.0]).tolist())
    assert normalised_weights(clipped.draws, RewardConfig(anchor="base", beta=0.5)) == pytest.approx(
        np.array([[1, 2, 1, 1]]) / 5
    )
    huge = normalised_weights(sampled_of([0.0, 900.0, 0.0, 0.0]).draws, RewardConfig(beta=0.01))
    assert huge == pytest.approx(np.array([[0, 1, 0, 0]]))
    ess = ess_of(np.concatenate([at_base, np.full((1, 4), 0.25)]))
    assert ess.harmonic == pytest.approx(2 / (22 / 64 + 1 / 4)) and ess.median == pytest.approx((64 / 22 + 4) / 2)
    assert (ess.below, ess.enough, ess.needed) == (1.0, False, 20)
    many = ess_of(np.concatenate([np.full((3, 40), 1 / 40), np.eye(40)[:1]]))
    assert many.below == 0.25 and many.harmonic == pytest.approx(4 / (3 / 40 + 1)) and not many.enough


def test_the_mode_of_the_weighted_set_adds_up_equal_texts() -> None:
    some = sampled_of([0.0] * 4)
    assert most_weighted(some, np.array([[0.3, 0.3, 0.1, 0.3]])) == [[Answer("a", True, 1)]]
    assert most_weighted(some, np.array([[0.1, 0.4, 0.1, 0.4]])) == [[Answer("b", True, 2)]], "the first of equals"


def test_a_vote_takes_what_most_samples_say_and_of_equals_the_first() -> None:
    assert vote(["x", "y", "y", "x", "z"], [1.0] * 5) == 0 and vote(["z", "y", "y", "x"], [1.0] * 4) == 1
    assert vote(["x", "y", "y", "z"], [0.2, 0.2, 0.2, 0.5]) == 3, "weighed, one sample may outweigh two"
    assert vote([(1, 2), (1,), (1,)], [1.0] * 3) == 1, "of any values that can be equal"
    some = sampled_of([0.0, 5.0, 0.0, 5.0])
    assert most_weighted(some, np.ones((1, 4))) == [[Answer("a", True, 1)]], "the rewards are not asked"
    assert some.cost(scored=False) == {"inference_flops": 40.0, "inference_times": 4.0}


def test_draws_follow_the_weights_and_the_seed() -> None:
    some = sampled_of([0.0] * 4, copies=1000)
    weights = np.array([[0.1, 0.2, 0.0, 0.7]] * 1000)
    drawn = resampled(some, weights, 10, seed=0)
    assert drawn == resampled(some, weights, 10, seed=0) != resampled(some, weights, 10, seed=1)
    counts = Counter(answer.tokens for each in drawn for answer in each)
    assert counts[3] == 0 and [counts[k] / 10000 for k in (1, 2, 4)] == pytest.approx([0.1, 0.2, 0.7], abs=0.02)
    assert len({tuple(each) for each in drawn}) > 100, "items must not share their draws"


def test_best_of_n_by_hand() -> None:
    some = sampled_of([3.0, 5.0, 1.0, 5.0])
    assert best_of(some, 1) == [[Answer("b", True, 2)]], "the first of equals"
    assert best_of(some, 2) == [[Answer("b", True, 2), Answer("c", True, 4)]]
    assert best_of(some, 3) == [[Answer("a", True, 1), Answer("b", True, 2), Answer("a", True, 3)]]
    with pytest.raises(ConfigError, match=r"methods\.samples \(4\) is below eval\.samples \(5\)"):
        best_of(some, 5)
    assert some.cost() == {"inference_flops": 120.0, "inference_times": 12.0}


@pytest.mark.parametrize("known", [True, False], ids=["known answers", "unknown answers"])
def test_samples_survive_a_folder_to_the_bit(tmp_path: Path, known: bool) -> None:
    """Texts of any kind, and numbers that no decimal of few places holds; twice the same bytes."""
    generator = np.random.default_rng(0)
    texts = ["a b", "", '\n"\\', "é\u2028\U0001f600", "\ufffd"]
    answers = [[Answer(text, len(text) % 2 == 0, i * 5 + k) for k, text in enumerate(texts)] for i in range(3)]
    reward_QK, ratio_QK, right_QK = (generator.normal(size=(3, 5)) * scale for scale in (1e-300, 1e9, 1.0))
    reward_QK[0, :2] = -0.0, np.inf
    draws = Draws(reward_QK, ratio_QK, np.ones((3, 5)), right_QK if known else None, np.zeros((3, 5)))
    saved = Sampled(answers, draws, 1 / 3, 1e17 / 7)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        saved.save(tmp_path / name)
    again = Sampled.load(tmp_path / "one", flops=saved.flops, plain_flops=saved.plain_flops)
    assert again.answers == answers and again.cost() == saved.cost()
    assert (again.draws.right_QK is not None) == known
    for name, array in vars(draws).items():
        found = getattr(again.draws, name)
        assert found is array is None or (found.dtype, found.tobytes()) == (np.float64, array.tobytes()), name
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1] and len(files[0]) == 2


def test_rewards_that_single_responses_lack_are_refused() -> None:
    for check in (check_ranks, check_resamples):
        with pytest.raises(ConfigError, match=r"reward\.kind = shuffled pays by other rollouts"):
            check(RewardConfig(kind="shuffled"))
    check_ranks(RewardConfig(beta=0.0))
    with pytest.raises(ConfigError, match=r"reward\.beta = 0 has no closed-form optimum"):
        check_resamples(RewardConfig(beta=0.0))
