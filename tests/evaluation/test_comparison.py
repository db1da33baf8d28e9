"""From results to differences, sentences and files, by hand, and how often a comparison errs."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

from srppo.console import Console
from srppo.errors import DataError, UserError
from srppo.evaluation.comparison import ComparisonResult, Difference, compare
from srppo.evaluation.pairing import by_seed, made_alike, pair
from srppo.evaluation.results import TaskResult, write_result
from srppo.record.store import Run
from srppo.report.comparison import arms_of, as_csv, as_json, as_markdown, compare_command, select
from srppo.statistics.intervals import crossed_error
from srppo.statistics.tests import seeds_needed, sign_flip
from srppo.statistics.verdicts import Contrast, t_interval


def result(scores: Sequence[float], model: str = "A", seed: int | None = 0, **more: Any) -> TaskResult:
    fields: dict[str, Any] = {"task": "t", "decoding": "greedy", "metric": "acc", "clusters": None, "group": None}
    fields |= {"items": tuple(f"i{n}" for n in range(len(scores))), "path": Path(f"{model}@{seed}")} | more
    return TaskResult(model=model, seed=seed, scores=tuple(map(float, scores)), **fields)


def only(arms: dict[str, list[TaskResult]], alpha: float = 0.05) -> Difference:
    (found,) = compare(arms, alpha=alpha).differences
    return found


def test_one_seed_of_right_and_wrong_is_mcnemar() -> None:
    before, after = [0] * 20 + [1] * 30 + [0] * 50, [1] * 18 + [0] * 4 + [1] * 28 + [0] * 50
    found = only({"A": [result(before)], "B": [result(after, "B")]})
    gaps = np.subtract(after, before)
    won, lost = int((gaps > 0).sum()), int((gaps < 0).sum())
    assert found.test == "exact McNemar" and found.p == pytest.approx(scipy_stats.binomtest(won, won + lost).pvalue)
    assert found.difference.mean == pytest.approx((won - lost) / 100) and found.difference.n == 100
    assert found.verdict == "better" and found.sentence.startswith("B is better than A on t (greedy) by 0.160 [")
    assert found.sentence.endswith("100 items (one training seed; others may differ).")


def test_one_seed_of_shares_is_a_paired_permutation() -> None:
    before, after = np.random.default_rng(0).choice([0.0, 0.5, 1.0], (2, 14))
    found = only({"A": [result(before)], "B": [result(after, "B")]})
    expected = scipy_stats.permutation_test(
        (after, before), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
    )
    assert found.test == "paired permutation of items, exact sign-flip" and found.p == pytest.approx(expected.pvalue)


def test_clusters_flip_together() -> None:
    """Six clusters of ten: the p of six differences, whatever the items are."""
    clusters = tuple(f"c{i // 10}" for i in range(60))
    arms = {name: [result([value] * 60, name, clusters=clusters)] for name, value in (("A", 0), ("B", 1))}
    found = only(arms)
    assert found.p == 2**-5 and found.clusters == 6 and found.test.startswith("paired permutation of clusters")
    own = {name: [result([value] * 6, name, clusters=tuple("abcdef"))] for name, value in (("A", 0), ("B", 1))}
    assert only(own).test == "exact McNemar" and only(own).clusters is None, "every item its own cluster: none"


def seeds_of(model: str, gain: float, count: int, rng: np.random.Generator) -> list[TaskResult]:
    return [result((rng.random(50) < 0.4 + gain), model, seed) for seed in range(count)]


def test_several_seeds_are_sign_flips_and_few_cannot_tell() -> None:
    rng = np.random.default_rng(1)
    six = {"A": seeds_of("A", 0, 6, rng), "B": seeds_of("B", 0.5, 6, rng)}
    found = only(six)
    assert (found.test, found.p, found.verdict) == ("exact sign-flip over seeds", 2**-5, "better")
    assert found.seeds == (0, 1, 2, 3, 4, 5) and "50 items and 6 seeds" in found.sentence
    three = only({name: results[:3] for name, results in six.items()})
    assert three.verdict == "cannot tell" and math.isinf(three.detectable)
    assert three.difference.low == 0 < three.difference.mean, "t would not hold 0; three seeds cannot exclude it"
    assert "3 seeds cannot give a p below 0.250" in three.sentence and "6 could" in three.sentence


def test_seeds_that_agree_on_few_items_are_not_enough() -> None:
    """Ten seeds say the same of four items: they are exchangeable, other items are not known."""
    arms = {"A": [result([0, 0, 1, 1], seed=seed) for seed in range(10)]}
    arms["B"] = [result([1, 1, 1, seed % 2], "B", seed) for seed in range(10)]
    found = only(arms)
    assert sign_flip(np.ones(10)).p == 2**-9 < 0.05 < found.p
    assert found.difference.low < 0 and found.verdict == "cannot tell"


def test_sign_flips_alone_would_err_often_where_items_differ() -> None:
    """Equal models, each better on some items: ten seeds agree about 100 drawn items, which say little of others."""
    rng, trials, flips, verdicts = np.random.default_rng(31), 300, 0, 0
    for _ in range(trials):
        gaps = rng.normal(0, 0.1, 100)  # by item, of mean 0 over all items there could be
        arms = {
            name: [result(0.5 + sign * gaps + rng.normal(0, 0.3, 100), name, seed) for seed in range(10)]
            for name, sign in (("A", -0.5), ("B", 0.5))
        }
        found = only(arms)
        by_seed = np.mean([np.subtract(b.scores, a.scores) for a, b in zip(*arms.values(), strict=True)], axis=1)
        flips, verdicts = flips + (sign_flip(by_seed).p <= 0.05), verdicts + (found.verdict in ("better", "worse"))
    print(f"called different: by the sign-flip alone {flips / trials:.3f}, by the verdict {verdicts / trials:.3f}")
    assert flips / trials > 0.05 + 3 * (0.05 * 0.95 / trials) ** 0.5 >= verdicts / trials


def test_holm_is_over_tasks_and_models_of_a_decoding() -> None:
    rng = np.random.default_rng(2)
    arms = {
        name: [
            result(rng.random(50) < 0.4 + gain, name, seed, task=task, decoding=decoding)
            for seed in range(6)
            for task in ("t", "u")
            for decoding in ("greedy", "sampled")
        ]
        for name, gain in (("A", 0.0), ("B", 0.5), ("C", 0.0))
    }
    found = compare(arms)
    assert len(found.differences) == 8 and {each.comparisons for each in found.differences} == {4}
    best = found.differences[0]
    assert (best.model, best.p, best.p_holm, best.verdict) == ("B", 2**-5, 4 * 2**-5, "cannot tell")
    assert f"{seeds_needed(0.05, 4)} could with Holm over 4" in best.sentence
    assert [(each.model, each.decoding, each.tasks) for each in found.aggregates] == [
        (model, decoding, ("t", "u")) for decoding in ("greedy", "sampled") for model in ("B", "C")
    ]
    assert found.aggregates[0].iqm.difference.low > 0.2


def of_tasks(count: int, gain: float = 0.25) -> dict[str, list[TaskResult]]:
    """Ten seeds of four items a task; B is better by `gain`, on some tasks far more and on others not at all."""
    rng, tasks = np.random.default_rng(7), tuple(f"task{i // 4}" for i in range(4 * count))
    more = np.repeat(rng.normal(gain, 0.2, count), 4)
    arms: dict[str, list[TaskResult]] = {"A": [], "B": []}
    for seed in range(10):
        hard = rng.random(4 * count)
        for name, chance in (("A", 0.3), ("B", 0.3 + more)):
            arms[name].append(result(hard < chance, name, seed, clusters=tasks, unit="tasks"))
    return arms


def test_a_claim_about_a_group_is_over_its_tasks() -> None:
    found = only(of_tasks(40))
    by_hand = np.subtract(*([each.scores for each in of_tasks(40)[name]] for name in ("B", "A"))).reshape(10, 40, 4)
    error, df = crossed_error(by_hand.mean(axis=2))
    assert found.difference.high - found.difference.mean == pytest.approx(scipy_stats.t.ppf(0.975, df) * error)
    assert found.these_tasks == pytest.approx(t_interval(Contrast(by_hand.reshape(10, 160), sign_flip([1.0]))))
    assert found.difference.low < found.these_tasks.low < found.these_tasks.high < found.difference.high
    assert found.verdict == "better" and "; over these 40 tasks, 160 items and 10 seeds; on these tasks alone [+" in (
        found.sentence
    )
    few = only(of_tasks(6, 0.1))
    assert few.verdict == "cannot tell"
    assert "over these 6 tasks (too few to say much of others), 24 items and 10 seeds could have" in few.sentence


def test_less_may_be_better() -> None:
    arms = {"A": [result([3.0, 4.0, 5.0] * 9)], "B": [result([2.0, 2.5, 4.0] * 9, "B")]}
    arms = {
        name: [TaskResult(**{**vars(each), "higher_is_better": False}) for each in own] for name, own in arms.items()
    }
    assert only(arms).verdict == "better" and compare(arms).aggregates == ()


def test_a_smaller_alpha_asks_for_more() -> None:
    arms = {"A": [result([0, 0, 1, 0] * 20)], "B": [result([1, 0, 1, 0] * 15 + [0, 1, 0, 0] * 5, "B")]}
    usual, strict = only(arms), only(arms, alpha=0.001)
    assert strict.difference.low < usual.difference.low and strict.detectable > usual.detectable
    assert usual.verdict == "better" and usual.p == strict.p


def test_equal_models_are_the_same_within_the_margin_and_never_equal() -> None:
    """Of 100 items on which both agree Wilson's bound still lets a few differ: 0.05 is out of reach for 40 of them."""
    arms = {"A": [result([0, 1] * 50)], "B": [result([0, 1] * 50, "B")]}
    found = only(arms)
    assert found.p == 1 and found.difference.low < 0 < found.difference.high and 0 < found.detectable < 0.1
    assert found.verdict == "same" and "B and A are the same within 0.05 on t (greedy): +0.000 [-" in found.sentence
    few = only({name: [result([0, 1] * 20, name)] for name in arms})
    assert few.verdict == "cannot tell" and "could have shown a difference of about 0.1" in few.sentence
    assert compare(arms, margin=0.01).differences[0].verdict == "cannot tell"


def test_what_cannot_be_paired_is_named() -> None:
    before = result([1, 0, 1, 0], items=("a", "b", "c", "d"))
    after = result([math.nan, 1, 1], "B", items=("a", "b", "x"), not_scored={"a": "no punkt"})
    found = pair({0: before}, {0: after}, ("A", "B"))
    assert found.baseline.tolist() == [[0]] and found.model.tolist() == [[1]]
    assert found.left_out == {"not scored in B: no punkt": ("a",), "not in B": ("c", "d"), "not in A": ("x",)}
    with pytest.raises(
        DataError, match=r"t: A \(4 items\) and B \(1 items\) share no scored item \(4 not in B; 1 not in A"
    ):
        pair({0: before}, {0: result([1], "B", items=("z",))}, ("A", "B"))
    half = {0: before, 1: result([1, 1], items=("a", "b"))}
    found = pair(half, half, ("A", "B"))
    assert found.left_out == {"not in A at every seed": ("c", "d"), "not in B at every seed": ("c", "d")}


def test_items_are_paired_by_id_not_by_place() -> None:
    after = result([0, 1, 1], "B", items=("i1", "i0", "i2"))
    found = pair({0: result([1, 0, 1])}, {0: after}, ("A", "B"))
    assert found.model.tolist() == found.baseline.tolist() == [[1, 0, 1]]


def test_seeds_are_paired() -> None:
    rng = np.random.default_rng(3)
    some, others = seeds_of("A", 0, 4, rng), seeds_of("B", 0, 6, rng)[2:]
    found = pair(by_seed(some), by_seed(others), ("A", "B"))
    assert found.seeds == (2, 3) and found.baseline.tolist()[0] == list(some[2].scores)
    assert found.notes == ("A: seeds 0, 1 left out, B lacks them", "B: seeds 4, 5 left out, A lacks them")
    hub = pair({None: result([1] * 50, seed=None)}, by_seed(others), ("A", "B"))
    assert hub.seeds == (2, 3, 4, 5) and "A is one model without a training seed" in hub.notes[0]
    with pytest.raises(DataError, match="none in common"):
        pair(by_seed(some[:2]), by_seed(others), ("A", "B"))
    one = pair({0: some[0]}, {5: others[3]}, ("A", "B"))
    assert "seeds 0 and 5 are not the same" in one.notes[0]


def test_of_several_results_of_a_seed_the_fullest_counts() -> None:
    """Where they are made in ways that cannot be told apart, and where the other model's way is none of them."""
    several = [result([1] * 5), result([1] * 9), result([1] * 7)]
    found, notes = made_alike({"A": several, "B": [result([1] * 9, "B")]})
    assert [len(each.items) for each in found["A"]] == [9] and "that with most items counts" in notes[0]
    older = {"B": [result([1] * 9, "B", settings={"num_fewshot": 0})]}
    found, notes = made_alike({"A": several} | older)
    assert [len(each.items) for each in found["A"]] == [9] and "that with most items counts" in notes[0]
    assert any("does not record all" in note for note in compare({"A": several} | older).differences[0].notes)


def test_what_cannot_be_compared_is_one_line() -> None:
    with pytest.raises(DataError, match="only A to compare"):
        compare({"A": [result([1])]})
    with pytest.raises(DataError, match=r"nothing to compare: t \(greedy\) is not compared: B has no result on it"):
        compare({"A": [result([1])], "B": [result([1], "B", task="u")]})
    with pytest.raises(DataError, match="has the metric acc, B@0 has f1; pick one that both have with --metric"):
        compare({"A": [result([1])], "B": [result([1], "B", metric="f1")]})
    with pytest.raises(DataError, match="alpha 2 is not between"):
        compare({"A": [result([1])], "B": [result([1], "B")]}, alpha=2)
    with pytest.raises(DataError, match="margin 0 is not above 0"):
        compare({"A": [result([1])], "B": [result([1], "B")]}, margin=0)
    with pytest.raises(DataError, match="item 'i0' is in cluster 'x' and, in B@0, in 'y'"):
        compare({"A": [result([1], clusters=("x",))], "B": [result([1], "B", clusters=("y",))]})


GREEDY = {"chat_template": None, "num_fewshot": 0, "generation.max_new_tokens": 16, "task_content": "1" * 64}


def made(other: dict[str, Any], **own: Any) -> dict[str, list[TaskResult]]:
    """Two models on the same items, the second one's result made with `other` settings."""
    return {
        "A": [result([0, 1] * 5, settings=GREEDY | own)],
        "B": [result([1, 1] * 5, "B", settings=GREEDY | own | other)],
    }


@pytest.mark.parametrize(
    ("other", "own", "words"),
    [
        ({"chat_template": "Q:"}, {}, "chat template: no and yes); make both with --chat-template, or both with --no-"),
        ({"num_fewshot": 5}, {}, "few-shot examples: 0 and 5); make both with the same --num-fewshot"),
        ({"fewshot_seed": 1235}, {"fewshot_seed": 1234}, "seed of the few-shot examples: 1234 and 1235"),
        ({"generation.max_new_tokens": 64}, {}, "new tokens at most: 16 and 64); make both with the same --max-new"),
        ({"generation.temperature": 0.7}, {"generation.temperature": 1.0}, "temperature: 1.0 and 0.7"),
        ({"generation.until": ["Q:"]}, {"generation.until": []}, "stop texts: [] and ['Q:']"),
        ({"generation.extra.min_p": 0.1}, {"generation.until": []}, "generation_kwargs: {} and {'min_p': 0.1}"),
        ({"task_content": "2" * 64}, {}, "the task's YAML or code: 111111111111... and 222222222222..."),
        ({"task_version": 2.0}, {"task_version": 1.0}, "version of the task: 1.0 and 2.0"),
        ({"harness": 2}, {"harness": 1}, "make both with one version of srppo"),
        (
            {"rollout.max_new_tokens": 8},
            {"rollout.max_new_tokens": 16},
            "make both with the same rollout.max_new_tokens",
        ),
        ({"data.system": "Be brief."}, {"data.system": None}, "system prompt: none and Be brief."),
    ],
)
def test_results_that_were_asked_otherwise_are_refused(other: dict[str, Any], own: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        compare(made(other, **own))
    line = str(caught.value)
    assert line.startswith("t: A@0 and B@0 were made in ways that cannot be compared (") and words in line
    assert "\n" not in line and len(line) < 300
    assert compare(made({}, **own)).differences[0].notes == ()


def test_all_that_differs_is_named_at_once_and_at_any_seed() -> None:
    arms = {name: [result([0, 1], name, seed, settings=GREEDY) for seed in (0, 1)] for name in "AB"}
    arms["B"][1] = result([0, 1], "B", 1, settings=GREEDY | {"num_fewshot": 5, "chat_template": "Q:"})
    with pytest.raises(DataError, match=r"A@0 and B@1 .*few-shot examples: 0 and 5; chat template: no and yes"):
        compare(arms)


def test_what_hardly_matters_is_a_note() -> None:
    other = {"batch_size": 64, "device": "cuda", "samples": 4, "environment.packages.torch": "2.14.0", "seconds": 9.0}
    own = {"batch_size": 512, "device": "cpu", "samples": 8, "environment.packages.torch": "2.13.0", "seconds": 1.0}
    (found,) = compare(made(other, **own)).differences
    assert found.notes == (
        "results differ in samples a prompt (8, 4), batch size (512, 64), device (cpu, cuda), torch (2.13.0, 2.14.0); "
        "the questions are the same",
    )
    (found,) = compare(made({"chat_template": "User:"}, chat_template="Q:")).differences
    assert found.notes == ("the models have different chat templates; each was asked in its own",)


def test_a_result_that_does_not_record_its_settings_is_named() -> None:
    arms = {"A": [result([0, 1])], "B": [result([0, 1], "B", settings=GREEDY)]}
    assert only(arms).notes == ("A@0 does not record all of its settings: move it away and evaluate again",)
    arms["B"] = [result([0, 1], "B")]
    assert only(arms).notes == (), "both from elsewhere: nothing is known of either"


@pytest.mark.parametrize("seeds", [1, 10])
def test_comparisons_of_equals_err_at_most_nominally(seeds: int) -> None:
    """Equal methods; items favour one model or the other by chance, which the sign-flip over seeds alone would take
    for a difference: verdicts count 5% at most, up to three Monte Carlo errors of 250 simulations."""
    rng, trials, wrong = np.random.default_rng(4), 250, 0
    for _ in range(trials):
        hardness = rng.normal(0, 1, (2, 1, 60)) * 0.7 + rng.normal(0, 1, (1, 1, 60))
        luck = rng.normal(0, 0.1 if seeds > 1 else 0, (2, seeds, 1))
        scores = rng.random((2, seeds, 60)) < scipy_stats.norm.cdf(hardness + luck)
        arms = {name: [result(s, name, i) for i, s in enumerate(own)] for name, own in zip("AB", scores, strict=True)}
        found = only(arms)
        wrong += found.verdict in ("better", "worse")
    print(f"\nequal models, {seeds} seeds: verdicts {wrong / trials:.3f}")
    assert wrong / trials <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)


def example() -> ComparisonResult:
    rng = np.random.default_rng(5)
    arms = {
        name: [
            result(rng.random(40) < chance, name, seed, task=task, items=tuple(f"{task}{i}|" for i in range(40)))
            for seed in range(10)
            for task in ("a_task", "b*task")
        ]
        for name, chance in (("base|line", 0.3), ("ours, a model with a rather long name", 0.8))
    }
    arms["base|line"].append(result([1], "base|line", task="alone"))
    return compare(arms)


def test_files_hold_the_same_figures() -> None:
    found = example()
    content = json.loads(as_json(found, ["a note"]))
    assert content["schema_version"] == 1 and content["notes"] == [*found.notes, "a note"]
    first = content["differences"][0]
    assert first["difference"] == found.differences[0].difference._asdict() and first["verdict"] == "better"
    rows = list(csv.DictReader(io.StringIO(as_csv(found))))
    assert [each["kind"] for each in rows] == ["difference", "difference", "iqm"]
    assert float(rows[0]["low"]) == first["difference"]["low"] and rows[0]["items"] == "40" and rows[0]["seeds"] == "10"
    assert rows[0]["sentence"] == found.differences[0].sentence and float(rows[2]["model_mean"]) > 0.7
    text = as_markdown(found, ["a note"])
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 5 and {line.replace("\\|", "").count("|") for line in table} == {10}
    assert "b\\*task" in text and "a note" in text and "alone (greedy) is not compared" in text


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Folders A and B of results on two tasks, and a folder of two models."""
    rng = np.random.default_rng(6)
    for model, chance in (("A", 0.3), ("B", 0.8)):
        for task in ("t", "u"):
            rows = [{"item": str(i), "sample": 0, "acc": float(rng.random() < chance)} for i in range(30)]
            summary = {"model": model, "task": task, "decoding": "greedy", "metric": "acc", "seed": None, "group": "g"}
            write_result(tmp_path / model, {**summary, "key": f"{model}1"}, rows)
            write_result(tmp_path / "both", {**summary, "key": f"{model}1"}, rows)
    return tmp_path


def test_paths_name_models(folders: Path) -> None:
    assert list(arms_of([folders / "A", folders / "B"])[0]) == ["A", "B"]
    assert list(arms_of([folders / "both"])[0]) == ["A", "B"]
    assert list(arms_of([Path(f"{folders}/both:b"), folders / "A"])[0]) == ["B", "A"]
    assert list(arms_of([folders / "A", Path(f"{folders}/both:A")])[0]) == ["A:A", "both:A"]
    with pytest.raises(DataError, match=r"holds the models A; B; choose one: .*both:NAME"):
        arms_of([folders / "both", folders / "A"])
    with pytest.raises(DataError, match="no 'C'; it has: A; B"):
        arms_of([Path(f"{folders}/both:C"), folders / "A"])
    with pytest.raises(DataError, match="given twice"):
        arms_of([folders / "A", folders / "A"])
    arms, _ = arms_of([folders / "both"])
    assert [len(own) for own in select(arms, ["u"], None).values()] == [1, 1] and select(arms, ["g"], None) == arms
    with pytest.raises(DataError, match="no result on v; there are: g; t; u"):
        select(arms, ["v"], None)
    with pytest.raises(DataError, match="decoding 'sampled'; there are: greedy"):
        select(arms, [], "sampled")


def test_a_run_has_arms_and_a_default(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", {})
    for kind, right, seeds in (("base", False, 2), ("sft", False, 2), ("ppo", True, 3)):
        for seed in range(seeds):
            stage = run.stage(kind, {"seed": seed})
            folder = stage.path / "eval" / "kept-greedy"
            folder.mkdir(parents=True)
            verdict = {"prompt": "p", "answer": "x", "task": "copy", "group": "own", "correct": [right]}
            (folder / "samples.jsonl").write_text(json.dumps(verdict) + "\n")
            with stage.attempt() as attempt:
                attempt.commit("ok" if seed < 2 else "diverged", {"reason": "KL 200"}, [])
    arms, notes = arms_of([run.path])
    assert list(arms) == ["SFT", "SRPPO"], "SFT is the baseline"
    assert [len(own) for own in arms.values()] == [2, 2] and notes == [
        f"{run.path}, SRPPO, left out: seed 2 diverged: KL 200",
        f"the base is left out of the family; {run.path}:SFT {run.path}:base compares it",
    ]
    arms, _ = arms_of([Path(f"{run.path}:sft"), Path(f"{run.path}:base")])
    assert list(arms) == ["SFT", "base"], "it is there for who asks"
    arms, notes = arms_of([Path(f"{run.path}:sft"), run.path])
    assert list(arms) == ["SFT", "SRPPO"] and "stands for its arm SRPPO" in notes[-1]


def test_the_command_prints_80_columns_and_writes_files(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folders / "out" / "here"
    compare_command([folders / "A", folders / "B"], out=out, console=Console(plain=True))
    printed = capsys.readouterr().out
    table = printed[: printed.index("written:")]
    assert max(map(len, table.splitlines())) <= 80 and "B is better than A on t (greedy) by" in table
    assert "detects" in table and "mean, 2 tasks" in table and "exact McNemar" in table
    assert sorted(path.name for path in out.iterdir()) == ["comparison.csv", "comparison.json", "comparison.md"]
    single = folders / "one.md"
    compare_command([folders / "A", folders / "B"], task=["t"], alpha=0.01, out=single, console=Console(plain=True))
    assert single.read_text().startswith("# B against A") and "99% intervals" in single.read_text()
    with pytest.raises(UserError, match=r"it ends in \.md, \.csv, \.json, or is a folder"):
        compare_command([folders / "A", folders / "B"], out=folders / "x.txt", console=Console(plain=True))
