"""Rows to token ids: what is trained on, what is held out, the prompts of PPO, and the account of what was used.

`prepare` is the one call of the stages. Reading is in `sources.py` and `rows.py`, templates in `chat.py`, order in
`order.py`, noise in `noise.py`, the likeness of prompts in `overlap.py`, the account for people in `report.py`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from srppo.config import DataConfig
from srppo.data.chat import (
    encode_demonstrations,
    encode_prompts,
    ensure_chat_template,
    special_tokens,
    stop_ids,
    template_notes,
)
from srppo.data.noise import Ask, Noise, add_noise
from srppo.data.order import Encoded, encoded, listed, permute, prompt_text, row_id, split_held_out
from srppo.data.overlap import measure_overlap, normalise
from srppo.data.report import DataReport, Part
from srppo.data.rows import Loaded, Unused, file_of, load_demonstrations, load_prompts, one_more, reasons, warned
from srppo.data.types import Demonstration, EncodedDemonstration, Prompt
from srppo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Sample = Callable[[Sequence[tuple[int, ...]], int], Sequence[str]]
"""(prompts as token ids, seed) to what the base says to each."""
_Taught = Encoded[Demonstration, EncodedDemonstration]
_Asked = Encoded[Prompt, tuple[int, ...]]
_EncodePrompts = Callable[[Sequence[Prompt]], Sequence[tuple[int, ...] | str]]


@dataclass(frozen=True)
class PreparedData:
    """Everything the stages train on, in training order.

    `sources` and `prompt_sources` are the places of the rows in the files; `prompt_texts` the users' words of
    `prompts`. `sha` is the sha256 of all usable rows' content, of both kinds, before any noise;
    `manifest["demonstrations"]["sha256"]` and `manifest["prompts"]["sha256"]` are those of either.
    """

    demonstrations: list[EncodedDemonstration]
    sources: list[str]
    held_out: list[EncodedDemonstration]
    prompts: list[tuple[int, ...]]
    prompt_sources: list[str]
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
    sample: Sample | None = None,
    only_prompts: bool = False,
) -> PreparedData:
    """Load, order, split, size, add noise, choose prompts and encode. A tokenizer without chat template is given ours.

    `context_length` is the model's: data.max_tokens is lowered to it, and PPO prompts leave room for `max_new_tokens`.
    Rows that can't be encoded are passed over before `size` is counted, so a size is met exactly or is an error. Noise
    changes answers of the rows that are trained on, never those held out, and of a conversation the last answer.
    `sample` is needed by data.noise = "base-answers" alone. `only_prompts`: no demonstrations are read.

    Raises:
        DataError: nothing to read or use, or fewer rows than asked for, or a data.overlap_share that cannot be met.
        ModelError: no EOS token. ConfigError: no room for a prompt in the context.
    """
    stops = list(stop) if stop else stop_ids(tokenizer)
    given = ensure_chat_template(tokenizer)
    most, most_prompt, most_asked, lowered = _limits(config, context_length, max_new_tokens)
    encode = partial(
        encode_demonstrations,
        tokenizer,
        system=config.system,
        max_tokens=most,
        max_prompt_tokens=most_prompt,
        stop=stops,
        turns=config.turns,
    )
    encode_asked = partial(encode_prompts, tokenizer, system=config.system, max_prompt_tokens=most_asked)
    ask = partial(ask_base, sample, encode_asked) if sample else None
    loaded = Loaded[Demonstration]() if only_prompts else load_demonstrations(config.demonstrations, seed=seed)
    train, held, noise, demonstrations = _demonstrations(loaded, config, seed, encode, ask, stops)
    questions = load_prompts(config.prompts, seed=seed) if config.prompts else Loaded[Prompt]()
    asked, prompts, repeated = _prompts(config, seed, questions, loaded.rows, train.rows, encode_asked)

    texts = [prompt_text(row) for row in asked.rows]
    overlap = measure_overlap([prompt_text(row) for row in train.rows], texts)
    pair = overlap.first and f"{asked.rows[overlap.first[0]].source} and {train.rows[overlap.first[1]].source}"
    notes = [
        *lowered,
        *(["the tokenizer has no chat template and was given ours, Q: ... A: ..."] if given else []),
        *template_notes(tokenizer),
        *repeated,
    ]
    odd = [line for part in (loaded, questions) for line in (*part.warnings, *_special(tokenizer, part.rows))]
    odd += _unread_tools(tokenizer, train.rows, asked.rows)
    report = DataReport(demonstrations, prompts, overlap, pair, noise, tuple(notes), tuple(dict.fromkeys(odd)))
    sha = hashlib.sha256(f"{loaded.sha} {questions.sha}".encode()).hexdigest()
    manifest = {
        "sha256": sha,
        "seed": seed,
        "demonstrations": _manifest(loaded, seed, train=train.rows, held_out=held.rows) | {"noise": noise.as_dict()},
        "prompts": _manifest(questions, seed, used=asked.rows),
        "report": report.as_dict(),
    }
    places, asked_places = ([row.source for row in rows] for rows in (train.rows, asked.rows))
    return PreparedData(train.ids, places, held.ids, asked.ids, asked_places, texts, sha, report, manifest)


def asks_base(config: DataConfig) -> bool:
    """Whether wrong answers are sampled from the base, which takes the model itself."""
    return config.noise == "base-answers" and config.noise_rate > 0


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


# ---- demonstrations


def _demonstrations(
    loaded: Loaded[Demonstration],
    config: DataConfig,
    seed: int,
    encode: Callable[[Sequence[Demonstration]], Sequence[EncodedDemonstration | str]],
    ask: Ask | None,
    stops: list[int],
) -> tuple[_Taught, _Taught, Noise, Part]:
    """(to train on, held out, noise, account); the rows stay as they were read, the ids to train on have the noise."""
    rows = permute(loaded.rows, seed)
    train_pool, held_pool = split_held_out(rows, config.held_out, seed) if rows else (rows, rows)
    train, held = encoded(train_pool, encode, config.size), encoded(held_pool, encode, None)
    unused = _counted(loaded, [*train.refused, *held.refused], loaded.unused)
    _refuse_shortfall("data.size", config.size, "demonstrations to train on", len(train.rows), unused)
    noise = add_noise(
        train.rows,
        config.noise,
        config.noise_rate,
        seed,
        encode=lambda row, answer: encode([replace(row, answer=answer)])[0],
        ask=ask,
    )
    train = replace(train, ids=noise.applied(train.ids))
    encoded_rows = [pair for part in (train, held) for pair in zip(part.rows, part.ids, strict=True)]
    without_eos = [("cut", row.source) for row, ids in encoded_rows if ids.ids[-1] not in stops]
    cut = _counted(loaded, without_eos, {}).get("cut")
    return train, held, noise, Part("demonstrations", loaded.opened, unused, len(train.rows), len(held.rows), cut)


def ask_base(sample: Sample, encode: _EncodePrompts, rows: Sequence[Demonstration], seed: int) -> list[str | None]:
    """What the base says to the prompts of `rows`, None to those that have none or leave no room for an answer."""
    asked = iter(encode([Prompt(row.prompt, row.source, row.tools) for row in rows if row.prompt]))
    ids = [next(asked) if row.prompt else "plain text" for row in rows]
    said = iter(sample([prompt for prompt in ids if not isinstance(prompt, str)], seed))
    return [None if isinstance(prompt, str) else next(said) for prompt in ids]


# ---- prompts


def _prompts(
    config: DataConfig,
    seed: int,
    questions: Loaded[Prompt],
    usable: Sequence[Demonstration],
    used: Sequence[Demonstration],
    encode: _EncodePrompts,
) -> tuple[_Asked, Part, list[str]]:
    """PPO's prompts, those of the demonstrations `used` last; the account of the ones that were read; what to say.

    With data.overlap = "minimum" or a data.overlap_share, prompts are held against every `usable` demonstration,
    trained on or not, so that they stay the same at every size.
    """
    ordered = permute(questions.rows, seed)
    share = config.overlap_share if ordered else None
    kept, alike = ordered, dict[str, Unused]()
    if share is not None or config.overlap == "minimum":
        kept, alike = _unlike(usable, questions.rows, ordered, "overlap" if share is None else "overlap_share")
    size, count, shared = config.prompts_size, 0, 0
    if share is not None:
        count = size or len(encoded(ordered, encode, None).rows)
        shared = round(share * count)
        size = count - shared
    drawn = encoded(kept, encode, size)
    found = len(drawn.rows)
    if share is not None and found < count - shared:
        raise DataError(
            f"data.overlap_share = {share:g} asks for {size:,} of {count:,} prompts unlike the demonstrations', but "
            f"only {found:,} can be used{_why(alike)}; raise it, lower data.prompts_size or add prompts"
        )
    unused = _counted(questions, drawn.refused, {**questions.unused, **alike})
    part = Part("prompts", questions.opened, unused, found)
    if not shared:
        _refuse_shortfall("data.prompts_size", config.prompts_size, "prompts", found, unused)
        return drawn, part, []
    own, note = _own(used, shared, f"data.overlap_share = {share:g}", encode)
    note = f"{shared:,} of {count:,} prompts are {note}"
    return Encoded(drawn.rows + own.rows, drawn.ids + own.ids, drawn.refused), part, [note]


def _own(used: Sequence[Demonstration], shared: int, key: str, encode: _EncodePrompts) -> tuple[_Asked, str]:
    """`shared` prompts of demonstrations, and what to say of them.

    They stand last and are counted from the end: at a larger share those of a smaller one keep their places, and so do
    the drawn ones that stay, counted from the front.
    """
    distinct: dict[str, Prompt] = {}
    for row in used:
        if row.prompt:
            distinct.setdefault(normalise(prompt_text(row)), Prompt(row.prompt, row.source, row.tools))
    found = encoded(list(distinct.values()), encode, shared)
    if not found.rows:
        raise DataError(
            f"{key} asks for {shared:,} prompts of demonstrations, but none of the {len(used):,} used has a prompt "
            f"that fits ({found.refused[0][0] if found.refused else 'plain text'})"
        )
    times, more = divmod(shared, len(found.rows))
    each = f"{times:,} or {times + 1:,} times" if more else "once" if times == 1 else f"{times:,} times"
    turns = [turn % len(found.rows) for turn in reversed(range(shared))]
    own = Encoded([found.rows[i] for i in turns], [found.ids[i] for i in turns], found.refused)
    return own, f"those of {len(found.rows):,} demonstrations, each {each} ({key})"


def _unlike(
    demonstrations: Sequence[Demonstration], prompts: Sequence[Prompt], ordered: list[Prompt], key: str
) -> tuple[list[Prompt], dict[str, Unused]]:
    """The prompts unlike every demonstration's, as `ordered`, and an account of the others."""
    found = measure_overlap([prompt_text(row) for row in demonstrations], [prompt_text(row) for row in prompts])
    if found.first is None:
        return ordered, {}
    kept = {id(prompts[position]) for position in found.kept}
    alike = {f"like a demonstration's prompt (data.{key})": Unused(found.dropped, prompts[found.first[0]].source)}
    return [row for row in ordered if id(row) in kept], alike


# ---- both


def _counted(loaded: Loaded[Any], found: Iterable[tuple[str, str]], counted: Mapping[str, Unused]) -> dict[str, Unused]:
    """What was `counted`, and behind it the (reason, source) `found` of rows, in the order of the files."""
    place = {row.source: position for position, row in enumerate(loaded.rows)}
    unused = dict(counted)
    for reason, source in sorted(found, key=lambda pair: place[pair[1]]):
        one_more(unused, reason, source)
    return unused


def _why(unused: Mapping[str, Unused]) -> str:
    return f" (not used: {reasons(unused)})" if unused else ""


def _refuse_shortfall(key: str, size: int | None, what: str, usable: int, unused: dict[str, Unused]) -> None:
    """Raise DataError where fewer rows can be used than were asked for, or none of those that are unusable."""
    if size is not None and usable < size:
        raise DataError(
            f"{key} asks for {size:,} {what}, but only {usable:,} can be used{_why(unused)}; lower it or add data"
        )
    if not usable and unused:
        raise DataError(f"no {what} can be used{_why(unused)}")


def _special(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Demonstration | Prompt]) -> list[str]:
    """Warnings, one a file, of prompts whose own text spells special tokens: they are read as such."""
    pattern = special_tokens(tokenizer)
    odd: dict[str, dict[str, Unused]] = {}
    for row in rows:
        if any(pattern.search(turn.content) for turn in row.prompt):
            spelled = odd.setdefault(file_of(row), {})
            one_more(spelled, "prompts spell special tokens, which are read as such", row.source)
    of_file = Counter(map(file_of, rows)) if odd else {}
    return [line for name, found in odd.items() for line in warned(name, of_file[name], found)]


def _unread_tools(tokenizer: PreTrainedTokenizerBase, *parts: Sequence[Demonstration | Prompt]) -> list[str]:
    """A warning where rows have tools on offer and the chat template does not write them."""
    count = sum(bool(row.tools) for part in parts for row in part)
    if not count or "tools" in str(tokenizer.chat_template):
        return []
    return [f"{count:,} rows have tools on offer, of which the chat template writes nothing; set model.chat_template"]


def _manifest(loaded: Loaded[Any], seed: int, **groups: list[Any]) -> dict[str, Any]:
    permutation = permute(range(len(loaded.rows)), seed)
    return {
        "sources": [vars(part) for part in loaded.opened],
        "rows": len(loaded.rows),
        "sha256": loaded.sha,
        "permutation": listed(permutation),
        **{name: listed([row_id(row) for row in rows]) for name, rows in groups.items()},
    }
