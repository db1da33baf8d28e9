"""Rows to token ids: templates, the loss boundary, order, held-out rows, and the account of what was used.

`prepare` is the one call of the stages. Reading is in `formats.py`, the likeness of prompts in `overlap.py`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from srppo.chat import encode_demonstration, encode_prompt, ensure_chat_template, stop_ids
from srppo.config import DataConfig, canonical_json, derive_seed
from srppo.errors import ConfigError, DataError
from srppo.formats import Loaded, Opened, Unused, load_demonstrations, load_prompts, reasons, row_content
from srppo.overlap import Overlap, measure_overlap, without_overlap
from srppo.types import Demonstration, EncodedDemonstration, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DataReport",
    "Loaded",
    "Overlap",
    "Part",
    "PreparedData",
    "Unused",
    "load_demonstrations",
    "load_prompts",
    "measure_overlap",
    "permute",
    "prepare",
    "prompt_text",
    "row_id",
    "split_held_out",
    "without_overlap",
]

_LISTED = 10_000  # rows up to which a manifest lists ids and positions; beyond, their sha256 stands for them

Row = TypeVar("Row", Demonstration, Prompt)
Ids = TypeVar("Ids", EncodedDemonstration, tuple[int, ...])
_T = TypeVar("_T")


# ---- order and held-out rows


def permute(rows: Sequence[_T], seed: int) -> list[_T]:
    """One permutation a seed; `size` rows are its first ones, so a larger size holds every smaller one."""
    ordered = list(rows)
    random.Random(derive_seed(seed, "data order")).shuffle(ordered)
    return ordered


def split_held_out(
    rows: Sequence[Demonstration], share: float, seed: int
) -> tuple[list[Demonstration], list[Demonstration]]:
    """(train, held out), each in the order of `rows`; about `share` of the rows are held out.

    A hash of the prompt (of the text where there is none) decides for each row alone, so rows that come or go move no
    other row, and rows of one prompt stay on one side.
    """

    def is_held_out(row: Demonstration) -> bool:
        asked = canonical_json([[turn.role, turn.content] for turn in row.prompt]) if row.prompt else row.answer
        return derive_seed(seed, f"held out {asked}") < share * 2**63

    train = [row for row in rows if not is_held_out(row)]
    if not train:
        raise DataError(f"data.held_out = {share} leaves none of {len(rows)} demonstrations to train on; lower it")
    return train, [row for row in rows if is_held_out(row)]


def row_id(row: Demonstration | Prompt) -> str:
    """Hash of what a row says, the same wherever it stands."""
    return hashlib.sha256(row_content(row).encode()).hexdigest()[:16]


def prompt_text(row: Demonstration | Prompt) -> str:
    """What the user says, the text that overlap looks at: all user turns; of a plain text, the text."""
    turns = row.prompt if isinstance(row, Demonstration) else row.messages
    asked = "\n".join(turn.content for turn in turns if turn.role == "user")
    return asked if asked or isinstance(row, Prompt) else row.answer


# ---- the account


@dataclass(frozen=True)
class Part:
    """What became of the rows of one kind: read = used + held_out + spare + the unused."""

    what: str
    opened: tuple[Opened, ...]
    unused: dict[str, Unused]
    used: int
    held_out: int
    cut: Unused | None

    @property
    def read(self) -> int:
        return sum(part.rows for part in self.opened)

    @property
    def spare(self) -> int:
        """Rows beyond the size that was asked for."""
        return self.read - self.used - self.held_out - sum(part.count for part in self.unused.values())

    def lines(self) -> list[str]:
        names = [f"{part.name} ({part.columns or 'no rows'})" for part in self.opened]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        held = f", {self.held_out:,} held out" if self.held_out else ""
        spare = f", {self.spare:,} beyond the size asked for" if self.spare else ""
        lines = [f"{self.what}: {self.read:,} rows in {', '.join(names[:3])}{more}; {self.used:,} used{held}{spare}"]
        if self.unused:
            lines.append(f"  not used: {reasons(self.unused)}")
        if self.cut:
            lines.append(
                f"  cut at data.max_tokens, so without EOS: {self.cut.count:,} (first {self.cut.first_source})"
            )
        return lines

    def as_dict(self) -> dict[str, Any]:
        counts = {"read": self.read, "used": self.used, "held_out": self.held_out, "spare": self.spare}
        unused = {reason: vars(part) for reason, part in self.unused.items()}
        return {**counts, "unused": unused, "cut": vars(self.cut) if self.cut else None}


@dataclass(frozen=True)
class DataReport:
    """What was read, used and left out and why, and how far the prompts used repeat the demonstrations used."""

    demonstrations: Part
    prompts: Part
    overlap: Overlap
    overlap_first: str | None
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """Plain words for the console."""
        found = self.overlap
        first = f" (first {self.overlap_first})" if self.overlap_first else ""
        overlap = (
            f"overlap: of {found.n:,} prompts used {found.exact:,} equal a demonstration's prompt, "
            f"{found.half_ngram:,} more share over half of their 8-grams with one{first}"
        )
        notes = [f"note: {note}" for note in self.notes]
        return [*self.demonstrations.lines(), *self.prompts.lines(), overlap, *notes]

    def as_dict(self) -> dict[str, Any]:
        """The same for the manifest."""
        return {
            "demonstrations": self.demonstrations.as_dict(),
            "prompts": self.prompts.as_dict(),
            "overlap": self.overlap.as_dict(),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class PreparedData:
    """Everything the stages train on, in training order.

    `prompt_texts` are the users' words of `prompts`. `sha` is the sha256 of all usable rows' content, of both kinds;
    that of either alone is `manifest["demonstrations"]["sha256"]` and `manifest["prompts"]["sha256"]`.
    """

    demonstrations: list[EncodedDemonstration]
    held_out: list[EncodedDemonstration]
    prompts: list[tuple[int, ...]]
    prompt_texts: list[str]
    sha: str
    report: DataReport
    manifest: dict[str, Any]


def prepare(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    context_length: int,
    *,
    max_new_tokens: int = 1,
    stop: Sequence[int] | None = None,
) -> PreparedData:
    """Load, order, split, size, measure overlap and encode. A tokenizer without chat template is given ours.

    `context_length` is the model's: data.max_tokens is lowered to it, and PPO prompts leave room for `max_new_tokens`.
    Rows that can't be encoded are passed over before `size` is counted, so a size is met exactly or is an error. With
    data.overlap = "minimum" prompts are held against every usable demonstration, trained on or not, so that they stay
    the same at every size.

    Raises:
        DataError: nothing to read or use, or fewer rows than asked for.
        ModelError: no EOS token. ConfigError: no room for a prompt in the context.
    """
    stops = list(stop) if stop else stop_ids(tokenizer)
    max_tokens, most, most_ppo, notes = _limits(config, context_length, max_new_tokens)
    if ensure_chat_template(tokenizer):
        notes.append("the tokenizer has no chat template and was given ours, Q: ... A: ...")
    encode = partial(
        encode_demonstration,
        tokenizer,
        system=config.system,
        max_tokens=max_tokens,
        max_prompt_tokens=most,
        stop=stops,
    )
    encode_asked = partial(encode_prompt, tokenizer, system=config.system, max_prompt_tokens=most_ppo)
    loaded = load_demonstrations(config.demonstrations, seed=seed)
    train_pool, held_pool = split_held_out(permute(loaded.rows, seed), config.held_out, seed)
    train = _encoded(train_pool, encode, config.size)
    held = _encoded(held_pool, encode, None)
    demonstrations = _part("demonstrations", loaded, train, held, stops)
    _refuse_shortfall("data.size", config.size, "demonstrations to train on", len(train.rows), demonstrations)

    none: Loaded[Prompt] = Loaded((), {}, (), "")
    questions = load_prompts(config.prompts, seed=seed) if config.prompts else none
    pool, alike = _unlike(loaded.rows, questions.rows, permute(questions.rows, seed), config.overlap)
    asked = _encoded(pool, encode_asked, config.prompts_size)
    prompts = _part("prompts", questions, asked, None, stops, alike)
    _refuse_shortfall("data.prompts_size", config.prompts_size, "prompts", len(asked.rows), prompts)

    texts = [prompt_text(row) for row in asked.rows]
    overlap = measure_overlap([prompt_text(row) for row in train.rows], texts)
    pair = overlap.first and f"{asked.rows[overlap.first[0]].source} and {train.rows[overlap.first[1]].source}"
    report = DataReport(demonstrations, prompts, overlap, pair, tuple(notes))
    sha = hashlib.sha256(f"{loaded.sha} {questions.sha}".encode()).hexdigest()
    manifest = {
        "sha256": sha,
        "seed": seed,
        "demonstrations": _manifest(loaded, seed, train=train.rows, held_out=held.rows),
        "prompts": _manifest(questions, seed, used=asked.rows),
        "report": report.as_dict(),
    }
    return PreparedData(train.ids, held.ids, asked.ids, texts, sha, report, manifest)


def _limits(config: DataConfig, context: int, max_new_tokens: int) -> tuple[int, int, int, list[str]]:
    """Tokens allowed: prompt and answer, a demonstration's prompt, a PPO prompt; and what to say about them."""
    notes = []
    max_tokens = min(config.max_tokens, context)
    if max_tokens < config.max_tokens:
        notes.append(f"data.max_tokens lowered from {config.max_tokens:,} to {max_tokens:,}, the model's context")
    most_ppo = min(config.max_prompt_tokens, context - max_new_tokens)
    if most_ppo < 1:
        raise ConfigError(
            f"rollout.max_new_tokens = {max_new_tokens} leaves no room for a prompt in the model's context of "
            f"{context} tokens; lower it to at most {context - 1}"
        )
    if most_ppo < config.max_prompt_tokens:
        notes.append(
            f"data.max_prompt_tokens lowered from {config.max_prompt_tokens:,} to {most_ppo:,} for PPO prompts, so "
            f"that {max_new_tokens:,} new tokens fit the model's context of {context:,}"
        )
    return max_tokens, min(config.max_prompt_tokens, max_tokens - 1), most_ppo, notes


@dataclass(frozen=True)
class _Encoded(Generic[Row, Ids]):
    rows: list[Row]
    ids: list[Ids]
    refused: list[tuple[str, str]]  # (reason, source)


def _encoded(rows: Sequence[Row], encode: Callable[[Row], Ids | str], size: int | None) -> _Encoded[Row, Ids]:
    """The first `size` rows that can be encoded, in order."""
    result: _Encoded[Row, Ids] = _Encoded([], [], [])
    for row in rows:
        if len(result.rows) == size:
            break
        ids = encode(row)
        if isinstance(ids, str):
            result.refused.append((ids, row.source))
        else:
            result.rows.append(row)
            result.ids.append(ids)
    return result


def _part(
    what: str,
    loaded: Loaded[Any],
    used: _Encoded[Any, Any],
    held: _Encoded[Any, Any] | None,
    stops: list[int],
    unused: dict[str, Unused] | None = None,
) -> Part:
    both = [used, held] if held else [used]
    place = {row.source: position for position, row in enumerate(loaded.rows)}
    refused = sorted((pair for part in both for pair in part.refused), key=lambda pair: place[pair[1]])
    cut = [
        row.source
        for part in both
        for row, ids in zip(part.rows, part.ids, strict=True)
        if isinstance(ids, EncodedDemonstration) and ids.ids[-1] not in stops
    ]
    unused = {**loaded.unused, **(unused or {})}
    for reason, source in refused:
        unused[reason] = unused.get(reason, Unused(0, source)).one_more()
    first_cut = Unused(len(cut), min(cut, key=place.__getitem__)) if cut else None
    return Part(what, loaded.opened, unused, len(used.rows), len(held.rows) if held else 0, first_cut)


def _refuse_shortfall(key: str, size: int | None, what: str, usable: int, part: Part) -> None:
    why = f" (not used: {reasons(part.unused)})" if part.unused else ""
    if size is not None and usable < size:
        raise DataError(f"{key} asks for {size:,} {what}, but only {usable:,} can be used{why}; lower it or add data")
    if not usable and part.opened:
        raise DataError(f"no {what} can be used{why}")


def _unlike(
    demonstrations: Sequence[Demonstration], prompts: Sequence[Prompt], ordered: list[Prompt], rule: str
) -> tuple[list[Prompt], dict[str, Unused]]:
    """The prompts that data.overlap admits, in order, and an account of the others."""
    if rule == "any":
        return ordered, {}
    found = measure_overlap([prompt_text(row) for row in demonstrations], [prompt_text(row) for row in prompts])
    if found.first is None:
        return ordered, {}
    kept = {id(prompts[position]) for position in found.kept}
    left_out = Unused(found.dropped, prompts[found.first[0]].source)
    return [row for row in ordered if id(row) in kept], {"like a demonstration's prompt (data.overlap)": left_out}


def _manifest(loaded: Loaded[Any], seed: int, **groups: list[Any]) -> dict[str, Any]:
    permutation = permute(range(len(loaded.rows)), seed)
    return {
        "sources": [vars(part) for part in loaded.opened],
        "rows": len(loaded.rows),
        "sha256": loaded.sha,
        "permutation": _listed(permutation),
        **{name: _listed([row_id(row) for row in rows]) for name, rows in groups.items()},
    }


def _listed(values: list[Any]) -> dict[str, Any]:
    """A list by its length and sha256, and whole when it is short."""
    sha = hashlib.sha256(canonical_json(values).encode()).hexdigest()
    return {"n": len(values), "sha256": sha, "values": values if len(values) <= _LISTED else None}
