"""The account of the data: what was read, used and left out and why, what is odd about it, and what is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.cells import chop_cells

from srppo.data.chat import special_ids
from srppo.data.noise import Noise
from srppo.data.overlap import Overlap
from srppo.data.rows import Opened, Unused, reasons
from srppo.data.types import EncodedDemonstration

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VISIBLE = {" ": "·", "\n": "⏎\n", "\t": "→", "\r": "␍"}
ROW_KEY = (
    "T: trained. · a space, ⏎ the end of a line, → a tab; 「special tokens」 are not the text that they look like."
)
_HEAD, _TAIL = 6, 3  # lines shown of a longer stretch of text, at its beginning and its end


@dataclass(frozen=True)
class Part:
    """What became of the rows of one kind: read = used + held_out + spare + the unused."""

    what: str
    opened: tuple[Opened, ...]
    unused: dict[str, Unused]
    used: int
    held_out: int = 0
    cut: Unused | None = None

    @property
    def read(self) -> int:
        return sum(part.rows for part in self.opened)

    @property
    def spare(self) -> int:
        """Rows beyond the size that was asked for."""
        return self.read - self.used - self.held_out - sum(part.count for part in self.unused.values())

    def lines(self) -> list[str]:
        """Plain words for the console, none where nothing was asked for."""
        if not self.opened:
            return []
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
    noise: Noise
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def lines(self) -> list[str]:
        """Plain words for the console."""
        found = self.overlap
        first = f" (first {self.overlap_first})" if self.overlap_first else ""
        overlap = (
            f"overlap: of {found.n:,} prompts used {found.exact:,} equal a demonstration's prompt, "
            f"{found.half_ngram:,} more share over half of their 8-grams with one{first}"
        )
        said = [f"note: {note}" for note in self.notes] + [f"warning: {warning}" for warning in self.warnings]
        both = [overlap] if self.demonstrations.used and self.prompts.used else []
        return [*self.demonstrations.lines(), *self.noise.lines(), *self.prompts.lines(), *both, *said]

    def as_dict(self) -> dict[str, Any]:
        """The same for the manifest."""
        return {
            "demonstrations": self.demonstrations.as_dict(),
            "prompts": self.prompts.as_dict(),
            "overlap": self.overlap.as_dict(),
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }


# ---- what `srppo data` shows beside it


def length_lines(demonstrations: Sequence[EncodedDemonstration], prompts: Sequence[Sequence[int]]) -> list[str]:
    """A table of lengths in tokens: of demonstrations whole and trained, of PPO's prompts."""
    kinds = {
        "demonstrations": [len(row.ids) for row in demonstrations],
        "of which trained": [row.trained for row in demonstrations],
        "prompts": [len(ids) for ids in prompts],
    }
    lines = [f"{'tokens':<18}{'rows':>9}{'shortest':>10}{'median':>10}{'95%':>10}{'longest':>10}{'all':>13}"]
    for what, lengths in kinds.items():
        if ordered := sorted(lengths):
            at_95 = ordered[min(round(0.95 * len(ordered)), len(ordered) - 1)]
            figures = (ordered[0], round(median(ordered)), at_95, ordered[-1])
            cells = "".join(f"{figure:>10,}" for figure in figures)
            lines.append(f"{what:<18}{len(ordered):>9,}{cells}{sum(ordered):>13,}")
    return lines


def row_lines(
    row: EncodedDemonstration, source: str, tokenizer: PreTrainedTokenizerBase, width: int
) -> Iterator[tuple[str, bool]]:
    """(line, whether it is trained) of one demonstration, of at most `width` columns; ROW_KEY says how to read them."""
    yield from ((line, False) for line in chop_cells(f"{source}: {len(row.ids)} tokens, {row.trained} trained", width))
    cursor = 0
    for start, stop in row.spans:
        yield from ((f"   | {line}", False) for line in _shown(tokenizer, row.ids[cursor:start], width - 5))
        yield from ((f" T | {line}", True) for line in _shown(tokenizer, row.ids[start:stop], width - 5))
        cursor = stop


def _shown(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], width: int) -> list[str]:
    """Tokens as visible text in lines of at most `width` characters, the middle of a long one left out."""
    special = special_ids(tokenizer)
    text, plain = "", list[int]()
    for token in (*ids, None):
        if token is not None and token not in special:
            plain.append(token)
            continue
        said = str(tokenizer.decode(plain)) if plain else ""
        text += "".join(_VISIBLE.get(character, character) for character in said)
        text += "" if token is None else f"「{tokenizer.convert_ids_to_tokens(token)}」"
        plain = []
    lines = [part for line in text.removesuffix("\n").split("\n") for part in chop_cells(line, width)]
    dropped = len(lines) - _HEAD - _TAIL
    return lines if dropped < 2 else [*lines[:_HEAD], f"... {dropped:,} lines more ...", *lines[-_TAIL:]]
