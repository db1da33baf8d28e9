"""An export loads with from_pretrained, and its card with any YAML and TOML reader."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import torch
import worlds
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from srppo.config import ModelConfig, build_recipe
from srppo.data.chat import CHAT_TEMPLATE, ensure_chat_template
from srppo.models.export import export_model, model_card
from srppo.models.language_model import LanguageModel
from srppo.models.loading import load_model, load_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worlds.save_model(tmp_path_factory.mktemp("models") / "base", worlds.byte_llama(0))


@pytest.mark.parametrize("where", ["embedded:s", "org/name", "runs/a: b #1"])
@pytest.mark.parametrize("kind", ["SRPPO", "longer SFT"])
def test_an_export_loads_with_from_pretrained(where: str, kind: str, base: Path, tmp_path: Path) -> None:
    lm = load_model(str(base), ModelConfig())
    tokenizer = load_tokenizer(str(base), ModelConfig())
    assert ensure_chat_template(tokenizer)
    recipe = build_recipe(
        {
            "model": {"base": where},
            "data": {"system": 'Say "ß" \\ or 😀 ```\n'},
            "ppo": {"lr": 3e-07},
            "eval": {"limit": 3},
        }
    )
    figures = {"kept_step": 1, "steps": 2, "test": {"g": {"greedy": {"mean": 0.5, "low": 0.1, "high": 0.9, "n": 4}}}}
    export_model(tmp_path, lm, tokenizer, stop_ids=[worlds.EOS, 3], card=model_card(recipe, kind, figures))

    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens_BS = torch.tensor([[1, 2, 3, 4, 5]])
    mask_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
    before = lm.response_logprobs(tokens_BS, mask_BS, 3)
    assert torch.equal(LanguageModel(again).response_logprobs(tokens_BS, mask_BS, 3), before)
    assert again.generation_config.eos_token_id == [worlds.EOS, 3]
    assert (tmp_path / "model.safetensors").exists() and not list(tmp_path.glob("*.bin"))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == CHAT_TEMPLATE
    asked = [{"role": "user", "content": "Hi"}]
    assert loaded.apply_chat_template(asked, add_generation_prompt=True, tokenize=False) == "Q: Hi\nA:"

    _, front, body = (tmp_path / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    header = yaml.safe_load(front)
    assert header["base_model"] == where and header["tags"] == ["srppo", kind]
    assert "| g | greedy | 0.500 | 0.100 to 0.900 | 4 |" in body
    (written,) = re.findall(r"^```toml\n(.*?)^```$", body, re.DOTALL | re.MULTILINE)
    assert build_recipe(tomllib.loads(written)) == recipe
