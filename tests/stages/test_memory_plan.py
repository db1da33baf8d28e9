"""The plan of a recipe: its parts against the real models and checkpoints, and against published figures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from srppo.config import Recipe, load_recipe, with_overrides
from srppo.console import Console
from srppo.data.types import EncodedDemonstration
from srppo.errors import ConfigError
from srppo.models.loading import load_model, to_train
from srppo.models.memory import weight_bytes
from srppo.report.memory_plan import advice_table, cost_lines, memory_table, verdict
from srppo.report.table import to_markdown
from srppo.stages.memory_plan import (
    KEPT,
    Advice,
    Lengths,
    advise,
    assumed_lengths,
    changes,
    largest_pass,
    least_bytes,
    lengths_of,
    plan,
)
from srppo.stages.run import prepare_run
from srppo.training import parallel
from srppo.training.batch import RolloutBatch, extents, micro_batches
from srppo.training.loop import TrainState, trained_bytes
from srppo.training.ppo import Learners, step_flops

ROOT = Path(__file__).parent.parent.parent
SHAPE: dict[str, Any] = {"num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
SHAPE |= {"intermediate_size": 14336, "num_hidden_layers": 32, "dtype": "bfloat16"}
MODELS: dict[str, Any] = {
    "mistral-7b": (lambda: MistralConfig(**SHAPE, vocab_size=32000, sliding_window=4096), 7_241_732_096),
    "llama3-8b": (lambda: LlamaConfig(**SHAPE, vocab_size=128256, max_position_embeddings=8192), 8_030_261_248),
    "qwen2.5-0.5b": (
        lambda: Qwen2Config(
            vocab_size=151936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            dtype="bfloat16",
        ),
        494_032_768,
    ),
}
"""The sizes of their config.json, and the number of weights that their pages on the hub say."""
GB = 10**9


def hub_recipe(name: str, folder: Path, *sets: str) -> Recipe:
    MODELS[name][0]().save_pretrained(folder)
    return load_recipe(ROOT / "recipes" / f"{name}.toml", [f"model.base={folder}", *sets])


def small_recipe(folder: Path, *sets: str) -> Recipe:
    """Whole weights in fp32 of a small Llama with tied embeddings."""
    LlamaConfig(
        vocab_size=2000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
        dtype="bfloat16",
    ).save_pretrained(folder)
    own = [f"model.base={folder}", "data.demonstrations=no/body", "data.prompts=no/body", "data.size=20000"]
    own += ["sft.lr=1e-5", "ppo.lr=1e-6", "ppo.value_lr=1e-6", "rollout.batch=128", "rollout.max_new_tokens=512"]
    return load_recipe(None, [*own, "ppo.minibatches=4", *sets])


@pytest.mark.parametrize("name", MODELS)
def test_the_recipes_fit_one_gpu(name: str, tmp_path: Path) -> None:
    recipe = hub_recipe(name, tmp_path)
    planned = plan(recipe, lengths_of(recipe), 24 * GB, "cuda")
    assert planned.counts["weights"] == MODELS[name][1]
    assert planned.fits and planned.peak[2] > 2 * MODELS[name][1]
    if name == "mistral-7b":  # rank 16 x (in + out), of 7 layers: q, o; k, v; gate, up, down
        layer = 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
        assert planned.counts["trained"] == 32 * layer == 41_943_040


def test_a_recipe_that_cannot_fit_is_told_what_to_change(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    memory = plan(recipe, lengths_of(recipe), GB, "cuda").peak[2] // 3
    planned = plan(recipe, lengths_of(recipe), memory, "cuda")
    assert not planned.fits and "does not fit" in verdict(planned)
    advice = advise(planned)
    assert advice.bytes and max(advice.bytes.values()) < planned.peak[2]
    assert {"model.adapters=lora", "ppo.critic=shared"} <= advice.bytes.keys()
    assert advice.together and advice.together_bytes <= memory
    keys = {key: value for name in advice.together for key, value in advice.changes[name].keys.items()}
    changed = plan(with_overrides(recipe, keys), planned.lengths, memory, "cuda")
    assert changed.fits and changed.peak[2] == advice.together_bytes
    shown = advice_table(planned, advice)
    assert "model.adapters=lora" in to_markdown(shown) and f"--set {advice.together[0].split()[0]}" in shown.caption[0]
    assert "a smaller model" in advice_table(planned, Advice({}, {}, None, 1000)).caption[0]


def test_no_change_that_the_recipe_has_already_is_proposed() -> None:
    had = ["model.adapters=lora", "model.activation_checkpointing=true", "model.precision=bf16"]
    had += ["sft.micro_tokens=64", "ppo.micro_tokens=64", "ppo.advantage=rloo", "rollout.per_prompt=4"]
    assert changes(load_recipe(None, had)) == []


def test_parts_are_those_of_the_real_run(tmp_path: Path) -> None:
    """Weights, gradients, moments, the checkpoint on disk and a step's counted operations, of the embedded world."""
    recipe = load_recipe(None, ["ppo.critic_warmup=1", "ppo.steps=3"])
    planned = plan(recipe, lengths_of(recipe), 8 * GB, "cuda")
    run = prepare_run(recipe, ["ppo"], tmp_path / "run", Console(file=io.StringIO(), quiet=True))
    sft = to_train(run.base, run.recipe.model)
    learners = Learners.start(to_train(sft, run.recipe.model), run.recipe.ppo)
    parts = planned.stages[1].phases["update"]
    assert parts["weights"] == weight_bytes(run.base, sft, learners.policy, learners.value)  # type: ignore[arg-type]
    assert parts["gradients"] + parts["optimizer"] == 3 * trained_bytes(learners.policy, learners.value) // 4
    for optimizer in (learners.policy_optimizer, learners.value_optimizer):
        assert optimizer is not None
        for weight in optimizer.param_groups[0]["params"]:
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
    (tmp_path / "state").mkdir()
    models = {"policy": learners.policy, "value": learners.value}
    optimizers = {"policy": learners.policy_optimizer, "value": learners.value_optimizer}
    TrainState(models, optimizers, {}).save(tmp_path / "state")
    on_disk = sum(file.stat().st_size for file in (tmp_path / "state").iterdir())
    assert planned.stages[1].checkpoint_bytes <= on_disk < 1.1 * planned.stages[1].checkpoint_bytes + 100_000
    assert planned.disk_bytes > (KEPT + 1) * on_disk * 0.9

    new, rows = recipe.rollout.max_new_tokens, recipe.rollout.batch
    mean = round(sum(map(len, run.data.prompts)) / len(run.data.prompts))
    batch = RolloutBatch(
        tokens_BS=torch.ones((rows, mean + new), dtype=torch.int64),
        attention_mask_BS=torch.ones((rows, mean + new), dtype=torch.bool),
        response_mask_BT=torch.ones((rows, new), dtype=torch.bool),
        ended_B=torch.zeros(rows, dtype=torch.bool),
        old_logprobs_BT=torch.zeros((rows, new)),
        sampled_logprobs_BT=torch.zeros((rows, new)),
        old_values_BT=torch.zeros((rows, new)),
    )
    passes = (recipe.ppo.epochs * recipe.ppo.minibatches, recipe.ppo.minibatches)
    steps = [step_flops(learners, batch, updates=passes, critic_only=only) for only in (True, False, False)]
    assert planned.stages[1].flops == sum(steps)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_pass_is_the_largest_that_training_cuts(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several processes, that of the first."""
    monkeypatch.setattr(parallel, "size", lambda: processes)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        totals = torch.randint(2, 60, (9,), generator=generator).tolist()
        rows = [EncodedDemonstration(tuple(range(total)), max(total // 2, 1)) for total in totals]
        cut = [sum(totals[i] for i in part.tolist()) for part in micro_batches(extents(rows)[0], 100, shared=True)]
        extent = [(row.prompt_tokens, len(row.ids)) for row in rows]
        lengths, scored, passes = largest_pass(extent, 9, 100, processes=processes)
        assert (sum(lengths), passes) == (max(cut), len(cut)) and 0 < scored < sum(lengths)


def test_assumed_rows_fill_a_pass_and_the_longest_still_fits() -> None:
    recipe = load_recipe(None, ["data.max_prompt_tokens=100", "data.max_tokens=400"])
    found = assumed_lengths(recipe, 60)
    assert (found.demonstrations, found.prompts, found.longest_prompt) == ([(60, 200)], [60], 100)
    assert sum(largest_pass(found.demonstrations, 64, 1000, 400)[0]) == 1000
    assert sum(largest_pass(found.demonstrations, 64, 100, 400)[0]) == 400, "one row is a pass, however long"
    assert sum(largest_pass(found.demonstrations, 2, 10_000, 400)[0]) == 800, "there are no more rows"


def test_each_choice_takes_what_it_says(tmp_path: Path) -> None:
    """Against the whole model on one plan: what is left out of the recipe is left out of the memory."""
    lengths, head = Lengths([(50, 100)] * 64, [50] * 64, 64, True), 64 + 1
    layer = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
    weights = 2000 * 64 + 2 * layer + 64

    def parts(*sets: str) -> dict[str, int]:
        return plan(small_recipe(tmp_path, *sets), lengths, 80 * GB, "cuda").stages[1].phases["update"]

    whole, shared = parts(), parts("ppo.critic=shared")
    rloo = parts("ppo.advantage=rloo", "rollout.per_prompt=4", "ppo.critic_warmup=0")
    assert whole["weights"] == 4 * (4 * weights + head)  # base (small, so widened), SFT model, policy and critic
    assert rloo["gradients"] == 4 * weights and shared["gradients"] == 4 * (weights + head)
    assert whole["gradients"] == 4 * (2 * weights + head) and whole["optimizer"] == 2 * whole["gradients"]
    recomputed = parts("model.activation_checkpointing=true", "ppo.micro_tokens=8192")
    assert recomputed["activations"] < parts("ppo.micro_tokens=8192")["activations"], "one layer of two at a time"


def test_one_process_holds_all_whatever_the_recipe_says(tmp_path: Path) -> None:
    lengths = Lengths([(50, 100)] * 64, [50] * 64, 64, True)
    whole, full = (
        plan(small_recipe(tmp_path, f"model.sharding={sharding}"), lengths, 80 * GB, "cuda", 1)
        for sharding in ("none", "full")
    )
    assert whole.stages == full.stages


def test_processes_that_hold_all_divide_rows_alone(tmp_path: Path) -> None:
    recipe, lengths = small_recipe(tmp_path), Lengths([(50, 100)] * 64, [50] * 64, 64, True)
    one, four = (plan(recipe, lengths, 80 * GB, "cuda", processes) for processes in (1, 4))
    for alone, shared in zip(one.stages, four.stages, strict=True):
        assert alone.phases.keys() == shared.phases.keys() and alone.flops == 4 * (shared.flops or 0)
        assert (alone.checkpoint_bytes, alone.model_bytes) == (shared.checkpoint_bytes, shared.model_bytes)
        for phase, parts in shared.phases.items():
            standing = {name: parts[name] for name in ("weights", "gradients", "optimizer")}
            assert standing.items() <= alone.phases[phase].items() and "gathered" not in parts
    update, cache = (of.stages[1].phases["rollout"]["keys and values"] for of in (one, four))
    assert update == 4 * cache


def test_what_is_spread_adds_up_to_the_whole_and_what_is_gathered_is_there(tmp_path: Path) -> None:
    """A layer of two is gathered with the next, the tied embeddings beside them, and once more as the head."""
    lengths = Lengths([(50, 100)] * 64, [50] * 64, 64, True)
    recipe = small_recipe(tmp_path, "model.sharding=full")
    whole = plan(recipe, lengths, 80 * GB, "cuda").stages
    before = whole
    for processes in (2, 4, 8):
        spread = plan(recipe, lengths, 80 * GB, "cuda", processes).stages
        for one, many, fewer in zip(whole, spread, before, strict=True):
            assert one.checkpoint_bytes == many.checkpoint_bytes
            assert many.peak[1] < fewer.peak[1], "more processes, less in each"
            critic = (processes - 1) * 4 * 65 if one.name == "PPO" else 0  # the values' head has one row
            for name, parts in one.phases.items():
                for part in ("weights", "gradients", "optimizer"):
                    rest = processes * many.phases[name][part] - parts[part]
                    tied = 4 * 2000 * 64 if part == "gradients" else 0  # see gradient_bytes
                    assert rest == (2 if part == "optimizer" else 1) * critic + tied, part
        before = spread
    layer, embedding, norm = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64, 2000 * 64, 64
    sft, ppo = (stage.phases for stage in spread)
    model = 4 * (2 * layer + embedding + norm)
    assert sft["start"]["gathered"] == sft["export"]["gathered"] == ppo["rollout"]["gathered"] == model
    forward = 4 * (embedding + norm) + max(8 * layer, 4 * (embedding + norm + layer))
    assert ppo["score"]["gathered"] == 2 * 4 * embedding + forward
    ends = [4 * embedding + forward, 4 * embedding + 4 * embedding // 8, 4 * (embedding + norm + 4 * layer)]
    ends += [4 * (3 * (embedding + norm) + layer)]
    assert ppo["update"]["gathered"] in ends


def test_adapters_are_whole_in_each_process(tmp_path: Path) -> None:
    lengths = Lengths([(50, 100)] * 64, [50] * 64, 64, True)
    recipe = small_recipe(tmp_path, "model.sharding=full", "model.adapters=lora")
    alone, four = (plan(recipe, lengths, 80 * GB, "cuda", processes).stages for processes in (1, 4))
    for one, many in zip(alone, four, strict=True):
        (update, whole) = (stage.phases["update"] for stage in (many, one))
        assert (update["gradients"], update["optimizer"]) == (whole["gradients"], whole["optimizer"])
    base = 4 * (2000 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64)
    whole, parts = (stages[0].phases["update"]["weights"] for stages in (alone, four))
    assert whole - parts == base - base // 4
    assert four[0].phases["start"]["gathered"] == four[1].phases["rollout"]["gathered"] == base
    assert "export" not in four[0].phases


def test_more_processes_than_rows_are_refused_as_by_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, lengths = small_recipe(tmp_path, "rollout.batch=4"), Lengths([(5, 10)], [5], 1, True)
    with pytest.raises(ConfigError) as planned:
        plan(recipe, lengths, GB, "cuda", 5)
    monkeypatch.setattr(parallel, "size", lambda: 5)
    with pytest.raises(ConfigError, match=r"5 processes have only 4 rows.*rollout\.batch") as run:
        parallel.check_rows(rollout__batch=4)
    assert str(planned.value) == str(run.value)


def test_processes_are_told_to_spread_weights_and_share_the_memory_of_a_cpu(tmp_path: Path) -> None:
    recipe, lengths = small_recipe(tmp_path), Lengths([(50, 100)] * 64, [50] * 64, 64, True)
    assert [change for change in changes(recipe) if "model.sharding" in change.keys] == []
    assert changes(recipe, 8)[0].keys == {"model.sharding": "full"}
    memory = plan(recipe, lengths, GB, "cuda", 8).peak[2] - 1
    advice = advise(plan(recipe, lengths, memory, "cuda", 8))
    assert "model.sharding=full" in advice.bytes
    most = plan(recipe, lengths, 80 * GB, "cpu", 2).peak[2]
    assert plan(recipe, lengths, 2 * most, "cpu", 2).fits and not plan(recipe, lengths, 2 * most - 1, "cpu", 2).fits
    assert f"{2 * most / 1e9:.2f} in all of" in verdict(plan(recipe, lengths, 2 * most, "cpu", 2))


def test_what_is_loaded_is_warned_of_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(None)
    base = load_model("embedded:xs", recipe.model)
    weights = sum(weight.numel() for weight in base.parameters())
    assert least_bytes(recipe, base, ["sft", "ppo"]) == 4 * weights * 10
    assert least_bytes(recipe, base, ["sft"]) == 4 * weights * 5
    assert least_bytes(with_overrides(recipe, {"model.adapters": "lora"}), base, ["ppo"]) == 0
    monkeypatch.setattr("srppo.stages.run.total_bytes", lambda device: 4 * weights * 10 - 1)
    said = io.StringIO()
    prepare_run(recipe, ["ppo"], tmp_path / "run", Console(plain=True, file=said))
    assert "will not fit; srppo plan says what to change" in " ".join(said.getvalue().split())


def test_the_table_adds_up_and_says_what_was_assumed(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    planned = plan(recipe, lengths_of(recipe), 24 * GB, "cpu")
    table = memory_table(planned)
    shown = to_markdown(table)
    assert "| logits | never |" in shown and "heap" in shown and "assumed, on average 256" in " ".join(table.caption)
    lines = list(cost_lines(planned, 100.0, 0.5, "as given"))
    assert any("20000 demonstrations" in line or "steps" in line for line in lines)
    unknown = plan(
        with_overrides(recipe, {"data.size": None}), lengths_of(with_overrides(recipe, {"data.size": None})), GB, "cpu"
    )
    assert unknown.stages[0].flops is None and any(
        "set data.size" in line for line in cost_lines(unknown, None, 0.5, "")
    )
