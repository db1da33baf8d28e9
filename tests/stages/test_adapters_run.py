"""Whole runs over one backbone: every method, what stays on disk, resuming, and what `export` gives out."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import quiet_console
from transformers import AutoModelForCausalLM
from worlds import World, make_world

from srppo.config import ModelConfig
from srppo.console import Console
from srppo.errors import Interrupted, ModelError, RecordError, UserError
from srppo.evaluation.harness.answering import Answering
from srppo.evaluation.harness.model import HarnessModel
from srppo.evaluation.meter import Meter
from srppo.models.adapters import AdaptedModel
from srppo.models.language_model import LanguageModel
from srppo.models.loading import check_weights, configured, declared, fingerprint, load_model, load_tokenizer
from srppo.record.store import Run
from srppo.stages.arms import stages_by_arm
from srppo.stages.publish import export_arm
from srppo.stages.run import PreparedRun, prepare_run, run_stages

LORA = {"model.adapters": "lora", "model.lora_rank": 4, "sft.lr": 0.05, "ppo.lr": 0.02, "distil.lr": 0.05}
METHODS = ("ppo-chosen", "extrapolated", "decoded", "distil", "self-distilled", "rejection-ft", "best-of-n")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    return make_world(tmp_path_factory.mktemp("world"))


def prepared(world: World, folder: Path, *kinds: str, **overrides: object) -> PreparedRun:
    keys = {name.replace("__", "."): value for name, value in overrides.items()}
    return prepare_run(world.recipe({**LORA, **keys}), kinds or ["ppo"], folder, quiet_console())


def test_every_method_runs_over_one_backbone_and_keeps_only_what_trained(world: World, tmp_path: Path) -> None:
    run = prepared(world, tmp_path, *METHODS, methods__samples=4, methods__self_prompts=4, methods__self_samples=4)
    before = {name: weight.clone() for name, weight in run.base.model.named_parameters()}
    done = run_stages(run)
    assert all(stage.done for stage in done.values())
    now = {name.replace(".base_layer", ""): weight for name, weight in run.base.model.named_parameters()}
    assert all(torch.equal(now[name], weight) for name, weight in before.items()), "the base stands"
    start = load_file(done["sft"].path / "model" / "adapter_model.safetensors")
    for name in ("ppo", "distil", "self-distilled", "rejection-ft", "extrapolated", "ppo-chosen"):
        own = load_file(done[name].path / "model" / "adapter_model.safetensors")
        assert own.keys() == start.keys() and any(not torch.equal(own[key], start[key]) for key in own), name
    for name in ("sft", "ppo", "distil", "self-distilled", "extrapolated", "chosen-sft"):
        files = {path.name for path in (done[name].path / "model").iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= files and "model.safetensors" not in files
        found = load_model(str(done[name].path / "model"), ModelConfig(base=world.base))
        assert isinstance(found, AdaptedModel) and any(weight.abs().sum() > 0 for weight in found.weights().values())
    checkpoint = done["ppo"].latest_checkpoint()
    assert checkpoint is not None
    for name, more in (("policy", set()), ("value", {"head.weight", "head.bias"})):
        with safe_open(checkpoint[1] / f"{name}.safetensors", "pt") as file:
            assert {key for key in file.keys() if ".lora_" not in key} == more  # noqa: SIM118
    whole = sum(weight.numel() for weight in before.values())
    assert sum(path.stat().st_size for path in checkpoint[1].glob("*.safetensors")) < 4 * whole


def test_adapters_change_the_identity_of_what_they_train(world: World, tmp_path: Path) -> None:
    from srppo.stages.kinds import stage_settings

    plain, lora = (stage_settings(world.recipe(each), "sft") for each in ({}, LORA))
    assert "adapters" not in plain and lora["adapters"] == {
        "adapters": "lora",
        "lora_alpha": 32.0,
        "lora_rank": 4,
        "lora_targets": ["all-linear"],
    }


@pytest.mark.parametrize("critic", ["own", "shared"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(world: World, tmp_path: Path, critic: str) -> None:
    keys: dict[str, object] = {"ppo__critic": critic, "ppo__checkpoint_every": 1}
    whole = run_stages(prepared(world, tmp_path / "whole", **keys))["ppo"]
    parts = prepared(world, tmp_path / "parts", **keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("srppo.training.ppo.log_rollouts", stop_at(2))
        with pytest.raises(Interrupted):
            run_stages(parts)
    resumed = run_stages(prepared(world, tmp_path / "parts", **keys))["ppo"]
    assert whole.id == resumed.id
    weights = [(stage.path / "model" / "adapter_model.safetensors").read_bytes() for stage in (whole, resumed)]
    assert weights[0] == weights[1]
    rows = [[{k: v for k, v in row.items() if k != "timing"} for row in stage.metrics()] for stage in (whole, resumed)]
    assert rows[0] == rows[1]


def stop_at(step: int):  # type: ignore[no-untyped-def]
    def log(bench: object, now: int, *rest: object) -> None:
        if now == step:
            raise Interrupted("stopped by the test")

    return log


def test_a_given_adapter_is_a_role_of_the_same_backbone(world: World, tmp_path: Path) -> None:
    sft = run_stages(prepared(world, tmp_path / "first", "sft"))["sft"].path / "model"
    run = prepared(world, tmp_path / "second", model__sft=str(sft))
    assert isinstance(run.given_sft, AdaptedModel) and run.given_sft.model is run.base.model
    done = run_stages(run)
    assert (done["ppo"].path / "model" / "adapter_config.json").exists()
    full = prepared(world, tmp_path / "third", model__sft=str(sft), model__adapters="none")
    trained = run_stages(full)["ppo"].path / "model"
    assert (trained / "model.safetensors").exists(), "merged into a copy, all of which was trained"
    with pytest.raises(ModelError, match=r"trained over '.*base', and model\.base is '.*base2'"):
        prepared(world, tmp_path / "fourth", model__sft=str(sft), model__base=world.base2)
    given = prepared(world, tmp_path / "fifth", model__sft=world.sft)
    policy = run_stages(given)["ppo"].path / "model"
    settings = json.loads((policy / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == world.sft, "an adapter over the SFT model that was given"


def test_export_gives_out_what_peft_and_transformers_load(world: World, tmp_path: Path) -> None:
    run_stages(prepared(world, tmp_path / "run", "base", "ppo"))
    record = Run.load(tmp_path / "run")
    (stage,) = stages_by_arm(record)["SRPPO"]
    role = load_model(str(stage.path / "model"), ModelConfig(base=world.base))
    tokens = torch.tensor([[3, 5, 7, 9]])
    role.activate()
    with torch.no_grad():
        ours = role.model(tokens).logits
    console = Console(plain=True, file=io.StringIO())

    def export(out: str | None, **how: object) -> Path:
        keys = {"arm": None, "seed": None, "merged": False, "dtype": "fp32", **how}
        return export_arm(tmp_path / "run", tmp_path / out if out else None, console=console, **keys)  # type: ignore[arg-type]

    adapter, merged, half = export(None), export("merged", merged=True), export("half", merged=True, dtype="bf16")
    assert adapter == tmp_path / "run" / "export" / "SRPPO-seed-0" and not (adapter / "manifest.json").exists()
    with torch.no_grad():
        for model in (
            AutoPeftModelForCausalLM.from_pretrained(adapter),
            AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32),
        ):
            torch.testing.assert_close(model(tokens).logits, ours, atol=1e-5, rtol=1e-5)
    assert LanguageModel(AutoModelForCausalLM.from_pretrained(half)).model.dtype == torch.bfloat16
    assert (merged / "README.md").exists() and (merged / "tokenizer.json").exists()
    for error, match, how in (
        (UserError, "no finished arm 'SRPO' with a model; it has base, SFT, SRPPO", {"arm": "SRPO"}),
        (UserError, "SRPPO has no seed 4; it has 0", {"seed": 4}),
        (UserError, "--dtype bf16 is of merged weights; add --merged", {"dtype": "bf16"}),
        (UserError, "base, seed 0 is .* itself: nothing was trained", {"arm": "base"}),
        (RecordError, "is not empty; give --out a new folder", {"out": "merged"}),
    ):
        with pytest.raises(error, match=match):
            export(str(how.pop("out", "new")), **how)


def test_an_adapter_is_known_with_its_base_and_checked_with_it(world: World, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    run = prepared(world, tmp_path / "run", "sft", model__base=str(base))
    folder = run_stages(run)["sft"].path / "model"
    config = ModelConfig(base=str(base))
    before = fingerprint(str(folder), config)
    assert declared(str(folder), config)[0] == declared(str(base), config)[0] and configured(str(folder)) == str(base)
    check_weights(str(folder), config)
    weights = load_file(base / "model.safetensors")
    save_file(
        {**weights, "lm_head.weight": weights["lm_head.weight"] + 1}, base / "model.safetensors", {"format": "pt"}
    )
    assert fingerprint(str(folder), config) != before
    (base / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match=r"is damaged: model\.safetensors"):
        check_weights(str(folder), config)


def test_lm_eval_measures_an_adapter(world: World, tmp_path: Path) -> None:
    """The figures of the arm are those of its merged model."""
    run_stages(prepared(world, tmp_path / "run"))
    console = quiet_console()
    keys = {"arm": None, "seed": None, "dtype": "fp32", "console": console}
    merged = export_arm(tmp_path / "run", tmp_path / "merged", merged=True, **keys)  # type: ignore[arg-type]
    adapter = export_arm(tmp_path / "run", tmp_path / "adapter", merged=False, **keys)  # type: ignore[arg-type]
    found = []
    for model in (merged, adapter):
        weights = (str(model), ModelConfig(base=world.base))
        options = {"seed": 0, "temperature": None, "new_tokens": 4}
        harness = HarnessModel(Answering("cpu", 3), weights, load_tokenizer(*weights), 100, **options)  # type: ignore[arg-type]
        harness.meter = Meter(console, "test", 2)
        pairs = [(("", ""), [3, 5, 7], [9, 11]), (("", ""), [4], [8])]
        found.append(harness._loglikelihood_tokens(pairs))  # type: ignore[arg-type]
    for (one, same), (two, equal) in zip(*found, strict=True):
        assert one == pytest.approx(two, abs=1e-4) and same == equal
