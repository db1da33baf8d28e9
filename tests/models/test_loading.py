"""Loading: fp32 whatever the checkpoint holds, and a line for each folder that is no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from architectures import CONFIGS, make
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging

import srppo.models.loading
from srppo.config import ModelConfig
from srppo.errors import ModelError
from srppo.models.loading import context_length, fingerprint, load_model, load_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worlds.save_model(tmp_path_factory.mktemp("models") / "base", worlds.byte_llama(0))


def test_a_bf16_checkpoint_is_loaded_as_fp32(base: Path, tmp_path: Path) -> None:
    worlds.save_model(tmp_path, worlds.byte_llama(0).bfloat16())
    loaded = load_model(str(tmp_path), ModelConfig())
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    head = load_model(str(base), ModelConfig()).model.lm_head.weight
    assert torch.equal(loaded.model.lm_head.weight, head.bfloat16().float())


def test_a_missing_pad_token_becomes_eos_and_padding_goes_left(tmp_path: Path) -> None:
    tokenizer = worlds.byte_tokenizer()
    tokenizer.pad_token = None
    worlds.save_model(tmp_path, worlds.byte_llama(0), tokenizer=False)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), ModelConfig())
    assert loaded.pad_token_id == loaded.eos_token_id == worlds.EOS and loaded.padding_side == "left"


def test_a_fingerprint_follows_content_and_not_the_folder(base: Path, tmp_path: Path) -> None:
    config = ModelConfig()
    same = worlds.save_model(tmp_path / "same", worlds.byte_llama(0))
    other = worlds.save_model(tmp_path / "other", worlds.byte_llama(1))
    assert fingerprint(str(base), config) == fingerprint(str(same), config) != fingerprint(str(other), config)


@pytest.mark.parametrize("name", ["./nothing/here", "/nothing/here", "nothing", "a/b/c", "~/nothing"])
def test_a_name_that_is_no_model_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="is neither a folder here nor a hub name"):
        load_model(name, ModelConfig())


def test_a_folder_without_weights_is_named_as_such(base: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    with pytest.raises(ModelError, match="has no weights"):
        load_model(str(tmp_path), ModelConfig())


def test_damaged_files_end_in_one_line(base: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        folder = worlds.save_model(tmp_path / name, worlds.byte_llama(0))
        (folder / name).write_text("{")
        with pytest.raises(ModelError, match="cannot be loaded") as error:
            load_model(str(folder), ModelConfig())
            load_tokenizer(str(folder), ModelConfig())
        assert "\n" not in str(error.value)


def test_bars_are_hidden_while_a_model_is_loaded_and_not_for_good(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was set before: shown, hidden by transformers' switch, or the hub's bars alone hidden."""
    seen = []
    original = srppo.models.loading.AutoModelForCausalLM.from_pretrained

    def look(*args: Any, **more: Any) -> Any:
        seen.append((logging.is_progress_bar_enabled(), not are_progress_bars_disabled()))
        return original(*args, **more)

    monkeypatch.setattr(srppo.models.loading.AutoModelForCausalLM, "from_pretrained", look)
    was = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    try:
        for shown, hub in ((True, True), (True, False), (False, False)):
            (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
            (enable_progress_bars if hub else disable_progress_bars)()
            load_model(str(base), ModelConfig())
            assert (logging.is_progress_bar_enabled(), not are_progress_bars_disabled()) == (shown, hub)
    finally:
        (logging.enable_progress_bar if was[0] else logging.disable_progress_bar)()
        (enable_progress_bars if was[1] else disable_progress_bars)()
    assert seen == [(False, False)] * 3


@pytest.mark.parametrize("name", CONFIGS)
def test_the_context_is_found_wherever_a_config_names_it(name: str) -> None:
    endless = ("bloom alibi", "mamba", "mamba2")
    assert context_length(make(name)) == {"falcon": 2048}.get(name, 1 << 20 if name in endless else 32)


def test_a_recipe_gives_its_own_models_a_template_and_leaves_what_a_run_exports(tmp_path: Path) -> None:
    folders = {
        name: str(worlds.save_model(tmp_path / name, worlds.byte_llama(0))) for name in ("base", "sft", "exported")
    }
    template = tmp_path / "chat.jinja"
    template.write_text(worlds.TEMPLATE)
    keys = {"base": folders["base"], "sft": folders["sft"], "chat_template": str(template)}
    config = ModelConfig(**keys, template_kwargs={"brief": True})
    found = {name: load_tokenizer(folder, config) for name, folder in folders.items()}
    turns = [{"role": "user", "content": "x"}]
    for name in ("base", "sft"):
        assert found[name].apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == "B u:xa:"
    assert found["exported"].chat_template is None
    found["sft"].save_pretrained(folders["exported"])
    again = load_tokenizer(
        folders["exported"], config.model_copy(update={"chat_template": str(tmp_path / "moved.jinja")})
    )
    assert again.chat_template == found["sft"].chat_template
    changed = fingerprint(folders["exported"], config)
    assert changed != fingerprint(folders["sft"], config)  # the template is part of what a model is


def test_the_slowdown_is_bf16_over_fp32_and_leaves_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of its own, on which a layer takes 2 s in fp32 and 18 s in bf16, and the first try of each longer."""
    now, tries, threads = [0.0], {torch.float32: 0, torch.bfloat16: 0}, torch.get_num_threads()

    def layer(x_MD: torch.Tensor, weight_ND: torch.Tensor) -> torch.Tensor:
        assert x_MD.dtype == weight_ND.dtype and torch.get_num_threads() == 1
        tries[x_MD.dtype] += 1
        now[0] += (100.0 if tries[x_MD.dtype] == 1 else 0.0) + (18.0 if x_MD.dtype == torch.bfloat16 else 2.0)
        return torch.nn.functional.linear(x_MD, weight_ND)

    monkeypatch.setattr(srppo.models.loading, "perf_counter", lambda: now[0])
    monkeypatch.setattr(srppo.models.loading, "linear", layer)
    assert srppo.models.loading.bf16_slowdown.__wrapped__("cpu") == 9.0
    assert torch.get_num_threads() == threads
