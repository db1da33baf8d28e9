"""Roles over one backbone: each gives what a model of its own would, and training one changes no other."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VOCAB, make, ragged
from peft import AutoPeftModelForCausalLM, LoraConfig
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from transformers import AutoModelForCausalLM

from srppo.config import ModelConfig
from srppo.errors import ConfigError, ModelError
from srppo.models.adapters import AdaptedModel, load_adapter, lora_settings
from srppo.models.language_model import LanguageModel
from srppo.models.loading import load_model, load_over, to_train
from srppo.models.value_model import ValueModel
from srppo.training.loop import parameters
from srppo.training.scores import response_log_ratio

NAMES = ("llama", "llama tied", "qwen2 tied", "gemma2 softcap", "gpt2 positions", "mixtral", "phi bias")
LORA = ModelConfig(base="somewhere", adapters="lora", lora_rank=4, lora_alpha=8)


def role(frozen: LanguageModel, seed: int) -> AdaptedModel:
    """An adapter that says something: A and B are random."""
    made = AdaptedModel(frozen, lora_settings(LORA), seed)
    generator = torch.Generator().manual_seed(seed)
    for weight in parameters(made):
        weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    return made


def logprobs(model: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return model.response_logprobs(*ragged()[:3])


@pytest.mark.parametrize("name", NAMES)
def test_each_role_gives_what_a_model_with_its_weights_added_gives(name: str) -> None:
    """The merged weights are worked out here: W + B A alpha / rank."""
    frozen = make(name)
    before = logprobs(frozen)
    roles = [role(frozen, seed) for seed in (1, 2, 3)]
    found = [logprobs(each) for each in roles]
    for each, own in zip(roles, found, strict=True):
        plain = make(name)
        weights = {name: weight.detach() for name, weight in each.weights().items()}
        added = {key.removesuffix(".lora_A.weight") for key in weights if key.endswith(".lora_A.weight")}
        assert len(added) >= 8 and 2 * len(added) == len(weights)
        for key in added:
            delta = weights[f"{key}.lora_B.weight"] @ weights[f"{key}.lora_A.weight"] * 2.0
            layer = plain.model.get_submodule(key.removeprefix("base_model.model."))
            layer.weight.data += delta if layer.weight.shape == delta.shape and not is_conv1d(layer) else delta.T
        torch.testing.assert_close(own, logprobs(plain), atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(own, logprobs(each.merged()), atol=2e-5, rtol=2e-5)
    assert torch.equal(logprobs(frozen), before), "the base is what it was, to the bit"
    assert all(not torch.allclose(one, other) for one, other in zip(found, [before, *found], strict=False))
    assert torch.equal(logprobs(roles[0]), found[0]), "and roles take turns in any order"


def is_conv1d(layer: Any) -> bool:
    return type(layer).__name__ == "Conv1D"


def test_gradients_reach_the_active_role_alone() -> None:
    frozen = make("llama")
    sft, policy = role(frozen, 1), role(frozen, 2)
    value = ValueModel(policy)
    torch.nn.init.normal_(value.head.weight)
    tokens_BS, mask_BS, width, _ = ragged()
    everything = {"sft": sft, "policy": policy, "value": value}
    for name, loss in (
        ("policy", lambda: policy.response_logprobs(tokens_BS, mask_BS, width).sum()),
        ("value", lambda: value.response_values(tokens_BS, mask_BS, width).sum()),
    ):
        frozen.model.zero_grad()
        value.zero_grad()
        loss().backward()
        reached = {
            role for role, model in everything.items() if any(weight.grad is not None for weight in parameters(model))
        }
        assert reached == {name}
        assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in parameters(everything[name]))
        own = {id(weight) for weight in parameters(everything[name])}
        assert all(weight.grad is None for weight in frozen.model.parameters() if id(weight) not in own)


def test_the_base_stands_to_the_bit_while_a_role_is_trained() -> None:
    frozen = make("llama")
    before, policy = logprobs(frozen), role(frozen, 1)
    start, optimizer = logprobs(policy), torch.optim.Adam(parameters(policy), lr=0.1)
    other = policy.copy()
    for _ in range(3):
        optimizer.zero_grad()
        policy.response_logprobs(*ragged()[:3]).sum().backward()
        assert torch.equal(logprobs(frozen), before)
        optimizer.step()
    assert torch.equal(logprobs(frozen), before) and torch.equal(logprobs(other), start)
    assert not torch.allclose(logprobs(policy), start, atol=0.1)


def test_a_copy_begins_where_its_role_is_and_a_new_one_at_the_base() -> None:
    frozen = make("llama")
    before = logprobs(frozen)
    fresh = to_train(frozen, LORA, seed=3)
    assert torch.equal(logprobs(fresh), before)
    assert any(weight.abs().sum() > 0 for weight in parameters(fresh)), "A is random, B zero"
    state = torch.get_rng_state()
    again = to_train(frozen, LORA, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(parameters(fresh), parameters(again), strict=True))
    assert all(torch.equal(one, two) and one is not two for one, two in pairs)
    other = to_train(frozen, LORA, seed=4)
    assert not all(torch.equal(one, two) for one, two in zip(parameters(fresh), parameters(other), strict=True))
    sft = role(frozen, 1)
    policy = to_train(sft, LORA)
    assert isinstance(policy, AdaptedModel) and torch.equal(logprobs(policy), logprobs(sft))
    whole = to_train(sft, ModelConfig(base="somewhere"))
    assert not isinstance(whole, AdaptedModel)
    torch.testing.assert_close(logprobs(whole), logprobs(sft), atol=2e-5, rtol=2e-5)


def test_a_role_that_is_made_while_the_base_is_read_is_its_own() -> None:
    """Layers that are switched off stay so when an adapter is put in."""
    frozen = make("llama")
    sft = role(frozen, 1)
    before = logprobs(frozen)
    policy = sft.copy()
    assert policy.response_logprobs(*ragged()[:3]).requires_grad
    assert torch.equal(logprobs(policy), logprobs(sft)) and not torch.allclose(logprobs(policy), before)


def test_a_role_that_is_gone_holds_no_memory() -> None:
    frozen = make("llama")
    kept, passing = role(frozen, 1), role(frozen, 2)
    found, count = logprobs(kept), sum(1 for _ in frozen.model.parameters())
    del passing
    gc.collect()
    assert sum(1 for _ in frozen.model.parameters()) == count - len(parameters(kept))
    assert torch.equal(logprobs(kept), found)


def test_log_ratios_are_those_of_four_models_and_share_the_head() -> None:
    frozen = make("llama tied")
    sft = role(frozen, 1)
    assert sft.head_rows()[0] is frozen.head_rows()[0], "one head, two sets of hidden states"
    scores = response_log_ratio(sft, frozen, *ragged()[:3])
    apart = response_log_ratio(sft.merged(), make("llama tied"), *ragged()[:3])
    for ours, theirs in zip(scores, apart, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


def test_a_layer_is_worked_out_again_for_the_role_that_it_was_worked_out_for() -> None:
    """Between a policy's forward and its backward pass other roles may be read: the gradient is the policy's."""
    found = []
    for recomputes in (False, True):
        frozen = make("llama", attention="sdpa")
        sft, policy = role(frozen, 1), role(frozen, 2)
        if recomputes:
            policy.recompute_activations()
        loss = policy.response_logprobs(*ragged()[:3]).sum()
        calls: list[int] = []
        hook = frozen.model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))  # noqa: B023
        read = logprobs(sft), logprobs(frozen)  # before the backward pass, as on-policy distillation does
        passes = len(calls)
        loss.backward()
        hook.remove()
        assert len(calls) == passes + recomputes
        assert torch.equal(logprobs(sft), read[0]) and torch.equal(logprobs(frozen), read[1])
        found.append([weight.grad for weight in parameters(policy)])
        assert all(weight.grad is None for weight in parameters(sft))
    for plain, again in zip(*found, strict=True):
        assert plain is not None and again is not None
        torch.testing.assert_close(again, plain, atol=1e-6, rtol=1e-5)


# ---- files


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    tiny_llama(vocab=VOCAB).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def of_folder(path: Path, base: Path) -> tuple[LanguageModel, ModelConfig]:
    config = LORA.model_copy(update={"base": str(base)})
    return load_model(str(path), config), config


def test_peft_reads_what_is_saved_and_so_do_we(base_folder: Path, tmp_path: Path) -> None:
    frozen, config = of_folder(base_folder, base_folder)
    sft = role(frozen, 1)
    (tmp_path / "sft").mkdir()
    sft.save(tmp_path / "sft")
    theirs = LanguageModel(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "sft").merge_and_unload())
    torch.testing.assert_close(logprobs(theirs), logprobs(sft), atol=2e-5, rtol=2e-5)
    sft.merged().save(tmp_path / "merged")
    whole = LanguageModel(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(logprobs(whole), logprobs(sft), atol=2e-5, rtol=2e-5)
    again = load_over(str(tmp_path / "sft"), frozen, config)
    assert isinstance(again, AdaptedModel) and again.model is frozen.model
    assert torch.equal(logprobs(again), logprobs(sft))
    alone = load_model(str(tmp_path / "sft"), config)
    assert alone.model is not frozen.model and torch.equal(logprobs(alone), logprobs(sft))
    settings = json.loads((tmp_path / "sft" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base_folder) and settings["inference_mode"]


def test_an_adapters_own_dropout_is_off(base_folder: Path, tmp_path: Path) -> None:
    frozen, config = of_folder(base_folder, base_folder)
    sft = role(frozen, 1)
    (tmp_path / "sft").mkdir()
    sft.save(tmp_path / "sft")
    settings = json.loads((tmp_path / "sft" / "adapter_config.json").read_text())
    (tmp_path / "sft" / "adapter_config.json").write_text(json.dumps(settings | {"lora_dropout": 0.5}))
    again = load_over(str(tmp_path / "sft"), frozen, config)
    assert torch.equal(logprobs(again), logprobs(sft)) and torch.equal(logprobs(again), logprobs(again))


def test_adapters_that_do_not_fit_are_refused_in_one_line(base_folder: Path, tmp_path: Path) -> None:
    frozen, config = of_folder(base_folder, base_folder)
    sft = role(frozen, 1)
    folder = tmp_path / "sft"
    folder.mkdir()
    sft.save(folder)
    tiny_llama(seed=1, vocab=VOCAB).save_pretrained(tmp_path / "other")
    other, _ = of_folder(tmp_path / "other", tmp_path / "other")
    with pytest.raises(ModelError, match=r"was trained over '.*/base', and model\.base is '.*/other': give that base"):
        load_over(str(folder), other, config)
    moved = tmp_path / "moved"
    base_folder.rename(moved)
    with pytest.raises(ModelError, match="give that base"):
        load_over(str(folder), other, config)
    moved.rename(base_folder)
    tiny_llama(vocab=VOCAB).save_pretrained(tmp_path / "twin")
    twin, _ = of_folder(tmp_path / "twin", tmp_path / "twin")
    assert torch.equal(logprobs(load_over(str(folder), twin, config)), logprobs(sft)), "the same weights elsewhere"

    weights = load_file(folder / "adapter_model.safetensors")
    name = next(key for key in weights if "down_proj.lora_A" in key)
    for changed, said in (
        ({key: x for key, x in weights.items() if key != name}, r"down_proj.lora_A.weight is absent in it"),
        ({**weights, name: torch.zeros(9, 9)}, r"down_proj.lora_A.weight is \(9, 9\) in it and \(4, 64\) here"),
    ):
        save_file(changed, folder / "adapter_model.safetensors")
        with pytest.raises(ModelError, match=said):
            load_adapter(folder, frozen)
    (folder / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="cannot be read"):
        load_adapter(folder, frozen)
    for more in ({"modules_to_save": ["lm_head"]}, {"use_dora": True}, {"bias": "all"}, {"lora_bias": True}):
        settings = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **more)
        settings.save_pretrained(str(folder))
        with pytest.raises(ModelError, match=f"has {next(iter(more))}; plain LoRA adapters are understood"):
            load_adapter(folder, frozen)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        load_adapter(folder, frozen)


def test_targets_that_no_layer_has_are_refused() -> None:
    config = LORA.model_copy(update={"lora_targets": ("q_prof",)})
    with pytest.raises(ConfigError, match=r"no adapter fits LlamaForCausalLM with model\.lora_targets = .*q_prof"):
        to_train(make("llama"), config)


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match=r"needs the package peft: pip install 'srppo\[peft\]'"):
        to_train(make("llama"), LORA)
