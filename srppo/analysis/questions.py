"""The questions put to the two models, and samples of their answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from srppo.config import derive_seed, resolved
from srppo.console import Console
from srppo.data.chat import encode_prompt
from srppo.data.formats import load_prompts
from srppo.data.types import Message, Prompt
from srppo.errors import DataError, UserError
from srppo.evaluation.development import load_items
from srppo.models.language_model import LanguageModel
from srppo.models.pair import Pair
from srppo.training.batch import Generated, left_pad
from srppo.training.rollout import generate

SAMPLE_BATCH = 512  # rows of one call of generate, which takes fewer at a time where the memory has it
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """A prompt as token ids; `answer` is the one right answer where it is known, `group` as in the evaluation items."""

    text: str
    ids: tuple[int, ...]
    answer: str | None = None
    group: str = "all"

    def is_right(self, response: str) -> bool | None:
        """Equal to the answer after stripping spaces, as in `evaluate`; None where no answer is known."""
        return None if self.answer is None else response.strip() == self.answer.strip()


def load_questions(pair: Pair, path: Path | None, limit: int | None, console: Console) -> list[Question]:
    """Prompts of a JSONL file (`prompt`, and may hold `answer`, `group`), else the recipe's development items, else its
    PPO prompts (no answers); at most `limit`, spread evenly. What cannot be encoded is left out and counted."""
    if path is not None:
        rows = [(turns_of(row, place), row.get("answer"), row.get("group", "all")) for place, row in read_jsonl(path)]
    elif items := load_items(pair.recipe, "dev"):
        rows = [((Message("user", item.prompt),), item.answer, item.group) for item in items]
    else:
        sources = resolved(pair.recipe).data.prompts
        if not sources:
            raise UserError("the recipe names neither eval.items nor data.prompts; give a JSONL file with --prompts")
        rows = [(row.messages, None, "all") for row in load_prompts(sources, seed=pair.recipe.seed).rows]
    questions, refused = [], 0
    for turns, answer, group in spread(rows, limit):
        ids = encode_turns(pair, turns)
        refused += isinstance(ids, str)
        if not isinstance(ids, str):
            questions.append(Question(turns[-1].content, ids, None if answer is None else str(answer), str(group)))
    if refused:
        console.warn(f"{refused} of {refused + len(questions)} prompts cannot be encoded and are left out")
    if not questions:
        raise DataError(f"no prompts to sample from{'' if path is None else f' in {path}'}")
    return questions


def encode_turns(pair: Pair, turns: tuple[Message, ...]) -> tuple[int, ...] | str:
    """Token ids up to where the answer begins, or why not; leaves room for the recipe's longest answer."""
    room = pair.context - pair.recipe.rollout.max_new_tokens
    most = min(pair.recipe.data.max_prompt_tokens, room)
    return encode_prompt(pair.tokenizer, Prompt(turns, "score"), system=pair.recipe.data.system, max_prompt_tokens=most)


def spread(rows: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` rows, evenly over the list, so that every task keeps its share."""
    if limit is None or limit >= len(rows):
        return list(rows)
    return [rows[i * len(rows) // limit] for i in range(limit)]


def read_jsonl(path: Path) -> list[tuple[str, dict[str, object]]]:
    """(place `file:line`, object) of each line that is not blank. Raises DataError naming the first bad one."""
    try:
        lines = path.expanduser().read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append((f"{path}:{number}", dict(json.loads(line))))
        except (ValueError, TypeError):
            raise DataError(f'{path}:{number} is no JSON object; a line is like {{"prompt": ..., ...}}') from None
    return rows


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


# ---- samples


def sample(
    pair: Pair,
    model: LanguageModel,
    questions: Sequence[Question],
    count: int,
    *,
    purpose: str,
    temperature: float = 1.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[tuple[int, ...]]]:
    """`count` responses (token ids, EOS included) to each question, drawn from the model's whole distribution.

    A function of (recipe's seed, purpose) alone. Prompts of like length share a batch.
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
        progress(min(start + SAMPLE_BATCH, len(rows)), len(rows))
    return found


def as_generated(pair: Pair, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Generated:
    """Rows of given ids in the form that `generate` returns: prompts padded left, responses right."""
    device = pair.sft.device
    tokens_BP, mask_BP = left_pad(prompts, pair.pad_id)
    flipped_BT, mask_BT = left_pad([list(reversed(row)) for row in responses], pair.pad_id)
    tokens_BS = torch.cat([tokens_BP, flipped_BT.flip(1)], dim=1).to(device)
    mask_BT = mask_BT.flip(1)
    ended_B = torch.tensor([bool(row) and row[-1] in pair.stops for row in responses])
    attention_mask_BS = torch.cat([mask_BP, mask_BT], dim=1).to(device)
    return Generated(tokens_BS, attention_mask_BS, mask_BT.to(device), ended_B.to(device))
