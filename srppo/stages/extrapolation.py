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
from torch.nn.functional import pad

from srppo.config import RewardConfig
from srppo.errors import ConfigError, ModelError
from srppo.evaluation.development import Development, answer_flops, encode_items
from srppo.models.adapters import AdaptedModel
from srppo.models.language_model import LanguageModel
from srppo.models.pair import check_same_vocabulary
from srppo.reward_kinds import REWARD_KINDS
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
from srppo.training.batch import Generated
from srppo.training.loop import Workbench
from srppo.training.reward import tokenwise_optimum
from srppo.training.rollout import generate

# ---- weights


def extrapolated_stage(run: PreparedRun, bench: Workbench, done: Stages) -> Figures:
    """Weight extrapolation; development items choose alpha, and what that took counts as selection_flops."""
    sft = sft_model(run, done)
    target = sft.copy()
    figures = UNTRAINED | choose_alpha(target, sft, run.base, run.recipe.methods.alphas, run.development)
    figures |= measure(run, bench, target)
    export(run, bench, target, figures)
    return figures


@torch.no_grad()
def extrapolate(target: LanguageModel, sft: LanguageModel, base: LanguageModel, alpha: float) -> None:
    """Set the weights of `target` to sft + alpha (sft - base); buffers stay. Raises ModelError for unlike models.

    Of adapters, which are sft - base as a product B A, B is taken 1 + alpha times.
    """
    if isinstance(target, AdaptedModel):
        own, found = target.weights(), sft.weights()
        for name, weight in own.items():
            weight.copy_(found[name] * (1 + alpha) if ".lora_B." in name else found[name])
        return
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
        raise ConfigError("reward.beta = 0 has no closed-form optimum to go towards; give a value above 0")
    kind = REWARD_KINDS[config.kind]
    whole = {
        f"reward.kind = {config.kind}": kind.among is not None or not kind.by_token,
        "reward.length_norm": config.length_norm,
        "reward.clip": config.clip is not None,
        "reward.at_limit": config.at_limit != "keep",
        "reward.limit_penalty": config.limit_penalty > 0,
    }
    if found := [name for name, used in whole.items() if used]:
        raise ConfigError(
            "decode-time extrapolation and on-policy distillation weigh one token at a time, and "
            f"{found[0]} is about whole responses; leave it out, or compare with resampling"
        )


def decoded_logprobs(
    config: RewardConfig, sft_logits_BV: Tensor, base_logits_BV: Tensor, *, stop_ids: Sequence[int]
) -> Tensor:
    """The distribution that is decoded, from the logits of both models; log-probs, BV fp32."""
    sft_BV, base_BV = (x_BV.float().log_softmax(-1) for x_BV in (sft_logits_BV, base_logits_BV))
    return tokenwise_optimum(config, sft_BV, base_BV, stop_ids=stop_ids)


class Towards:
    """Turns the SFT model's logits into those of the decoded distribution: reads along with the base, token by token.

    For one batch, whose prompts' mask it is given.
    """

    def __init__(self, base: LanguageModel, config: RewardConfig, stop_ids: Sequence[int], mask_BP: Tensor) -> None:
        self.base, self.config, self.stop_ids, self.mask_BS = base, config, stop_ids, mask_BP
        self.read, self.cache = 0, None
        takes = inspect.signature(base.model.forward).parameters
        self.extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def __call__(self, tokens_BS: Tensor, sft_logits_BV: Tensor) -> Tensor:
        base_logits_BV = self.base_logits(tokens_BS)[:, : self.base.vocab_size]
        return decoded_logprobs(self.config, sft_logits_BV, base_logits_BV, stop_ids=self.stop_ids)

    def base_logits(self, tokens_BS: Tensor) -> Tensor:
        """The base's logits after these columns, of which all but the newest have been read; BV."""
        new_BS, self.read = tokens_BS[:, self.read :], tokens_BS.shape[1]
        self.mask_BS = pad(self.mask_BS, (0, self.read - self.mask_BS.shape[1]), value=True)
        inputs: dict[str, Any] = {"input_ids": new_BS, "attention_mask": self.mask_BS.long(), **self.extra}
        if self.base.takes_positions:
            inputs["position_ids"] = (self.mask_BS.long().cumsum(dim=1) - 1).clamp(min=0)[:, -new_BS.shape[1] :]
        self.base.activate()
        out = self.base.model(**inputs, past_key_values=self.cache, use_cache=True)
        self.cache = out.past_key_values
        logits_BV: Tensor = out.logits[:, -1]
        return logits_BV


def generate_decoded(
    sft: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    base: LanguageModel,
    config: RewardConfig,
    stop_ids: Sequence[int],
    **how: Any,
) -> Generated:
    """Responses by decode-time extrapolation; `how` as `rollout.generate` takes it."""
    with base.gathered():
        return generate(sft, prompts, stop_ids=stop_ids, processor=partial(Towards, base, config, stop_ids), **how)
