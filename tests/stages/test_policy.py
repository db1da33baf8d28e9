"""PPO's stage: the points of a curve are what the policy is at their steps, and change nothing that is trained."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import World, make_world, run_world

import srppo.stages.policy
from srppo.config import Recipe, load_recipe, with_overrides
from srppo.console import Console
from srppo.errors import ConfigError, Interrupted
from srppo.evaluation.development import encode_items
from srppo.models.loading import load_model
from srppo.record.store import Stage
from srppo.stages.kinds import stage_settings
from srppo.stages.run import prepare_run, run_stages
from srppo.training.rollout import generate
from srppo.training.scores import score_logprobs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


CURVE: dict[str, Any] = {"eval.curve": [1, 2], "eval.every": 0, "eval.samples": 2}


def ppo_stage(recipe: Recipe, folder: Path) -> Stage:
    run = prepare_run(recipe, ["ppo"], folder, Console(plain=True, file=io.StringIO()))
    return run_stages(run)["ppo"]


def answers(stage: Stage, which: str) -> list[Any]:
    return [json.loads(line) for line in (stage.path / "eval" / which / "samples.jsonl").read_text().splitlines()]


def test_the_last_point_is_the_model_that_is_kept(world: World, tmp_path: Path) -> None:
    stage = ppo_stage(world.recipe(CURVE), tmp_path / "run")
    figures = (stage.result() or {})["figures"]
    first, last = figures["curve"]
    assert (first["step"], last["step"], figures["kept_step"]) == (1, 2, 2)
    for decoding in ("greedy", "sampled"):
        assert answers(stage, f"step-2-{decoding}") == answers(stage, f"kept-{decoding}")
        assert last["test"] == figures["test"] and last[f"{decoding}_tokens"] == figures[f"{decoding}_tokens"]
    assert answers(stage, "step-1-sampled") != answers(stage, "step-2-sampled")
    for point in (first, last):
        assert set(point["kl"]) == set(point["kl_error"]) == set(point["reward"]) == {"demonstrated", "unseen"}
        assert all(kl > 0 for kl in point["kl"].values())


def test_its_kl_is_that_of_log_ratios_within_their_noise(world: World, tmp_path: Path) -> None:
    """Against the mean of log pi - log pi_sft over 400 answers to each item, drawn anew from the exported model."""
    recipe = world.recipe({**CURVE, "eval.samples": 20})
    run = prepare_run(recipe, ["ppo"], tmp_path / "run", Console(plain=True, file=io.StringIO()))
    done = run_stages(run)
    size = len(run.tokenizer)
    policy, sft = (load_model(str(done[k].path / "model"), recipe.model, vocab_size=size) for k in ("ppo", "sft"))
    items = [item for item in run.test_items if item.group == "demonstrated"]
    prompts = [ids for ids in encode_items(run.tokenizer, items, recipe) for _ in range(400)]
    limit = recipe.rollout.max_new_tokens
    drawn = generate(policy, prompts, stop_ids=run.stops, pad_id=run.pad_id, max_new_tokens=limit, seed=1)
    gaps = (score_logprobs(policy, drawn) - score_logprobs(sft, drawn)).sum(dim=1).double()
    point = (done["ppo"].result() or {})["figures"]["curve"][-1]
    noise = float(gaps.std() / len(gaps) ** 0.5) + point["kl_error"]["demonstrated"] / 2
    assert point["kl"]["demonstrated"] == pytest.approx(float(gaps.mean()), abs=4 * noise)
    assert point["kl"]["demonstrated"] > 8 * noise, "or a KL of 0 would pass"


def test_a_curve_changes_no_training_and_no_other_id(world: World, tmp_path: Path) -> None:
    plain = run_world(world.recipe({"eval.every": 0}), tmp_path / "plain")
    curved = run_world(world.recipe(CURVE), tmp_path / "curved")
    assert plain.weights == curved.weights and plain.digests["ppo"] == curved.digests["ppo"]
    without = load_recipe(None)
    with_curve = with_overrides(without, {"eval.curve": [5]})
    for kind in ("base", "sft", "longer-sft-1"):
        assert stage_settings(without, kind) == stage_settings(with_curve, kind)
    assert "curve" not in stage_settings(without, "ppo") and stage_settings(with_curve, "ppo")["curve"] == [5]


def test_a_stage_that_goes_on_keeps_the_points_it_had(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, point = world.recipe({**CURVE, "ppo.checkpoint_every": 1}), srppo.stages.policy.curve_point

    def stopped_at_two(*args: Any) -> Any:
        if args[-1] == 2:
            raise Interrupted("stopped")
        return point(*args)

    monkeypatch.setattr(srppo.stages.policy, "curve_point", stopped_at_two)
    with pytest.raises(Interrupted):
        ppo_stage(recipe, tmp_path / "run")
    monkeypatch.undo()
    whole = (ppo_stage(recipe, tmp_path / "whole").result() or {})["figures"]
    assert (ppo_stage(recipe, tmp_path / "run").result() or {})["figures"]["curve"] == whole["curve"]


def test_steps_that_never_come_and_items_that_are_not_there_are_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"eval\.curve names step 30, and PPO ends at ppo\.steps \(20\)"):
        load_recipe(None, ["eval.curve=[5,30]"])
    for wrong in ("[0]", "[5,5]", "[10,5]"):
        with pytest.raises(ConfigError, match=r"eval\.curve: steps are above 0 and rise"):
            load_recipe(None, [f"eval.curve={wrong}"])
    assert load_recipe(None, ["eval.curve=10"]).eval.curve == (10,)
    with pytest.raises(ConfigError, match=r"eval\.curve measures test items, and there are none"):
        ppo_stage(world.recipe({"eval.curve": [1], "eval.items": None, "eval.metric": "nll"}), tmp_path)


def test_points_of_all_rewards(world: World, tmp_path: Path) -> None:
    """The reward of a point is the recipe's own: brevity pays -0.1 a token of the sampled answers."""
    stage = ppo_stage(world.recipe({**CURVE, "reward.kind": "brevity"}), tmp_path / "run")
    torch.set_num_threads(1)
    for point in (stage.result() or {})["figures"]["curve"]:
        rows = answers(stage, f"step-{point['step']}-sampled")
        for group, reward in point["reward"].items():
            lengths = [length for row in rows if row["group"] == group for length in row["tokens"]]
            assert reward == pytest.approx(-0.1 * sum(lengths) / len(lengths), rel=1e-5)
