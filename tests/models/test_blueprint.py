"""A blueprint has the weights of the model that is loaded, to the number and the byte, and no memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import CONFIGS
from transformers import AutoModelForCausalLM

from srppo.config import ModelConfig
from srppo.errors import ModelError
from srppo.models.blueprint import META, blueprint
from srppo.models.loading import load_model, to_train
from srppo.models.memory import weight_bytes


@pytest.mark.parametrize("adapters", ["none", "lora"])
@pytest.mark.parametrize("name", ["llama", "llama tied", "qwen2 tied", "gemma2 softcap"])
@pytest.mark.parametrize("worth", [0, 1 << 40])
def test_weights_are_those_of_the_loaded_model(
    name: str, adapters: str, worth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also which of them stay in 16 bits."""
    monkeypatch.setattr("srppo.models.narrow.WORTH", worth)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[name]()).to(torch.bfloat16).save_pretrained(tmp_path)
    config = ModelConfig(base=str(tmp_path), adapters=adapters)
    loaded, planned = load_model(str(tmp_path), config), blueprint(str(tmp_path), config)
    assert all(weight.device.type == "meta" for weight in planned.parameters())
    with META:
        planned_policy = to_train(planned, config)
    policy = to_train(loaded, config)
    for real, drawn in ((loaded, planned), (policy, planned_policy)):
        sizes, theirs = (
            {key: (tuple(w.shape), w.dtype, w.requires_grad) for key, w in each.named_parameters()}
            for each in (real, drawn)
        )
        assert sizes == theirs
        assert weight_bytes(real) == weight_bytes(drawn)
        assert real.weights().keys() == drawn.weights().keys()


def test_what_is_no_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ModelError) as caught:
        blueprint(str(tmp_path), ModelConfig(base=str(tmp_path)))
    assert "cannot be planned" in str(caught.value) and "\n" not in str(caught.value)
