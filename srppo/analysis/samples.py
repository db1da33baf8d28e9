"""Questions put to the two models of a pair, samples of the answers, and their rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from srppo.analysis.optimum import Draws
from srppo.config import RewardConfig, derive_seed, resolved
from srppo.console import Console
from srppo.data.chat import encode_prompts
from srppo.data.rows import load_prompts
from srppo.data.types import Message, Prompt
from srppo.errors import DataError, UserError
from srppo.evaluation.items import checked_item, load_items, read_rows, spread
from srppo.models.language_model import LanguageModel
from srppo.models.pair import Pair
from srppo.training.batch import Generated, left_pad
from srppo.training.reward import rewards_before_kl
from srppo.training.rollout import generate
from srppo.training.scores import Scores, score_log_ratio, score_logprobs
from srppo.world.items import Item

SAMPLE_BATCH = 512  # rows of one call of generate, which takes fewer at a time where the memory has it
SCORE_BATCH = 128  # rows scored at once, or in parts where the memory has it


@dataclass(frozen=True)
class Question:
    """A prompt as token ids; `item` says what is right where that is known, `group` as in the evaluation items."""

    text: str
    ids: tuple[int, ...]
    item: Item | None = None
    group: str = "all"

    @property
    def answer(self) -> str | None:
        """The right answer, or what a right one obeys; None where nothing is known."""
        return None if self.item is None else self.item.answer

    def is_right(self, response: str) -> bool | None:
        """As for evaluation items; None where it cannot be known."""
        return None if self.item is None else self.item.is_right(response)


def question_of(turns: Sequence[Message], item: Item | None, group: object, ids: tuple[int, ...]) -> Question:
    """What the last turn of a conversation asks; ids: of the whole conversation."""
    return Question(turns[-1].content, ids, item, str(group))


def load_questions(pair: Pair, path: Path | None, limit: int | None, console: Console) -> list[Question]:
    """Prompts of a JSONL file (`prompt`, and may hold what an item does), else the recipe's development items, else its
    PPO prompts (no answers); at most `limit`, spread evenly. What cannot be encoded is left out and counted. Each
    leaves room for the recipe's longest answer."""
    if path is not None:
        read = read_rows(path, "--prompts")
        asked = [(row, turns_of(row, place), place) for place, row in read]
        rows = [
            (turns, checked_item(row, turns[-1].content, place), row.get("group", "all")) for row, turns, place in asked
        ]
    elif items := load_items(pair.recipe, "dev"):
        rows = [((Message("user", item.prompt),), item, item.group) for item in items]
    else:
        sources = resolved(pair.recipe).data.prompts
        if not sources:
            raise UserError("the recipe names neither eval.items nor data.prompts; give a JSONL file with --prompts")
        rows = [(row.prompt, None, "all") for row in load_prompts(sources, seed=pair.recipe.seed).rows]
    rows, data = spread(rows, limit), pair.recipe.data
    most = min(data.max_prompt_tokens, pair.context - pair.recipe.rollout.max_new_tokens)
    prompts = [Prompt(turns, "score") for turns, _, _ in rows]
    found = encode_prompts(pair.tokenizer, prompts, system=data.system, max_prompt_tokens=most)
    questions = [question_of(*row, ids) for row, ids in zip(rows, found, strict=True) if not isinstance(ids, str)]
    if refused := len(rows) - len(questions):
        console.warn(f"{refused} of {len(rows)} prompts cannot be encoded and are left out")
    if not questions:
        raise DataError(f"no prompts to sample from{'' if path is None else f' in {path}'}")
    return questions


def turns_of(row: Mapping[str, object], place: str) -> tuple[Message, ...]:
    """The `prompt` of a row: text, or a list of messages with role and content that ends with the user's."""
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt.strip():
        return (Message("user", prompt),)
    try:
        listed = prompt if isinstance(prompt, list) else []
        turns = tuple(Message(str(turn["role"]), str(turn["content"])) for turn in listed)
    except (TypeError, KeyError):
        turns = ()
    if not turns or turns[-1].role != "user":
        raise DataError(f"{place}: prompt is neither text nor a list of messages that ends with the user's")
    return turns


def sample(
    pair: Pair,
    model: LanguageModel,
    questions: Sequence[Question],
    count: int,
    *,
    purpose: str,
    temperature: float = 1.0,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[tuple[int, ...]]]:
    """`count` responses (token ids, EOS included) to each question, drawn from the model's whole distribution.

    A function of (recipe's seed, purpose) alone. Prompts of like length share a batch. `progress` hears how
    many more are done.
    """
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].ids))
    rows = [i for i in order for _ in range(count)]
    found: list[list[tuple[int, ...]]] = [[] for _ in questions]
    for start in range(0, len(rows), SAMPLE_BATCH):
        chunk = rows[start : start + SAMPLE_BATCH]
        generated = generate(
            model,
            [questions[i].ids for i in chunk],
            stop_ids=pair.stops,
            pad_id=pair.pad_id,
            max_new_tokens=pair.recipe.rollout.max_new_tokens,
            seed=derive_seed(pair.recipe.seed, purpose, start),
            temperature=temperature,
        )
        for i, ids in zip(chunk, generated.responses(), strict=True):
            found[i].append(tuple(ids))
        progress(len(chunk))
    return found


def scored_batches(
    pair: Pair, rows: Sequence[tuple[Question, tuple[int, ...]]]
) -> Iterator[tuple[list[int], Generated, Scores]]:
    """(places, those rows in the form that `generate` returns, what both models say of them); rows: question, response.

    Rows of like length share a batch.
    """
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i][0].ids), len(rows[i][1])))
    for start in range(0, len(rows), SCORE_BATCH):
        places = order[start : start + SCORE_BATCH]
        questions, responses = zip(*(rows[i] for i in places), strict=True)
        tokens_BP, mask_BP = left_pad([question.ids for question in questions], pair.pad_id)
        response_BT, mask_BT = (x.flip(1) for x in left_pad([row[::-1] for row in responses], pair.pad_id))
        parts = (torch.cat([tokens_BP, response_BT], dim=1), torch.cat([mask_BP, mask_BT], dim=1), mask_BT)
        ended_B = torch.tensor([bool(row) and row[-1] in pair.stops for row in responses])
        batch = Generated(*(x.to(pair.sft.device) for x in (*parts, ended_B)))
        yield places, batch, score_log_ratio(pair.sft, pair.base, batch)


@torch.no_grad()
def rewarded(
    pair: Pair,
    questions: Sequence[Question],
    responses: Sequence[Sequence[tuple[int, ...]]],
    config: RewardConfig,
    *,
    policy: LanguageModel | None = None,
    temperature: float = 1.0,
) -> Draws:
    """Rewards by `config` of as many responses (token ids) to each question; `policy` drew them, None: pi_sft did.

    Short answers repeat: each distinct one is scored once.
    """
    rows = distinct(responses)
    reward, log_ratio, log_policy_sft = np.zeros((3, len(rows)))  # of each distinct response, nats
    for places, batch, scores in scored_batches(pair, [(questions[i], ids) for i, ids in rows]):
        reward[places] = rewards_before_kl(config, scores, batch).sum(dim=1).double().cpu()
        log_ratio[places] = scores.log_ratio_BT.double().sum(dim=1).cpu()
        if policy is not None:
            theirs_BT = score_logprobs(policy, batch, temperature=temperature)
            log_policy_sft[places] = (theirs_BT - scores.sft_logprobs_BT).double().sum(dim=1).cpu()
    texts = pair.tokenizer.batch_decode([list(ids) for _, ids in rows], skip_special_tokens=True)
    right = np.array([float(bool(questions[i].is_right(text))) for (i, _), text in zip(rows, texts, strict=True)])
    length = np.array([float(len(ids)) for _, ids in rows])
    place = {row: j for j, row in enumerate(rows)}
    of_QK = np.array([[place[i, ids] for ids in each] for i, each in enumerate(responses)])
    known = all(question.item is not None for question in questions)
    return Draws(reward[of_QK], log_ratio[of_QK], length[of_QK], right[of_QK] if known else None, log_policy_sft[of_QK])


def distinct(responses: Sequence[Sequence[tuple[int, ...]]]) -> list[tuple[int, tuple[int, ...]]]:
    """(question, response) of each distinct response, in the order they came."""
    return list(dict.fromkeys((i, ids) for i, each in enumerate(responses) for ids in each))
