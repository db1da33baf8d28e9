"""Stages of a run: measured, exported, found again, equal to the bit when run twice, and what one that fails leaves."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from worlds import World, make_world

import srppo.models.loading
import srppo.stages.extrapolation
import srppo.stages.resampling
import srppo.stages.run
from srppo.config import Recipe, with_overrides
from srppo.console import Console
from srppo.errors import ConfigError, Diverged, Interrupted, RecordError, RunError
from srppo.models.loading import fingerprint, load_model
from srppo.record.arms import problem_of
from srppo.record.files import _checksum
from srppo.record.json import read_json, read_lines
from srppo.record.store import Run, Stage
from srppo.stages.arms import compute_of, figures_of, stages_by_arm
from srppo.stages.kinds import CHOSEN, EQUAL, KINDS, SHARES, longer, stage_settings
from srppo.stages.resampling import (
    Sampled,
    load_samples,
)
from srppo.stages.run import PreparedRun, choose_length, prepare_run, run_stages
from srppo.training.sft import evenly

# ---- the stages


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


METHODS = ("extrapolated", "decoded", "vote", "weighted-vote", "resampled", "best-of-n")


def prepared(world: World, place: Path | Run, kinds: Iterable[str] = METHODS, **overrides: Any) -> PreparedRun:
    torch.set_num_threads(1)
    keys = {name.replace("__", "."): value for name, value in overrides.items()}
    recipe = world.recipe({"methods.samples": 8, "methods.alphas": [0.5, 1.0], **keys})
    return prepare_run(recipe, kinds, place, Console(plain=True, file=io.StringIO()))


def verdicts(stage: Stage, decoding: str) -> list[dict[str, Any]]:
    lines = (stage.path / "eval" / f"kept-{decoding}" / "samples.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_each_method_is_an_arm_with_verdicts_like_any_other(world: World, tmp_path: Path) -> None:
    run = prepared(world, tmp_path / "run", ("base", *METHODS))
    found = run_stages(run)
    assert list(stages_by_arm(run.record)) == ["base", "SFT", *(KINDS[kind].label for kind in METHODS)]
    base, sft, drawn = (found.pop(kind) for kind in ("base", "sft", "samples"))
    assert drawn.identity["parents"] == [run.base_id, sft.id] and tuple(found) == METHODS
    for kind, stage in found.items():
        parent = sft if kind in ("extrapolated", "decoded") else drawn
        assert stage.identity["kind"] == kind and stage.identity["parents"] == [run.base_id, parent.id]
        figures = (stage.result() or {})["figures"]
        assert figures["flops"] == figures["steps"] == 0
        assert (stage.path / "eval" / "kept-greedy").exists() == ("greedy" in KINDS[kind].decodings)
        for decoding, samples in (("greedy", 1), ("sampled", 2)):
            if decoding not in KINDS[kind].decodings:
                continue
            rows, theirs = verdicts(stage, decoding), verdicts(base, decoding)
            assert [row["prompt"] for row in rows] == [row["prompt"] for row in theirs]
            assert {k for row in rows for k in row} == {k for row in theirs for k in row}
            assert all(len(row[k]) == samples for row in rows for k in ("responses", "correct", "ended", "tokens"))
            group = [sum(row["correct"]) / samples for row in rows if row["group"] == "demonstrated"]
            assert figures["test"]["demonstrated"][decoding]["mean"] == pytest.approx(sum(group) / len(group))
    assert (found["decoded"].result() or {})["figures"]["inference_times"] == 2.0
    ess = figures_of(found["resampled"])["ess"]
    assert ess["harmonic"] < 8 and not ess["enough"] and figures_of(found["weighted-vote"])["ess"] == ess
    assert figures_of(found["vote"])["inference_times"] == 8 < figures_of(found["best-of-n"])["inference_times"]


def test_methods_find_their_finished_stages_without_work(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_time = run_stages(prepared(world, tmp_path / "run"))
    again = prepared(world, tmp_path / "run")

    def refuse(*args: Any, **more: Any) -> Any:
        raise AssertionError("a finished stage was measured again")

    for module, name in (
        (srppo.stages.extrapolation, "choose_alpha"),
        (srppo.stages.extrapolation, "generate_decoded"),
        (srppo.stages.resampling, "sample_items"),
        (srppo.stages.resampling, "load_samples"),
        (srppo.stages.run, "answer_in_ways"),
    ):
        monkeypatch.setattr(module, name, refuse)
    assert {k: s.id for k, s in run_stages(again).items()} == {k: s.id for k, s in first_time.items()}


def test_two_runs_of_the_methods_are_equal_to_the_bit(world: World, tmp_path: Path) -> None:
    one, two = (run_stages(prepared(world, tmp_path / name)) for name in ("one", "two"))
    for kind in METHODS:
        assert one[kind].id == two[kind].id
        assert (one[kind].result() or {})["figures"] == (two[kind].result() or {})["figures"]
        assert all(verdicts(one[kind], d) == verdicts(two[kind], d) for d in KINDS[kind].decodings)


def test_resampling_and_best_of_n_choose_from_the_same_samples(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Sampled] = []
    plain = srppo.stages.resampling.sample_items

    def watched(*args: Any) -> Sampled:
        seen.append(plain(*args))
        return seen[-1]

    monkeypatch.setattr(srppo.stages.resampling, "sample_items", watched)
    run = prepared(world, tmp_path / "run")
    found = run_stages(run)
    (sampled,) = seen
    samples = found["samples"]
    saved = load_samples(samples)
    assert saved.answers == sampled.answers and saved.cost() == sampled.cost()
    assert np.array_equal(saved.draws.reward_QK, sampled.draws.reward_QK)
    assert {"samples/answers.json.gz", "samples/draws.npz"} <= (samples.result() or {})["files"].keys()
    for kind in ("vote", "weighted-vote", "resampled", "best-of-n"):
        for decoding in KINDS[kind].decodings:
            for row, answers in zip(verdicts(found[kind], decoding), sampled.answers, strict=True):
                assert set(row["responses"]) <= {answer.text for answer in answers}
    for row, answers in zip(verdicts(found["vote"], "greedy"), sampled.answers, strict=True):
        texts = [answer.text for answer in answers]
        assert texts.count(row["responses"][0]) == max(map(texts.count, texts))
    for row, answers, rewards in zip(
        verdicts(found["best-of-n"], "greedy"), sampled.answers, sampled.draws.reward_QK, strict=True
    ):
        assert row["responses"] == [answers[int(rewards.argmax())].text]
    again = run_stages(prepared(world, run.record, reward__beta=0.7, reward__anchor="base"))
    assert len(seen) == 1, "anchor and beta weigh samples and draw none"
    assert again["best-of-n"].id == found["best-of-n"].id and again["resampled"].id != found["resampled"].id
    assert again["vote"].id == found["vote"].id and again["weighted-vote"].id != found["weighted-vote"].id
    (samples.path / "samples" / "draws.npz").write_bytes(b"")
    with pytest.raises(RecordError, match=r"draws\.npz changed after the result was committed"):
        run_stages(run)


def test_the_reward_of_the_recipe_chooses(world: World, tmp_path: Path) -> None:
    """Paid by -log pi_base, best-of-n takes another answer than paid by the ratio; the anchor changes nothing."""
    answers = {}
    for name, keys in (("ratio", {}), ("base", {"reward__kind": "base"}), ("anchor", {"reward__anchor": "base"})):
        stages = run_stages(prepared(world, tmp_path / name, ["best-of-n"], **keys))
        answers[name] = [row["responses"] for row in verdicts(stages["best-of-n"], "sampled")]
    assert answers["ratio"] == answers["anchor"] != answers["base"]


def test_the_extrapolated_model_is_exported_as_measured(world: World, tmp_path: Path) -> None:
    alphas = [0.5, 1.0, 2.0, 4.0]
    run = prepared(world, tmp_path / "run", ["extrapolated"], eval__metric="nll", methods__alphas=alphas)
    stages = run_stages(run)
    stage = stages["extrapolated"]
    figures = (stage.result() or {})["figures"]
    by_alpha = {row["alpha"]: row["score"] for row in figures["alphas"]}
    assert by_alpha[figures["alpha"]] == max(by_alpha.values()) == figures["score"] and len(by_alpha) == 4
    assert figures["held_out_nll"] == pytest.approx(-figures["score"])
    assert figures["selection_flops"] > 0
    config = run.recipe.model
    exported, start = (load_model(str(stages[kind].path / "model"), config) for kind in ("extrapolated", "sft"))
    ours, ends = (dict(m.model.named_parameters()) for m in (exported, start))
    for name, weight in run.base.model.named_parameters():
        expected = ends[name] + figures["alpha"] * (ends[name] - weight)
        torch.testing.assert_close(ours[name], expected, atol=1e-6, rtol=0)
    card = (stage.path / "model" / "README.md").read_text()
    assert f"alpha = {figures['alpha']:g}, chosen of 0.5, 1, 2, 4" in card and "was kept" not in card
    weights = stage.path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00\x01")
    with pytest.raises(Exception, match=r"model\.safetensors changed after the result was committed"):
        run_stages(run)


def test_methods_without_test_items_say_so(world: World, tmp_path: Path) -> None:
    keys = {"eval__items": None, "methods__alphas": [1.0]}
    for kind in ("decoded", "samples", "resampled", "best-of-n"):
        with pytest.raises(ConfigError, match=r"no test items to answer; set eval\.items"):
            prepared(world, tmp_path / "run", [kind], **keys)
    assert not (tmp_path / "run").exists()
    assert run_stages(prepared(world, tmp_path / "run", ["extrapolated"], **keys))["extrapolated"].done


@pytest.mark.parametrize(
    ("keys", "times", "warns"),
    [
        ({"model.precision": "bf16"}, 9.0, True),
        ({"model.scoring": "bf16"}, 9.0, True),
        ({"model.precision": "bf16"}, 0.6, False),
        ({}, 9.0, False),
    ],
)
def test_bf16_without_instructions_for_it_is_said(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, str], times: float, warns: bool
) -> None:
    monkeypatch.setattr(srppo.stages.run, "bf16_slowdown", lambda device: times)
    said = io.StringIO()
    prepare_run(world.recipe(keys), ["sft"], tmp_path / "run", Console(plain=True, file=said))
    assert ("takes 9 times as long as one in fp32 on this cpu" in " ".join(said.getvalue().split())) == warns


# ---- SFT by steps


def test_sft_by_steps_is_measured_evenly(world: World, tmp_path: Path) -> None:
    assert evenly(20, 5) == {4, 8, 12, 16, 20} and evenly(3, 5) == {1, 2, 3} and evenly(1, 5) == {1}
    stage = run_stages(prepared(world, tmp_path / "run", ["sft"], sft__steps=10, sft__epochs=7))["sft"]
    rows = stage.metrics()
    assert [row["step"] for row in rows] == list(range(11))
    assert [row["step"] for row in rows if "dev/accuracy" in row] == [0, 2, 4, 6, 8, 10]
    assert rows[-1]["epoch"] == pytest.approx(10 / 3) and (stage.result() or {})["figures"]["steps"] == 10
    card = (stage.path / "model" / "README.md").read_text()
    assert "of 10 was kept" in card and "steps = 10" in card
    settings: Callable[[Recipe], Any] = lambda recipe: stage_settings(recipe, "sft")["sft"]  # noqa: E731
    assert settings(world.recipe({"sft.steps": 10}))["steps"] == 10 and settings(world.recipe())["steps"] is None


# ---- how stages end


class Watching:
    """A tracker that remembers what it was told."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config, self.finished = config, 0

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        assert not self.finished

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def watching(monkeypatch: pytest.MonkeyPatch) -> list[Watching]:
    """Two trackers of each stage, in the order of stages."""
    made: list[Watching] = []

    def trackers(names: Any, run_name: str, folder: Path, config: dict[str, Any]) -> tuple[Watching, ...]:
        both = (Watching(config), Watching(config)) if config else ()  # none where names are only checked
        made.extend(both)
        return both

    monkeypatch.setattr(srppo.stages.run, "trackers", trackers)
    return made


def fail_at_step(run: PreparedRun, step: int, error: BaseException) -> None:
    """Let the measurement of development items at a step of PPO raise; SFT measures its start and its end."""
    plain, count = run.development.measure, iter(range(-2, 100))

    def measure(model: Any) -> Any:
        if next(count) == step:
            raise error
        return plain(model)

    run.development.measure = measure  # type: ignore[method-assign]


def settings_of(stage: Stage) -> list[dict[str, Any]]:
    """What each attempt was told beside its identity."""
    events = [event for folder in stage.attempts() for event in read_lines(folder / "events.jsonl")]
    return [event for event in events if event["event"] == "settings"]


PPO = {"ppo__steps": 4, "ppo__checkpoint_every": 1}


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmuch"), "oom", "out of memory (CUDA out of"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "oom", "out of memory (DefaultCPU"),
        (MemoryError(), "oom", "out of memory (MemoryError)"),
        (ValueError("a bug\nin two lines"), "failed", "ValueError: a bug"),
        (ConfigError("no such thing"), "failed", "ConfigError: no such thing"),
        (Diverged("step 2: loss is NaN"), "diverged", "step 2: loss is NaN"),
        (Interrupted("stopped"), None, ""),
        (RecordError("lost its lease"), None, ""),
        (KeyboardInterrupt(), None, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_however_a_stage_ends_its_result_says_so_and_its_trackers_are_finished(
    error: BaseException, status: str | None, reason: str, world: World, tmp_path: Path, watching: list[Watching]
) -> None:
    run = prepared(world, tmp_path / "run", ["ppo"], **PPO)
    started: list[Stage] = []
    fail_at_step(run, 3, error)
    with pytest.raises(RunError if status == "oom" else type(error)) as caught:
        run_stages(run, on_stage=lambda kind, stage: started.append(stage))
    stage = started[-1]
    result = stage.result()
    assert (result and result["status"]) == status
    assert [each.finished for each in watching] == [1, 1, 1, 1], "of SFT and of PPO"
    if result:
        assert result["figures"]["reason"].startswith(reason)
        assert problem_of(stage, result) == f"seed 0 {status}: {result['figures']['reason']}"
    if status == "oom":
        assert "lower ppo.micro_tokens (8), which changes memory and rounding alone" in str(caught.value)
        assert "\n" not in str(caught.value)
    if status != "diverged":
        assert run_stages(prepared(world, tmp_path / "run", ["ppo"], **PPO))["ppo"].done, "the same command goes on"
        assert not result or read_json(stage.attempts()[0] / "result.json")["status"] == status, "and the reason stays"


def test_a_stage_out_of_memory_goes_on_with_another_micro_batch(world: World, tmp_path: Path) -> None:
    """What the message tells to do keeps every finished stage, and the steps of the one that failed."""
    run = prepared(world, tmp_path / "run", ["base", "ppo"], **PPO)
    fail_at_step(run, 3, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RunError, match="run the same command: finished stages stay"):
        run_stages(run)
    smaller = prepared(world, tmp_path / "run", ["base", "ppo"], **PPO, ppo__micro_tokens=3, sft__micro_tokens=2)
    stages = run_stages(smaller)
    assert len(run.record.stages()) == 3 and all(stage.done for stage in stages.values())
    assert len(stages["sft"].attempts()) == len(stages["base"].attempts()) == 1
    first, second = settings_of(stages["ppo"])
    assert (first["ppo.micro_tokens"], second["ppo.micro_tokens"], second["sft.micro_tokens"]) == (8, 3, 2)
    resumed = [event["step"] for event in read_lines(stages["ppo"].attempts()[1] / "events.jsonl") if "step" in event]
    assert resumed == [2] and [row["step"] for row in stages["ppo"].metrics()] == [0, 1, 2, 3, 4]


def test_every_tracker_gets_the_recipe_of_its_own_seed(world: World, tmp_path: Path, watching: list[Watching]) -> None:
    recipes = [with_overrides(world.recipe(), {"seed": seed}) for seed in (0, 1)]
    for recipe in recipes:
        console = Console(plain=True, file=io.StringIO())
        run_stages(prepare_run(recipe, ["sft"], tmp_path / "run", console, seeds=[0, 1]))
    assert [each.config["seed"] for each in watching] == [0, 0, 1, 1]
    assert all(each.finished == 1 for each in watching)


def test_a_given_model_is_read_once_for_all_seeds_and_never_stale(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _checksum.cache_clear()
    read: list[str] = []
    plain = srppo.models.loading.hashlib.file_digest

    def noted(stream: Any, name: str) -> Any:
        read.append(str(stream.name))
        return plain(stream, name)

    monkeypatch.setattr(srppo.models.loading.hashlib, "file_digest", noted)
    for seed in (0, 1):
        recipe = world.recipe({"model.sft": world.sft, "seed": seed})
        prepare_run(recipe, ["ppo"], tmp_path / "run", Console(plain=True, file=io.StringIO()), seeds=[0, 1])
    weights = [name for name in read if name.endswith("model.safetensors") and str(world.folder) in name]
    assert sorted(weights) == [f"{world.base}/model.safetensors", f"{world.sft}/model.safetensors"]
    monkeypatch.undo()
    shutil.copytree(world.sft, tmp_path / "copy")
    before = fingerprint(str(tmp_path / "copy"), world.recipe().model)
    assert before == fingerprint(world.sft, world.recipe().model)
    with (tmp_path / "copy" / "config.json").open("a") as file:
        file.write("\n")
    assert fingerprint(str(tmp_path / "copy"), world.recipe().model) != before


LENGTHS = [longer(share) for share in SHARES]


def test_each_length_of_longer_sft_takes_its_share_of_the_compute(world: World, tmp_path: Path) -> None:
    """Of SFT and PPO together, by counted operations, but for a step; the whole is an arm, the others answer no test
    item before one is chosen."""
    run = prepared(world, tmp_path / "run", ["chosen-sft"], ppo__steps=6)
    found = {name: figures_of(stage) for name, stage in run_stages(run).items()}
    budget = found["sft"]["flops"] + found["ppo"]["flops"]
    for share, name in zip(SHARES, LENGTHS, strict=True):
        own = found[name]
        assert abs(own["flops"] - share * budget) <= 2 * own["flops"] / own["steps"] or own["steps"] == 1
        assert ("test" in own) == (share == 1)
    assert list(stages_by_arm(run.record)) == ["SFT", EQUAL, CHOSEN, "SRPPO"]


def test_development_items_choose_the_length_and_srppo_starts_from_it(world: World, tmp_path: Path) -> None:
    """The chosen model, its answers and its cost are those of its length; of the others the compute alone remains."""
    run = prepared(world, tmp_path / "run", ["ppo-chosen"], ppo__steps=6, eval__metric="nll")
    found = run_stages(run)
    lengths = {name: figures_of(found[name]) for name in LENGTHS}
    best = max(lengths, key=lambda name: lengths[name]["score"])
    chosen, figures = found["chosen-sft"], figures_of(found["chosen-sft"])
    assert figures["chosen"] == found[best].id and figures["steps"] == lengths[best]["steps"]
    others = [each["flops"] + each["selection_flops"] for name, each in lengths.items() if name != best]
    assert compute_of(chosen) == (lengths[best]["flops"], sum(others) + lengths[best]["selection_flops"])
    weights = [(found[name].path / "model" / "model.safetensors").read_bytes() for name in (best, "chosen-sft")]
    assert weights[0] == weights[1]
    srppo, own = found["ppo-chosen"], figures_of(found["ppo-chosen"])
    spent = compute_of(chosen)
    assert compute_of(srppo) == (own["flops"] + spent[0], own["selection_flops"] + spent[1])
    assert srppo.identity["parents"] == [run.base_id, chosen.id]
    first, plain = srppo.metrics()[1], found["ppo"].metrics()[1]
    assert first["kl_sft"] == 0 == plain["kl_sft"] and first["kl_base"] == pytest.approx(first["reward"], abs=1e-5)
    assert first["reward"] != plain["reward"], "its reward is that of the chosen model"


def test_srppo_from_equal_compute_starts_from_that_sft(world: World, tmp_path: Path) -> None:
    """Its start, its anchor and its reward are those of SFT at equal compute, which it pays for."""
    run = prepared(world, tmp_path / "run", ["ppo-equal"], ppo__steps=6, eval__metric="nll")
    found = run_stages(run)
    longer, srppo = found["longer-sft-1"], found["ppo-equal"]
    assert srppo.identity["parents"] == [run.base_id, longer.id]
    own, spent = figures_of(srppo), compute_of(longer)
    assert compute_of(srppo) == (own["flops"] + spent[0], own["selection_flops"] + spent[1])
    first, plain = srppo.metrics()[1], found["ppo"].metrics()[1]
    assert first["kl_sft"] == 0 == plain["kl_sft"] and first["kl_base"] == pytest.approx(first["reward"], abs=1e-5)
    assert first["reward"] != plain["reward"], "its reward is that of the longer model"


def test_the_shorter_of_equals_is_chosen_and_without_scores_the_whole() -> None:
    def lengths(*scores: float | None) -> dict[str, dict[str, Any]]:
        rows = zip("abc", scores, (40, 10, 4), strict=True)
        return {
            name: {"score": s, "steps": n, "kept_step": n, "flops": 10 * n, "selection_flops": 1} for name, s, n in rows
        }

    for scores, best, dropped in (
        ((0.2, 0.7, 0.4), "b", 442),
        ((0.7, 0.2, 0.7), "c", 502),
        ((None, None, None), "a", 142),
    ):
        name, figures = choose_length(lengths(*scores))
        assert (name, figures["selection_flops"], figures["flops"]) == (best, dropped, 0)


def test_what_choosing_takes_is_counted_in_every_trained_stage(world: World, tmp_path: Path) -> None:
    """The operations of every measurement on development items, start included; a resumed stage counts them once."""
    counted: list[int] = []
    run = prepared(world, tmp_path / "run", ["ppo"], **PPO)
    plain = run.development.flops

    def flops(model: Any, verdicts: Any) -> int:
        counted.append(plain(model, verdicts))
        return counted[-1]

    run.development.flops = flops  # type: ignore[method-assign]
    found = run_stages(run)
    assert len(counted) == 2 + 5 and min(counted) > 0
    assert figures_of(found["sft"])["selection_flops"] == sum(counted[:2])
    assert figures_of(found["ppo"])["selection_flops"] == sum(counted[2:])
    assert compute_of(found["ppo"])[1] == sum(counted)
    broken = prepared(world, tmp_path / "broken", ["ppo"], **PPO)
    fail_at_step(broken, 3, RuntimeError("no"))
    with pytest.raises(RuntimeError):
        run_stages(broken)
    again = run_stages(prepared(world, tmp_path / "broken", ["ppo"], **PPO))["ppo"]
    assert figures_of(again) == figures_of(found["ppo"])
