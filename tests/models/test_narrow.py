"""Frozen weights that stay in 16 bits give the bits that a model loaded in fp32 gives."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from architectures import make, ragged
from torch import nn
from transformers import AutoModelForCausalLM

from srppo.config import ModelConfig
from srppo.models import narrow
from srppo.models.language_model import LanguageModel
from srppo.models.loading import load_model, to_train
from srppo.models.memory import weight_bytes

NAMES = ("llama", "llama tied", "gemma2 softcap", "gpt2 positions", "mixtral", "phi bias", "opt projected", "mamba")


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a model that is large enough for it."""
    monkeypatch.setattr(narrow, "WORTH", 0)


def saved(folder: Path, name: str, dtype: torch.dtype) -> str:
    make(name).model.to(dtype).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_bits_are_those_of_fp32_weights(name: str, dtype: torch.dtype, precision: str, tmp_path: Path) -> None:
    path = saved(tmp_path, name, dtype)
    ours = load_model(path, ModelConfig(precision=precision))
    theirs = LanguageModel(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), precision=precision)
    if name in ("llama", "llama tied", "phi bias"):  # matrices of others are no linear layers, or read past them
        assert weight_bytes(ours) < 0.6 * weight_bytes(theirs)
    with torch.no_grad():
        assert torch.equal(ours.response_logprobs(*ragged()[:3]), theirs.response_logprobs(*ragged()[:3]))
    assert not any(weight.requires_grad for weight in ours.model.parameters())
    trained = to_train(ours, ModelConfig(precision=precision))
    assert all(weight.requires_grad and weight.dtype == torch.float32 for weight in trained.model.parameters())
    assert not any(type(module).__name__.startswith("Narrow") for module in trained.model.modules())
    with torch.no_grad():
        assert torch.equal(trained.response_logprobs(*ragged()[:3]), theirs.response_logprobs(*ragged()[:3]))


def test_gradients_through_a_narrow_layer_are_those_through_a_wide_one() -> None:
    torch.manual_seed(0)
    wide = nn.Linear(12, 7).bfloat16().requires_grad_(False)
    layer = copy.deepcopy(wide)
    layer.__class__, layer.bias.data = narrow.NarrowLinear, layer.bias.data.float()
    wide.float()
    x, twin = (torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    (layer(x) ** 2).sum().backward()
    (wide(twin) ** 2).sum().backward()
    assert layer.weight.dtype == torch.bfloat16 and layer.bias.dtype == torch.float32
    assert x.grad is not None and twin.grad is not None and torch.equal(x.grad, twin.grad)


def test_a_small_model_is_widened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(narrow, "WORTH", 1 << 28)
    ours = load_model(saved(tmp_path, "llama", torch.bfloat16), ModelConfig())
    assert all(weight.dtype == torch.float32 for weight in ours.model.parameters())
