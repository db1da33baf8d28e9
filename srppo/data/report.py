"""The account of the data: what was read, used and left out and why, what was noised, how far prompts repeat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from srppo.data.formats import Opened, Unused, reasons
from srppo.data.noise import Noise
from srppo.data.overlap import Overlap


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
    noise: Noise
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
        return [*self.demonstrations.lines(), *self.noise.lines(), *self.prompts.lines(), overlap, *notes]

    def as_dict(self) -> dict[str, Any]:
        """The same for the manifest."""
        return {
            "demonstrations": self.demonstrations.as_dict(),
            "prompts": self.prompts.as_dict(),
            "overlap": self.overlap.as_dict(),
            "notes": list(self.notes),
        }
