"""Exact-match accuracy on items with known answers, and the NLL of held-out answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from srppo.config import Recipe, derive_seed
from srppo.data.chat import encode_prompts
from srppo.data.noise import add_noise
from srppo.data.prepare import Sample, ask_base
from srppo.data.types import Demonstration, EncodedDemonstration, Message, Prompt
from srppo.errors import DataError
from srppo.evaluation.items import load_items, spread
from srppo.instructions.checkers import InstructedItem
from srppo.models.flops import forward_flops
from srppo.models.language_model import LanguageModel
from srppo.statistics.intervals import Estimate, item_interval
from srppo.training.batch import Generated, answer_nll_sum, extents, micro_batches
from srppo.training.rollout import generate, row_seeds
from srppo.world.items import Item

CHOOSE = ("demonstrated", "development")  # groups of items: no step is chosen on tasks that are reported as new
SEED_BLOCK = 300  # items whose seeds are made of one


@dataclass(frozen=True)
class Verdict:
    """What a model wrote for an item: each sample's text, whether it is right and ended by EOS, and its tokens."""

    prompt: str
    answer: str
    task: str
    group: str
    responses: tuple[str, ...]
    correct: tuple[bool, ...]
    ended: tuple[bool, ...]
    tokens: tuple[int, ...]


class Answer(NamedTuple):
    """One response to an item; tokens: its length, EOS included."""

    text: str
    ended: bool
    tokens: int


def encode_items(tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], recipe: Recipe) -> list[Sequence[int]]:
    """Token ids of each item's prompt, up to where the answer begins. Raises DataError for one that cannot be used."""
    prompts = [Prompt((Message("user", item.prompt),), "eval") for item in items]
    limit = recipe.data.max_prompt_tokens
    found = encode_prompts(tokenizer, prompts, system=recipe.data.system, max_prompt_tokens=limit)
    for item, ids in zip(items, found, strict=True):
        if isinstance(ids, str):
            raise DataError(f"evaluation item {item.prompt[:60]!r} cannot be used: {ids}")
    return [ids for ids in found if not isinstance(ids, str)]


def verdict_of(item: Item, answers: Sequence[Answer]) -> Verdict:
    """What was written for an item, and which of it is right."""
    return Verdict(
        prompt=item.prompt,
        answer=item.answer,
        task=item.task,
        group=item.group,
        responses=tuple(answer.text for answer in answers),
        correct=tuple(item.is_right(answer.text) for answer in answers),
        ended=tuple(answer.ended for answer in answers),
        tokens=tuple(answer.tokens for answer in answers),
    )


def answer_items(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    recipe: Recipe,
    *,
    samples: int | None,
    stops: Sequence[int],
    decode: Callable[..., Generated] = generate,
) -> list[Verdict]:
    """Let a model answer: greedily (samples None) or `samples` times at temperature 1. `decode` takes what
    `rollout.generate` takes."""
    return answer_in_ways(model, tokenizer, items, recipe, {"": samples}, stops=stops, decode=decode)[""]


@torch.no_grad()
def answer_in_ways(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    recipe: Recipe,
    samples: Mapping[str, int | None],
    *,
    stops: Sequence[int],
    decode: Callable[..., Generated] = generate,
) -> dict[str, list[Verdict]]:
    """The same in several ways at once, each by its name: a prompt is then read once for all.

    Sampling seeds depend on the recipe's seed and the item's place alone: all arms share them.
    """
    if not items:
        return {way: [] for way in samples}
    prompts = encode_items(tokenizer, items, recipe)
    draws = [(way, draw, count) for way, count in samples.items() for draw in range(count or 1)]
    generated = decode(
        model,
        prompts * len(draws),
        stop_ids=stops,
        pad_id=int(tokenizer.pad_token_id),
        max_new_tokens=recipe.rollout.max_new_tokens,
        seed=[seed for _, draw, _ in draws for seed in _seeds(recipe, draw, len(items))],
        temperature=[None if count is None else 1.0 for _, _, count in draws for _ in items],
    )
    written = generated.responses()
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    ended = generated.ended_B.tolist()
    answers = [Answer(text, end, len(ids)) for text, end, ids in zip(texts, ended, written, strict=True)]
    found: dict[str, list[list[Answer]]] = {way: [[] for _ in items] for way in samples}
    for number, (way, _, _) in enumerate(draws):
        for place, given in enumerate(found[way]):
            given.append(answers[number * len(items) + place])
    return {
        way: [verdict_of(item, given) for item, given in zip(items, each, strict=True)] for way, each in found.items()
    }


def _seeds(recipe: Recipe, draw: int, items: int) -> list[int]:
    """Of one sample of each item; by blocks, as records of before have them."""
    starts = range(0, items, SEED_BLOCK)
    blocks = {start: derive_seed(recipe.seed, "eval", draw * items + start) for start in starts}
    return [seed for start, own in blocks.items() for seed in row_seeds(own, min(SEED_BLOCK, items - start))]


def answer_flops(model: LanguageModel, prompts: Sequence[Sequence[int]], verdicts: Sequence[Verdict]) -> int:
    """Counted operations of writing all the answers of some items, whose prompts are given as token ids."""
    pairs = [(len(ids), n) for ids, verdict in zip(prompts, verdicts, strict=True) for n in verdict.tokens]
    return forward_flops(model, torch.tensor([p + n for p, n in pairs]), sum(n for _, n in pairs))


def accuracy_by_group(verdicts: Sequence[Verdict]) -> dict[str, Estimate]:
    """Mean accuracy of each group, 95% interval over items; a sampled item counts by its share of right samples."""
    shares: dict[str, list[float]] = defaultdict(list)
    for verdict in verdicts:
        shares[verdict.group].append(sum(verdict.correct) / len(verdict.correct))
    return {group: item_interval(values) for group, values in shares.items()}


def answer_nll(model: LanguageModel, rows: Sequence[EncodedDemonstration], *, micro_tokens: int) -> float:
    """Mean NLL of the answers, nats a token, over all answer tokens."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for part in micro_batches(extents(rows)[0], micro_tokens):
            nll, count = answer_nll_sum(model, [rows[i] for i in part.tolist()], pad_id=0)
            total, tokens = total + float(nll), tokens + count
    return total / max(tokens, 1)


def noised(
    items: list[Item], recipe: Recipe, tokenizer: PreTrainedTokenizerBase, sample: Sample | None = None
) -> list[Item]:
    """The items, answers with the demonstrations' own noise where data.noise_dev asks for it: its kind at its rate,
    the same for the same seed and items. `sample` is what the base says, for base-answers alone."""
    config = recipe.data
    if not config.noise_dev:
        return items
    if any(isinstance(item, InstructedItem) for item in items):
        raise DataError(
            "data.noise_dev changes answers, and items of instructions (instruction_id_list) have none: leave it false"
        )
    rows = [
        Demonstration((Message("user", item.prompt),), item.answer, f"development item {place}", item.task)
        for place, item in enumerate(items, start=1)
    ]
    encode = partial(encode_prompts, tokenizer, system=config.system, max_prompt_tokens=config.max_prompt_tokens)
    ask = partial(ask_base, sample, encode) if sample else None
    answer = EncodedDemonstration((0,), 0)  # items are asked, not trained on: any answer fits
    found = add_noise(rows, config.noise, config.noise_rate, recipe.seed, encode=lambda row, text: answer, ask=ask)
    return [replace(item, answer=found.changes[i][0]) if i in found.changes else item for i, item in enumerate(items)]


class Development:
    """Measures a model during training: greedy accuracy on development items, and held-out answer NLL.

    The score that picks the kept step is one rule for every arm: accuracy on the items of the groups in CHOOSE (on all
    where no group has such a name), or minus the NLL with eval.metric = "nll". Where nothing can be measured, the last
    step is kept.
    """

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        held_out: Sequence[EncodedDemonstration],
        stops: Sequence[int],
        sample: Sample | None = None,
    ) -> None:
        self.recipe, self.tokenizer, self.stops = recipe, tokenizer, stops
        self.items = spread(noised(load_items(recipe, "dev"), recipe, tokenizer, sample), recipe.eval.limit)
        self.held_out = spread(held_out, recipe.eval.limit)

    @property
    def ranks(self) -> bool:
        """Whether there is anything to choose a step by."""
        return bool(self.items if self.recipe.eval.metric == "accuracy" else self.held_out)

    def measure(self, model: LanguageModel) -> tuple[dict[str, Any], float | None]:
        """(metrics to log, score); score None: there is nothing to choose by."""
        answers = self.answers(model)
        row, score = self.rated(model, answers)
        return row | {"selection_flops": self.flops(model, answers)}, score

    def answers(self, model: LanguageModel) -> list[Verdict]:
        """Greedy answers to the development items."""
        return answer_items(model, self.tokenizer, self.items, self.recipe, samples=None, stops=self.stops)

    def flops(self, model: LanguageModel, verdicts: Sequence[Verdict]) -> int:
        """Counted operations of one measurement."""
        prompts = encode_items(self.tokenizer, self.items, self.recipe)
        scored = forward_flops(model, *extents(self.held_out))
        return answer_flops(model, prompts, verdicts) + scored

    def rated(self, model: LanguageModel, verdicts: Sequence[Verdict]) -> tuple[dict[str, Any], float | None]:
        """`measure` with the answers given."""
        row: dict[str, Any] = {}
        score = None
        if self.held_out:
            row["dev/nll"] = answer_nll(model, self.held_out, micro_tokens=self.recipe.sft.micro_tokens)
            if self.recipe.eval.metric == "nll":
                score = -row["dev/nll"]
        if self.items:
            row |= {f"dev/{group}": estimate.mean for group, estimate in accuracy_by_group(verdicts).items()}
            row["dev/accuracy"] = sum(v.correct[0] for v in verdicts) / len(verdicts)
            if self.recipe.eval.metric == "accuracy":
                chosen = [v for v in verdicts if v.group in CHOOSE] or verdicts
                score = sum(v.correct[0] for v in chosen) / len(chosen)
        return row, score
