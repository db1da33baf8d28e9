"""SFT on the SFT model's own answers to the prompts that PPO is given: what can be had of them without PPO.

    self-distilled    the answer that most of the samples give, no reward at all (arXiv 2210.11610)
    rejection FT      the sample with the highest reward: rejection-sampling fine-tuning (arXiv 2307.09288)

Both go on from the SFT model, by its own recipe, and keep the pass that development items choose. Sampling, scoring and
training are counted.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from srppo.analysis.samples import Question, distinct, rewarded, sample
from srppo.config import with_overrides
from srppo.data.order import scheduled
from srppo.data.types import EncodedDemonstration
from srppo.errors import RunError
from srppo.models.loading import to_train
from srppo.models.pair import Pair, check_same_vocabulary
from srppo.stages.resampling import response_flops, vote
from srppo.stages.run import UNTRAINED, Figures, PreparedRun, Stages, finish, sft_model
from srppo.training.loop import Workbench
from srppo.training.sft import train_sft

_SAMPLES = "responses.json.gz"
Responses = Sequence[tuple[int, ...]]  # to one prompt, token ids, EOS included


def prompt_samples_stage(run: PreparedRun, bench: Workbench, done: Stages) -> Figures:
    """Answers of the SFT model to the first of PPO's prompts, drawn once for all that train on a choice of them."""
    pair, questions = _pair(run, done), _questions(run)
    responses = sample(pair, pair.sft, questions, run.recipe.methods.self_samples, purpose="self-training")
    text = json.dumps(responses).encode()
    bench.attempt.publish("samples", lambda folder: _write(folder / _SAMPLES, text))
    drawn = [(i, ids) for i, each in enumerate(responses) for ids in each]
    flops = response_flops(pair.sft, [question.ids for question in questions], drawn)
    return UNTRAINED | {"flops": flops, "prompts": len(questions), "samples": run.recipe.methods.self_samples}


def self_distilled_stage(run: PreparedRun, bench: Workbench, done: Stages) -> Figures:
    """SFT on the majority's answer to each prompt."""
    return _trained(run, bench, done, lambda prompt, ended: vote(ended, [1.0] * len(ended)), scoring_flops=0)


def rejection_ft_stage(run: PreparedRun, bench: Workbench, done: Stages) -> Figures:
    """SFT on the answer to each prompt that has the highest reward, the first of equals."""
    pair, questions, responses = _pair(run, done), _questions(run), _load(done)
    check_same_vocabulary(run.base.model, pair.sft.model)
    reward_QK = rewarded(pair, questions, responses, run.recipe.reward).reward_QK
    of = [dict(zip(each, row.tolist(), strict=True)) for each, row in zip(responses, reward_QK, strict=True)]
    prompts, rows = [question.ids for question in questions], distinct(responses)
    scoring = sum(response_flops(model, prompts, rows) for model in (pair.sft, run.base))

    def best(prompt: int, ended: Responses) -> int:
        return max(range(len(ended)), key=lambda k: of[prompt][ended[k]])

    return _trained(run, bench, done, best, scoring_flops=scoring)


def _trained(
    run: PreparedRun, bench: Workbench, done: Stages, choose: Callable[[int, Responses], int], *, scoring_flops: int
) -> Figures:
    """Train on the answer that `choose` picks (prompt's place, its ended answers) to each prompt."""
    rows = chosen_rows([question.ids for question in _questions(run)], _load(done), run.stops, choose)
    if not rows:
        raise RunError("no answer of the SFT model ended within rollout.max_new_tokens; raise it to train on them")
    model = to_train(sft_model(run, done), run.recipe.model)
    recipe = with_overrides(run.recipe, {"sft.epochs": run.recipe.methods.self_epochs, "sft.steps": None})
    session = train_sft(recipe, bench, model, rows, run.development, pad_id=run.pad_id)
    figures = finish(run, bench, model, session)
    return figures | {"flops": figures["flops"] + scoring_flops, "rows": len(rows)}


def chosen_rows(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Responses],
    stops: Sequence[int],
    choose: Callable[[int, Responses], int],
) -> list[EncodedDemonstration]:
    """The chosen answer to each prompt as a demonstration. One that was cut at the length limit is no answer: it would
    teach not to end; a prompt to which all were cut has none."""
    found = []
    for place, (prompt, each) in enumerate(zip(prompts, responses, strict=True)):
        if ended := [ids for ids in each if ids[-1] in stops]:
            ids = (*prompt, *ended[choose(place, ended)])
            found.append(EncodedDemonstration(ids, len(prompt)))
    return found


def _pair(run: PreparedRun, done: Stages) -> Pair:
    return Pair(sft_model(run, done), run.base, run.tokenizer, run.recipe, done["sft"].id, run.recipe.model.base)


def _questions(run: PreparedRun) -> list[Question]:
    """The prompts that PPO's first rollouts answer, each once."""
    prompts = run.data.prompts
    count = min(run.recipe.methods.self_prompts, len(prompts))
    return [Question("", tuple(prompts[i])) for i in scheduled(len(prompts), count, 0, run.recipe.seed)]


def _write(path: Path, text: bytes) -> None:
    path.write_bytes(gzip.compress(text, mtime=0))


def _load(done: Stages) -> list[list[tuple[int, ...]]]:
    rows = json.loads(gzip.decompress((done["prompt-samples"].path / "samples" / _SAMPLES).read_bytes()))
    return [[tuple(ids) for ids in each] for each in rows]
