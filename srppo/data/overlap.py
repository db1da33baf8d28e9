"""How far PPO prompts repeat SFT prompts, by the rule of `data.overlap = "minimum"`.

A PPO prompt overlaps when, after normalising, it equals an SFT prompt, or when more than half of its distinct 8-grams
of words stand in ONE SFT prompt (not in all of them together). A prompt of fewer than 8 words has no 8-gram: only the
first rule applies to it, so `reverse sun cat` and `reverse cat sun` do not overlap.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GRAM = 8
_MULTIPLIERS = np.random.default_rng(8).integers(2**63, size=GRAM, dtype=np.uint64) | np.uint64(1)


@dataclass(frozen=True)
class Overlap:
    """What was found among `n` PPO prompts; `half_ngram` counts those that are not `exact` already.

    `kept` are the positions of the prompts that do not overlap; `first` is the first overlapping prompt's position and
    that of the SFT prompt it repeats.
    """

    n: int
    exact: int
    half_ngram: int
    kept: tuple[int, ...]
    first: tuple[int, int] | None

    @property
    def dropped(self) -> int:
        """How many overlap by either rule."""
        return self.exact + self.half_ngram

    @property
    def share(self) -> float:
        """Share of the prompts that overlap, by either rule."""
        return self.dropped / self.n if self.n else 0.0

    def as_dict(self) -> dict[str, float]:
        return {"n": self.n, "exact": self.exact, "half_ngram": self.half_ngram, "share": self.share}


def normalise(text: str) -> str:
    """Case folded, compatibility forms united, apostrophes dropped, other punctuation and space as single spaces.

    Symbols such as `+` and `=` are kept, they carry meaning in questions; so is all of a text without a word in it.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.translate(_SPACED).split()) or " ".join(folded.split())


class _Spaced(dict[int, str]):
    """Translation table that learns each character's class on first sight."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if character in "'’‘`":
            self[code] = ""
        else:
            self[code] = " " if unicodedata.category(character)[0] in "PZC" else character
        return self[code]


_SPACED = _Spaced()


def measure_overlap(sft_prompts: Sequence[str], ppo_prompts: Sequence[str]) -> Overlap:
    """Which PPO prompts overlap with SFT prompts, by the two rules above."""
    sft = [normalise(prompt) for prompt in sft_prompts]
    ppo = [normalise(prompt) for prompt in ppo_prompts]
    where = {text: position for position, text in reversed(list(enumerate(sft)))}
    vocabulary: dict[str, int] = {}
    similar = _GramIndex([_grams(text, vocabulary) for text in sft])
    kept, exact, half, first = [], 0, 0, None
    for position, text in enumerate(ppo):
        match = where.get(text)
        if match is not None:
            exact += 1
        else:
            match = similar.holder_of_half(_grams(text, vocabulary))
            half += match is not None
        if match is None:
            kept.append(position)
        elif first is None:
            first = (position, match)
    return Overlap(len(ppo), exact, half, tuple(kept), first)


def _grams(normalised: str, vocabulary: dict[str, int]) -> NDArray[np.uint64]:
    """Distinct 64-bit hashes of the 8-grams of words, sorted; empty for fewer than 8 words."""
    words = normalised.split()
    if len(words) < GRAM:
        return np.empty(0, np.uint64)
    ids = np.array([vocabulary.setdefault(word, len(vocabulary) + 1) for word in words], np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(ids, GRAM)
    return np.unique((windows * _MULTIPLIERS).sum(axis=1, dtype=np.uint64))


class _GramIndex:
    """Inverted index of 8-grams: hashes in order, beside each an SFT prompt that holds it, ascending for each gram."""

    def __init__(self, grams: list[NDArray[np.uint64]]) -> None:
        owners = np.repeat(np.arange(len(grams), dtype=np.int32), [len(of_one) for of_one in grams])
        hashes = np.concatenate([np.empty(0, np.uint64), *grams])
        order = np.argsort(hashes, kind="stable")
        self.grams, self.hashes, self.owners = grams, hashes[order], owners[order]

    def holder_of_half(self, grams: NDArray[np.uint64]) -> int | None:
        """An SFT prompt that holds more than half of `grams`, or None."""
        needed = len(grams) // 2 + 1
        start = np.searchsorted(self.hashes, grams, "left")
        found = np.searchsorted(self.hashes, grams, "right") - start
        rarest = np.argsort(found, kind="stable")[np.count_nonzero(found == 0) :]
        if len(rarest) < needed:  # the common case: too few of its grams occur anywhere
            return None
        # A text that many SFT prompts share has one first owner in all its grams: found without reading long lists.
        first, counts = np.unique(self.owners[start[rarest]], return_counts=True)
        if counts.max() >= needed:
            return int(first[counts.argmax()])
        # A holder of `needed` of these grams misses at most the others, so it holds one of the `others + 1` rarest.
        lists = [self.owners[start[i] : start[i] + found[i]] for i in rarest[: len(rarest) - needed + 1]]
        candidates, counts = np.unique(np.concatenate(lists), return_counts=True)
        for candidate in candidates[np.argsort(-counts, kind="stable")]:
            if len(np.intersect1d(grams, self.grams[candidate], assume_unique=True)) >= needed:
                return int(candidate)
        return None
