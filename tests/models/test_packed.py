"""Packed rows give what padded ones give, on every architecture that takes them, and no row reads another."""

from __future__ import annotations

import pytest
import torch
from architectures import CONFIGS, EOS, VOCAB, make, ragged
from torch import Tensor

from srppo.models.language_model import LanguageModel
from srppo.models.packed import NAME, Asked, Packing, Segments
from srppo.models.value_model import ValueModel

PACKED = ("llama", "mistral window", "mixtral", "qwen2 tied", "qwen3 moe", "gemma3 text", "gemma3 nested", "phi bias")
PACKED += ("gpt2 positions", "gpt neox", "opt projected", "cohere2 scale", "granite moe", "deepseek v3", "smollm3")
PADDED = ("falcon", "stablelm", "nemotron", "falcon h1", "lfm2", "llama4 text")


def test_what_lies_where_by_hand() -> None:
    tokens_BS = torch.tensor([[9, 9, 1, 2, 3, 9], [9, 4, 5, 9, 9, 9], [6, 7, 8, 9, 9, 9]])
    mask_BS = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0]]).bool()
    packing = Packing.of(tokens_BS, mask_BS)
    assert packing.tokens_N.tolist() == [4, 5, 1, 2, 3, 6, 7, 8]
    assert packing.positions_N.tolist() == [0, 1, 0, 1, 2, 0, 1, 2]
    assert packing.segments == Segments((2, 3, 3))
    assert packing.place_BS[mask_BS].tolist() == [2, 3, 4, 0, 1, 5, 6, 7]


@pytest.mark.parametrize("name", PACKED)
def test_log_probs_values_and_gradients_are_those_of_padded_rows(name: str) -> None:
    lm = make(name, attention="sdpa")
    assert lm.packs and lm.model.config._attn_implementation == NAME
    tokens_BS, mask_BS, width, _ = ragged()
    found = {}
    for packs in (True, False):
        lm.packs = packs
        value = ValueModel(lm)
        torch.nn.init.constant_(value.head.weight, 0.1)
        lm.model.zero_grad()
        logprobs_BT = lm.response_logprobs(tokens_BS, mask_BS, width)
        values_BT = value.response_values(tokens_BS, mask_BS, width)
        (logprobs_BT.sum() + values_BT.square().sum()).backward()
        weights = [*lm.model.parameters(), *value.trunk.weights().values()]
        found[packs] = [logprobs_BT, values_BT, *(x.grad for x in weights if x.grad is not None)]
    assert len(found[True]) == len(found[False]) > 4
    for ours, theirs in zip(found[True], found[False], strict=True):
        scale = max(float(theirs.abs().max()), 0.05)
        torch.testing.assert_close(ours, theirs, atol=2e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("name", PADDED)
def test_a_body_that_mixes_rows_or_does_otherwise_is_left_as_it_was(name: str) -> None:
    lm = make(name, attention="sdpa")
    assert not lm.packs and lm.model.config._attn_implementation == "sdpa"


def test_every_architecture_is_one_or_the_other() -> None:
    assert not {*PACKED, *PADDED} - {*CONFIGS}


def rows_of(lm: LanguageModel, tokens_BS: Tensor, mask_BS: Tensor) -> list[Tensor]:
    with torch.no_grad():
        logprobs_BT = lm.response_logprobs(tokens_BS, mask_BS, 4)
    return [row[mask] for row, mask in zip(logprobs_BT, mask_BS[:, -4:], strict=True)]


@pytest.mark.parametrize("name", ["llama", "mistral window", "gpt2 positions", "gemma3 text"])
def test_no_row_reads_another(name: str) -> None:
    """Other tokens in one row change that row alone, to the bit; so does the order of rows not at all."""
    lm = make(name, attention="sdpa")
    assert lm.packs
    tokens_BS, mask_BS, _, _ = ragged()
    before = rows_of(lm, tokens_BS, mask_BS)
    for changed in range(len(before)):
        other_BS = tokens_BS.clone()
        other_BS[changed] = (tokens_BS[changed] + 1) % VOCAB
        after = rows_of(lm, other_BS, mask_BS)
        same = [torch.equal(one, two) for one, two in zip(before, after, strict=True)]
        assert same == [i != changed for i in range(len(before))]
    order = torch.tensor([3, 1, 4, 0, 2])
    moved = rows_of(lm, tokens_BS[order], mask_BS[order])
    for place, i in enumerate(order.tolist()):
        torch.testing.assert_close(moved[place], before[i], atol=1e-5, rtol=1e-5)


def test_without_segments_a_model_is_transformers_own() -> None:
    """generate() and lm-eval go through the same model."""
    ours, theirs = make("llama", attention="sdpa"), make("llama")
    tokens_BS, mask_BS, _, _ = ragged()
    prompt = {"input_ids": tokens_BS[:, :6], "attention_mask": mask_BS[:, :6].long()}
    written = [
        lm.model.generate(**prompt, max_new_tokens=6, do_sample=False, pad_token_id=EOS) for lm in (ours, theirs)
    ]
    assert ours.packs and not theirs.packs and torch.equal(*written)


def test_a_window_is_kept_where_a_row_is_longer() -> None:
    """Mistral's window of 4: the fifth token before has no influence on one layer's values."""
    segments = Segments((7,))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 7, 8, generator=generator) for _ in range(3))
    full, banded = (segments.attend(q, k, v, Asked(window=window)) for window in (None, 4))
    scores = (q @ k.transpose(1, 2)) / 8**0.5
    back = torch.arange(7)[:, None] - torch.arange(7)
    for found, seen in ((full, back >= 0), (banded, (back >= 0) & (back < 4))):
        expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        torch.testing.assert_close(found.transpose(0, 1), expected)
    assert torch.equal(segments.attend(q, k, v, Asked(window=7)), full)


def test_what_is_not_known_is_refused() -> None:
    from srppo.models.packed import attention

    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="knows nothing of s_aux"):
        attention(None, x, x, x, None, segments=Segments((3,)), s_aux=torch.zeros(2))
