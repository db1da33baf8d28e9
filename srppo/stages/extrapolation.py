"""Going beyond the SFT model without training, away from the base: in the weights, or in the next-token distribution.

    weights     theta = theta_sft + alpha (theta_sft - theta_base)
    decoding    pi(y_t|.) ∝ pi_anchor(y_t|.) exp(r(y_t|.) / beta),    r = log pi_sft - log pi_base

The second is the closed-form optimum of PPO's objective (docs/method.md), normalised a token at a time instead of
over sequences: with anchor sft, pi_sft^(1 + 1/beta) pi_base^(-1/beta). A token's weight then knows nothing of the
reward that is still to come, so it is an approximation (0.13 nats away at beta 0.5 in the world of test_oracle.py);
`resampling` is exact.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from srppo.config import RewardConfig
from srppo.errors import ConfigError, ModelError
from srppo.evaluation.development import Development, answer_flops, encode_items
from srppo.models.language_model import LanguageModel
from srppo.models.pair import check_same_vocabulary
from srppo.stages.run import (
    UNTRAINED,
    Figures,
    PreparedRun,
    Stages,
    answers_of,
    export,
    measure,
    publish_answers,
    sft_model,
)
from srppo.training.batch import left_pad
from srppo.training.loop import Workbench
from srppo.training.reward import reward_terms
from srppo.training.rollout import Generated, up_to_stop

# ---- weights


def extrapolated_stage(run: PreparedRun, bench: Workbench, done: Stages) -> Figures:
    """Weight extrapolation; development items choose alpha, and what that took counts as selection_flops."""
    sft = sft_model(run, done)
    target = sft.copy()
    figures = UNTRAINED | choose_alpha(target, sft, run.base, run.recipe.methods.alphas, run.development)
    figures |= measure(run, bench.attempt, target)
    export(run, bench, target, figures)
    return figures


@torch.no_grad()
def extrapolate(target: LanguageModel, sft: LanguageModel, base: LanguageModel, alpha: float) -> None:
    """Set the weights of `target` to sft + alpha (sft - base); buffers stay. Raises ModelError for unlike models."""
    weights = [dict(model.model.named_parameters()) for model in (target, sft, base)]
    shapes = [{name: tuple(weight.shape) for name, weight in each.items()} for each in weights]
    if shapes[1] != shapes[2]:
        differing = min(name for name, _ in shapes[1].items() ^ shapes[2].items())
        raise ModelError(
            f"weight extrapolation needs an SFT model with the base's architecture; {differing} differs: use an SFT "
            "model trained from this base"
        )
    for name, weight in weights[0].items():
        weight.copy_(weights[1][name] + alpha * (weights[1][name] - weights[2][name]))


def choose_alpha(
    target: LanguageModel,
    sft: LanguageModel,
    base: LanguageModel,
    alphas: Sequence[float],
    development: Development,
) -> Figures:
    """Measure each alpha on development items, keep the best (the smaller at a tie) and leave `target` at it.

    Returns the figures alpha, score, alphas (what each was measured at) and selection_flops (what that took).
    Raises ConfigError where nothing can be measured and there is more than one to choose from.
    """
    if len(alphas) > 1 and not development.ranks:
        raise ConfigError(
            f"nothing measures eval.metric = {development.recipe.eval.metric} here to choose one of methods.alphas by "
            "(accuracy needs eval.items, nll needs data.held_out); give one alpha"
        )
    tried: list[dict[str, Any]] = []
    flops = 0
    for alpha in sorted(alphas):
        extrapolate(target, sft, base, alpha)
        answers = development.answers(target)
        row, score = development.rated(target, answers)
        flops += development.flops(target, answers)
        tried.append({"alpha": alpha, "score": score, **row})
    best = tried[0] if len(tried) == 1 else max(tried, key=lambda row: row["score"])  # the first of equals
    extrapolate(target, sft, base, best["alpha"])
    return {"alpha": best["alpha"], "score": best["score"], "alphas": tried, "selection_flops": flops}


# ---- decoding


def decoded_stage(run: PreparedRun, bench: Workbench, done: Stages) -> Figures:
    """Decode-time extrapolation at PPO's own anchor and beta: each token is read by two models."""
    sft, base = sft_model(run, done), run.base
    check_same_vocabulary(base.model, sft.model)
    answers = answers_of(run, sft, partial(generate_decoded, base=base, config=run.recipe.reward))
    prompts = encode_items(run.tokenizer, run.test_items, run.recipe)
    plain, more = (answer_flops(model, prompts, answers["greedy"]) for model in (sft, base))
    cost = {"inference_flops": (plain + more) / len(prompts), "inference_times": (plain + more) / plain}
    return UNTRAINED | publish_answers(bench.attempt, answers) | cost


def check_decodable(config: RewardConfig) -> None:
    """Raises ConfigError for a reward that is no sum of terms of single tokens, or an objective without an optimum."""
    if config.beta == 0:
        raise ConfigError("reward.beta = 0 has no closed-form optimum to decode towards; give a value above 0")
    whole = {
        "reward.kind = shuffled": config.kind == "shuffled",
        "reward.length_norm": config.length_norm,
        "reward.clip": config.clip is not None,
        "reward.at_limit": config.at_limit != "keep",
        "reward.limit_penalty": config.limit_penalty > 0,
    }
    if found := [name for name, used in whole.items() if used]:
        raise ConfigError(
            f"decode-time extrapolation weighs one token at a time, and {found[0]} is about whole responses; leave it "
            "out, or compare with resampling"
        )


def decoded_logprobs(config: RewardConfig, sft_logits_BV: Tensor, base_logits_BV: Tensor) -> Tensor:
    """log of pi_anchor exp(r / beta), normalised over the vocabulary; BV fp32. r is the reward's term of each token."""
    sft_BV, base_BV = sft_logits_BV.float().log_softmax(-1), base_logits_BV.float().log_softmax(-1)
    terms_BV = reward_terms(config, sft_BV - base_BV, sft_BV, base_BV, torch.ones_like(sft_BV, dtype=torch.bool), 0)
    return ((sft_BV if config.anchor == "sft" else base_BV) + terms_BV / config.beta).log_softmax(-1)


class _Reader:
    """One model that reads a batch token by token, with its own cache; in fp32 throughout."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.cache = model, None
        takes = inspect.signature(model.model.forward).parameters
        self.extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def next_logits(self, new_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """Logits after `new_BS`, the columns not read yet; mask_BS covers all columns. BV."""
        inputs: dict[str, Any] = {"input_ids": new_BS, "attention_mask": mask_BS.long(), **self.extra}
        if self.model.takes_positions:
            inputs["position_ids"] = (mask_BS.long().cumsum(dim=1) - 1).clamp(min=0)[:, -new_BS.shape[1] :]
        out = self.model.model(**inputs, past_key_values=self.cache, use_cache=True)
        self.cache = out.past_key_values
        return out.logits[:, -1]


@torch.no_grad()
def generate_decoded(
    sft: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    base: LanguageModel,
    config: RewardConfig,
    stop_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    seed: int,
    greedy: bool = False,
) -> Generated:
    """Responses by decode-time extrapolation at temperature 1, or greedy; as `rollout.generate` otherwise."""
    tokens_BS, mask_BP = (x.to(sft.device) for x in left_pad(prompts, pad_id))
    stops = torch.tensor(list(stop_ids), device=sft.device)
    readers = _Reader(sft), _Reader(base)
    mask_BS, new_BS = mask_BP, tokens_BS
    ended_B = torch.zeros(len(prompts), dtype=torch.bool, device=sft.device)
    with torch.random.fork_rng(devices=[sft.device] if sft.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for _ in range(max_new_tokens):
            logprobs_BV = decoded_logprobs(config, *(reader.next_logits(new_BS, mask_BS) for reader in readers))
            best_B1 = logprobs_BV.argmax(dim=-1, keepdim=True)
            new_BS = best_B1 if greedy else torch.multinomial(logprobs_BV.exp(), 1)
            new_BS = new_BS.masked_fill(ended_B.unsqueeze(1), pad_id)
            tokens_BS = torch.cat([tokens_BS, new_BS], dim=1)
            mask_BS = torch.cat([mask_BS, torch.ones_like(new_BS, dtype=torch.bool)], dim=1)
            ended_B = ended_B | torch.isin(new_BS[:, 0], stops)
            if ended_B.all():
                break
    return up_to_stop(tokens_BS, mask_BP, stop_ids)
