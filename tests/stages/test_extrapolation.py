"""Weight and decode-time extrapolation, by hand and by enumeration.

Whether the decoded distribution is that of the closed form is in tests/training/test_oracle.py.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from tiny import EOS, LIMIT, PROMPTS, base_and_sft, sequence_logprobs, tiny_llama, tiny_recipe
from transformers import GPT2Config, GPT2LMHeadModel

from srppo.config import ModelConfig, Recipe, RewardConfig
from srppo.errors import ConfigError, ModelError
from srppo.models.adapters import AdaptedModel, lora_settings
from srppo.models.language_model import LanguageModel
from srppo.stages.extrapolation import (
    Towards,
    check_decodable,
    choose_alpha,
    decoded_logprobs,
    extrapolate,
    generate_decoded,
)
from srppo.training.batch import left_pad

# ---- weight extrapolation


def test_weights_by_hand() -> None:
    base, sft = base_and_sft()
    target = LanguageModel(copy.deepcopy(sft.model))
    for alpha in (0.0, 0.5, 2.0, -1.0):
        extrapolate(target, sft, base, alpha)
        for (name, w), s, b in zip(
            target.model.named_parameters(), sft.model.parameters(), base.model.parameters(), strict=True
        ):
            torch.testing.assert_close(w, (1 + alpha) * s - alpha * b, atol=1e-5, rtol=0, msg=name)
    other = LanguageModel(tiny_llama(vocab=6))
    with pytest.raises(ModelError, match=r"base's architecture; lm_head\.weight differs"):
        extrapolate(target, sft, other, 1.0)


def test_an_adapter_is_extrapolated_as_its_weights_are() -> None:
    base, _ = base_and_sft()
    sft = AdaptedModel(base, lora_settings(ModelConfig(adapters="lora", lora_rank=4)), seed=1)
    torch.manual_seed(2)
    for weight in sft.weights().values():
        weight.data = 0.3 * torch.randn_like(weight)
    target, plain, start = sft.copy(), sft.merged(), LanguageModel(tiny_llama())
    for alpha in (0.0, 2.0, -1.0):
        extrapolate(target, sft, base, alpha)
        whole = plain.copy()
        extrapolate(whole, plain, start, alpha)
        for prompt in PROMPTS:
            ours, theirs = sequence_logprobs(target.merged(), prompt), sequence_logprobs(whole, prompt)
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


class Scored:
    """Development whose score is a function of the first weight, which tells the alphas apart."""

    def __init__(self, scores: dict[float, float], recipe: Recipe, *, ranks: bool = True) -> None:
        self.scores, self.recipe, self.ranks = scores, recipe, ranks
        self.seen: list[float] = []
        base, sft = base_and_sft()
        self.start, self.way = first(sft), first(sft) - first(base)

    def answers(self, model: LanguageModel) -> list[Any]:
        self.seen.append(round((first(model) - self.start) / self.way, 3))
        return []

    def flops(self, model: LanguageModel, verdicts: list[Any]) -> int:
        return 10

    def rated(self, model: LanguageModel, verdicts: list[Any]) -> tuple[dict[str, Any], float]:
        return {"dev/accuracy": 0.5}, self.scores[self.seen[-1]]


def first(model: LanguageModel) -> float:
    return float(model.model.lm_head.weight[0, 0].detach())


@pytest.mark.parametrize(
    ("scores", "best"),
    [({0.5: 0.1, 1.0: 0.7, 2.0: 0.6}, 1.0), ({0.5: 0.7, 1.0: 0.2, 2.0: 0.7}, 0.5)],
    ids=["best", "tie"],
)
def test_development_items_choose_alpha_and_ties_go_to_the_smaller(scores: dict[float, float], best: float) -> None:
    base, sft = base_and_sft()
    target = LanguageModel(copy.deepcopy(sft.model))
    development: Any = Scored(scores, tiny_recipe())
    chosen = choose_alpha(target, sft, base, (2.0, 0.5, 1.0), development)
    assert development.seen == [0.5, 1.0, 2.0]
    assert (chosen["alpha"], chosen["score"], chosen["selection_flops"]) == (best, scores[best], 30)
    assert [row["alpha"] for row in chosen["alphas"]] == [0.5, 1.0, 2.0]
    assert chosen["alphas"][1] == {"alpha": 1.0, "score": scores[1.0], "dev/accuracy": 0.5}
    development.answers(target)
    assert development.seen[-1] == best, "the model must be left at the chosen alpha"


def test_without_development_items_one_alpha_must_be_given() -> None:
    base, sft = base_and_sft()
    target = LanguageModel(copy.deepcopy(sft.model))
    nothing: Any = Scored({0.5: 0.0}, tiny_recipe(), ranks=False)
    with pytest.raises(ConfigError, match=r"nothing measures eval\.metric = accuracy .*; give one alpha"):
        choose_alpha(target, sft, base, (0.5, 1.0), nothing)
    assert choose_alpha(target, sft, base, (0.5,), nothing)["alpha"] == 0.5


# ---- decode-time extrapolation


def test_next_token_distribution_by_hand() -> None:
    """pi_sft = (.5, .3, .2), pi_base = (.25, .5, .25): ratios 2, .6, .8."""
    sft, base = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    for config, weights in (
        ({"anchor": "sft", "beta": 0.5}, [0.5 * 4, 0.3 * 0.36, 0.2 * 0.64]),
        ({"anchor": "base", "beta": 0.5}, [0.25 * 4, 0.5 * 0.36, 0.25 * 0.64]),
        ({"anchor": "base", "beta": 1.0}, [0.5, 0.3, 0.2]),
        ({"anchor": "sft", "beta": 1.0, "token_clip": 0.1}, [0.5 * np.e**0.1, 0.3 * np.e**-0.1, 0.2 * np.e**-0.1]),
        ({"anchor": "sft", "beta": 1.0, "kind": "base"}, [0.5 / 0.25, 0.3 / 0.5, 0.2 / 0.25]),
        ({"anchor": "sft", "beta": 1.0, "kind": "zero"}, [0.5, 0.3, 0.2]),
    ):
        found = decoded_logprobs(
            RewardConfig(**config), sft + 3.0, base - 1.0, stop_ids=[]
        )  # logits have a free constant
        torch.testing.assert_close(found.exp(), torch.tensor([weights]).float() / sum(weights), msg=str(config))


def test_what_no_single_token_decides_is_refused() -> None:
    for config, named in (
        ({"beta": 0.0}, r"reward\.beta = 0 has no closed-form optimum"),
        ({"kind": "shuffled"}, r"reward\.kind = shuffled is about whole responses"),
        ({"length_norm": True}, r"reward\.length_norm is"),
        ({"clip": 1.0}, r"reward\.clip is"),
        ({"at_limit": "zero"}, r"reward\.at_limit is"),
        ({"limit_penalty": 1.0}, r"reward\.limit_penalty is"),
    ):
        with pytest.raises(ConfigError, match=named):
            check_decodable(RewardConfig(**config))
    check_decodable(RewardConfig(token_clip=1.0, anchor="base", kind="sft"))


RAGGED = [(1, 2, 3), (4,), (2, 2), (3, 1, 4, 2)]


def decoded(prompts: Any = RAGGED, models: Any = None, **more: Any) -> Any:
    base, sft = models or base_and_sft()
    config = RewardConfig(beta=0.5)
    arguments = {"stop_ids": [EOS], "pad_id": EOS, "max_new_tokens": LIMIT, "seed": 1, **more}
    return generate_decoded(sft, prompts, base=base, config=config, **arguments)


@torch.no_grad()
def test_greedy_decoding_is_the_argmax_without_cache_or_padding() -> None:
    base, sft = base_and_sft()
    responses = decoded(temperature=None).responses()
    for prompt, response in zip(RAGGED, responses, strict=True):
        own: list[int] = []
        while len(own) < LIMIT and EOS not in own:
            ids = torch.tensor([[*prompt, *own]])
            logits = [model.model(input_ids=ids).logits[0, -1].log_softmax(-1) for model in (sft, base)]
            own.append(int((3 * logits[0] - 2 * logits[1]).argmax()))
        assert response == own
    assert len({len(response) for response in responses}) > 1 or len({tuple(r) for r in responses}) > 1


@torch.no_grad()
def test_reading_with_a_cache_gives_the_logits_of_unpadded_rows() -> None:
    """With learned absolute positions, which padding would shift, and with rotary ones."""
    torch.manual_seed(0)
    size = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 5, "initializer_range": 0.5}
    absolute = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=EOS))
    for model in (LanguageModel(absolute), LanguageModel(tiny_llama())):
        tokens_BS, mask_BP = left_pad(RAGGED, EOS)
        reader = Towards(model, RewardConfig(), [EOS], mask_BP)
        written: list[list[int]] = [list(prompt) for prompt in RAGGED]
        for step in range(3):
            logits_BV = reader.base_logits(tokens_BS)
            for row, own_V in zip(written, logits_BV, strict=True):
                alone_V = model.model(input_ids=torch.tensor([row])).logits[0, -1]
                torch.testing.assert_close(own_V, alone_V, atol=1e-5, rtol=0)
                row.append(1 + (step + len(row)) % 4)
            tokens_BS = torch.cat([tokens_BS, torch.tensor([row[-1:] for row in written])], dim=1)


def test_decoding_samples_are_a_function_of_the_seed_and_leave_the_global_state() -> None:
    models = base_and_sft()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, again, other = (decoded(RAGGED * 8, models, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.responses() == again.responses() != other.responses()


def test_a_decoded_response_ends_with_its_first_stop_token() -> None:
    found = decoded(RAGGED * 8)
    for response, ended in zip(found.responses(), found.ended_B.tolist(), strict=True):
        assert ended == (EOS in response) and EOS not in response[:-1] and len(response) <= LIMIT
    assert 0 < sum(found.ended_B.tolist()) < 32
