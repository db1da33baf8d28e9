"""Answers chosen from samples of the SFT model: by a vote, by resampling to the closed form, and best-of-n.

All choose from the same n samples an item. Resampling weighs each by pi*/pi_sft (`optimum.log_weights`): draws from
the weighted set tend to the closed-form optimum of PPO's objective as n grows, and are as good as the effective sample
size says (the sum of squared normalised weights, inverted). A vote takes the answer that most samples give, which
knows no reward (self-consistency, arXiv 2203.11171), or the one with most of those weights: one answer an item, which
stands where others have their greedy one. Best-of-n takes the highest reward and knows no beta.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from srppo.analysis.optimum import MIN_ESS, Draws, Floats, effective, enough, log_weights, samples_needed
from srppo.analysis.samples import Question, distinct, rewarded, sample
from srppo.config import RewardConfig, derive_seed
from srppo.errors import ConfigError
from srppo.evaluation.development import Answer, encode_items, verdict_of
from srppo.models.flops import forward_flops
from srppo.models.language_model import LanguageModel
from srppo.models.pair import Pair, check_same_vocabulary
from srppo.record.store import Stage
from srppo.reward_kinds import REWARD_KINDS
from srppo.stages.run import UNTRAINED, Figures, PreparedRun, Stages, publish_answers, sft_model
from srppo.training.loop import Workbench
from srppo.world.items import Item

_ARRAYS, _TEXTS = "draws.npz", "answers.json.gz"
_SAVED = ("reward_QK", "log_ratio_QK", "length_QK", "right_QK")


@dataclass(frozen=True)
class Sampled:
    """n answers of the SFT model to each item, QK, and their rewards. Counted operations, means over items: `flops` of
    sampling all n and scoring each distinct one with both models, `plain_flops` of one of the samples alone."""

    answers: list[list[Answer]]
    draws: Draws
    flops: float
    plain_flops: float

    def save(self, folder: Path) -> None:
        """Into a folder, to the bit and the same bytes every time; the operations are figures and stay out."""
        arrays = {name: getattr(self.draws, name) for name in _SAVED if getattr(self.draws, name) is not None}
        np.savez_compressed(folder / _ARRAYS, **arrays)
        (folder / _TEXTS).write_bytes(gzip.compress(json.dumps(self.answers).encode(), mtime=0))

    @classmethod
    def load(cls, folder: Path, *, flops: float, plain_flops: float) -> Sampled:
        """What `save` wrote."""
        rows = json.loads(gzip.decompress((folder / _TEXTS).read_bytes()))
        answers = [[Answer(*answer) for answer in row] for row in rows]
        with np.load(folder / _ARRAYS) as arrays:
            saved = {name: arrays.get(name) for name in _SAVED}
        draws = Draws(**saved, log_policy_sft_QK=np.zeros_like(saved["reward_QK"]))  # pi_sft itself drew them
        return cls(answers, draws, flops, plain_flops)

    def cost(self, *, scored: bool = True) -> dict[str, float]:
        """The figures of inference: operations an item, and how many times those of one plain answer."""
        flops = self.flops if scored else self.plain_flops * self.draws.reward_QK.shape[1]
        return {"inference_flops": flops, "inference_times": flops / self.plain_flops}


class Ess(NamedTuple):
    """Effective samples an item: their harmonic mean and median, the share of items below the minimum, whether the
    rule admits them, and about how many samples it would take (0: cannot be said)."""

    harmonic: float
    median: float
    below: float
    enough: bool
    needed: int


def check_resamples(config: RewardConfig) -> None:
    """Raises ConfigError for an objective without a closed-form optimum."""
    check_ranks(config)
    if config.beta == 0:
        raise ConfigError("reward.beta = 0 has no closed-form optimum to resample; give a value above 0")


def check_ranks(config: RewardConfig) -> None:
    """Raises ConfigError for a reward that a response does not have by itself."""
    if REWARD_KINDS[config.kind].among is not None:
        raise ConfigError(f"reward.kind = {config.kind} pays by other rollouts, so it chooses between no samples")


# ---- samples


def samples_stage(run: PreparedRun, bench: Workbench, done: Stages) -> Figures:
    """Samples of the SFT model for every test item and their rewards, drawn once for all that choose from them."""
    sft, recipe = sft_model(run, done), run.recipe
    check_same_vocabulary(run.base.model, sft.model)
    pair = Pair(sft, run.base, run.tokenizer, recipe, done["sft"].id, recipe.model.base)
    sampled = sample_items(pair, run.test_items, recipe.reward, recipe.methods.samples)
    bench.attempt.publish("samples", sampled.save)
    return UNTRAINED | {"sampling_flops": sampled.flops, "plain_flops": sampled.plain_flops}


def load_samples(samples: Stage) -> Sampled:
    """What a finished stage of samples holds."""
    figures = (samples.result() or {})["figures"]
    return Sampled.load(samples.path / "samples", flops=figures["sampling_flops"], plain_flops=figures["plain_flops"])


def chosen_figures(
    run: PreparedRun,
    bench: Workbench,
    sampled: Sampled,
    answers: Mapping[str, Sequence[Sequence[Answer]]],
    *,
    scored: bool = True,
) -> Figures:
    """Figures of answers that were chosen from samples, by decoding, and what sampling cost at every answer."""
    verdicts = {
        decoding: [verdict_of(item, given) for item, given in zip(run.test_items, chosen, strict=True)]
        for decoding, chosen in answers.items()
    }
    figures = UNTRAINED | publish_answers(bench.attempt, verdicts)
    return figures | {"samples": run.recipe.methods.samples, **sampled.cost(scored=scored)}


def sample_items(pair: Pair, items: Sequence[Item], config: RewardConfig, count: int) -> Sampled:
    """`count` samples of pi_sft at temperature 1 for each item: a function of the recipe's seed, shared by all arms."""
    prompts = encode_items(pair.tokenizer, items, pair.recipe)
    questions = [Question(item.prompt, tuple(ids), item, item.group) for item, ids in zip(items, prompts, strict=True)]
    responses = sample(pair, pair.sft, questions, count, purpose="method-samples")
    draws = rewarded(pair, questions, responses, config)
    drawn = [(i, ids) for i, each in enumerate(responses) for ids in each]
    written = response_flops(pair.sft, prompts, drawn)
    scored = sum(response_flops(model, prompts, distinct(responses)) for model in (pair.sft, pair.base))
    texts = iter(pair.tokenizer.batch_decode([list(ids) for _, ids in drawn], skip_special_tokens=True))
    answers = [[Answer(next(texts), bool(set(ids) & set(pair.stops)), len(ids)) for ids in each] for each in responses]
    return Sampled(answers, draws, (written + scored) / len(items), written / len(drawn))


def response_flops(
    model: LanguageModel, prompts: Sequence[Sequence[int]], rows: Sequence[tuple[int, tuple[int, ...]]]
) -> int:
    """Counted operations of writing, or of scoring, responses; rows: the prompt's place, token ids."""
    lengths_B = torch.tensor([len(prompts[i]) + len(ids) for i, ids in rows])
    return forward_flops(model, lengths_B, sum(len(ids) for _, ids in rows))


# ---- votes and resampling


def vote_stage(run: PreparedRun, bench: Workbench, done: Stages) -> Figures:
    """The majority vote of the SFT model's samples: no reward at all, so nothing is scored for it."""
    sampled = load_samples(done["samples"])
    answers = {"greedy": most_weighted(sampled, np.ones_like(sampled.draws.reward_QK))}
    return chosen_figures(run, bench, sampled, answers, scored=False)


def weighted_vote_stage(run: PreparedRun, bench: Workbench, done: Stages) -> Figures:
    """The vote in which each sample weighs as resampling draws it: its closed form's likeliest answer."""
    sampled = load_samples(done["samples"])
    weights_QK, ess = _weighed(run, bench, sampled)
    return chosen_figures(run, bench, sampled, {"greedy": most_weighted(sampled, weights_QK)}) | ess


def resampled_stage(run: PreparedRun, bench: Workbench, done: Stages) -> Figures:
    """Resampling to the closed form of PPO's own objective: a distribution, so it has no greedy answer.

    reward.at_limit = drop keeps answers at the length limit here and in best-of-n, as in `srppo forecast`.
    """
    sampled = load_samples(done["samples"])
    weights_QK, ess = _weighed(run, bench, sampled)
    drawn = resampled(sampled, weights_QK, run.recipe.eval.samples, run.recipe.seed)
    return chosen_figures(run, bench, sampled, {"sampled": drawn}) | ess


def _weighed(run: PreparedRun, bench: Workbench, sampled: Sampled) -> tuple[Floats, Figures]:
    """(weights of the samples, QK; how many they are worth), with a warning where these are too few."""
    weights_QK = normalised_weights(sampled.draws, run.recipe.reward)
    ess = ess_of(weights_QK)
    if not ess.enough:
        more = f"about {ess.needed} would do" if ess.needed else "single samples hold nearly all the weight"
        run.console.warn(
            f"{bench.name} has {ess.harmonic:.1f} effective samples an item of methods.samples = "
            f"{run.recipe.methods.samples}, too few for the closed form ({more}): its figures say little of it"
        )
    return weights_QK, {"ess": ess._asdict()}


def normalised_weights(draws: Draws, config: RewardConfig) -> Floats:
    """QK, each row sums to 1: exp(r'/beta) with anchor sft, exp(r'/beta - r) with anchor base."""
    log_w_QK = log_weights(draws, config.anchor, config.beta)
    w_QK = np.exp(log_w_QK - log_w_QK.max(axis=1, keepdims=True))
    return np.asarray(w_QK / w_QK.sum(axis=1, keepdims=True))


def resampled(sampled: Sampled, weights_QK: Floats, count: int, seed: int) -> list[list[Answer]]:
    """`count` draws from each item's weighted samples, with replacement; a function of seed and the item's place."""
    found = []
    for i, (answers, weights_K) in enumerate(zip(sampled.answers, weights_QK, strict=True)):
        generator = np.random.default_rng(derive_seed(seed, "resample", i))
        found.append([answers[k] for k in generator.choice(len(answers), size=count, p=weights_K)])
    return found


def most_weighted(sampled: Sampled, weights_QK: Floats) -> list[list[Answer]]:
    """The answer of each item whose text carries most weight: the mode of the weighted set, the first of equals."""
    return [
        [answers[vote([answer.text for answer in answers], weights_K.tolist())]]
        for answers, weights_K in zip(sampled.answers, weights_QK, strict=True)
    ]


def vote(answers: Sequence[Hashable], weights: Sequence[float]) -> int:
    """Where the answer that carries most weight stands first; of equals the one that came first."""
    total: dict[Hashable, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        total[answer] = total.get(answer, 0.0) + weight
    return answers.index(max(total, key=lambda answer: total[answer]))


def ess_of(weights_QK: Floats) -> Ess:
    """Effective sample sizes of normalised weights, held to the rule of `optimum.MIN_ESS`."""
    ess_Q = 1 / (weights_QK**2).sum(axis=1)
    below = float((ess_Q < MIN_ESS).mean())
    needed = samples_needed(ess_Q, weights_QK.shape[1])
    return Ess(effective(ess_Q), float(np.median(ess_Q)), below, enough(ess_Q), needed)


# ---- best of n


def best_of_n_stage(run: PreparedRun, bench: Workbench, done: Stages) -> Figures:
    """The samples with the highest reward: of all n as the greedy answer, of each of eval.samples equal parts of
    them as the sampled ones (best of n // eval.samples). The samples are a function of the seed, so both are."""
    sampled = load_samples(done["samples"])
    answers = {"greedy": best_of(sampled, 1), "sampled": best_of(sampled, run.recipe.eval.samples)}
    return chosen_figures(run, bench, sampled, answers)


def best_of(sampled: Sampled, groups: int) -> list[list[Answer]]:
    """The answer with the highest reward in each of `groups` equal parts of an item's samples, the first of equals.

    With more than one part each answer is the best of n // groups samples of its own: independent, and of a smaller n.
    """
    size = sampled.draws.reward_QK.shape[1] // groups
    if size < 1:
        raise ConfigError(
            f"methods.samples ({sampled.draws.reward_QK.shape[1]}) is below eval.samples ({groups}); best-of-n gives "
            "each of those answers samples of its own to choose from"
        )
    best_QG: NDArray[np.intp] = np.stack(
        [sampled.draws.reward_QK[:, g * size : (g + 1) * size].argmax(axis=1) + g * size for g in range(groups)], axis=1
    )
    return [[answers[k] for k in best_G] for answers, best_G in zip(sampled.answers, best_QG.tolist(), strict=True)]
