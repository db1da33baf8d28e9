"""Which prompts PPO gets: all that were read, those unlike the demonstrations', or also the demonstrations' own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from srppo.config import DataConfig
from srppo.data.order import Encoded, encoded, prompt_text
from srppo.data.overlap import measure_overlap, normalise
from srppo.data.rows import Unused, reasons
from srppo.data.types import Demonstration, Prompt
from srppo.errors import DataError

_ALIKE = "like a demonstration's prompt (data.overlap)"
_SHARED = "like a demonstration's prompt (data.overlap_share)"
EncodePrompts = Callable[[Sequence[Prompt]], Sequence[tuple[int, ...] | str]]


@dataclass(frozen=True)
class Chosen:
    """PPO's prompts: `drawn` from the prompt sources, then `own`, which are prompts of demonstrations.

    `unused` accounts for rows of the sources left out for being like a demonstration's prompt; `note` says what was
    repeated, empty where nothing was.
    """

    drawn: Encoded[Prompt, tuple[int, ...]]
    own: Encoded[Prompt, tuple[int, ...]]
    unused: dict[str, Unused]
    note: str = ""

    @property
    def rows(self) -> list[Prompt]:
        """The prompts in order."""
        return self.drawn.rows + self.own.rows

    @property
    def ids(self) -> list[tuple[int, ...]]:
        """Their token ids."""
        return self.drawn.ids + self.own.ids


def choose_prompts(
    config: DataConfig,
    usable: Sequence[Demonstration],
    used: Sequence[Demonstration],
    prompts: Sequence[Prompt],
    ordered: Sequence[Prompt],
    encode: EncodePrompts,
) -> Chosen:
    """The prompts for PPO out of `prompts`, which `ordered` holds in training order, and of the demonstrations `used`.

    With data.overlap = "minimum" or a data.overlap_share, prompts are held against every `usable` demonstration,
    trained on or not, so that they stay the same at every size.

    Raises:
        DataError: a data.overlap_share that cannot be met.
    """
    none: Encoded[Prompt, tuple[int, ...]] = Encoded([], [], [])
    if config.overlap_share is None or not prompts:
        kept, unused = (ordered, {}) if config.overlap == "any" else _unlike(usable, prompts, ordered, _ALIKE)
        return Chosen(encoded(kept, encode, config.prompts_size), none, unused)
    count = config.prompts_size or len(encoded(ordered, encode, None).rows)
    shared = round(config.overlap_share * count)
    kept, unused = _unlike(usable, prompts, ordered, _SHARED)
    drawn = encoded(kept, encode, count - shared)
    if len(drawn.rows) < count - shared:
        why = f" (not used: {reasons(unused)})" if unused else ""
        raise DataError(
            f"data.overlap_share = {config.overlap_share:g} asks for {count - shared:,} of {count:,} prompts unlike "
            f"the demonstrations', but only {len(drawn.rows):,} can be used{why}; raise it, lower data.prompts_size or "
            "add prompts"
        )
    own, note = _own(config, used, count, shared, encode) if shared else (none, "")
    return Chosen(drawn, own, unused, note)


def _own(
    config: DataConfig, used: Sequence[Demonstration], count: int, shared: int, encode: EncodePrompts
) -> tuple[Encoded[Prompt, tuple[int, ...]], str]:
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
            f"data.overlap_share = {config.overlap_share:g} asks for {shared:,} prompts of demonstrations, but none of "
            f"the {len(used):,} used has a prompt that fits ({found.refused[0][0] if found.refused else 'plain text'})"
        )
    times, more = divmod(shared, len(found.rows))
    each = f"{times:,} or {times + 1:,} times" if more else "once" if times == 1 else f"{times:,} times"
    note = (
        f"{shared:,} of {count:,} prompts are those of {len(found.rows):,} demonstrations, each {each} "
        f"(data.overlap_share = {config.overlap_share:g})"
    )
    turns = [turn % len(found.rows) for turn in reversed(range(shared))]
    return Encoded([found.rows[i] for i in turns], [found.ids[i] for i in turns], found.refused), note


def _unlike(
    demonstrations: Sequence[Demonstration], prompts: Sequence[Prompt], ordered: Sequence[Prompt], reason: str
) -> tuple[Sequence[Prompt], dict[str, Unused]]:
    """The prompts unlike every demonstration's, in order, and an account of the others."""
    found = measure_overlap([prompt_text(row) for row in demonstrations], [prompt_text(row) for row in prompts])
    if found.first is None:
        return ordered, {}
    kept = {id(prompts[position]) for position in found.kept}
    left_out = Unused(found.dropped, prompts[found.first[0]].source)
    return [row for row in ordered if id(row) in kept], {reason: left_out}
