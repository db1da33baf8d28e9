"""Models by role: our log-probs are those of the model itself, for every kind of head, under padding and autocast."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
import yaml
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
)

import srppo.training.rollout
from srppo.config import ModelConfig, build_recipe
from srppo.data.chat import CHAT_TEMPLATE, ensure_chat_template
from srppo.errors import ModelError
from srppo.kernels import linear_logprob_diff_parts
from srppo.models.export import export_model, model_card
from srppo.models.language_model import (
    Head,
    LanguageModel,
    ValueModel,
    check_same_vocabulary,
    fingerprint,
    forward_flops,
    load_model,
    load_tokenizer,
)
from srppo.training.rollout import response_log_ratio

VOCAB, EOS = 40, 0  # pad = EOS: nothing may look at ids
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "pad_token_id": EOS,
}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
DROPOUT = 0.5  # wherever an architecture has one: it must be off


def _without(*names: str) -> dict[str, Any]:
    return {key: value for key, value in SHAPE.items() if key not in names}


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=False, attention_dropout=DROPOUT),
    "llama tied": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2 tied": lambda: Qwen2Config(**SHAPE, num_key_value_heads=1, tie_word_embeddings=True),
    "gemma2 softcap": lambda: Gemma2Config(**SHAPE, **GROUPED, final_logit_softcapping=2.0, attn_logit_softcapping=5.0),
    "cohere scale": lambda: CohereConfig(**SHAPE, num_key_value_heads=1, logit_scale=0.25),
    "granite scale": lambda: GraniteConfig(**SHAPE, num_key_value_heads=1, logits_scaling=4.0),
    "phi bias": lambda: PhiConfig(**SHAPE, resid_pdrop=DROPOUT),
    "gpt2 positions": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=32, eos_token_id=EOS, bos_token_id=EOS
    ),  # dropout 0.1 by default
    "gpt neox": lambda: GPTNeoXConfig(**SHAPE, hidden_dropout=DROPOUT, attention_dropout=DROPOUT),
    "opt": lambda: OPTConfig(
        **_without("intermediate_size"), ffn_dim=24, word_embed_proj_dim=16, dropout=DROPOUT, do_layer_norm_before=True
    ),
    "bloom alibi": lambda: BloomConfig(
        vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=2, hidden_dropout=DROPOUT, attention_dropout=DROPOUT
    ),
}


def make(name: str, *, precision: str = "fp32", seed: int = 0) -> LanguageModel:
    """A random model whose logits spread over several nats, so that errors of head, scale or cap would show."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data += 0.1 * torch.randn_like(weight)
    output = model.get_output_embeddings()
    output.weight.data.normal_(0, 1.0)
    if output.bias is not None:
        output.bias.data.normal_(0, 1.0)
    return LanguageModel(model.train(), precision=precision)


def ragged(seed: int = 0) -> tuple[Tensor, Tensor, int, list[tuple[list[int], list[int]]]]:
    """(tokens_BS, attention_mask_BS, T, rows): prompts of 1 to 6 tokens to the right, answers of 1 to 4 to the left."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [(6, 4), (1, 2), (3, 4), (2, 1), (5, 3)]
    rows = [
        tuple(torch.randint(VOCAB, (n,), generator=generator).tolist() for n in pair) for pair in lengths
    ]  # EOS may stand anywhere
    tokens_BS = torch.full((len(rows), 10), EOS)
    mask_BS = torch.zeros(len(rows), 10, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(rows):
        span = slice(6 - len(prompt), 6 + len(answer))
        tokens_BS[i, span] = torch.tensor(prompt + answer)
        mask_BS[i, span] = True
    return tokens_BS, mask_BS, 4, rows  # type: ignore[return-value]


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


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("llama", Head(True)),
        ("llama tied", Head(True)),
        ("gemma2 softcap", Head(True, 1.0, 2.0)),
        ("cohere scale", Head(True, 0.25)),
        ("granite scale", Head(True, 0.25)),
        ("phi bias", Head(True)),
        ("gpt2 positions", Head(True)),
        ("gpt neox", Head(True)),
        ("opt", Head(True)),
        ("bloom alibi", Head(True)),
    ],
)
def test_the_head_is_read_from_the_config(name: str, head: Head) -> None:
    assert make(name).head == head


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


class Heedless(LlamaForCausalLM):
    """Ignores the attention mask."""

    def forward(self, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


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
    value = ValueModel(lm).train()
    torch.testing.assert_close(lm.response_logprobs(tokens_BS, mask_BS, width), first, atol=1e-6, rtol=0)
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

    monkeypatch.setattr(srppo.training.rollout, "linear_logprob_diff_parts", look)
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
    hidden = lm.hidden(tokens_BS, mask_BS)[:, -width - 1 : -1][mask_BT].double()
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


# ---- the critic


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


# ---- counted operations


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


# ---- loading and export


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


def test_vocabularies_must_agree() -> None:
    one, other = worlds.byte_llama(0), worlds.byte_llama(0, vocab=worlds.VOCAB + 1)
    check_same_vocabulary(one, worlds.byte_llama(1))
    with pytest.raises(ModelError, match="the base has a vocabulary of 258, the SFT model of 259"):
        check_same_vocabulary(one, other)


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
