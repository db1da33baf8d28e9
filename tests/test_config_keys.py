"""Every key of a recipe changes the outcome of a run, and changes nothing upstream of where it belongs.

A run is `srppo.stages.run` on a one-layer model, in this process. What it leaves behind falls into four parts, in the
order in which they are made: the token ids, what SFT did, what PPO did, and what was measured (`worlds.PARTS`). A case
names the first part that its key changes: that one must differ, those before it must be the same to the bit.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import worlds
from worlds import PARTS, Outcome, World, run_world

import srppo.models.language_model
from srppo.config import Recipe, all_keys, canonical_json, derive_seed
from srppo.console import Console
from srppo.errors import ConfigError, ModelError, RunError
from srppo.evaluation.development import Answer, verdict_of
from srppo.reward_kinds import COHERENT, REWARD_KINDS
from srppo.stages.run import PreparedRun, prepare_run, run_stages

Setting = Callable[[World], Any]


@dataclass(frozen=True)
class Case:
    """Changing `key` to `value` (in the context of other settings) first changes `part`."""

    key: str
    value: Any
    part: str
    context: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        value = self.value.__name__ if callable(self.value) else self.value
        return f"{self.key}={value}"


def at(name: str) -> Setting:
    """A path of the world, which exists only once a test runs."""

    def path(world: World) -> str:
        return getattr(world, name)

    path.__name__ = name
    return path


def both_demonstrations(world: World) -> list[str]:
    return [world.demonstrations, world.demonstrations2]


# A given SFT model and nothing to measure: what PPO alone needs, in half the time.
PPO_ONLY: dict[str, Any] = {"model.sft": at("sft"), "eval.items": None, "data.held_out": 0.0}
TWO_EPOCHS = {"sft.epochs": 2}
NOISE = {"data.noise": "derangement", "data.noise_rate": 0.5}
TWO_TASKS = {"data.demonstrations": both_demonstrations}  # a file is a task
THREE_STEPS = {**PPO_ONLY, "ppo.steps": 3}


def ppo(key: str, *values: Any, **more: Any) -> list[Case]:
    context = {**PPO_ONLY, **{name.replace("__", "."): value for name, value in more.items()}}
    return [Case(key, value, "ppo", context) for value in values]


CASES = [
    Case("seed", 1, "data"),
    Case("model.base", at("base2"), "sft"),
    Case("model.sft", at("sft"), "sft"),
    Case("model.precision", "bf16", "sft"),
    Case("model.adapters", "lora", "sft"),
    Case("model.lora_rank", 2, "sft", {"model.adapters": "lora"}),
    Case("model.lora_alpha", 4.0, "sft", {"model.adapters": "lora"}),
    Case("model.lora_targets", ["q_proj", "down_proj"], "sft", {"model.adapters": "lora"}),
    Case("model.chat_template", at("chat"), "data"),
    Case("model.template_kwargs", {"brief": True}, "data", {"model.chat_template": at("chat")}),
    Case("data.demonstrations", at("demonstrations2"), "data"),
    Case("data.prompts", at("prompts2"), "data"),
    Case("data.size", 6, "data"),
    Case("data.prompts_size", 5, "data"),
    Case("data.held_out", 0.6, "data"),
    Case("data.noise", "derangement", "data", {**NOISE, "data.noise": "near-miss"}),
    Case("data.noise", "derangement-across", "data", {**TWO_TASKS, **NOISE, "data.noise": "near-miss"}),
    Case("data.noise", "token-corruption", "data", NOISE),
    Case("data.noise", "truncation", "data", {**NOISE, "data.noise_rate": 0.1}),  # only one answer is beyond a letter
    Case("data.noise", "wrong-task", "data", {**NOISE, "data.demonstrations": "embedded", "data.size": 8}),
    Case("data.noise", "near-miss", "data", NOISE),
    Case("data.noise", "base-answers", "data", NOISE),
    Case("data.noise_rate", 0.9, "data", NOISE),
    Case("data.overlap", "minimum", "data"),
    Case("data.overlap_share", 0.5, "data"),
    Case("data.turns", "all", "data", {"data.demonstrations": at("talks")}),
    Case("data.max_prompt_tokens", 25, "data"),
    Case("data.max_tokens", 31, "data"),
    Case("data.system", "Be brief.", "data"),
    Case("sft.epochs", 2, "sft"),
    Case("sft.steps", 2, "sft"),
    Case("sft.batch", 5, "sft"),
    Case("sft.lr", 0.005, "sft"),
    Case("sft.schedule", "constant", "sft", TWO_EPOCHS),
    Case("sft.schedule", "cosine", "sft", TWO_EPOCHS),
    Case("sft.warmup", 1.0, "sft"),
    Case("sft.weight_decay", 0.1, "sft"),
    Case("sft.max_grad_norm", 0.1, "sft"),
    *(Case("sft.optimizer", name, "sft") for name in ("adafactor", "sgd")),
    *ppo("ppo.optimizer", "adafactor", "sgd"),
    *ppo("model.scoring", "bf16"),
    *ppo("rollout.batch", 6),
    *ppo("rollout.per_prompt", 2),
    *ppo("rollout.max_new_tokens", 3),
    *ppo("rollout.temperature", 0.7),
    *ppo("reward.kind", *(kind for kind in REWARD_KINDS if kind != COHERENT)),
    *ppo("reward.placement", "token"),
    *ppo("reward.length_norm", True),
    *ppo("reward.token_clip", 0.05),
    *ppo("reward.clip", 0.1),
    *ppo("reward.at_limit", "zero", "drop"),
    *ppo("reward.limit_penalty", 1.0),
    *ppo("reward.center", "none", "critic"),
    *ppo("reward.scale", False),
    *ppo("reward.anchor", "base"),
    *ppo("reward.beta", 0.5),
    *ppo("reward.beta", 0.5, reward__kl="k2"),
    *ppo("reward.kl", "k2", "k3"),
    *ppo("reward.kl", "k3", reward__kl="k2"),
    *ppo("ppo.steps", 3),
    *ppo("ppo.advantage", "rloo", rollout__per_prompt=2),
    *ppo("ppo.critic", "shared"),
    *ppo("ppo.value_coef", 1.0, ppo__critic="shared"),
    *ppo("ppo.epochs", 3),
    *ppo("ppo.minibatches", 4),
    *ppo("ppo.lr", 0.005),
    *ppo("ppo.value_lr", 0.02),
    *ppo("ppo.schedule", "linear", "cosine", ppo__steps=3),
    *ppo("ppo.schedule", "cosine", ppo__steps=3, ppo__schedule="linear"),
    *ppo("ppo.warmup", 1.0),
    *ppo("ppo.gamma", 0.5),
    *ppo("ppo.lam", 0.5),
    *ppo("ppo.lam_length", 0.5),
    *ppo("ppo.critic_lam", 0.5),
    *ppo("ppo.clip", 0.01),
    *ppo("ppo.value_clip", None, 0.001),
    *ppo("ppo.whiten", False),
    *ppo("ppo.max_grad_norm", 0.05),
    *ppo("ppo.critic_warmup", 1),
    *ppo("ppo.target_kl", 1e-6),
    *ppo("ppo.max_kl", 1e-4),
    Case("eval.items", at("items2"), "figures"),
    Case("eval.every", 2, "figures"),
    Case("eval.keep", "last", "figures"),
    Case("eval.metric", "nll", "ppo", TWO_EPOCHS),  # another step of SFT is kept, so PPO starts elsewhere
    Case("eval.samples", 3, "figures"),
    Case("eval.limit", 1, "figures"),
    Case("eval.curve", [1, 2], "figures"),
]
ALONE: dict[str, Callable[..., None]] = {}  # keys with a test of their own: they refuse, or change no figure


def covers(*keys: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """This test answers for these keys."""

    def register(test: Callable[..., None]) -> Callable[..., None]:
        ALONE.update(dict.fromkeys(keys, test))
        return test

    return register


Runner = Callable[..., Outcome]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return worlds.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """Run a recipe, or find its outcome; nothing is synced to disk, which here would be a third of the time."""
    folder = tmp_path_factory.mktemp("runs")
    known: dict[str, Outcome] = {}

    def outcome(overrides: Mapping[str, Any], *, ppo: bool = True) -> Outcome:
        resolved = {key: value(world) if callable(value) else value for key, value in overrides.items()}
        name = f"{derive_seed(0, canonical_json(resolved)):x}-{ppo}"
        if name not in known:
            known[name] = run_world(world.recipe(resolved), folder / name, ppo=ppo)
        return known[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield outcome


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_key_changes_its_part_and_nothing_before_it(case: Case, run: Runner) -> None:
    through_ppo = case.part != "sft"
    before = run(case.context, ppo=through_ppo)
    after = run({**case.context, case.key: case.value}, ppo=through_ppo)
    place = PARTS.index(case.part)
    same = {part: before.digests[part] == after.digests[part] for part in PARTS[: place + 1]}
    assert same == {**dict.fromkeys(PARTS[:place], True), case.part: False}
    if case.part in ("sft", "ppo"):
        assert before.weights.get(case.part) != after.weights.get(case.part)


@pytest.mark.parametrize("key", [key for key in all_keys() if key.startswith("data.")])
def test_data_keys_reach_training(key: str, run: Runner) -> None:
    for case in CASES:
        if case.key == key:
            before, after = run(case.context), run({**case.context, key: case.value})
            concerns = ("ppo",) if key in PROMPTS_ONLY else ("sft", "ppo")
            assert {part for part in ("sft", "ppo") if before.digests[part] != after.digests[part]} == set(concerns)


PROMPTS_ONLY = ("data.prompts", "data.prompts_size", "data.overlap", "data.overlap_share", "data.max_prompt_tokens")


def test_every_key_has_a_case() -> None:
    assert set(all_keys()) == {case.key for case in CASES} | set(ALONE)


def test_every_choice_of_a_key_is_tried() -> None:
    for key in all_keys():
        section, _, name = key.rpartition(".")
        model = Recipe.model_fields[section].annotation if section else Recipe
        assert isinstance(model, type)
        options = model.model_fields[name]
        if get_origin(options.annotation) is Literal:
            if key in ALONE:
                continue
            tried = {case.value for case in CASES if case.key == key} | {options.default}
            tried |= {name for name in get_args(options.annotation) if name.endswith("8bit")}  # tests of optimizers
            assert tried == set(get_args(options.annotation)), key


def test_the_same_recipe_twice_leaves_the_same_to_the_bit(run: Runner, world: World, tmp_path: Path) -> None:
    again = run_world(world.recipe(), tmp_path)
    assert run({}).digests == again.digests


def test_the_baseline_can_show_what_the_cases_ask_of_it(run: Runner) -> None:
    """Rollouts of many lengths, some cut by the limit, clipped ratios: or a case could pass or fail for no reason."""
    rows = run(PPO_ONLY).metrics("ppo")[1:]
    assert all(0 < row["ended"] < 1 and row["clip_share"] > 0 and 1 < row["length"] < 5 for row in rows)
    assert len({row["reward"] for row in rows}) == len(rows) == 2
    assert run({"ppo.max_kl": 1e-4, **PPO_ONLY}).diverged


# ---- keys that change no figure, or refuse


def largest_forward(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of the passes through a body that are differentiated, filled while models run."""
    rows: list[int] = []
    original = srppo.models.language_model.body_hidden

    def counted(body: Any, inputs: dict[str, torch.Tensor], precision: str) -> torch.Tensor:
        if torch.is_grad_enabled():
            rows.append(inputs["input_ids"].numel())
        return original(body, inputs, precision)

    monkeypatch.setattr(srppo.models.language_model, "body_hidden", counted)
    return rows


def assert_rows_agree(kind: str, one: Outcome, other: Outcome) -> None:
    """The first step's metrics to 1e-5; later ones, after optimizer steps that rounding moves, to 1e-4."""
    rows, twins = ([{k: v for k, v in r.items() if k != "timing"} for r in o.metrics(kind)] for o in (one, other))
    assert len(rows) == len(twins) > 1
    assert rows[1] == pytest.approx(twins[1], rel=1e-5, abs=1e-5)
    for row, twin in zip(rows, twins, strict=True):
        assert row == pytest.approx(twin, rel=1e-4, abs=1e-4)


@covers("model.kernels")
def test_every_kernel_trains_alike(world: World, tmp_path: Path) -> None:
    """SFT and PPO with the definition, and with the fast kernels: the same metrics, not the same bits."""
    names = ("auto", "torch", "reference")
    outcomes = {name: run_world(world.recipe({"model.kernels": name}), tmp_path / name) for name in names}
    assert outcomes["torch"].digests == outcomes["auto"].digests  # here is no GPU
    assert outcomes["reference"].digests["sft"] != outcomes["auto"].digests["sft"]  # or nothing was chosen
    for kind in ("sft", "ppo"):
        assert_rows_agree(kind, outcomes["auto"], outcomes["reference"])
    with pytest.raises(ConfigError, match=r"impl is 'triton' and the tensors are not on a GPU; use impl='auto'"):
        run_world(world.recipe({"model.kernels": "triton"}), tmp_path / "triton")


@covers("sft.micro_tokens", "ppo.micro_tokens")
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_micro_batches_change_memory_and_not_the_loss(
    stage: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes, largest = [], []
    context = {} if stage == "sft" else {key: v(world) if callable(v) else v for key, v in PPO_ONLY.items()}
    for size in (4096, 45):
        rows = largest_forward(monkeypatch)
        recipe = world.recipe({**context, f"{stage}.micro_tokens": size})
        outcomes.append(run_world(recipe, tmp_path / str(size), ppo=stage == "ppo"))
        monkeypatch.undo()
        largest.append(max(rows))
    assert largest[1] <= 45 < largest[0], "two rows of the longest are more"
    assert_rows_agree(stage, *outcomes)


@covers("model.activation_checkpointing")
@pytest.mark.parametrize("adapters", ["none", "lora"])
def test_recomputed_activations_change_no_figure(adapters: str, world: World, tmp_path: Path) -> None:
    keys = {"model.adapters": adapters}
    plain = run_world(world.recipe(keys), tmp_path / "plain")
    again = run_world(world.recipe({**keys, "model.activation_checkpointing": True}), tmp_path / "again")
    for kind in ("sft", "ppo"):
        assert_rows_agree(kind, plain, again)
        assert plain.stage(kind).name == again.stage(kind).name, "it is in no id"


@covers("model.sharding")
def test_sharding_changes_nothing_in_one_process(run: Runner) -> None:
    """What it changes in several is shown in tests/training/test_sharding.py."""
    plain, spread = run(PPO_ONLY), run({**PPO_ONLY, "model.sharding": "full"})
    assert plain.digests == spread.digests and plain.stage("ppo").name == spread.stage("ppo").name


@covers("ppo.checkpoint_every")
def test_checkpoint_every_changes_the_checkpoints_and_nothing_else(run: Runner) -> None:
    context = {**PPO_ONLY, "ppo.steps": 4, "eval.every": 0}
    often, seldom = run({**context, "ppo.checkpoint_every": 3}), run({**context, "ppo.checkpoint_every": 10})
    found = [sorted(p.name for p in (o.stage("ppo") / "checkpoints").iterdir()) for o in (often, seldom)]
    assert found == [["step-3", "step-4"], ["step-4"]]
    assert often.digests == seldom.digests


@covers("rollout.server", "rollout.server_timeout_s", "rollout.importance_cap")
def test_a_server_that_is_named_is_asked(world: World, tmp_path: Path) -> None:
    """That it says what is said here, in time, and by which weights, is shown in tests/training/test_server.py."""
    with pytest.raises(RunError, match=re.escape("the server http://127.0.0.1:9/v1 cannot be reached")):
        run_world(world.recipe({"rollout.server": "http://127.0.0.1:9/v1"}), tmp_path / "run")


@covers("methods.alphas", "methods.samples", "methods.self_prompts", "methods.self_samples", "methods.self_epochs")
def test_methods_keys_decide_their_own_stages_alone(world: World, tmp_path: Path) -> None:
    """Extrapolation reads the alphas, what chooses from samples their number, self-training its own keys; decoding
    none."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, keys in (
        ("plain", {"methods.alphas": [0.5]}),
        ("alphas", {"methods.alphas": [8.0]}),
        ("samples", {"methods.alphas": [0.5], "methods.samples": 3}),
        ("self_prompts", {"methods.alphas": [0.5], "methods.self_prompts": 2}),
        ("self_samples", {"methods.alphas": [0.5], "methods.self_samples": 2}),
        ("self_epochs", {"methods.alphas": [0.5], "methods.self_epochs": 6}),
    ):
        console = Console(plain=True, file=io.StringIO())
        kinds = ["extrapolated", "decoded", "vote", "resampled", "best-of-n", "self-distilled", "rejection-ft"]
        few = {"methods.self_prompts": 6, "methods.self_samples": 8, "methods.self_epochs": 2}
        recipe = world.recipe({"methods.samples": 12, **few, **keys})
        stages = run_stages(prepare_run(recipe, kinds, tmp_path / name, console))
        for stage in (stages[kind] for kind in kinds):
            answers = [file.read_text() for file in sorted(stage.path.glob("eval/*/samples.jsonl"))]
            found.setdefault(stage.identity["kind"], {})[name] = [stage.id, *answers]
    changed = {kind: {n for n in each if each[n] != each["plain"]} for kind, each in found.items()}
    assert changed == {
        "extrapolated": {"alphas"},
        "decoded": set(),
        **{kind: {"samples"} for kind in ("vote", "resampled", "best-of-n")},
        **{kind: {"self_prompts", "self_samples", "self_epochs"} for kind in ("self-distilled", "rejection-ft")},
    }
    for kind, each in found.items():
        for name in changed[kind]:
            assert each[name][0] != each["plain"][0] and each[name][1:] != each["plain"][1:], (kind, name)


@covers("distil.steps", "distil.lr")
def test_distillation_reads_its_own_steps_and_rate(world: World, tmp_path: Path) -> None:
    """And PPO reads neither: its stage is found again. The distilled model is exported, and it is what is measured."""
    stages = {}
    for name, keys in (("plain", {}), ("steps", {"distil.steps": 3}), ("lr", {"distil.lr": 0.02})):
        console = Console(plain=True, file=io.StringIO())
        recipe = world.recipe({"distil.steps": 2, "distil.lr": 0.01, "eval.keep": "last", **keys})
        stages[name] = run_stages(prepare_run(recipe, ["distil", "ppo"], tmp_path / name, console))
    assert len({found["ppo"].id for found in stages.values()}) == 1
    assert len({found["distil"].id for found in stages.values()}) == 3
    assert [found["distil"].metrics()[-1]["step"] for found in stages.values()] == [2, 3, 2]
    weights = [(found["distil"].path / "model" / "model.safetensors").read_bytes() for found in stages.values()]
    assert len({*weights, (stages["plain"]["sft"].path / "model" / "model.safetensors").read_bytes()}) == 4
    figures = (stages["plain"]["distil"].result() or {})["figures"]
    assert figures["steps"] == 2 and figures["flops"] > 0 and figures["test"]


@covers("data.noise_dev")
def test_development_items_get_the_demonstrations_noise_and_nothing_else_does(world: World, tmp_path: Path) -> None:
    """As many wrong answers as the rate says, nested and the same each time; test items and training stay as they are.

    A model that says the wrong answers is right on them: a choice of steps sees no clean ones.
    """

    def run(name: str, **keys: Any) -> PreparedRun:
        noise = {"data.noise": "near-miss", **{key.replace("__", "."): value for key, value in keys.items()}}
        return prepare_run(world.recipe(noise), ["sft"], tmp_path / name, Console(plain=True, file=io.StringIO()))

    def noised(*runs: PreparedRun) -> list[set[str]]:
        pairs = [zip(clean.development.items, each.development.items, strict=True) for each in runs]
        return [{new.prompt for old, new in pair if new.answer != old.answer} for pair in pairs]

    clean = run("clean", data__noise_rate=0.5)
    half, again = (run(name, data__noise_rate=0.5, data__noise_dev=True) for name in ("half", "again"))
    most, none = (run(str(rate), data__noise_rate=rate, data__noise_dev=True) for rate in (0.75, 0.0))
    found = noised(half, most, none)
    assert list(map(len, found)) == [2, 3, 0] and found[0] < found[1]
    assert half.development.items == again.development.items and half.test_items == clean.test_items
    assert half.data.demonstrations == clean.data.demonstrations
    sampled = run("base", data__noise="base-answers", data__noise_rate=0.5, data__noise_dev=True)
    assert list(map(len, noised(sampled))) == [2]

    echo = half.development.items
    answers = [verdict_of(item, [Answer(item.answer, True, 1)]) for item in echo]
    assert half.development.rated(half.base, answers)[0]["dev/accuracy"] == 1.0
    with pytest.raises(ConfigError, match=r"noise_dev changes development items, and eval\.metric = nll chooses"):
        world.recipe({"data.noise_dev": True, "eval.metric": "nll"})


@covers("model.allow_pickle")
def test_pickled_weights_are_refused_unless_allowed(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(world.base, folder)
    torch.save(worlds.byte_llama(0).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"not safetensors \(pytorch_model\.bin\).*model\.allow_pickle=true"):
        run_world(world.recipe({"model.base": str(folder)}), tmp_path / "refused", ppo=False)
    run_world(world.recipe({"model.base": str(folder), "model.allow_pickle": True}), tmp_path / "allowed", ppo=False)


CUSTOM = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@covers("model.trust_remote_code")
def test_code_that_comes_with_a_model_runs_only_when_asked(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "own"
    shutil.copytree(world.base, folder)
    (folder / "own.py").write_text(CUSTOM)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(ModelError, match=r"Python code.*model\.trust_remote_code=true"):
        run_world(world.recipe({"model.base": str(folder)}), tmp_path / "refused", ppo=False)
    asked = world.recipe({"model.base": str(folder), "model.trust_remote_code": True})
    outcome = run_world(asked, tmp_path / "allowed", ppo=False)
    assert type(outcome.run.base.model).__name__ == "OwnForCausalLM"
