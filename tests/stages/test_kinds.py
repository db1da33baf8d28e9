"""The registry of stages: what decides a stage and nothing else, and that a new kind is one entry and one function."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import make_world

from srppo.ablations import Ablation, Analysis, Arm, Sweep
from srppo.ablations.analysis import analyse
from srppo.ablations.execute import execute
from srppo.ablations.ledger import Ledger
from srppo.ablations.plan import Plan
from srppo.config import ADDED, FREE, Recipe, RewardConfig, decisive, free_settings, recipe_id, with_overrides
from srppo.console import Console
from srppo.errors import ConfigError
from srppo.record.store import Run
from srppo.report.answers import arm_rows, arms_of
from srppo.stages.kinds import KINDS, Kind, check, in_order, stage_settings
from srppo.stages.run import UNTRAINED, PreparedRun, measure, prepare_run, run_stages, sft_model

CHANGES: dict[str, Any] = {
    "reward.beta": 0.7,
    "reward.anchor": "base",
    "reward.kind": "sft",
    "reward.token_clip": 2.0,
    "reward.clip": 5.0,
    "reward.limit_penalty": 1.0,
    "reward.length_norm": True,
    "reward.at_limit": "zero",
    "reward.scale": False,
    "reward.placement": "token",
    "reward.kl": "k2",
    "methods.alphas": [3.0],
    "methods.samples": 9,
    "methods.self_prompts": 9,
    "methods.self_samples": 9,
    "methods.self_epochs": 9,
    "eval.samples": 3,
    "eval.metric": "nll",
    "eval.limit": 4,
    "eval.keep": "last",
    "rollout.max_new_tokens": 9,
    "rollout.batch": 24,
    "rollout.temperature": 0.7,
    "sft.lr": 0.5,
    "sft.epochs": 3,
    "sft.micro_tokens": 3,
    "eval.every": 3,
    "ppo.lr": 0.5,
    "ppo.steps": 3,
    "ppo.max_kl": 9.0,
    "distil.steps": 3,
    "distil.lr": 0.5,
    "seed": 4,
    "model.precision": "bf16",
}
COMMON = {"eval.samples", "rollout.max_new_tokens", "seed", "model.precision"}
SCORE = {f"reward.{k}" for k in ("kind", "token_clip", "clip", "limit_penalty", "length_norm", "at_limit")}
KEPT = {"eval.metric", "eval.limit", "eval.keep"}  # how a step is chosen
SELF = {"sft.lr", "methods.self_epochs"} | KEPT
DECIDES = {
    "extrapolated": COMMON | {"methods.alphas", "eval.metric", "eval.limit"},
    "decoded": COMMON | {"reward.kind", "reward.token_clip", "reward.anchor", "reward.beta"},
    "samples": COMMON - {"eval.samples"} | SCORE | {"methods.samples"},
    "resampled": COMMON | {"reward.anchor", "reward.beta"},  # beside what its samples are
    "best-of-n": COMMON,
    "distil": COMMON
    | {"rollout.batch", "rollout.temperature", "reward.kind", "reward.token_clip", "reward.anchor", "reward.beta"}
    | {"distil.steps", "distil.lr", "ppo.max_kl", "eval.metric", "eval.limit", "eval.keep"},
    "vote": COMMON - {"eval.samples"},
    "weighted-vote": COMMON - {"eval.samples"} | {"reward.anchor", "reward.beta"},
    "prompt-samples": COMMON - {"eval.samples"} | {"methods.self_prompts", "methods.self_samples"},
    "self-distilled": COMMON | SELF,
    "rejection-ft": COMMON | SELF | SCORE,
    "longer-sft-1/16": COMMON | {"sft.lr", "sft.epochs"} | KEPT,
    "chosen-sft": COMMON,
}


@pytest.mark.parametrize("kind", DECIDES)
def test_a_stage_is_known_by_the_settings_it_reads_and_no_others(kind: str) -> None:
    before = stage_settings(Recipe(), kind)
    found = {key for key, v in CHANGES.items() if stage_settings(with_overrides(Recipe(), {key: v}), kind) != before}
    assert found == DECIDES[kind]


def test_all_that_choose_share_the_samples_of_an_sft_model() -> None:
    """One draw a seed for three betas, two anchors and best-of-n."""
    points = [
        Ablation(f"{anchor} {beta}", {"reward.anchor": anchor, "reward.beta": beta})
        for anchor in ("sft", "base")
        for beta in (0.25, 0.5, 1.0)
    ]
    kinds = ("sft", "resampled", "best-of-n", "vote", "weighted-vote")
    arms = tuple(Arm(kind, kind) for kind in kinds)
    sweep = Sweep("s", "?", Recipe(), (), tuple(points), arms, (0, 1), Analysis("unseen", "greedy", ()))
    counts = Counter(task.kind for task in Plan(sweep).tasks.values())
    assert counts == {"sft": 2, "samples": 2, "resampled": 12, "best-of-n": 2, "vote": 2, "weighted-vote": 12}


def test_a_control_is_its_method_under_keys_of_its_own() -> None:
    """Shuffled: the settings of PPO under that reward, whatever the recipe's own is, and no others."""
    recipe = with_overrides(Recipe(), {"reward.kind": "sft", "reward.beta": 0.5})
    shuffled = with_overrides(recipe, {"reward.kind": "shuffled"})
    assert stage_settings(recipe, "shuffled") == stage_settings(shuffled, "ppo") != stage_settings(recipe, "ppo")
    check(["shuffled"], recipe)


def test_what_rloo_does_not_read_is_not_in_its_id() -> None:
    rloo_recipe = with_overrides(Recipe(), {"rollout.per_prompt": 4, "ppo.advantage": "rloo"})
    before = stage_settings(rloo_recipe, "ppo")
    assert before["ppo"]["advantage"] == "rloo" and before["rollout"]["per_prompt"] == 4
    for key, value, same in (("ppo.lam", 0.5, True), ("ppo.value_lr", 0.5, True), ("ppo.lr", 0.5, False)):
        assert (stage_settings(with_overrides(rloo_recipe, {key: value}), "ppo") == before) is same
    assert stage_settings(with_overrides(Recipe(), {"ppo.lam": 0.5}), "ppo") != stage_settings(Recipe(), "ppo")


def test_what_changes_no_result_is_in_no_id() -> None:
    """Micro-batches move rounding and checkpoints what a stop costs: finished stages are found under other ones."""
    free = {"sft.micro_tokens": 2, "ppo.micro_tokens": 12, "ppo.checkpoint_every": 3}
    model = {"model.activation_checkpointing": True, "model.sharding": "full"}
    changed = with_overrides(Recipe(), free | model)
    assert all(stage_settings(changed, kind) == stage_settings(Recipe(), kind) for kind in KINDS)
    assert recipe_id(changed) == recipe_id(Recipe()) != recipe_id(with_overrides(Recipe(), {"ppo.lr": 0.1}))
    said = {"rollout.server": None, "rollout.server_timeout_s": 600.0}
    assert free_settings(changed) == free | said | model
    defaults = {f"{section}.{key}": value for section, keys in FREE.items() for key, value in keys.items()}
    assert free_settings(Recipe()) == defaults | said, "or ids of the default recipe would have moved"


def test_which_server_samples_is_in_no_id_and_that_one_does_is() -> None:
    one, other = ({"rollout.server": f"http://{name}:8000/v1", "rollout.server_timeout_s": 9.0} for name in "ab")
    here, there, elsewhere = (with_overrides(Recipe(), keys) for keys in ({}, one, other))
    assert stage_settings(there, "ppo") == stage_settings(elsewhere, "ppo") != stage_settings(here, "ppo")
    assert stage_settings(there, "sft") == stage_settings(here, "sft")
    assert recipe_id(there) == recipe_id(elsewhere) != recipe_id(here)
    capped = {"rollout.importance_cap": 1.5}
    assert stage_settings(with_overrides(there, capped), "ppo") != stage_settings(there, "ppo")
    assert stage_settings(with_overrides(here, capped), "ppo") == stage_settings(here, "ppo")


def test_keys_that_came_later_left_the_ids_of_before() -> None:
    """The settings by which the default recipe's stages of this epoch were first known."""
    for kind in KINDS:
        settings = stage_settings(Recipe(), kind)
        for section, keys in (
            ("sft", ["optimizer"]),
            ("ppo", ["optimizer"]),
            ("rollout", ["server", "importance_cap"]),
        ):
            assert not set(keys) & set(settings.get(section, {}))
    tree = Recipe().model_dump(mode="json")
    before = {name: dict(section) if isinstance(section, dict) else section for name, section in tree.items()}
    for section, keys in ADDED.items():
        for key in keys:
            del before[section][key]
    assert decisive(tree) == decisive(before), "or folders and registered plans of before would be refused"
    for key, kinds in (
        ("sft.optimizer", ("sft", "longer-sft-1", "rejection-ft")),
        ("ppo.optimizer", ("ppo", "distil")),
    ):
        changed = with_overrides(Recipe(), {key: "sgd"})
        assert all(stage_settings(changed, kind) != stage_settings(Recipe(), kind) for kind in kinds)


def test_parents_come_first_and_once() -> None:
    lengths = ["longer-sft-1", "longer-sft-1/4", "longer-sft-1/16", "longer-sft-1/64", "longer-sft-1/256"]
    assert in_order(["best-of-n", "ppo-chosen", "resampled"]) == [
        *("sft", "samples", "best-of-n"),
        *("ppo", *lengths, "chosen-sft", "ppo-chosen", "resampled"),
    ]


def test_the_rate_of_distillation_must_be_said_for_other_models() -> None:
    given = {"model.base": "folder", "data.demonstrations": "mine.jsonl"}
    check(["distil"], Recipe())
    check(["distil"], with_overrides(Recipe(), {**given, "distil.lr": 1e-5}))
    with pytest.raises(ConfigError, match=r"model\.base is 'folder' but distil\.lr is not set"):
        check(["distil"], with_overrides(Recipe(), given))
    sft_given = {**given, "model.sft": "folder"}  # then no SFT asks for its rate
    with pytest.raises(ConfigError, match=r"sft\.lr is not set, by which self-distilled is trained"):
        check(["self-distilled"], with_overrides(Recipe(), sft_given))
    check(["self-distilled"], with_overrides(Recipe(), {**sft_given, "sft.lr": 1e-5}))


# ---- a kind of one's own


def own_stage(run: PreparedRun, bench: Any, done: Any) -> dict[str, Any]:
    """Registered below as a method that answers as the SFT model does."""
    return UNTRAINED | measure(run, bench, sft_model(run, done))


def own_check(config: RewardConfig) -> None:
    if config.kind == "zero":
        raise ConfigError("reward.kind = zero tells this method nothing")


def test_a_new_method_is_one_entry_and_one_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned, executed, analysed, an arm in the report's tables; refused where its check says so."""
    torch.set_num_threads(1)
    world = make_world(tmp_path)
    own = Kind(
        "own",
        f"{__name__}:own_stage",
        ("reward.beta", "eval.samples"),
        parents=("sft",),
        label="my method",
        check=f"{__name__}:own_check",
        needs_items=True,
    )
    monkeypatch.setitem(KINDS, "own", own)
    recipe = world.recipe()
    points = tuple(Ablation(f"beta {beta}", {"reward.beta": beta}) for beta in (0.5, 1.0))
    arms = (Arm("SFT", "sft"), Arm("my method", "own"))
    sweep = Sweep("grid", "?", recipe, (), points, arms, (0,), Analysis("unseen", "greedy", ()))
    plan = Plan(sweep)
    assert Counter(task.kind for task in plan.tasks.values()) == {"sft": 1, "own": 2}
    ledger = Ledger(Run.open(tmp_path / "sweep", sweep.as_spec()), 1)
    for task in plan.tasks.values():
        execute(task, ledger, console=Console(quiet=True))
    accuracy = {(row["point"], row["arm"]): row["accuracy"] for row in analyse(plan, ledger).rows}
    assert accuracy.keys() == {(point.name, arm.name) for point in points for arm in arms}
    assert accuracy["beta 1.0", "my method"] == accuracy["beta 1.0", "SFT"]

    run = prepare_run(recipe, ["base", "own"], tmp_path / "run", Console(plain=True, file=io.StringIO()))
    assert [*run_stages(run)] == ["base", "sft", "own"]
    rows = {arm.name: arm for arm in arms_of(arm_rows(run.record))}
    assert [*rows] == ["base", "SFT", "my method"] and rows["my method"].figures == rows["SFT"].figures
    assert rows["my method"].flops == rows["SFT"].flops > 0, "its cost includes that of its SFT"
    with pytest.raises(ConfigError, match="tells this method nothing"):
        check(["own"], with_overrides(recipe, {"reward.kind": "zero"}))
