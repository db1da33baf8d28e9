"""Counted operations: by hand, and beside torch's own counter on many architectures."""

from __future__ import annotations

import pytest
import torch
from architectures import CONFIGS, MORE_THAN_COUNTED, VOCAB, make
from torch.utils.flop_counter import FlopCounterMode

from srppo.config import ModelConfig
from srppo.models.adapters import AdaptedModel, lora_settings
from srppo.models.flops import forward_flops, update_flops
from srppo.models.value_model import ValueModel


def test_forward_flops_by_hand() -> None:
    lm = make("llama tied")
    width, inner, layers = 16, 24, 2
    matrices = layers * (4 * width * width + 3 * width * inner)
    lengths, head_tokens = [3, 5], 4
    pairs = (1 + 2 + 3) + (1 + 2 + 3 + 4 + 5)  # each token looks at itself and those before
    attention = layers * pairs * (2 * width + 2 * width)  # scores, then weighted values; 2 operations a product
    body = 2 * matrices * sum(lengths) + attention
    assert forward_flops(lm, torch.tensor(lengths), head_tokens) == body + 2 * width * VOCAB * head_tokens
    assert forward_flops(ValueModel(lm), torch.tensor(lengths), head_tokens) == body + 2 * width * head_tokens


def test_forward_flops_count_neither_padding_nor_embeddings() -> None:
    tied, untied = make("llama tied"), make("llama")
    lengths = torch.tensor([3, 5])
    assert forward_flops(tied, lengths, 4) == forward_flops(untied, lengths, 4)
    assert forward_flops(tied, lengths, 4) > 2 * sum(
        weight.numel() for name, weight in tied.model.named_parameters() if weight.dim() == 2 and "embed" not in name
    ) * int(lengths.sum())


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_flops_are_those_that_torch_counts(name: str) -> None:
    """One token: equal. More: torch counts the square of attention, of which a causal model needs the lower half."""
    model = make(name)
    counted, ours = {}, {}
    for length in (1, 8):
        tokens_BS = torch.arange(length)[None]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.model(input_ids=tokens_BS, use_cache=False)
        counted[length] = counter.get_total_flops()
        ours[length] = forward_flops(model, torch.tensor([length]), length)
    if name in MORE_THAN_COUNTED:
        assert counted[1] / 3 < ours[1] < counted[1] and counted[8] / 3 < ours[8] < counted[8]
        return
    assert ours[1] == counted[1]
    of_a_pair = (8 * ours[1] - ours[8]) / (8 - 36)  # 8 tokens alone see 8, together 36
    assert ours[8] == counted[8] - of_a_pair * (64 - 36)
    head = model.model.get_output_embeddings().weight
    assert forward_flops(ValueModel(model), torch.tensor([8]), 8) == ours[8] - 8 * 2 * (head.numel() - head.shape[1])


def test_adapters_are_counted_with_their_role_and_in_their_update() -> None:
    """Of rank 4 over all linear layers: A and B of the role alone, in every pass; the backbone has no gradient."""
    lm = make("llama tied")
    lengths = torch.tensor([3, 5])
    plain = forward_flops(lm, lengths, 4)
    roles = [AdaptedModel(lm, lora_settings(ModelConfig(adapters="lora", lora_rank=4)), seed=i) for i in range(2)]
    width, inner, layers = 16, 24, 2
    adapter = 2 * 4 * layers * (4 * (width + width) + 3 * (width + inner)) * 8
    assert forward_flops(lm, lengths, 4) == plain and forward_flops(roles[0], lengths, 4) == plain + adapter
    assert update_flops(lm, lengths, 4) == 3 * plain
    assert update_flops(roles[1], lengths, 4) == 2 * (plain + adapter) + adapter
    value = ValueModel(roles[1])
    heads = 2 * width * 4 * (1 - VOCAB)
    assert forward_flops(value, lengths, 4) == plain + adapter + heads
    assert update_flops(value, lengths, 4) == 2 * (plain + adapter + heads) + adapter


def test_experts_in_a_list_count_as_those_in_one_weight() -> None:
    """As models with code of their own hold them, and transformers before its version 5."""
    model = make("mixtral")
    before = forward_flops(model, torch.tensor([3, 5]), 4)
    for layer in model.model.base_model.layers:
        together = layer.mlp.experts
        layer.mlp.experts = torch.nn.ModuleList(
            torch.nn.ParameterList([together.gate_up_proj[i].detach(), together.down_proj[i].detach()])
            for i in range(4)
        )
    assert forward_flops(model, torch.tensor([3, 5]), 4) == before


def test_a_body_that_cannot_be_found_has_its_head_counted_once() -> None:
    model = make("llama4 text")
    head = model.model.get_output_embeddings().weight
    with_head, without = (forward_flops(model, torch.tensor([8]), count) for count in (8, 0))
    assert with_head - without == 2 * 8 * head.numel()
    rest = [weight for name, weight in model.named_parameters() if weight.dim() == 2 and "embed" not in name]
    experts = [weight for name, weight in model.named_parameters() if weight.dim() == 3]
    matrices = sum(weight.numel() for weight in rest) - head.numel() + sum(weight.numel() // 4 for weight in experts)
    assert without == 2 * 8 * matrices + 2 * (4 * 2 * 8) * 36  # layers, heads of 8, pairs
