"""Sweeps as values and their plans: what is run, what is shared, and what a bad command line says. No torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

import srppo.cli.app
from srppo.ablations import Ablation, Analysis, Arm, Cell, Sweep, grid
from srppo.ablations.estimate import power_lines
from srppo.ablations.options import build_sweep, read_axis, read_options
from srppo.ablations.plan import Plan, Task, task_key
from srppo.ablations.spec import MOST_COMPARISONS, every
from srppo.ablations.sweeps import ARMS, SWEEPS, parameter_count
from srppo.cli.sweep import SMALL
from srppo.config import Recipe, all_keys, canonical_json, load_recipe, with_overrides
from srppo.errors import ConfigError, SrppoError
from srppo.record.arms import is_sweep
from srppo.record.store import Run
from srppo.stages.kinds import KINDS
from srppo.world import base_path

RECIPE = load_recipe(None, SMALL)
AXIS = {"grid": ["ppo.lr=3e-5,1e-4,3e-4"]}  # what grid needs


def the_sweep(name: str, recipe: Recipe = RECIPE, *, check: bool = True, **options: Any) -> Sweep:
    """check: as the command line builds it, with mistakes refused."""
    read = read_options(name, recipe, **{"axes": AXIS.get(name, []), **options})
    return build_sweep(name, read) if check else SWEEPS[name][0](read)


EVERY_SWEEP = [(name, quick) for name in SWEEPS for quick in (False, True)]
any_sweep = pytest.mark.parametrize(("name", "quick"), EVERY_SWEEP)


# ---- sweeps


@any_sweep
def test_every_sweep_builds_and_survives_json(name, quick):
    sweep = the_sweep(name, quick=quick)
    spec = sweep.as_spec()
    assert is_sweep(spec) and not is_sweep({"recipe": {}, "seeds": [0]})
    again = Sweep.from_spec(json.loads(canonical_json(spec)))
    assert canonical_json(again.as_spec()) == canonical_json(spec)
    del spec["analysis"]["margin"]  # as in records before there was one
    assert Sweep.from_spec(spec).analysis.margin == Analysis.margin == 0.05
    assert again.arms == sweep.arms and again.seeds == sweep.seeds and again.analysis == sweep.analysis
    assert Plan(again).tasks == Plan(sweep).tasks and Plan(again).measured_by == Plan(sweep).measured_by


@any_sweep
def test_every_family_can_be_significant_and_compares_what_is_run(name, quick):
    sweep = the_sweep(name, quick=quick)
    family, cells = sweep.analysis.family, set(sweep.cells())
    assert 1 <= sweep.analysis.comparisons <= MOST_COMPARISONS and len(set(family)) == len(family)
    assert all(each.model in cells and each.baseline in cells and each.model != each.baseline for each in family)
    assert len(sweep.seeds) == (3 if quick else 10) and 2 ** (1 - 10) * MOST_COMPARISONS < 0.05
    assert len(cells) == len(sweep.points) * len(sweep.arms) == len(sweep.cells())
    assert sweep.question.endswith("?")


@any_sweep
def test_axes_name_values_that_every_point_has(name, quick):
    sweep = the_sweep(name, quick=quick)
    measured = {"parameters"} if name == "model-scale" else set()  # of an axis that is no number
    assert all(set(point.values) == {*sweep.axes, *measured} for point in sweep.points)
    if sweep.analysis.trend is not None:
        values = [point.values[sweep.analysis.trend] for point in sweep.points]
        assert all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        assert sweep.analysis.scale == "linear" or min(values) > 0


def test_a_given_sft_model_leaves_no_arm_at_equal_compute(tmp_path):
    recipe = with_overrides(RECIPE, {"model.sft": str(tmp_path)})
    sweep = the_sweep("method", recipe)
    assert "longer SFT, SRPPO from chosen SFT are left out" in " ".join(sweep.notes)
    left = {"longer SFT", "SRPPO from chosen SFT", "SFT with weight decay"}
    assert not left & {arm.name for arm in sweep.arms} and "rejection FT" in {arm.name for arm in sweep.arms}
    assert not any(left & {each.model.arm, each.baseline.arm} for each in sweep.analysis.family)
    Plan(sweep)
    for name in ("data-size", "data-prompts", "noise", "model-scale"):
        with pytest.raises(ConfigError, match=r"model\.sft is given"):
            the_sweep(name, recipe)


def test_a_grid_is_every_combination_the_last_axis_fastest():
    points = grid(**{"ppo.lr": (1e-5, 3e-5), "reward.kind": ("ratio", "zero"), "ppo.steps": (5,)})
    assert [tuple(point.overrides.values()) for point in points] == [
        (1e-5, "ratio", 5),
        (1e-5, "zero", 5),
        (3e-5, "ratio", 5),
        (3e-5, "zero", 5),
    ]
    assert points[0].name == "lr 1e-05, kind ratio, steps 5"


def test_what_could_not_be_analysed_is_refused():
    point, arms = Ablation("all", {}), (Arm("SFT", "sft"), Arm("SRPPO", "ppo"))
    plain: dict[str, Any] = {"name": "s", "question": "?", "recipe": RECIPE, "axes": (), "arms": arms, "seeds": (0, 1)}
    nothing = Analysis("unseen", "greedy", ())

    def build(points: tuple[Ablation, ...] = (point,), **changes: Any) -> Sweep:
        return Sweep(**{**plain, "points": points, "analysis": nothing, **changes})

    assert len(build().cells()) == 2
    stranger = Analysis("unseen", "greedy", every((point,), "SRPPO", "RLOO"))
    many = tuple(Ablation(f"p{i}", {}) for i in range(MOST_COMPARISONS + 1))
    too_many = Analysis("unseen", "greedy", every(many, "SRPPO", "SFT"))
    bad: list[tuple[str, dict[str, Any]]] = [
        ("axis is empty", {"points": ()}),
        ("one or more, each once", {"seeds": ()}),
        ("one or more, each once", {"seeds": (1, 1)}),
        ("point 'all' twice", {"points": (point, point)}),
        ("arm 'SFT' twice", {"arms": (*arms, Arm("SFT", "ppo"))}),
        ("compares 'RLOO' at 'all', which it does not run", {"analysis": stranger}),
        ("would test 26 differences", {"points": many, "analysis": too_many}),
        ("would test 26 differences", {"points": many, "analysis": too_many, "seeds": tuple(range(99))}),
    ]
    for words, changes in bad:
        with pytest.raises(ConfigError, match=words) as error:
            build(**changes)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data.size=4,16", ("data.size", (4, 16))),
        (" ppo.lr = 1e-5 , 3e-5", ("ppo.lr", (1e-5, 3e-5))),
        ("reward.kind=ratio,zero", ("reward.kind", ("ratio", "zero"))),
        ("model.base=embedded:xs,embedded:s", ("model.base", ("embedded:xs", "embedded:s"))),
        ("reward.scale=true,false", ("reward.scale", (True, False))),
        ("data.overlap_share=none,0.5", ("data.overlap_share", (None, 0.5))),
        ('data.system="Be brief, please.","Sing."', ("data.system", ("Be brief, please.", "Sing."))),
        ('data.prompts=["a", "b"],["c"]', ("data.prompts", (["a", "b"], ["c"]))),
    ],
)
def test_axes_are_read_as_toml_or_as_plain_words(text, expected):
    assert read_axis(text) == expected


def test_a_grid_takes_any_arms():
    given = "SFT, longer SFT,best-of-n,RLOO,SRPPO"
    sweep = the_sweep("grid", arms=given)
    assert [arm.name for arm in sweep.arms] == [name.strip() for name in given.split(",")]
    assert {(each.model.arm, each.baseline.arm) for each in sweep.analysis.family} == {
        ("SRPPO", name) for name in ("SFT", "longer SFT", "best-of-n", "RLOO")
    }
    assert kinds(Plan(sweep))["best-of-n"] == 10, "which no learning rate of PPO changes"
    without = the_sweep("grid", arms="base,SFT,resampling", axes=["reward.beta=0.25,0.5"])
    assert {(each.model.arm, each.baseline.arm) for each in without.analysis.family} == {("base", "SFT")}
    assert "no greedy answers, so not tested: resampling" in without.notes
    assert (
        the_sweep(
            "grid",
            axes=["ppo.advantage=gae,rloo"],
            arms="SRPPO",
            recipe=with_overrides(RECIPE, {"rollout.per_prompt": 4}),
        ).analysis.family
        == ()
    )
    variants = ["SFT with weight decay", "SFT by held-out loss"]
    asked_for = (
        "longer SFT, equal compute",
        "sharpening",
        "by length",
        "beyond length",
        "SRPPO from equal-compute SFT",
    )
    others = [name for name in list(ARMS)[2:] if name not in asked_for]
    assert [arm.name for arm in the_sweep("method").arms] == ["SFT", *variants, *others]


def test_method_takes_any_arms_too():
    """Those that no default holds among them; a name may have a comma."""
    sweep = the_sweep("method", arms="SFT,longer SFT, equal compute ,sharpening,SRPPO,SRPPO from equal-compute SFT")
    assert [(arm.name, arm.kind) for arm in sweep.arms] == [
        ("SFT", "sft"),
        ("longer SFT, equal compute", "longer-sft-1"),
        ("sharpening", "ppo"),
        ("SRPPO", "ppo"),
        ("SRPPO from equal-compute SFT", "ppo-equal"),
    ]
    assert {(each.model.arm, each.baseline.arm) for each in sweep.analysis.family} == {
        ("SRPPO", arm.name) for arm in sweep.arms if arm.name != "SRPPO"
    }
    assert kinds(Plan(sweep)) == {"sft": 10, "ppo": 20, "longer-sft-1": 10, "ppo-equal": 10}
    recipes = {arm.name: sweep.recipe_of(Cell("all", arm.name), 0).reward.kind for arm in sweep.arms}
    assert recipes["sharpening"] == "sft" and recipes["SRPPO"] == recipes["SRPPO from equal-compute SFT"] == "ratio"


def test_the_trend_of_model_scale_is_over_parameters(tmp_path):
    """Counted from headers; safetensors' own reader is the oracle."""
    for name, widths in (("one", (4,)), ("two", (4, 8)), ("same", (8, 4))):
        (tmp_path / name).mkdir()
        for i, width in enumerate(widths):
            save_file({f"w{i}": np.zeros((3, width)), f"b{i}": np.zeros(())}, tmp_path / name / f"m-{i}.safetensors")
    assert [parameter_count(str(tmp_path / name)) for name in ("one", "two", "nowhere")] == [13, 38, None]
    sweep = the_sweep("model-scale")
    assert (sweep.axes, sweep.analysis.trend, sweep.analysis.scale) == (("base",), "parameters", "log2")
    for point in sweep.points:
        with safe_open(base_path(point.name.partition(":")[2]) / "model.safetensors", "numpy") as file:
            keys = list(file.keys())  # which is no mapping
            count = sum(int(np.prod(file.get_slice(key).get_shape())) for key in keys)
        assert point.values == {"base": point.name, "parameters": count}
    recipe = with_overrides(RECIPE, {"model.base": str(tmp_path / "one")})
    for other in ("org/name", str(tmp_path / "same")):
        found = the_sweep("model-scale", recipe, axes=[f"model.base={tmp_path / 'one'},{tmp_path / 'two'},{other}"])
        assert found.analysis.trend is None and "no slope along the number of parameters" in " ".join(found.notes)


# ---- plans


@any_sweep
def test_parents_come_first_and_each_stage_once(name, quick):
    plan = Plan(the_sweep(name, quick=quick))
    seen: set[str] = set()
    for key, task in plan.tasks.items():
        assert key == task.key and set(task.needs) <= seen and key not in seen
        assert tuple(plan.tasks[need].kind for need in task.needs) == KINDS[task.kind].parents
        assert {plan.tasks[need].recipe.seed for need in task.needs} <= {task.recipe.seed}
        seen.add(key)
    measured = set(plan.measured_by.values())
    needed = {need for task in plan.tasks.values() for need in task.needs}
    assert measured | needed == set(plan.tasks), "a stage that nothing asks for"
    assert set(plan.measured_by) == {(cell, seed) for cell in plan.sweep.cells() for seed in plan.sweep.seeds}


@any_sweep
def test_arms_of_a_seed_share_sft_and_seeds_share_nothing(name, quick):
    sweep = the_sweep(name, quick=quick)
    plan = Plan(sweep)
    for point in sweep.points:
        for seed in sweep.seeds:
            own = {"base", *(arm.kind for arm in sweep.arms if arm.overrides.keys() & {"sft.epochs", "sft.steps"})}
            roots = {
                root(plan, plan.measured_by[Cell(point.name, arm.name), seed])
                for arm in sweep.arms
                if arm.kind not in own
            }
            assert len(roots) == 1, f"{point.name}: arms start from different SFT models"
    by_seed = [{key for key, task in plan.tasks.items() if task.recipe.seed == seed} for seed in sweep.seeds]
    assert sum(map(len, by_seed)) == len(set().union(*by_seed)) == len(plan.tasks)


def lengths(count: int) -> dict[str, int]:
    """The stages of longer SFT, each so many times."""
    return dict.fromkeys([*(kind.name for kind in KINDS.values() if kind.share), "chosen-sft"], count)


def root(plan: Plan, key: str) -> str:
    """The first of the stages that lead to a task."""
    needs = plan.tasks[key].needs
    return root(plan, needs[0]) if needs else key


def kinds(plan: Plan) -> dict[str, int]:
    found: dict[str, int] = {}
    for task in plan.tasks.values():
        found[task.kind] = found.get(task.kind, 0) + 1
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # 4 sizes x 2 budgets, but 32 demonstrations are not among them: same steps is never same epochs
        ("data-size", {"sft": 80, "ppo": 80, "shuffled": 80, **lengths(80)}),
        (
            "noise",
            {"sft": 90, "ppo": 90, "shuffled": 90, "decoded": 90, **lengths(90)},
        ),  # 4 kinds x 2 rates, rate 0 once
        ("model-scale", {"base": 30, "sft": 30, "ppo": 30, "shuffled": 30, **lengths(30)}),
        ("reward", {"sft": 10, "ppo": 400, **lengths(10)}),  # 10 curves, of 4 betas each
        # 2 anchors x 4 betas from the same samples, and longer SFT once for all of them
        ("kl", {"sft": 10, "ppo": 80, "shuffled": 80, "samples": 10, "resampled": 80, **lengths(10)}),
        ("prompts", {"sft": 10, "ppo": 90, "shuffled": 90, **lengths(10)}),
    ],
)
def test_what_a_point_leaves_alone_is_run_once(name, expected):
    assert kinds(Plan(the_sweep(name))) == expected


@any_sweep
def test_every_sweep_has_the_controls(name, quick):
    """Longer SFT and a reward that knows nothing, and SRPPO is tested against longer SFT at every point."""
    sweep = the_sweep(name, quick=quick)
    if name == "length":  # which asks how long answers are, not how right
        assert [arm.name for arm in sweep.arms] == ["SFT", "SRPPO", "shuffled"]
        return
    assert {"SFT", "longer SFT", "shuffled"} <= {arm.name for arm in sweep.arms}
    if name == "reward":  # which compares at equal distance
        assert not sweep.analysis.family
        return
    against = {each.model.point for each in sweep.analysis.family if each.baseline.arm == "longer SFT"}
    measured = Plan(sweep).measured_by
    by_key = {measured[Cell(point.name, "SRPPO"), sweep.seeds[0]]: point.name for point in reversed(sweep.points)}
    assert against == set(by_key.values()), "of points that are the same stages, the first"


def test_a_slope_along_a_wide_axis_is_per_doubling():
    assert the_sweep("grid", axes=["ppo.lr=3e-5,1e-4,3e-4"]).analysis.scale == "log2"
    assert the_sweep("grid", axes=["ppo.lam=0,0.5,1"]).analysis.scale == "linear", "0 has no logarithm"
    assert the_sweep("grid", axes=["reward.beta=0.5,0.75,1"]).analysis.scale == "linear"


def test_prompts_beyond_what_ppo_draws_are_no_point_of_their_own():
    sweep = the_sweep("data-prompts")
    found = [(point.overrides["data.size"], point.overrides["data.prompts_size"]) for point in sweep.points]
    assert found == [(32, 32), (32, 320), (32, 960), (256, 256), (256, 960), (1792, 960)]
    assert "256 demonstrations, 10x and 100x: PPO draws 960 prompts in all" in " ".join(sweep.notes)
    assert kinds(Plan(sweep))["sft"] == 30, "one SFT model for all numbers of prompts"


def test_whole_arms_are_left_out_of_a_family_that_would_be_too_many():
    sweep = the_sweep("kl", axes=["reward.anchor=sft", "reward.beta=0.125,0.25,0.5", "ppo.steps=5,10,20,40"])
    pairs = [(each.model.arm, each.baseline.arm) for each in sweep.analysis.family]
    assert pairs == [("SRPPO", "SFT")] * 12 + [("SRPPO", "longer SFT")] * 12
    dearest = "lengths are shares of the compute at anchor sft, beta 0.125, 40 steps"
    assert any(dearest in note for note in sweep.notes)
    assert {sweep.recipe_of(cell, 0).ppo.steps for cell in sweep.cells() if cell.arm == "longer SFT"} == {40}
    grid_sweep = the_sweep("grid", axes=["ppo.lr=" + ",".join(f"{n}e-5" for n in range(1, 13))])
    assert "outside the plan's tests, which would be more than 25: SRPPO minus shuffled" in grid_sweep.notes


def test_longer_sft_is_shared_only_where_the_sft_model_is():
    shared = {name: any("longer SFT is the same" in note for note in the_sweep(name).notes) for name in SWEEPS}
    assert {name for name, one in shared.items() if one} == {"kl", "overlap", "prompts", "reward", "grid"}


BASES = "embedded:xs, embedded:xs-1"


def test_seeds_take_turns_with_the_pretrainings():
    """Whatever the point or the arm, so that arms of a seed stay paired; a point's own base goes before."""
    sweep = build_sweep("kl", read_options("kl", RECIPE, seeds=3, bases=BASES))
    assert Sweep.from_spec(json.loads(json.dumps(sweep.as_spec()))) == sweep
    for cell in sweep.cells():
        bases = [sweep.recipe_of(cell, seed).model.base for seed in sweep.seeds]
        assert bases == ["embedded:xs", "embedded:xs-1", "embedded:xs"]
    assert kinds(Plan(sweep))["sft"] == 3
    for name, axes in (("model-scale", []), ("grid", ["model.base=embedded:s,embedded:l"])):
        with pytest.raises(ConfigError, match="--bases gives each seed a base in turn"):
            read_options(name, RECIPE, axes=axes, bases=BASES)


def test_what_has_no_answers_under_the_primary_decoding_is_not_tested():
    for primary, without in (("unseen/greedy", {"resampling"}), ("unseen/sampled", {"majority vote", "weighted vote"})):
        sweep = the_sweep("method", primary=primary)
        tested = {arm for each in sweep.analysis.family for arm in (each.model.arm, each.baseline.arm)}
        assert {arm.name for arm in sweep.arms} - tested == without
    assert the_sweep("kl").analysis.decoding == "sampled", "the optimum is a distribution"


def test_noise_reaches_the_development_items():
    sweep = the_sweep("noise")
    assert all(sweep.recipe_of(cell, 0).data.noise_dev for cell in sweep.cells())
    both = the_sweep("noise", axes=["data.noise_dev=true,false", "data.noise=near-miss"], rates="0,0.7")
    assert [point.values["noisy_dev"] for point in both.points] == [True, False] * 2
    plans = [Plan(each) for each in (sweep, both)]
    assert [kinds(plan)["sft"] for plan in plans] == [90, 30], "at rate 0 there is nothing to be noisy"
    names = {point.name.partition(" ")[0] for point in sweep.points}
    assert names == {"derangement", "base-answers", "wrong-task", "near-miss"}


def test_overlap_shares_the_demonstrations_sft(name="overlap"):
    found = kinds(Plan(the_sweep(name)))
    assert found["ppo"] == 50 and found["sft"] == 10


def test_the_method_sweep_tells_its_arms_apart():
    plan = Plan(the_sweep("method"))
    keys = [plan.measured_by[cell, 0] for cell in plan.sweep.cells()]
    assert len(set(keys)) == len(keys) == 18
    assert kinds(plan)["sft"] == 30 and kinds(plan)["ppo"] == 20  # SFT and its two variants; SRPPO and RLOO


def test_the_plan_depends_on_neither_the_order_of_axes_nor_of_values():
    axes = ["ppo.lr=1e-5,3e-5", "reward.beta=0.5,1.0", "sft.lr=1e-4,2e-4"]
    plans = [Plan(the_sweep("grid", axes=order, quick=True)) for order in (axes, axes[::-1])]
    backwards = ["sft.lr=2e-4,1e-4", "reward.beta=1.0,0.5", "ppo.lr=3e-5,1e-5"]
    plans.append(Plan(the_sweep("grid", axes=backwards, quick=True)))
    needs = [{key: (task.kind, task.needs) for key, task in plan.tasks.items()} for plan in plans]
    assert needs[0] == needs[1] == needs[2]
    assert plans[0].measured_by != plans[1].measured_by  # points are named in the order of axes
    assert sorted(plans[0].measured_by.values()) == sorted(plans[1].measured_by.values())


def test_keys_are_the_same_in_another_process_folder_and_hash_seed(tmp_path):
    program = (
        "from srppo.ablations.plan import Plan; from srppo.ablations.options import *; from srppo.config import *; "
        "from srppo.cli.sweep import SMALL; import sys; "
        "print(*Plan(build_sweep('kl', read_options('kl', load_recipe(None, SMALL)))).tasks); "
        "assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(srppo.cli.app.__file__).parents[2])}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == list(Plan(the_sweep("kl")).tasks), done.stderr


# What a setting changes, by the longest prefix of its key: an oracle beside `kinds.stage_settings`.
BASE, SFT, PPO, LONGER = "base", "sft", "ppo", "longer-sft-1/4"
ALL, TRAINED, FROM_PPO = {BASE, SFT, PPO, LONGER}, {SFT, PPO, LONGER}, {PPO, LONGER}
CHANGES: dict[str, set[str]] = {
    "": ALL,
    "sft.": TRAINED,
    "rollout.": FROM_PPO,
    "rollout.max_new_tokens": ALL,
    "rollout.server_timeout_s": set(),
    "rollout.importance_cap": set(),
    "reward.": FROM_PPO,
    "ppo.": FROM_PPO,
    "eval.every": FROM_PPO,
    "eval.curve": FROM_PPO,
    "ppo.value_coef": set(),
    "model.lora_": set(),
    "model.activation_checkpointing": set(),
    "model.sharding": set(),
    "sft.micro_tokens": set(),
    "ppo.micro_tokens": set(),
    "ppo.checkpoint_every": set(),
    "data.prompts": FROM_PPO,
    "data.prompts_size": FROM_PPO,
    "data.overlap": FROM_PPO,
    "methods.": set(),
    "distil.": set(),
}
OTHER: dict[str, list[dict[str, Any]]] = {
    "seed": [{"seed": 5}],
    "model.base": [{"model.base": "embedded:l"}],
    "model.sft": [{"model.sft": "folder"}],
    "model.precision": [{"model.precision": "bf16"}],
    "model.kernels": [{"model.kernels": "reference"}],
    "model.scoring": [{"model.scoring": "bf16"}],
    "model.adapters": [{"model.adapters": "lora"}],
    "model.sharding": [{"model.sharding": "full"}],
    "model.lora_targets": [{"model.lora_targets": ["q_proj"]}],
    "ppo.critic": [{"ppo.critic": "shared"}],
    "model.trust_remote_code": [{"model.trust_remote_code": True}],
    "model.allow_pickle": [{"model.allow_pickle": True}],
    "data.demonstrations": [{"data.demonstrations": ["mine.jsonl"]}],
    "data.prompts": [{"data.prompts": ["embedded:unseen"]}],
    "data.noise_rate": [{"data.noise": "derangement", "data.noise_rate": 0.5}],
    "data.noise": [{"data.noise": "near-miss", "data.noise_rate": 0.5}],
    "data.noise_dev": [{"data.noise": "near-miss", "data.noise_rate": 0.5, "data.noise_dev": True}],
    "data.overlap": [{"data.overlap": "minimum"}],
    "data.overlap_share": [{"data.overlap_share": 0.5}],
    "data.system": [{"data.system": "Be brief."}],
    "sft.schedule": [{"sft.schedule": "cosine"}],
    "rollout.per_prompt": [{"rollout.per_prompt": 4}],
    "rollout.server": [{"rollout.server": "http://localhost:8000/v1"}],
    "sft.optimizer": [{"sft.optimizer": "sgd"}],
    "ppo.optimizer": [{"ppo.optimizer": "sgd"}],
    "reward.kind": [{"reward.kind": kind} for kind in ("sft", "base", "zero", "shuffled")],
    "reward.placement": [{"reward.placement": "token"}],
    "reward.at_limit": [{"reward.at_limit": "drop"}],
    "reward.anchor": [{"reward.anchor": "base"}],
    "reward.center": [{"reward.center": center} for center in ("none", "critic")],
    "reward.kl": [{"reward.kl": "k3"}],
    "ppo.advantage": [{"ppo.advantage": "rloo", "rollout.per_prompt": 4}],
    "ppo.schedule": [{"ppo.schedule": "cosine"}],
    "eval.items": [{"eval.items": "mine.jsonl"}],
    "eval.keep": [{"eval.keep": "last"}],
    "eval.curve": [{"eval.curve": [5, 10]}],
    "eval.metric": [{"eval.metric": "nll"}],
    "methods.alphas": [{"methods.alphas": [1.0, 3.0]}],
    "model.chat_template": [{"model.chat_template": __file__}],  # whatever it says: its content is what counts
    "model.template_kwargs": [{"model.template_kwargs": {"enable_thinking": False}}],
    "data.turns": [{"data.turns": "all"}],
}
NUMBERS = {
    "data.size": 7, "data.prompts_size": 7, "data.held_out": 0.3, "data.max_prompt_tokens": 100, "data.max_tokens": 900,
    "sft.steps": 9, "reward.token_clip": 2.0, "reward.clip": 2.0, "ppo.gamma": 0.5, "ppo.lam": 0.5,
    "ppo.lam_length": 0.5, "ppo.critic_lam": 0.5, "ppo.warmup": 0.5, "sft.warmup": 0.5,
    "ppo.target_kl": 0.5, "ppo.minibatches": 3, "eval.limit": 9, "ppo.value_clip": None, "rollout.batch": 48,
}  # fmt: skip


def another_value(key: str) -> list[dict[str, Any]]:
    """Settings that differ from the default in this key."""
    if key in OTHER:
        return OTHER[key]
    if key in NUMBERS:
        return [{key: NUMBERS[key]}]
    section, _, name = key.partition(".")
    now = getattr(getattr(RECIPE, section), name)
    return [{key: (not now) if isinstance(now, bool) else now + type(now)(2)}]


def keys_of(recipe: Recipe) -> dict[str, str]:
    """The key of each trained kind, on the way from the base to longer SFT."""
    sft = task_key("sft", recipe)
    ppo = task_key("ppo", recipe, (sft,))
    return {BASE: task_key(BASE, recipe), SFT: sft, PPO: ppo, LONGER: task_key(LONGER, recipe, (sft, ppo))}


def changed(before: Recipe, after: Recipe) -> set[str]:
    old, new = keys_of(before), keys_of(after)
    return {kind for kind in old if old[kind] != new[kind]}


@pytest.mark.parametrize("key", all_keys())
def test_a_setting_changes_the_stages_that_read_it_and_no_other(key):
    prefix = max((each for each in CHANGES if key.startswith(each)), key=len)
    for overrides in another_value(key):
        assert changed(RECIPE, with_overrides(RECIPE, overrides)) == CHANGES[prefix], overrides


EXCLUSIVE = {
    "data.noise",
    "data.noise_dev",
    "data.overlap",
    "ppo.advantage",
    "ppo.gamma",
}  # some values go only with some of others


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.sampled_from(sorted(set(all_keys()) - EXCLUSIVE)), max_size=6),
    st.data(),
)
def test_settings_change_keys_independently_of_one_another(keys, data):
    """The stages that several changes touch together are those that they touch one by one; and back again."""
    chosen = {key: data.draw(st.sampled_from(another_value(key))) for key in dict.fromkeys(keys)}
    recipe, expected = RECIPE, set()
    for overrides in chosen.values():
        expected |= changed(RECIPE, with_overrides(RECIPE, overrides))
        recipe = with_overrides(recipe, overrides)
    assert changed(RECIPE, recipe) == expected
    assert keys_of(Recipe.model_validate(json.loads(recipe.model_dump_json()))) == keys_of(recipe)


@pytest.mark.parametrize(
    ("same", "as_"),
    [
        ({"data.noise_dev": True}, {}),
        ({"data.noise": "derangement", "data.noise_rate": 0.0}, {}),
        ({"data.noise": "near-miss", "data.noise_rate": 0.0}, {"data.noise": "derangement", "data.noise_rate": 0.0}),
    ],
)
def test_settings_that_come_to_the_same_share_their_stages(same, as_):
    assert not changed(with_overrides(RECIPE, as_), with_overrides(RECIPE, same))


def test_rloo_reads_no_critic():
    rloo = with_overrides(RECIPE, {"ppo.advantage": "rloo", "rollout.per_prompt": 4})
    assert not changed(rloo, with_overrides(rloo, {"ppo.value_lr": 0.1, "ppo.lam": 0.1, "ppo.value_clip": 3.0}))


def test_methods_read_only_their_own_settings():
    def key(kind: str, recipe: Recipe) -> str:
        return task_key(kind, recipe, tuple(key(parent, recipe) for parent in KINDS[kind].parents))

    more = with_overrides(RECIPE, {"methods.samples": 9, "methods.alphas": [1.0]})
    beta = with_overrides(RECIPE, {"reward.beta": 3.0})
    steps = with_overrides(RECIPE, {"ppo.steps": 3})
    expected = {"extrapolated": (True, False), "decoded": (False, True), "resampled": (True, True)}
    for kind, moves in {**expected, "best-of-n": (True, False)}.items():
        assert (key(kind, RECIPE) != key(kind, more), key(kind, RECIPE) != key(kind, beta)) == moves, kind
        assert key(kind, RECIPE) == key(kind, steps)


def test_shares_and_parents_tell_tasks_apart():
    sft = task_key("sft", RECIPE)
    keys = [task_key(kind, RECIPE, (sft, "p")) for kind in ("longer-sft-1", "longer-sft-1/4")]
    assert len({*keys, task_key("longer-sft-1", RECIPE, (sft, "q"))}) == 3
    assert "1/4" in Task("k", "longer-sft-1/4", RECIPE, ()).name


# ---- bad input


def command(monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    """`srppo ...` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["srppo", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        srppo.cli.app.main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["data-sise"], "did you mean 'data-size'?"),
        (["nonsense"], "there are: data-size, data-prompts, noise"),
        (["grid"], "grid needs axes"),
        (["grid", "--axis", "ppo.lr="], "the axis ppo.lr is empty"),
        (["data-size", "--sizes", ","], "the axis data.size is empty"),
        (["data-size", "--sizes", ""], "the axis data.size is empty"),
        (["noise", "--rates", ""], "the axis data.noise_rate is empty"),
        (["grid", "--axis", "ppo.lrr=1,2"], "unknown key 'ppo.lrr' in --axis; did you mean 'ppo.lr'?"),
        (["grid", "--axis", "ppo=1,2"], "is a section, not a value"),
        (["grid", "--axis", "1,2"], "unknown key '1,2'"),
        (["kl", "--axis", "sft.lr=1e-4,2e-4"], "sft.lr is no axis of kl"),
        (["grid", "--axis", "ppo.lr=1e-4", "--arms", "SFT,SRPO"], "unknown arm 'SRPO', did you mean 'SRPPO'?"),
        (["grid", "--axis", "ppo.lr=1e-4", "--arms", ""], "there are: base, SFT, longer SFT, weight extrapolation"),
        (["grid", "--axis", "ppo.lr=1e-4", "--arms", "SFT,SFT"], "has the arm 'SFT' twice"),
        (["kl", "--arms", "SFT"], "the arms of kl are fixed; `srppo ablate grid --arms ...` takes any"),
        (["method", "--axis", "ppo.lr=1e-4"], "it has no axis to change"),
        (["data-size", "--rates", "0.1"], "data.noise_rate is no axis of data-size"),
        (["grid", "--axis", "ppo.lr=1e-5", "--axis", "ppo.lr=2e-5"], "is given twice"),
        (["data-size", "--sizes", "4,4"], "has 4 twice"),
        (["noise", "--rates", "0,1.5"], "data.noise_rate: Input should be less than or equal to 1"),
        (["noise", "--rates", "-0.1,0.5"], "data.noise_rate: Input should be greater than or equal to 0"),
        (["noise", "--rates", "some"], "data.noise_rate"),
        (["data-size", "--sizes", "0,4"], "data.size: Input should be greater than or equal to 1"),
        (["data-size", "--sizes", "few"], "data.size"),
        (["overlap", "--axis", "data.overlap_share=0,2"], "data.overlap_share"),
        (["reward", "--set", "ppo.stepps=3"], "did you mean 'ppo.steps'?"),
        (["reward", "--primary", "nowhere"], "no group of the items; there are: demonstrated, prompted, unseen"),
        (["reward", "--primary", "unseen/loudly"], "is no decoding"),
        (["reward", "--margin", "0"], "margin 0.0 of sweep reward: give a difference of accuracy between 0 and 1"),
        (["reward", "--engine", "cloud"], "engine 'cloud' is unknown; there are local, ray, slurm"),
        (["reward", "missing.toml"], "missing.toml does not exist"),
        (["reward", "--set", "data.demonstrations=mine.jsonl"], "set eval.items"),
        (["reward", "--set", "eval.items=missing.jsonl"], "missing.jsonl cannot be read"),
        (["kl", "--axis", "reward.beta=" + ",".join(map(str, range(1, 28)))], "trim an axis"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "ablate", *argv) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("error: ") and words in line and out == ""
    assert list(tmp_path.iterdir()) == [], "nothing is left on disk"


def test_sizes_beyond_the_data_are_one_line_before_anything_is_trained(tmp_path, monkeypatch, capfd):
    """The data are read in a process of its own: this one never loads torch."""
    monkeypatch.chdir(tmp_path)
    argv = ["data-size", "--sizes", "8,9999", "--quick", "--seeds", "1", "--plain"]
    assert command(monkeypatch, "ablate", *argv) == 2
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert "data.size asks for 9,999 demonstrations to train on, but only" in lines[-1]
    assert "Traceback" not in "".join(lines) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv", [["--seeds", "0"], ["--slots", "0"], ["--timeout", "0"], ["--seeds", "few"]])
def test_impossible_numbers_are_refused_by_the_command_line(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "ablate", "reward", *argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and argv[0] in line and list(tmp_path.iterdir()) == []


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["reward", "--quick"], "holds data-size, not reward"),
        (["data-size", "--quick", "--seeds", "4"], "seeds"),
        (["data-size", "--quick", "--set", "ppo.lr=1e-3"], "recipe.ppo.lr: 0.0003 there, 0.001 now"),
        (["data-size", "--quick", "--sizes", "8,16"], "points"),
    ],
)
def test_a_folder_of_another_sweep_or_with_other_settings_is_refused(argv, words, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "sweep"
    Run.open(folder, the_sweep("data-size", quick=True).as_spec())
    before = contents(folder)
    assert command(monkeypatch, "ablate", *argv, "--out", folder) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line and "--out another folder" in line
    assert contents(folder) == before


def test_a_plan_is_registered_before_the_sweep_and_holds_it(tmp_path, monkeypatch, capsys):
    """--plan writes sweep.json where --out says, and nothing else; a run of another plan is then refused there."""
    monkeypatch.chdir(tmp_path)
    argv = ["ablate", "data-size", "--quick", "--sizes", "8,16"]
    assert command(monkeypatch, *argv, "--plan", "--plain") == 0
    assert list(tmp_path.iterdir()) == [], "without --out nothing is written"
    assert command(monkeypatch, *argv, "--plan", "--plain", "--out", tmp_path / "plan") == 0
    assert "registered: " in capsys.readouterr().err
    assert list(contents(tmp_path / "plan")) == ["sweep.json"]
    assert Run.load(tmp_path / "plan").spec["analysis"]["margin"] == 0.05
    assert command(monkeypatch, *argv, "--margin", "0.1", "--out", tmp_path / "plan") == 2
    assert "made with other settings (analysis.margin" in capsys.readouterr().err


def test_folders_that_are_no_sweep_are_refused(tmp_path, monkeypatch, capsys):
    Run.open(tmp_path / "run", {"recipe": RECIPE.model_dump(mode="json"), "seeds": [0]})
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("mine")
    before = contents(tmp_path)
    for argv, words in [
        (["ablate", "reward", "--out", tmp_path / "run"], "holds no sweep but a single run, not reward"),
        (["ablate", "reward", "--out", tmp_path / "thesis"], "holds 'thesis.tex' but no sweep.json"),
        (["worker", tmp_path / "run"], "is the record of a single run, not of a sweep"),
        (["worker", tmp_path / "thesis"], "sweep.json"),
        (["worker", tmp_path / "nowhere"], "nowhere"),
    ]:
        assert command(monkeypatch, *argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and words in line, line
    assert contents(tmp_path) == before


def test_items_without_a_default_group_must_be_told_apart(tmp_path):
    file = tmp_path / "items.jsonl"
    groups = ("one", "one", "two", "two")  # every second row is a test item
    file.write_text("".join(json.dumps({"prompt": "p", "answer": "a", "group": g}) + "\n" for g in groups))
    recipe = with_overrides(RECIPE, {"eval.items": str(file)})
    with pytest.raises(SrppoError, match="--primary one/greedy"):
        read_options("reward", recipe)
    assert read_options("reward", recipe, primary="two").primary == ("two", "greedy")
    assert read_options("reward", recipe, primary="one/sampled").primary == ("one", "sampled")


@pytest.mark.parametrize(
    "argv", [["ablate", "reward"], ["train"], ["sft"], ["demo"], ["demo", "--build"]], ids=" ".join
)
@pytest.mark.parametrize("name", ["dangling", "x" * 300, "/proc/nope", "file/run"])
def test_a_folder_that_cannot_be_made_is_said_before_anything_is_loaded(argv, name, tmp_path, monkeypatch, capsys):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    assert command(monkeypatch, *argv, "--out", tmp_path / name) == 2
    *said, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "give --out another folder" in line
    assert all(each.startswith("run folder: ") for each in said), "nothing was measured"


# ---- what a review found


def test_no_noise_is_said_as_on_the_command_line():
    """`none` stands for None at every key; at data.noise it is a value of its own."""
    recipe = load_recipe(None, [*SMALL, "data.noise=none"])
    assert recipe == RECIPE and recipe.data.noise == "none"
    sweep = the_sweep("noise", axes=["data.noise=none,truncation"], rates="0")
    assert [point.name for point in sweep.points] == ["none 0", "truncation 0"]
    other = with_overrides(RECIPE, {"data.noise": "truncation"})
    found = the_sweep("grid", other, axes=["data.noise=none,truncation", "ppo.lr=1e-5,3e-5"], check=False)
    assert [found.recipe_of(Cell(p.name, "SRPPO"), 0).data.noise for p in found.points[::2]] == ["none", "truncation"]


@pytest.mark.parametrize(("seeds", "words"), [(1, "with 1 seed no"), (2, "with 2 seeds no")])
def test_a_plan_that_can_show_nothing_warns(seeds, words):
    (line,) = power_lines(Plan(the_sweep("overlap", seeds=seeds)), 60)
    assert words in line and "15 tests of the plan take 10 seeds (one alone 6)" in line


def test_seeds_are_no_axis_and_an_axis_that_nothing_reads_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "ablate", "grid", "--axis", "seed=5,6") == 2
    assert "give their number with --seeds" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="the same to SFT, longer SFT, shuffled, SRPPO"):
        the_sweep("grid", axes=["methods.samples=8,16"])
    assert the_sweep("grid", axes=["ppo.lr=1e-5,3e-5"]).axes == ("lr",)


def test_a_slope_needs_numbers_that_it_can_take():
    sweep = the_sweep("kl", axes=["reward.beta=0,0.25,0.5"])
    assert sweep.analysis.trend is None and any("no slope along beta" in note for note in sweep.notes)
    assert the_sweep("kl", axes=["reward.beta=.1,.25,.5"]).analysis.trend == "beta"
    sizes = the_sweep("data-size", axes=[], sizes="none,8,16")
    assert sizes.analysis.trend is None


def test_the_embedded_worlds_axes_are_not_taken_for_other_data(tmp_path):
    items = tmp_path / "items.jsonl"
    items.write_text('{"prompt": "p", "answer": "a", "split": "test"}\n')
    own = with_overrides(RECIPE, {"data.demonstrations": "mine.jsonl", "eval.items": str(items)})
    for name in ("data-size", "data-prompts", "model-scale", "prompts"):
        with pytest.raises(ConfigError, match="on your own data needs"):
            the_sweep(name, own, axes=[])
    assert the_sweep("noise", own, axes=[], rates="0,0.3").seeds


def test_arms_are_what_their_names_say_whatever_the_recipe():
    other = with_overrides(RECIPE, {"reward.kind": "sft", "reward.length_norm": True})
    sweep = the_sweep("reward", other)
    coherent, parts = (
        sweep.recipe_of(Cell("beta 0.25", name), 0).reward for name in ("coherent reward", "sharpening (log pi_sft)")
    )
    assert (coherent.kind, parts.kind, coherent.length_norm) == ("ratio", "sft", False)


def test_a_refused_start_leaves_an_empty_folder_empty(monkeypatch, capsys, tmp_path):
    for argv in (("--sizes", "8,99999"), ("--device", "gpu")):
        assert command(monkeypatch, "ablate", "data-size", "--quick", *argv, "--out", tmp_path) == 2
        assert len(capsys.readouterr().err.splitlines()) <= 2 and list(tmp_path.iterdir()) == []
