"""Our log-probs are those of the model itself, for every kind of head and architecture, under padding and autocast."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from architectures import CONFIGS, HEADS_OF, REFUSED, VOCAB, make, make_model, ragged
from tiny import tiny_llama
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel
from worlds import World, make_world

import srppo.models.language_model
import srppo.training.scores
from srppo.config import ModelConfig
from srppo.console import Console
from srppo.errors import ModelError
from srppo.kernels import linear_logprob_diff_parts
from srppo.models.language_model import Head, LanguageModel
from srppo.models.loading import load_model, load_tokenizer
from srppo.models.pair import load_pair
from srppo.models.value_model import ValueModel
from srppo.stages.run import prepare_run, run_stages
from srppo.training.scores import response_log_ratio


@torch.no_grad()
def own_logprobs(model: PreTrainedModel, prompt: list[int], answer: list[int], temperature: float = 1.0) -> Tensor:
    """From the model's own logits on the unpadded row, fp32, no positions or mask given."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].float()
    chosen = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
    return chosen.gather(-1, torch.tensor(answer)[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", CONFIGS)
def test_logprobs_are_the_models_own_under_ragged_padding(name: str, temperature: float) -> None:
    lm = make(name)
    tokens_BS, mask_BS, width, rows = ragged()
    got = lm.response_logprobs(tokens_BS, mask_BS, width, temperature=temperature)
    assert got.dtype == torch.float32
    for i, (prompt, answer) in enumerate(rows):
        expected = own_logprobs(lm.model, prompt, answer, temperature)
        torch.testing.assert_close(got[i, : len(answer)], expected, atol=1e-5, rtol=0)
        assert (got[i, len(answer) :] == 0).all()
    assert float(got.detach()[mask_BS[:, -width:]].std()) > 0.5  # or scale and cap could not show


@pytest.mark.parametrize("name", CONFIGS)
def test_the_head_is_read_from_the_config(name: str) -> None:
    assert make(name).head == HEADS_OF.get(name, Head(True))


class OddHead(LlamaForCausalLM):
    """A head that its config does not tell of."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits - 0.1 * output.logits.square()
        return output


def test_an_unknown_head_is_noticed_and_its_own_logits_are_used() -> None:
    torch.manual_seed(0)
    model = OddHead(CONFIGS["llama"]())
    model.lm_head.weight.data.normal_(0, 0.5)
    lm = LanguageModel(model, precision="bf16")  # which must not reach the logits
    assert not lm.head.linear
    tokens_BS, mask_BS, width, rows = ragged()
    for parameter in model.parameters():
        parameter.grad = None
    got = lm.response_logprobs(tokens_BS, mask_BS, width)
    for i, (prompt, answer) in enumerate(rows):
        torch.testing.assert_close(got[i, : len(answer)], own_logprobs(model, prompt, answer), atol=1e-5, rtol=0)
    got.sum().backward()
    assert model.lm_head.weight.grad is not None and model.lm_head.weight.grad.abs().sum() > 0


class Louder(LlamaForCausalLM):
    """A head whose config does not tell that it is 1% louder."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.01
        return output


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e6])
def test_a_head_is_checked_by_the_size_of_its_logits(size: float) -> None:
    """An absolute tolerance would let the small odd head pass, and call the plain large one odd."""
    torch.manual_seed(0)
    odd, plain = Louder(CONFIGS["llama"]()), LlamaForCausalLM(CONFIGS["llama"]())
    for model in (odd, plain):
        model.lm_head.weight.data.normal_(0, size)
    assert not LanguageModel(odd).head.linear and LanguageModel(plain).head.linear


@pytest.mark.parametrize("name", ["llama", "phi bias", "gemma2 softcap", "bf16", "odd"])
def test_ids_beyond_the_tokenizer_are_in_no_softmax(name: str) -> None:
    """A head with rows that the tokenizer has no ids for gives the log-probs of one without them."""
    precision = "bf16" if name == "bf16" else "fp32"
    lm = make("llama" if name in ("bf16", "odd") else name, precision=precision)
    lm.vocab_size = VOCAB - 7
    if name == "odd":
        lm.head = Head(linear=False)
    head = lm.model.get_output_embeddings()
    with torch.no_grad():
        head.weight[VOCAB - 7 :] = 9 * torch.cat([head.weight[:4], -head.weight[:3]])  # they would take much of it
        head.weight.copy_(head.weight.bfloat16().float())
    tokens_BS, mask_BS, width, rows = ragged()
    tokens_BS = tokens_BS.clamp(max=VOCAB - 8)
    got_BT, moved = lm.response_logprobs(tokens_BS, mask_BS, width), 0.0
    for i, (prompt, answer) in enumerate(rows):
        prompt, answer = ([min(token, VOCAB - 8) for token in part] for part in (prompt, answer))
        logits = lm.model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        kept, whole = (
            x.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0] for x in (logits[:, : VOCAB - 7], logits)
        )
        torch.testing.assert_close(got_BT[i, : len(answer)], kept, atol=0.1 if name == "bf16" else 1e-5, rtol=0)
        moved = max(moved, float((kept - whole).detach().abs().max()))
    assert moved > 0.2
    same = response_log_ratio(lm, lm, tokens_BS, mask_BS, width)
    torch.testing.assert_close(same.sft_logprobs_BT, got_BT.detach(), atol=1e-5, rtol=0)
    got_BT.sum().backward()
    assert not head.weight.grad[VOCAB - 7 :].any() and head.weight.grad[: VOCAB - 7].any()


def test_the_size_of_a_vocabulary_is_the_tokenizers_where_the_head_has_more_rows(tmp_path: Path) -> None:
    path = str(worlds.save_model(tmp_path, worlds.byte_llama(0, vocab=worlds.VOCAB + 30)))
    tokenizer = load_tokenizer(path, ModelConfig())
    assert load_model(path, ModelConfig(), vocab_size=len(tokenizer)).vocab_size == worlds.VOCAB
    assert load_model(path, ModelConfig()).vocab_size == worlds.VOCAB + 30
    pair = load_pair(sft=path, base=path)
    assert pair.sft.vocab_size == pair.base.vocab_size == pair.load(path).vocab_size == worlds.VOCAB


class Heedless(LlamaForCausalLM):
    """Ignores the attention mask."""

    def forward(self, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("name", REFUSED)
def test_an_architecture_that_is_wrong_under_left_padding_is_refused(name: str) -> None:
    model = make_model(REFUSED[name]())
    with pytest.raises(ModelError, match=f"{type(model).__name__} gives other logits under left padding"):
        LanguageModel(model)


def test_a_model_that_is_wrong_under_left_padding_is_refused() -> None:
    torch.manual_seed(0)
    model = Heedless(CONFIGS["llama"]())
    model.lm_head.weight.data.normal_(0, 1.0)
    with pytest.raises(ModelError, match="Heedless gives other logits under left padding"):
        LanguageModel(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_dropout_is_off_and_passes_repeat(name: str) -> None:
    lm = make(name)  # handed over in train() mode
    tokens_BS, mask_BS, width, _ = ragged()
    first, second = (lm.response_logprobs(tokens_BS, mask_BS, width) for _ in range(2))
    assert torch.equal(first, second)
    assert not any(module.training for module in lm.model.modules())
    lm.train()  # whoever does so by mistake gets no dropout either
    torch.testing.assert_close(lm.response_logprobs(tokens_BS, mask_BS, width), first, atol=1e-6, rtol=0)
    if not lm.head.linear:  # its body cannot be found, and a critic is refused
        return
    value = ValueModel(lm).train()
    nn.init.normal_(value.head.weight)
    values = [value.response_values(tokens_BS, mask_BS, width) for _ in range(2)]
    assert torch.equal(*values) and values[0].abs().sum() > 0


def test_a_frozen_head_is_scored_in_bf16_where_that_rounds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint in bf16 keeps its 16-bit head; a trained one does not, nor does anything without `precision`."""
    sft, base, plain = make("llama", precision="bf16"), make("llama", precision="bf16", seed=1), make("llama")
    tokens_BS, mask_BS, width, _ = ragged()
    before = response_log_ratio(sft, base, tokens_BS, mask_BS, width)
    head = base.model.get_output_embeddings()
    with torch.no_grad():
        head.weight.copy_(head.weight.bfloat16().float())
    taken = {}

    def look(*arguments: Any, **named: Any) -> Any:
        taken.update(sft=arguments[1].dtype, base=arguments[3].dtype)
        return linear_logprob_diff_parts(*arguments, **named)

    monkeypatch.setattr(srppo.training.scores, "linear_logprob_diff_parts", look)
    after = response_log_ratio(sft, base, tokens_BS, mask_BS, width)
    assert taken == {"sft": torch.float32, "base": torch.bfloat16}
    direct = base.response_logprobs(tokens_BS, mask_BS, width)
    torch.testing.assert_close(after.base_logprobs_BT, direct, atol=1e-5, rtol=0)
    assert torch.equal(after.sft_logprobs_BT, before.sft_logprobs_BT) and not torch.equal(
        after.base_logprobs_BT, before.base_logprobs_BT
    )
    with torch.no_grad():
        head.weight += 1e-4  # as an optimiser would
    assert base.frozen_head()[0] is head.weight and plain.frozen_head()[0].dtype == torch.float32


def test_a_copy_has_weights_of_its_own_and_scores_with_them() -> None:
    first = make("llama", precision="bf16")
    weight_VD = first.model.get_output_embeddings().weight
    with torch.no_grad():
        weight_VD.copy_(weight_VD.bfloat16().float())
    first.frozen_head()
    copied = first.copy()
    own_VD = copied.model.get_output_embeddings().weight
    assert torch.equal(own_VD, weight_VD) and own_VD.data_ptr() != weight_VD.data_ptr()
    with torch.no_grad():
        while own_VD._version < weight_VD._version:  # until it has changed as often as the first one's, when narrowed
            own_VD.mul_(2)
    assert torch.equal(copied.frozen_head()[0].float(), own_VD) and not torch.equal(own_VD, weight_VD)


@pytest.mark.parametrize("name", ["llama", "gemma2 softcap", "cohere scale", "gpt2 positions"])
def test_bf16_stays_in_the_body(name: str) -> None:
    """Log-probs from a 16-bit body and an fp32 head: what is lost is the hidden states' rounding, not the logits'."""
    tokens_BS, mask_BS, width, _ = ragged()
    exact, lm = make(name), make(name, precision="bf16")
    got = lm.response_logprobs(tokens_BS, mask_BS, width)
    mask_BT = mask_BS[:, -width:]
    got_N = got[mask_BT]
    assert got_N.dtype == torch.float32
    assert (got_N == got_N.bfloat16().float()).float().mean() < 0.2  # not on the grid of bf16
    hidden = lm.hidden_rows(tokens_BS, mask_BS, width).double()
    head = lm.model.get_output_embeddings()
    logits = (hidden @ head.weight.double().T) * lm.head.logit_scale
    if lm.head.softcap:
        logits = lm.head.softcap * torch.tanh(logits / lm.head.softcap)
    tokens_N = tokens_BS[:, -width:][mask_BT][:, None]
    from_hidden = logits.log_softmax(-1).gather(-1, tokens_N)[:, 0]
    torch.testing.assert_close(got_N.double(), from_hidden, atol=1e-5, rtol=0)
    rounded = logits.bfloat16().double().log_softmax(-1).gather(-1, tokens_N)[:, 0]
    assert (rounded - from_hidden).abs().max() > 1e-3  # what the line above would have shown of 16-bit logits
    error = (got_N - exact.response_logprobs(tokens_BS, mask_BS, width)[mask_BT]).abs().max()
    assert 0 < error < 0.2


def test_gradients_reach_every_weight_once() -> None:
    lm = make("llama")
    tokens_BS, mask_BS, width, rows = ragged()
    lm.response_logprobs(tokens_BS, mask_BS, width).sum().backward()
    ours = {name: weight.grad.clone() for name, weight in lm.model.named_parameters()}
    lm.model.zero_grad()
    for prompt, answer in rows:
        logits = lm.model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum().backward()
    for name, weight in lm.model.named_parameters():
        torch.testing.assert_close(ours[name], weight.grad, atol=1e-5, rtol=1e-4)


# ---- models whose head is not a plain linear layer: whole logits, the same results, and a word about it, once


def run(world: World, folder: Path) -> tuple[list[dict[str, Any]], str]:
    """(metrics of PPO's steps, what was printed)."""
    log = io.StringIO()
    ppo = run_stages(prepare_run(world.recipe(), ["ppo"], folder, Console(plain=True, file=log)))["ppo"]
    return [{k: v for k, v in row.items() if k != "timing"} for row in ppo.metrics()], log.getvalue()


def test_it_trains_alike_and_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path / "world")
    rows, log = run(world, tmp_path / "linear")
    monkeypatch.setattr(srppo.models.language_model, "_find_head", lambda model: Head(linear=False))
    others, said = run(world, tmp_path / "logits")
    assert "whole logits are built" not in log
    assert said.count("whole logits are built") == 1, "three models are loaded, one warning is enough"
    assert len(rows) == len(others) > 1
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-4)


class Unnamed(LlamaForCausalLM):
    """Its body cannot be found: `base_model` is the model itself, whose output has no hidden states."""

    base_model_prefix = "nowhere"


class Projected(LlamaForCausalLM):
    """Hidden states that a projection widens on their way to the head."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.widen = torch.nn.Linear(config.hidden_size, 48, bias=False)
        self.lm_head = torch.nn.Linear(48, config.vocab_size, bias=False)

    def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **_: Any) -> Any:
        body = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        body.logits = self.lm_head(self.widen(body.last_hidden_state))
        return body


@pytest.mark.parametrize("kind", [Unnamed, Projected])
def test_a_head_that_cannot_be_reached_takes_the_models_own_logits(kind: type[LlamaForCausalLM]) -> None:
    model = LanguageModel(kind(tiny_llama(vocab=40).config))
    assert not model.head.linear
    tokens_BS = torch.arange(12).view(2, 6)
    attention_mask_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
    attention_mask_BS[0, :2] = False
    logprobs_BT = model.response_logprobs(tokens_BS, attention_mask_BS, 3)
    alone_TV = model.model(input_ids=tokens_BS[:1, 2:]).logits[0, :-1].log_softmax(-1)
    assert torch.allclose(logprobs_BT[0], alone_TV.gather(1, tokens_BS[0, 3:, None])[:, 0], atol=1e-5)
