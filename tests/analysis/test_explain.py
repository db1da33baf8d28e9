"""What length explains, against enumeration, where every conditional accuracy is exact."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import EOS, PROMPTS, SEQUENCES, base_and_sft, quiet_console, sequence_logprobs
from worlds import make_world, run_world, write_rows

from srppo.analysis.explain import (
    Answers,
    Explained,
    ExplainResult,
    Rows,
    explain_command,
    explained,
    gain_at_lengths,
    priced,
    standardised,
)
from srppo.analysis.optimum import Floats
from srppo.errors import RecordError, UserError
from srppo.record.store import Run
from srppo.report.explain import explain_table, report_explain, sentences
from srppo.stages.arms import stages_by_arm
from srppo.statistics.intervals import calibrated_interval

LENGTH = np.array([len(y) for y in SEQUENCES])
ENDED = np.array([y[-1] == EOS for y in SEQUENCES])
STRATA = [(n == LENGTH) & (end == ENDED) for n, end in set(zip(LENGTH, ENDED, strict=True))]
RIGHT = np.array([float(2 in y or 3 in y) for y in SEQUENCES])  # the longer, the likelier


@cache
def enumerated() -> tuple[Floats, Floats]:
    """P(y | x) of pi_sft and of a policy that is longer and, within a length, another; a row a prompt, 85 responses."""
    base, sft = base_and_sft()
    both = [[sequence_logprobs(model, x).exp().double().numpy() for x in PROMPTS] for model in (sft, base)]
    asked = np.array([-2.0 * LENGTH, -LENGTH - 2.0 * RIGHT])  # the second question: longer answers, fewer right
    return tilted(np.array(both[0]), asked), tilted(np.array(both[1]), asked + LENGTH)


def tilted(p_XY: Floats, nats: Floats) -> Floats:
    """The exact optimum of a reward (over beta) of each response: pi_sft e^nats / Z."""
    w_XY = p_XY * np.exp(nats)
    return np.asarray(w_XY / w_XY.sum(axis=1, keepdims=True))


def exact(sft_XY: Floats, policy_XY: Floats, pooled: bool = False) -> float:
    """sum_s P_policy(s) P_sft(right | s), question by question or over both as one, by the definition."""
    if pooled:
        sft_XY, policy_XY = (p.mean(axis=0, keepdims=True) for p in (sft_XY, policy_XY))
    total = 0.0
    for p, q in zip(sft_XY, policy_XY, strict=True):
        for own in STRATA:
            total += q[own].sum() * (p[own] @ RIGHT[own]) / p[own].sum() / len(sft_XY)
    return float(total)


def drawn(p_XY: Floats, count: int, seed: int, repeats: int = 1) -> np.ndarray:
    """Places of responses: `count` to each prompt, each prompt `repeats` times in a row."""
    generator = np.random.default_rng(seed)
    return np.concatenate([generator.choice(len(p), p=p, size=(repeats, count)) for p in p_XY])


def answers(places_QK: np.ndarray) -> Answers:
    return Answers(LENGTH[places_QK], ENDED[places_QK], RIGHT[places_QK])


def rows(places_QK: np.ndarray, tasks: int = 1) -> Rows:
    """As a samples.jsonl holds them."""
    return [
        {"group": "unseen", "task": f"task {i * tasks // len(places_QK)}", "prompt": f"question {i}", "answer": "2"}
        | {"tokens": LENGTH[own].tolist(), "ended": ENDED[own].tolist(), "correct": (RIGHT[own] > 0).tolist()}
        for i, own in enumerate(places_QK)
    ]


@pytest.mark.parametrize("pooled", [False, True])
def test_it_is_the_definition_on_any_samples(pooled: bool) -> None:
    """In fractions, stratum by stratum, on ragged samples: a question apart, or as one pool."""
    sft_XY, other_XY = enumerated()
    ours, theirs = drawn(sft_XY, 40, 0, repeats=3), drawn(other_XY, 7, 1, repeats=3)
    pools = [["all"] * 6] if pooled else [range(6)]
    written: dict[tuple[object, ...], list[float]] = defaultdict(list)
    for i, own in enumerate(ours):
        for y in own:
            written[pools[0][i], LENGTH[y], ENDED[y]].append(RIGHT[y])
    total, outside = Fraction(0), 0
    for i, own in enumerate(theirs):
        for y in own:
            found = written.get((pools[0][i], LENGTH[y], ENDED[y]), [])
            total += Fraction(int(sum(found)), len(found)) if found else 0
            outside += not found
    made = standardised(answers(ours), answers(theirs), pools)
    assert made.right_Q.mean() == pytest.approx(float(total / theirs.size), abs=1e-12)
    assert made.outside_Q.mean() == pytest.approx(outside / theirs.size, abs=1e-12)
    assert made.weight_QK.mean() == pytest.approx(1 - outside / theirs.size, abs=1e-12)


def test_it_converges_to_the_enumeration() -> None:
    """A policy that differs from pi_sft within a length too; pools and single questions differ."""
    sft_XY, other_XY = enumerated()
    ours, theirs = answers(drawn(sft_XY, 400_000, 2)), answers(drawn(other_XY, 400_000, 3))
    truth = {pooled: exact(sft_XY, other_XY, pooled) for pooled in (False, True)}
    assert abs(truth[False] - truth[True]) > 0.006 and abs(truth[False] - (other_XY @ RIGHT).mean()) > 0.02
    for pooled, pools in ((False, [range(2)]), (True, [["all", "all"]])):
        found = standardised(ours, theirs, pools)
        assert found.right_Q.mean() == pytest.approx(truth[pooled], abs=0.003)
        assert not found.outside_Q.any() and not found.borrowed_Q.any()


@pytest.mark.parametrize("nats", [-1.0, 0.7])
def test_a_length_reward_is_explained_to_the_last_digit(nats: float) -> None:
    """pi_sft e^(c length) by enumeration: integer counts of every response, those of the policy 2^length times."""
    sft_XY, _ = enumerated()
    policy_XY = tilted(sft_XY, nats * LENGTH)
    assert exact(sft_XY, policy_XY) == pytest.approx(float((policy_XY @ RIGHT).mean()), abs=1e-12)
    assert abs(exact(sft_XY, policy_XY) - float((sft_XY @ RIGHT).mean())) > 0.02
    counts = np.random.default_rng(4).integers(1, 5, size=len(SEQUENCES))
    ours = np.repeat(np.arange(len(SEQUENCES)), counts)[None, :]
    theirs = np.repeat(np.arange(len(SEQUENCES)), counts * 2**LENGTH)[None, :]
    found = standardised(answers(ours), answers(theirs), [["one"]])
    assert found.right_Q[0] == pytest.approx(RIGHT[theirs].mean(), abs=1e-12)


def one(policy_XY: Floats, seed: int, *, repeats: int = 30, tasks: int = 1, seeds: int = 1) -> Explained:
    """A run: 32 answers of pi_sft to a question, 4 of the policy."""
    ours = {s: rows(drawn(enumerated()[0], 32, 10 * seed + s, repeats), tasks) for s in range(seeds)}
    theirs = {s: rows(drawn(policy_XY, 4, 10 * seed + s + 5, repeats), tasks) for s in range(seeds)}
    (found,) = explained("SRPPO", ours, theirs, fresh=True)
    return found


def test_the_optimum_under_a_length_reward_is_explained_whole() -> None:
    """Sampled exactly, question by question: beyond length there is nothing, at the rate of a 95% interval."""
    sft_XY, _ = enumerated()
    policy_XY = tilted(sft_XY, 1.5 * LENGTH)
    found = [one(policy_XY, seed) for seed in range(12)]
    assert sum(each.beyond.low <= 0 <= each.beyond.high for each in found) >= 9  # 8 or fewer of 12: P = 2e-4 at 95%
    shares = [each.share for each in found if each.share]
    assert len(shares) == 12 and sum(each.low <= 1 <= each.high for each in shares) >= 9
    error = np.mean([(each.high - each.low) / 4 for each in shares]) / 12**0.5
    assert np.mean([each.mean for each in shares]) == pytest.approx(1, abs=4 * error) and error < 0.03
    assert found[0].mostly and "SRPPO: length alone explains more than half" in sentences(found[:1])[0]


def test_a_policy_that_answers_better_at_the_same_lengths_is_not() -> None:
    """Right answers twice as likely within each stratum, strata as likely as before: length explains nothing of it."""
    sft_XY, _ = enumerated()
    policy_XY = tilted(sft_XY, 1.5 * RIGHT)
    for own in STRATA:
        policy_XY[:, own] *= sft_XY[:, own].sum(axis=1, keepdims=True) / policy_XY[:, own].sum(axis=1, keepdims=True)
    found = one(policy_XY, 0, repeats=100)
    assert found.share and found.share.low < 0 < found.share.high < 0.5 and found.beyond.low > 0
    assert not found.mostly and sentences([found]) == []


def test_the_policy_itself_has_no_gain_to_explain() -> None:
    sft_XY, _ = enumerated()
    found = [one(sft_XY, seed) for seed in range(8)]
    nothing = [each for each in found if each.share is None]
    assert len(nothing) >= 6 and not any(each.mostly for each in nothing)
    console = quiet_console()
    console.print(explain_table(nothing[:1], 32))
    assert "no gain" in console._file.getvalue()  # type: ignore[union-attr]


@pytest.mark.parametrize("pooled", [False, True])
def test_intervals_cover(pooled: bool) -> None:
    """Over questions of two kinds. Pooled, all questions share the errors of few answers' rates; question by question
    some lengths are never written, and the bounds hold the truth."""
    (sft_XY, other_XY), covered = enumerated(), []
    for trial in range(150):
        generator = np.random.default_rng(trial)
        kinds = generator.integers(2, size=60)
        ours, theirs = (
            answers(np.stack([generator.choice(len(SEQUENCES), p=p_XY[x], size=k) for x in kinds]))
            for p_XY, k in ((sft_XY, 6 if pooled else 32), (other_XY, 32))
        )
        made = standardised(ours, theirs, [["all"] * 60 if pooled else range(60)])
        low, high = (calibrated_interval(q[None, :], draws=200) for q in (made.right_Q, made.right_Q + made.outside_Q))
        covered.append(low.low <= exact(sft_XY, other_XY, pooled) <= high.high)
    print(f"\ncoverage, {'pooled' if pooled else 'question by question'}: {np.mean(covered):.3f}")
    assert 0.9 <= np.mean(covered) <= (0.99 if pooled else 1.0)


def test_lengths_that_pi_sft_never_wrote_are_counted_and_bounded() -> None:
    """One question, right at 2 tokens; the policy writes half of its answers longer than pi_sft ever did."""
    row = {"group": "g", "task": "t", "prompt": "q", "answer": "a"}
    sft = [row | {"tokens": [2, 1, 2, 1], "ended": [True] * 4, "correct": [True, False, True, False]}]
    policy = [row | {"tokens": [2, 9, 2, 9], "ended": [True, True, True, False], "correct": [True] * 4}]
    ours, theirs = Answers.of(sft), Answers.of(policy)
    alone = standardised(ours, theirs, [["q"]])
    assert (alone.right_Q[0], alone.outside_Q[0]) == (0.5, 0.5)
    worse, other = policy[0] | {"correct": [True, False, True, True]}, sft[0] | {"correct": [True, True, False, False]}
    (found,) = explained("SRPPO", {0: sft * 15 + [other] * 15}, {0: policy * 20 + [worse] * 10}, fresh=True)
    assert found.outside == 0.5 and found.at_lengths.mean == pytest.approx(0.375) and found.at_lengths.high > 0.875
    assert found.beyond.mean == pytest.approx(11 / 12 - 0.375) and found.beyond.low < 11 / 12 - 0.875
    assert found.share and found.share.mean == pytest.approx(-0.125 / (5 / 12)) and found.share.high > 0.375 / (5 / 12)
    ended = standardised(
        ours, Answers.of([policy[0] | {"tokens": [2] * 4, "ended": [True, True, False, False]}]), [["q"]]
    )
    assert ended.outside_Q[0] == 0.5, "cut at 2 tokens is another stratum than ended at 2"


def test_a_question_without_a_length_takes_its_tasks_rate() -> None:
    row = {"group": "g", "answer": "a", "ended": [True, True]}
    sft = [row | {"tokens": [1, 1], "correct": [False] * 2}, row | {"tokens": [2, 2], "correct": [True, False]}]
    policy = [row | {"tokens": [2, 1], "correct": [True] * 2}, row | {"tokens": [3, 2], "correct": [True] * 2}]
    found = standardised(Answers.of(sft), Answers.of(policy), [range(2), ["t", "t"]])
    assert found.borrowed_Q.tolist() == [0.5, 0.0] and found.outside_Q.tolist() == [0.0, 0.5]
    assert found.right_Q.mean() == pytest.approx((0.5 + 0.0 + 0.0 + 0.5) / 4)
    apart = standardised(Answers.of(sft), Answers.of(policy), [range(2), ["t", "u"]])
    assert apart.outside_Q.tolist() == [0.5, 0.5], "another task's answers are no stand-in"


@pytest.mark.parametrize("price", [-0.8, 0.5])
def test_one_price_a_token_is_found_again(price: float) -> None:
    """From the mean length of pi_sft e^(price length) alone: the price, and what that optimum scores."""
    sft_XY, _ = enumerated()
    truth_XY = tilted(sft_XY, price * LENGTH)
    found = priced(answers(drawn(sft_XY, 100_000, 6)), float((truth_XY @ LENGTH).mean()))
    assert found is not None and found.enough
    assert found.price == pytest.approx(price, abs=0.03)
    assert found.right_Q == pytest.approx(truth_XY @ RIGHT, abs=0.01)


def test_no_price_gives_a_length_that_was_never_written() -> None:
    some = answers(drawn(enumerated()[0], 50, 7))
    assert priced(some, 3.5) is None and priced(some, 0.5) is None
    few = priced(some, 2.97)
    assert few is not None and not few.enough, "single answers would decide"


def test_seeds_are_paired_and_others_left_out() -> None:
    sft_XY, other_XY = enumerated()
    ours, theirs = rows(drawn(sft_XY, 8, 0, 5), 5), rows(drawn(other_XY, 8, 1, 5), 5)
    other = [row | {"prompt": "another"} for row in theirs]
    (found,) = explained("SRPPO", {0: ours, 1: ours}, {0: theirs, 1: other, 2: theirs}, fresh=False)
    assert (found.seeds, found.tasks) == (1, 5)
    assert explained("SRPPO", {3: ours}, {0: theirs}, fresh=False) == []
    gains = gain_at_lengths(ours, theirs, "unseen")
    assert gains["sampled_gain"] == pytest.approx(found.gain.mean)
    assert gains["gain_at_lengths"] == pytest.approx(found.at_lengths.mean - found.sft.mean)
    assert gain_at_lengths(ours, other, "unseen") == {} == gain_at_lengths(ours, theirs, "demonstrated")


# ---- a run


def test_a_run_its_report_and_its_mistakes(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    world = make_world(tmp_path)
    folder, console = tmp_path / "run", quiet_console()
    run_world(world.recipe(), folder)
    result = explain_command(folder, arms=stages_by_arm, samples=16, console=console)
    assert {each.group for each in result.found} == {"demonstrated", "unseen"} and result.samples == 16
    assert all(each.arm == "SRPPO" and each.seeds == 1 for each in result.found)
    again = explain_command(folder, arms=stages_by_arm, arm="SRPPO", samples=16, console=quiet_console())
    assert again == result, "a function of the record and the seed"
    few = explain_command(folder, arms=stages_by_arm, arm="base", samples=2, limit=2, console=console)
    assert {each.policy.n for each in few.found} == {1} and few.found[0].arm == "base"
    path = report_explain(result, tmp_path / "out", console)
    content = json.loads(path.read_text())
    assert content["sentences"] == sentences(result.found) and len(content["found"]) == 2
    printed = console._file.getvalue()  # type: ignore[union-attr]
    table = printed[printed.index("What length alone explains") :].splitlines()
    assert max(map(len, table[:-3])) <= 80 and "16 fresh answers" in " ".join(printed.split())
    with pytest.raises(UserError, match="no arm 'RL'; it has base, SFT, SRPPO"):
        explain_command(folder, arms=stages_by_arm, arm="RL", console=console)
    with pytest.raises(UserError, match="--samples 1 is too few"):
        explain_command(folder, arms=stages_by_arm, samples=1, console=console)
    with pytest.raises(UserError, match="no finished SFT model of seed 7"):
        explain_command(folder, arms=stages_by_arm, seed=7, console=console)
    stages = {stage.identity["kind"]: stage.path for stage in Run.load(folder).stages()}
    answered = stages["ppo"] / "eval" / "kept-sampled" / "samples.jsonl"
    kept = [json.loads(line) for line in answered.read_text().splitlines()]
    write_rows(answered, [{key: row[key] for key in row if key != "tokens"} for row in kept])
    with pytest.raises(RecordError, match=r"has no lengths \(tokens, ended\)"):
        explain_command(folder, arms=stages_by_arm, console=console)
    shutil.rmtree(answered.parent)
    with pytest.raises(UserError, match="recorded no sampled answers of a trained arm"):
        explain_command(folder, arms=stages_by_arm, console=console)
    with pytest.raises(RecordError, match="is a sweep"):
        sweep = Run.open(tmp_path / "sweep", {"sweep": {}})
        explain_command(sweep.path, arms=stages_by_arm, console=console)


def test_tables_keep_to_80_columns() -> None:
    _, other_XY = enumerated()
    found = one(other_XY, 0, tasks=8, seeds=2)
    console = quiet_console()
    for samples in (0, 32):
        console.print(explain_table([found, found], samples))
    console.print(explain_table([]))
    said = console._file.getvalue()  # type: ignore[union-attr]
    assert max(map(len, said.splitlines())) <= 80
    assert "over tasks (8 a group) and training seeds (2)" in " ".join(said.split())
    assert ExplainResult("r", "s", 32, ()).found == () and sentences(()) == []
