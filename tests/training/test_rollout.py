"""Sampling: the policy's own distribution, masks from lengths, and log-probs that training repeats to 1e-5."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import scipy.stats
import tiny
import torch
from torch import Tensor
from transformers import GenerationConfig

import srppo.training.ppo
import srppo.training.rollout
from srppo.config import derive_seed
from srppo.errors import OutOfMemory
from srppo.models.language_model import Head, LanguageModel
from srppo.models.value_model import ValueModel
from srppo.training import parallel
from srppo.training.batch import Generated, RolloutBatch, left_pad, micro_slices
from srppo.training.losses import PolicyLoss, clipped_policy_loss
from srppo.training.rollout import EVEN, LocalSampler, _own_rows, generate, to_batch
from srppo.training.scores import score_logprobs

VOCAB, EOS, LIMIT = 12, 0, 6
PROMPTS = [(3, 4, 5, 6, 7), (8,), (9, 0, 10), (0, 0), (1, 2, 3, 4)] * 4  # ragged; EOS inside prompts


def policy(seed: int = 0, *, eos: float = 0.0, precision: str = "fp32") -> LanguageModel:
    """A random model over 12 tokens; `eos` nats are added to the logit of EOS at every place."""
    model = tiny.tiny_llama(seed, vocab=VOCAB, scale=0.4)
    model.get_input_embeddings().weight.data[:, 0] = 1.0  # a constant dimension, for the head to favour EOS by
    model.lm_head.weight.data[:, 0] = 0.0
    model.lm_head.weight.data[EOS, 0] = eos / 5.0
    return LanguageModel(model, precision=precision)


def sample(lm: LanguageModel, prompts: Sequence[Sequence[int]] = PROMPTS, **changes: Any) -> Generated:
    arguments = {"stop_ids": [EOS], "pad_id": EOS, "max_new_tokens": LIMIT, "seed": 1, **changes}
    return generate(lm, prompts, **arguments)


@torch.no_grad()
def own_logprobs(lm: LanguageModel, prompt: Sequence[int], response: Sequence[int], temperature: float) -> Tensor:
    """From the model's own logits on the unpadded row."""
    logits = lm.model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]


# ---- log-probs


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_behaviour_logprobs_are_the_models_own_at_the_sampling_temperature(temperature: float) -> None:
    lm = policy(eos=1.0)
    generated = sample(lm, temperature=temperature)
    batch = to_batch(generated, lm, ValueModel(lm), micro_tokens=3, temperature=temperature)
    at_one = score_logprobs(lm, batch, micro_tokens=7)
    lengths = set()
    for i, (prompt, response) in enumerate(zip(PROMPTS, generated.responses(), strict=True)):
        lengths.add(len(response))
        for got, at in ((batch.old_logprobs_BT, temperature), (at_one, 1.0)):  # the reward's are always at 1
            expected = own_logprobs(lm, prompt, response, at)
            torch.testing.assert_close(got[i, : len(response)], expected, atol=1e-5, rtol=0)
            assert (got[i, len(response) :] == 0).all()
    assert len(lengths) >= 3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_repeats_the_old_logprobs_on_any_slice(precision: str) -> None:
    """Rows cut to their own width and padding, as minibatches take them: new and old log-probs are the same."""
    lm = policy(eos=1.0, precision=precision)
    batch = to_batch(sample(lm), lm, ValueModel(lm), micro_tokens=6, temperature=1.0)
    widths = set()
    order = torch.randperm(len(PROMPTS), generator=torch.Generator().manual_seed(0))
    for index in [*order.split(4), slice(1, 2), slice(3, 4), slice(0, 20)]:
        rows = batch.rows(index)
        width = rows.response_mask_BT.shape[1]
        widths.add(rows.tokens_BS.shape[1])
        new = lm.response_logprobs(rows.tokens_BS, rows.attention_mask_BS, width)
        tolerance = 1e-5 if precision == "fp32" else 0.05  # 16-bit matrix products round differently by shape
        torch.testing.assert_close(new, rows.old_logprobs_BT, atol=tolerance, rtol=0)
    assert len(widths) >= 3


def test_in_train_ppo_old_and_new_agree_on_the_first_minibatch_of_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, float]] = []

    def watched(new_BT: Tensor, old_BT: Tensor, *rest: Any, **named: Any) -> PolicyLoss:
        seen.append((new_BT.numel(), float((new_BT - old_BT).detach().abs().max())))
        return clipped_policy_loss(new_BT, old_BT, *rest, **named)

    monkeypatch.setattr(srppo.training.ppo, "clipped_policy_loss", watched)
    recipe = tiny.tiny_recipe(
        rollout={"batch": 24, "temperature": 0.8, "max_new_tokens": LIMIT},
        ppo={"steps": 3, "epochs": 2, "minibatches": 3, "micro_tokens": 40, "lr": 1e-2},
    )
    base, sft = policy(0), policy(1)
    with tiny.Bench(tmp_path, recipe) as bench:
        srppo.training.ppo.train_ppo(
            recipe, bench, policy(1), sft, base, PROMPTS[:5], tiny.NoDevelopment(), LocalSampler([EOS], EOS)
        )
    steps: list[list[tuple[int, float]]] = [[]]
    for each in seen:  # a step begins where old and new agree again
        if each[1] < 1e-5 <= (steps[-1] or [each])[-1][1]:
            steps.append([])
        steps[-1].append(each)
    assert len(steps) == 3
    for passes in steps:
        first = [each for each in passes if each[1] < 1e-5]
        later = passes[len(first) :]
        assert len(first) >= 2 and len(later) >= 5 * 2, "one minibatch of six, in several passes"
        assert max(gap for _, gap in first) < 1e-5
        assert min(gap for _, gap in later) > 1e-4  # the policy has moved, so agreement above is no accident


# ---- masks


def lengths_by_hand(rows: Tensor, stops: Sequence[int]) -> list[tuple[int, bool]]:
    """(length with the stop token, whether it ended) of each row."""
    found = []
    for row in rows.tolist():
        place = next((i for i, token in enumerate(row) if token in stops), None)
        found.append((len(row), False) if place is None else (place + 1, True))
    return found


@pytest.mark.parametrize("pad", [EOS, 5, VOCAB - 1])
def test_masks_come_from_lengths_whatever_the_padding(pad: int) -> None:
    """Pad may equal EOS, or a token that the policy likes to write."""
    lm = policy(eos=0.5)
    generated = sample(lm, PROMPTS * 3, pad_id=pad)
    width = generated.response_mask_BT.shape[1]
    expected = lengths_by_hand(generated.tokens_BS[:, -width:], [EOS])
    assert generated.response_mask_BT.sum(1).tolist() == [length for length, _ in expected]
    assert generated.ended_B.tolist() == [ended for _, ended in expected]
    assert 0 < sum(generated.ended_B.tolist()) < len(expected)
    for i, (length, _) in enumerate(expected):
        assert generated.response_mask_BT[i, :length].all() and not generated.response_mask_BT[i, length:].any()
        assert (generated.tokens_BS[i, -width:][length:] == pad).all()
    if pad not in (EOS,):
        assert any(pad in response for response in generated.responses())  # written, and counted
    for prompt, row, mask in zip(PROMPTS * 3, generated.tokens_BS, generated.attention_mask_BS, strict=True):
        assert row[:-width][mask[:-width]].tolist() == list(prompt)


def test_padding_does_not_change_the_samples() -> None:
    """The same seed and prompts with another pad token: other padding, the same responses."""
    lm = policy(eos=0.5)
    assert sample(lm, pad_id=EOS).responses() == sample(lm, pad_id=7).responses()


def test_responses_that_end_at_once() -> None:
    lm = policy(eos=60.0)
    generated = sample(lm)
    assert generated.responses() == [[EOS]] * len(PROMPTS)
    assert generated.response_mask_BT.shape == (20, 1) and generated.ended_B.all()
    batch = to_batch(generated, lm, ValueModel(lm), micro_tokens=8, temperature=1.0)
    assert batch.old_logprobs_BT.abs().max() < 1e-3 and batch.lengths_B().tolist() == [1] * 20
    assert batch.rows(slice(0, 1)).tokens_BS.shape == (1, 6)


def test_responses_that_never_end() -> None:
    generated = sample(policy(eos=-60.0))
    assert not generated.ended_B.any() and generated.response_mask_BT.all()
    assert {len(response) for response in generated.responses()} == {LIMIT}


def test_a_response_ended_by_its_last_allowed_token_has_ended() -> None:
    lm = policy(eos=1.0)
    generated = sample(lm, PROMPTS * 10, max_new_tokens=1)
    assert generated.ended_B.tolist() == [response == [EOS] for response in generated.responses()]
    assert 0 < generated.ended_B.sum() < 200


def test_any_of_several_stop_tokens_ends_a_response_and_counts() -> None:
    stops = [EOS, 4, 9]
    generated = sample(policy(eos=0.5), PROMPTS * 3, stop_ids=stops, pad_id=4)
    ends = set()
    for response, ended in zip(generated.responses(), generated.ended_B.tolist(), strict=True):
        assert ended == (response[-1] in stops) and not any(token in stops for token in response[:-1])
        ends.add(response[-1])
    after = generated.tokens_BS[:, -generated.response_mask_BT.shape[1] :][~generated.response_mask_BT]
    assert (after == 4).all()  # sampling stopped there, too
    assert ends >= set(stops)


def test_left_pad() -> None:
    tokens_BP, mask_BP = left_pad([[1, 2, 3], [0], []], 0)
    assert tokens_BP.tolist() == [[1, 2, 3], [0, 0, 0], [0, 0, 0]] and tokens_BP.dtype == torch.int64
    assert mask_BP.tolist() == [[True] * 3, [False, False, True], [False] * 3]


def test_micro_slices_cover_each_row_once() -> None:
    for count in (1, 5, 6, 7):
        assert [i for part in micro_slices(count, 3) for i in range(count)[part]] == list(range(count))
        assert all(part.stop - part.start <= 3 for part in micro_slices(count, 3))


# ---- the sampled distribution


OWN_SETTINGS = GenerationConfig(
    do_sample=True,
    top_k=1,
    top_p=0.1,
    temperature=0.05,
    repetition_penalty=9.0,
    no_repeat_ngram_size=1,
    suppress_tokens=[1, 2],
    min_new_tokens=4,
    eos_token_id=7,
    max_length=3,
    num_beams=2,
)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_softmax_whatever_the_model_was_shipped_with(temperature: float) -> None:
    """A chi-square test of 4000 first tokens; a top-k of 50, a penalty or a wrong temperature would not pass it."""
    lm = policy(eos=1.0)
    lm.model.generation_config = OWN_SETTINGS
    prompt = (3, 4, 5)
    generated = sample(lm, [prompt] * 4000, max_new_tokens=1, temperature=temperature)
    counts = numpy.bincount([response[0] for response in generated.responses()], minlength=VOCAB)
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    expected = (logits / temperature).softmax(-1).numpy() * 4000
    assert expected.min() > 5 and scipy.stats.chisquare(counts, expected * 4000 / expected.sum()).pvalue > 0.01
    wrong = (logits * 1.3 / temperature).softmax(-1).numpy() * 4000
    assert scipy.stats.chisquare(counts, wrong * 4000 / wrong.sum()).pvalue < 1e-6  # the test has power


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "by transformers"])
def test_a_models_own_settings_change_no_response_and_are_put_back(
    packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, shipped = policy(eos=0.5), policy(eos=0.5)
    plain.packs = shipped.packs = packs
    shipped.model.generation_config = OWN_SETTINGS
    for temperature in (1.0, None):
        ours, theirs = (sample(lm, temperature=temperature).responses() for lm in (plain, shipped))
        assert ours == theirs
    assert shipped.model.generation_config is OWN_SETTINGS

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    shipped.model.generate = broken
    monkeypatch.setattr(srppo.training.rollout, "generate_packed", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        sample(shipped)
    assert shipped.model.generation_config is OWN_SETTINGS


def test_all_of_a_large_vocabulary_can_be_sampled() -> None:
    """transformers samples from the top 50 unless told otherwise."""
    lm = LanguageModel(tiny.tiny_llama(0, vocab=200, scale=0.02))
    generated = generate(lm, [(3,)] * 4000, stop_ids=[EOS], pad_id=EOS, max_new_tokens=1, seed=0)
    assert len({response[0] for response in generated.responses()}) == 200


def test_greedy_takes_the_likeliest_token() -> None:
    lm = policy(eos=0.5)
    generated = sample(lm, temperature=None)
    for prompt, response in zip(PROMPTS, generated.responses(), strict=True):
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == response


def test_seeds_decide_the_samples_and_nothing_else_does() -> None:
    lm = policy(eos=0.5)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = sample(lm, seed=3).responses()
    assert torch.equal(torch.get_rng_state(), before)  # the global state is left as it was
    torch.manual_seed(6)
    assert sample(lm, seed=3).responses() == first != sample(lm, seed=4).responses()


# ---- heads with more rows than the tokenizer has ids


def padded(lm: LanguageModel, extra: int = 5) -> LanguageModel:
    """The same model with a head of more rows, which it would write all the time."""
    wide = tiny.tiny_llama(0, vocab=VOCAB + extra)
    own = lm.model.state_dict()
    for name, weight in wide.state_dict().items():
        weight[: len(own[name])] = own[name]
    wide.lm_head.weight.data[VOCAB:] = 0.0
    wide.lm_head.weight.data[VOCAB:, 0] = 9.0  # the constant dimension
    return LanguageModel(wide, vocab_size=VOCAB)


@pytest.mark.parametrize("linear", [True, False])
def test_ids_that_no_tokenizer_makes_are_never_written(linear: bool) -> None:
    """Sampled by one seed, by a seed a row, or greedily; and the log-probs that are trained are those of what is
    sampled."""
    plain = policy(eos=0.5)
    lm = padded(plain)
    lm.head = Head(linear)
    for how in ({"temperature": 0.7}, {"seed": list(range(20))}, {"temperature": None}):
        ours, theirs = (sample(model, **how) for model in (lm, plain))
        assert int(ours.tokens_BS.max()) < VOCAB
        assert ours.responses() == theirs.responses(), how
    batch = to_batch(ours, lm, None, micro_tokens=8, temperature=0.8)
    expected_BT = score_logprobs(plain, ours, micro_tokens=8, temperature=0.8)
    torch.testing.assert_close(batch.old_logprobs_BT, expected_BT, atol=1e-5, rtol=0)
    unmasked = LanguageModel(lm.model)
    assert int(sample(unmasked).tokens_BS.max()) >= VOCAB  # they are likely, and the mask is what keeps them out


# ---- batches by memory


def test_rows_that_do_not_fit_together_are_written_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is what it would be in any part, with random numbers of its own."""
    lm = policy(eos=0.5)
    whole, asked = sample(lm), []

    def seven(model: LanguageModel, positions: int, **options: Any) -> int:
        asked.append((positions, options))
        return 7

    monkeypatch.setattr(srppo.training.rollout, "rows_that_fit", seven)
    found = sample(lm, held=123)
    assert asked == [(5 + LIMIT, {"held": 123})]
    assert found.responses() == whole.responses() and found.ended_B.tolist() == whole.ended_B.tolist()
    seeds = [derive_seed(1, "row", i) for i in range(len(PROMPTS))]
    assert len({tuple(row) for row in whole.responses()}) > 10
    for i in (3, 11):
        assert sample(lm, [PROMPTS[i]], seed=[seeds[i]]).responses() == [whole.responses()[i]]
    greedy = [sample(lm, temperature=None, rows=rows).responses() for rows in (3, 20)]
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory.\nTry"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["cuda", "cpu"],
)
def test_out_of_memory_while_writing_names_what_helps(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """No micro-batch does: batches go by memory."""
    lm = policy()

    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(srppo.training.rollout, "generate_packed", full)
    advice = r"^generating ran out of memory \((CUDA|Def)[^\n]*\), .* lower rollout\.max_new_tokens or [^\n]*$"
    with pytest.raises(OutOfMemory, match=advice):
        sample(lm)


def test_a_batch_that_fits_is_written_at_once() -> None:
    lm = policy(eos=0.5)
    assert sample(lm).responses() == sample(lm, rows=20).responses() == sample(lm, rows=999).responses()


def test_a_rollout_batch_keeps_what_was_generated() -> None:
    lm = policy(eos=0.5)
    generated = sample(lm)
    value = ValueModel(lm)
    torch.nn.init.normal_(value.head.weight)
    batch = to_batch(generated, lm, value, micro_tokens=3, temperature=1.0)
    assert isinstance(batch, RolloutBatch)
    for name in ("tokens_BS", "attention_mask_BS", "response_mask_BT", "ended_B"):
        assert torch.equal(getattr(batch, name), getattr(generated, name))
    width = batch.response_mask_BT.shape[1]
    whole = value.response_values(batch.tokens_BS, batch.attention_mask_BS, width)
    torch.testing.assert_close(batch.old_values_BT, whole, atol=1e-5, rtol=0)
    assert not batch.old_logprobs_BT.requires_grad and not batch.old_values_BT.requires_grad


def test_equal_prompts_stay_together_where_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process reads a prompt once, and few prompts are shared by rows, or one process would have most."""
    monkeypatch.setattr(parallel, "size", lambda: 2)
    for count in (EVEN, EVEN - 1):
        prompts = [[1] * (1 + i % 5) + [i] for i in range(count)] * 3
        shares = []
        for rank in (0, 1):
            monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
            shares.append([tuple(prompts[i]) for i in _own_rows(prompts)])
        assert sorted(shares[0] + shares[1]) == sorted(map(tuple, prompts))
        assert bool({*shares[0]} & {*shares[1]}) == (count < EVEN)
        assert abs(len(shares[0]) - len(shares[1])) <= (3 * (count % 2) if count >= EVEN else 1)
        assert all([len(prompt) for prompt in share] == sorted(map(len, share)) for share in shares)
