"""The critic: its own copy of the body, under a head that starts at zero."""

from __future__ import annotations

import pytest
import torch
from architectures import VOCAB, make, ragged
from tiny import tiny_llama
from torch import nn
from transformers import LlamaForCausalLM

from srppo.errors import ModelError
from srppo.models.language_model import LanguageModel
from srppo.models.value_model import ValueModel


def test_the_critic_starts_at_zero_and_shares_nothing() -> None:
    lm = make("llama")
    tokens_BS, mask_BS, width, _ = ragged()
    value = ValueModel(lm)
    values_BT = value.response_values(tokens_BS, mask_BS, width)
    assert values_BT.shape == (5, width) and values_BT.dtype == torch.float32 and (values_BT == 0).all()
    before = lm.response_logprobs(tokens_BS, mask_BS, width)
    for weight in value.parameters():
        weight.data += 1.0
    assert torch.equal(lm.response_logprobs(tokens_BS, mask_BS, width), before)


def test_the_critic_sees_the_state_before_each_token() -> None:
    """Value t may depend on the prompt and on answer tokens before t, and on nothing later; 0 where masked."""
    lm = make("llama")
    value = ValueModel(lm)
    nn.init.normal_(value.head.weight)
    tokens_BS, mask_BS, width, _ = ragged()
    before = value.response_values(tokens_BS, mask_BS, width)
    assert (before[~mask_BS[:, -width:]] == 0).all() and (before[mask_BS[:, -width:]] != 0).all()
    changed = tokens_BS.clone()
    changed[0, 7] = (changed[0, 7] + 1) % VOCAB  # the second answer token
    after = value.response_values(changed, mask_BS, width)
    assert torch.equal(before[0, :2], after[0, :2]) and (before[0, 2:] != after[0, 2:]).all()


class Unnamed(LlamaForCausalLM):
    """Its body cannot be found: `base_model` is the model itself, whose output has no hidden states."""

    base_model_prefix = "nowhere"


def test_a_critic_needs_a_body() -> None:
    with pytest.raises(ModelError, match=r"Unnamed has no body under its head .* ppo\.advantage=rloo"):
        ValueModel(LanguageModel(Unnamed(tiny_llama().config)))
