"""Stages of what PPO is compared with beside longer SFT: all are made of the base and the SFT model without training.

base, SFT -> extrapolated, decoded      weight and decode-time extrapolation (`extrapolation`)
base, SFT -> samples                    of the SFT model, with their rewards (`resampling`)
samples -> resampled, best-of-n         what is chosen from the samples
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from srppo.evaluation.development import Answer, Verdict, answer_flops, encode_items, verdict_of
from srppo.models.pair import Pair, check_same_vocabulary
from srppo.record.store import Attempt, Stage
from srppo.stages.extrapolation import check_decodable, choose_alpha, generate_decoded
from srppo.stages.resampling import (
    Ess,
    Sampled,
    best_of,
    check_ranks,
    check_resamples,
    ess_of,
    most_weighted,
    normalised_weights,
    resampled,
    sample_items,
)
from srppo.stages.run import UNTRAINED, Figures, Pipeline


def extrapolated_stage(pipeline: Pipeline, sft: Stage, sft_path: Path) -> Stage:
    """Weight extrapolation; development items choose alpha, and what that took counts as selection_flops."""

    def measure(attempt: Attempt) -> Figures:
        target = pipeline.load(str(sft_path))
        start = target.copy()
        chosen = choose_alpha(target, start, pipeline.base, pipeline.recipe.methods.alphas, pipeline.development)
        figures: Figures = {"alpha": chosen.alpha, "score": chosen.score, "alphas": list(chosen.tried)}
        figures |= {"selection_flops": chosen.flops, **pipeline.measure(attempt, target, "kept")}
        pipeline.export(attempt, target, "weight extrapolation", UNTRAINED | figures)
        return figures

    return pipeline.untrained("extrapolated", [pipeline.base_id, sft.id], measure, files=[Path("model")])


def decoded_stage(pipeline: Pipeline, sft: Stage, sft_path: Path) -> Stage:
    """Decode-time extrapolation at PPO's own anchor and beta: each token is read by two models."""
    recipe, base = pipeline.recipe, pipeline.base
    check_decodable(recipe.reward)

    def measure(attempt: Attempt) -> Figures:
        model = pipeline.load(str(sft_path))
        check_same_vocabulary(base.model, model.model)
        decode = partial(generate_decoded, base=base, config=recipe.reward)
        figures, verdicts = pipeline.test(attempt, "kept", partial(pipeline.answers, model, decode))
        prompts = encode_items(pipeline.tokenizer, pipeline.test_items(), recipe)
        plain, more = (answer_flops(each, prompts, verdicts["greedy"]) for each in (model, base))
        cost = {"inference_flops": (plain + more) / len(prompts), "inference_times": (plain + more) / plain}
        return figures | cost

    return pipeline.untrained("decoded", [pipeline.base_id, sft.id], measure)


# ---- what is chosen from samples


def samples_stage(pipeline: Pipeline, sft: Stage, sft_path: Path) -> Stage:
    """Samples of the SFT model for every test item and their rewards, drawn once for all that choose from them."""
    recipe, base = pipeline.recipe, pipeline.base
    check_ranks(recipe.reward)

    def measure(attempt: Attempt) -> Figures:
        model = pipeline.load(str(sft_path))
        check_same_vocabulary(base.model, model.model)
        pair = Pair(model, base, pipeline.tokenizer, recipe, str(sft_path), recipe.model.base)
        sampled = sample_items(pair, pipeline.test_items(), recipe.reward, recipe.methods.samples)
        attempt.publish("samples", sampled.save)
        return {"sampling_flops": sampled.flops, "plain_flops": sampled.plain_flops}

    return pipeline.untrained("samples", [pipeline.base_id, sft.id], measure, files=[Path("samples")])


def load_samples(samples: Stage) -> Sampled:
    """What a finished stage of samples holds."""
    figures = (samples.result() or {})["figures"]
    return Sampled.load(samples.path / "samples", flops=figures["sampling_flops"], plain_flops=figures["plain_flops"])


def resampled_stage(pipeline: Pipeline, samples: Stage) -> Stage:
    """Resampling to the closed form of PPO's own objective; greedy is the weighted set's most likely answer.

    reward.at_limit = drop keeps answers at the length limit here and in best-of-n, as in `srppo forecast`.
    """
    recipe = pipeline.recipe
    check_resamples(recipe.reward)

    def measure(attempt: Attempt) -> Figures:
        sampled = load_samples(samples)
        weights_QK = normalised_weights(sampled.draws, recipe.reward)
        ess = ess_of(weights_QK)
        _warn_of_few(pipeline, ess)

        def answers(count: int | None) -> list[list[Answer]]:
            if count is None:
                return most_weighted(sampled, weights_QK)
            return resampled(sampled, weights_QK, count, recipe.seed)

        figures, _ = pipeline.test(attempt, "kept", lambda count: _verdicts(pipeline, answers(count)))
        return figures | {"ess": ess._asdict(), "samples": recipe.methods.samples, **sampled.cost()}

    return pipeline.untrained("resampled", [pipeline.base_id, samples.id], measure)


def _warn_of_few(pipeline: Pipeline, ess: Ess) -> None:
    if ess.enough:
        return
    more = f"about {ess.needed} would do" if ess.needed else "single samples hold nearly all the weight"
    pipeline.console.warn(
        f"resampling has {ess.harmonic:.1f} effective samples an item of methods.samples = "
        f"{pipeline.recipe.methods.samples}, too few for the closed form ({more}): its figures say little of it"
    )


def best_of_n_stage(pipeline: Pipeline, samples: Stage) -> Stage:
    """The samples with the highest reward: of all n as the greedy answer, of each of eval.samples equal parts of
    them as the sampled ones (best of n // eval.samples). The samples are a function of the seed, so both are."""

    def measure(attempt: Attempt) -> Figures:
        sampled = load_samples(samples)
        figures, _ = pipeline.test(attempt, "kept", lambda count: _verdicts(pipeline, best_of(sampled, count or 1)))
        return figures | {"samples": pipeline.recipe.methods.samples, **sampled.cost()}

    return pipeline.untrained("best-of-n", [pipeline.base_id, samples.id], measure)


def _verdicts(pipeline: Pipeline, answers: Sequence[Sequence[Answer]]) -> list[Verdict]:
    return [verdict_of(item, given) for item, given in zip(pipeline.test_items(), answers, strict=True)]
