"""From questions with answers to demonstrations, prompts and test items of instructions that a program can check.

    DIR/demonstrations.jsonl    prompt, completion, task                        kinds that are demonstrated
    DIR/prompts.jsonl           prompt, task                                    these, and kinds that are only prompted
    DIR/items.jsonl             prompt, instruction_id_list, kwargs, task, group, split: development items of
                                demonstrated kinds; test items of these, of prompted ones, and of unseen ones
    DIR/manifest.json           checksums of the sources and of the files, counts, what was left out and why, overlap

A question serves once. Its answer is changed so that it obeys the instruction, and IFEval's own checker must say so,
for test items too, whose answers are then thrown away: all of them can be obeyed.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from srppo.data.overlap import Overlap, measure_overlap, normalise
from srppo.data.sources import tables
from srppo.errors import DataError
from srppo.instructions.checkers import check_packages, instructed_item
from srppo.instructions.kinds import GROUPS, KINDS, Kind, of_group
from srppo.record.files import checksum, create_exclusive, storing, write_atomic

TEST = {"demonstrated": 30, "prompted": 30, "unseen": 112}  # items a kind: 1,008 of the nine unseen ones
DEV = 20  # development items a demonstrated kind
SHORTEST, LONGEST = 30, 600  # characters of an answer
FILES = ("demonstrations.jsonl", "prompts.jsonl", "items.jsonl")
UNFIT, FAILED = "the answer does not lend itself", "fail their checker"


class Pair(NamedTuple):
    """A question and its answer, and where they stand."""

    question: str
    answer: str
    place: str


class Made(NamedTuple):
    """A question with an instruction, the settings of its checker, and the answer that obeys."""

    kind: Kind
    prompt: str
    settings: Mapping[str, Any]
    completion: str

    def demonstration(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "completion": self.completion, "task": self.kind.name}

    def asked(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "task": self.kind.name}

    def item(self, split: str) -> dict[str, Any]:
        checked = {"instruction_id_list": [self.kind.name], "kwargs": [dict(self.settings)]}
        return {"prompt": self.prompt, **checked, "task": self.kind.name, "group": self.kind.group, "split": split}


@dataclass
class Built:
    """What was made of some sources. left_out: answers that no instruction was put to, by reason; refused: tries whose
    answer could not be changed, or was changed and did not obey, by kind."""

    demonstrations: list[Made] = field(default_factory=list)
    prompts: list[Made] = field(default_factory=list)
    dev: list[Made] = field(default_factory=list)
    test: list[Made] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """What each file holds."""
        items = [made.item(split) for split, each in (("dev", self.dev), ("test", self.test)) for made in each]
        shown, asked = [made.demonstration() for made in self.demonstrations], [made.asked() for made in self.prompts]
        return dict(zip(FILES, (shown, asked, items), strict=True))


def read_pairs(sources: Sequence[str]) -> tuple[list[Pair], Counter[str]]:
    """Questions with answers of files with Alpaca's columns (instruction, input, output); what is left out, by reason.

    Raises DataError for a source without such columns.
    """
    found: dict[str, Pair] = {}
    left_out: Counter[str] = Counter()
    for source in sources:
        for table in tables(source, "demonstrations", seed=0):
            for place, row in table.rows:
                columns = row if isinstance(row, Mapping) else {}
                question, answer = (columns.get(name) for name in ("instruction", "output"))
                if not (isinstance(question, str) and isinstance(answer, str)):
                    raise DataError(
                        f"{place} has no instruction and output that are text (its columns: "
                        f"{', '.join(map(str, columns)) or 'none'}); give rows with Alpaca's columns"
                    )
                pair = Pair(question.strip(), answer.strip(), place)
                why = _unfit(pair, columns.get("input"))
                if not why and normalise(pair.question) in found:
                    why = "asked before"
                if why:
                    left_out[why] += 1
                else:
                    found[normalise(pair.question)] = pair
    return list(found.values()), left_out


def _unfit(pair: Pair, given: object) -> str | None:
    """Why a question with its answer is not used; None where it is."""
    if given and str(given).strip():
        return "with an input beside the question"
    if not (pair.question + pair.answer).isascii():
        return "not plain ASCII"
    if re.match(r"\W*no (in|out)put", pair.answer, flags=re.IGNORECASE):
        return "no answer"
    if "```" in pair.question + pair.answer or "<" in pair.answer:
        return "code or markup"
    if len(pair.answer) < SHORTEST:
        return f"answer below {SHORTEST} characters"
    return f"answer above {LONGEST} characters" if len(pair.answer) > LONGEST else None


def build(sources: Sequence[str], *, demonstrations: int, prompts: int | None, seed: int) -> Built:
    """Test items first, then development items, then demonstrations, then prompts (None: of all that is left).

    Each takes the kinds in turn, so the kinds of one role have like shares, and another number of demonstrations asks
    the same test. Raises DataError where the sources hold too little, or the checkers' packages are not here.
    """
    check_packages(score_rest=False)
    pairs, left_out = read_pairs(sources)
    Random(f"instructions:{seed}").shuffle(pairs)
    built, pool = Built(left_out=left_out), list(pairs)
    for group, each in TEST.items():
        kinds = of_group(group)
        built.test += _take(pool, kinds, each * len(kinds), seed, f"test items of {group} kinds", built.refused)
    shown = of_group("demonstrated")
    built.dev = _take(pool, shown, DEV * len(shown), seed, "development items", built.refused)
    built.demonstrations = _take(pool, shown, demonstrations, seed, "demonstrations", built.refused)
    asked = of_group("demonstrated", "prompted")
    built.prompts = _take(pool, asked, prompts, seed, "prompts", built.refused)
    return built


def _take(
    pool: list[Pair], kinds: Sequence[Kind], count: int | None, seed: int, what: str, refused: Counter[str]
) -> list[Made]:
    """So many of the pool, which loses them, a kind after the other; what no kind in need can use stays for others."""
    made: list[Made] = []
    had = Counter[str]()
    rest: list[Pair] = []
    for pair in pool:
        if len(made) == count:
            rest.append(pair)
            continue
        fewest = min(had[kind.name] for kind in kinds)  # of these first: shares stay equal to one row
        found = _made(pair, [kind for kind in kinds if had[kind.name] == fewest], seed, refused)
        if found is None:
            rest.append(pair)
        else:
            had[found.kind.name] += 1
            made.append(found)
    if count is not None and len(made) < count:
        raise DataError(
            f"the sources give {len(made)} {what} of {count} wanted; give more files, or ask for fewer demonstrations "
            "and prompts"
        )
    pool[:] = rest
    return made


def _made(pair: Pair, kinds: Sequence[Kind], seed: int, refused: Counter[str]) -> Made | None:
    """What one of some kinds makes of a pair, tried in an order of the pair's own; None where none can."""
    rng = Random(f"{seed}:{pair.question}")
    for kind in rng.sample(kinds, len(kinds)):
        changed = kind.change(pair.question, pair.answer, rng)
        if changed is None:
            refused[f"{kind.name}: {UNFIT}"] += 1
            continue
        settings, completion = changed
        asked = pair.question if re.search(r"[.?!:\"']$", pair.question) else f"{pair.question}."
        prompt = f"{asked} {kind.word(settings, rng)}"
        if instructed_item(prompt, [kind.name], [settings], kind.name, kind.group).is_right(completion):
            return Made(kind, prompt, settings, completion)
        refused[f"{kind.name}: {FAILED}"] += 1
    return None


# ---- beside IFEval, in words, and on disk


def prompts_of(source: Path) -> list[str]:
    """The column `prompt` of some rows, IFEval's. Raises DataError where a row has none."""
    found = [(place, row) for table in tables(str(source), "prompts", seed=0) for place, row in table.rows]
    texts = [row.get("prompt") if isinstance(row, Mapping) else None for _, row in found]
    for (place, _), text in zip(found, texts, strict=True):
        if not isinstance(text, str):
            raise DataError(f"{place} has no prompt that is text; give IFEval's rows, input_data.jsonl")
    return [text for text in texts if isinstance(text, str)]


@dataclass(frozen=True)
class Beside:
    """How far rows of ours repeat other prompts. prompts: by file, by the rule of data.overlap; wordings: how many
    there are without settings, found: those that stand in one of the other prompts."""

    prompts: Mapping[str, Overlap]
    wordings: int
    found: tuple[str, ...]


def overlap_with(built: Built, asked: Sequence[str]) -> Beside:
    """Ours beside others' prompts (IFEval's)."""
    ours = {name: [str(row["prompt"]) for row in rows] for name, rows in built.rows().items()}
    texts = [normalise(text) for text in asked]
    wordings = [normalise(wording) for kind in KINDS for wording in kind.wordings if "{" not in wording]
    return Beside(
        {name: measure_overlap(asked, prompts) for name, prompts in ours.items()},
        len(wordings),
        tuple(wording for wording in wordings if any(wording in text for text in texts)),
    )


def account(built: Built, beside: Beside | None) -> list[str]:
    """What was made and what was left out, a line each."""
    lines = []
    for name, rows in built.rows().items():
        kinds = Counter(row["task"] for row in rows)
        split = Counter(f"{row['split']} {row['group']}" for row in rows if "split" in row)
        parts = f" ({', '.join(f'{count:,} {what}' for what, count in split.items())})" if split else ""
        lines.append(f"{name}: {len(rows):,} rows{parts} of {len(kinds)} kinds")
    left = ", ".join(f"{count:,} {reason}" for reason, count in built.left_out.most_common())
    lines.append(f"questions left out: {left or 'none'}")
    failed = {why: count for why, count in built.refused.items() if why.endswith(FAILED)}
    said = "; ".join(f"{why.removesuffix(FAILED).rstrip(': ')} {count}" for why, count in sorted(failed.items()))
    lines.append(f"changed answers that {FAILED}: {said or 'none'}")
    if beside is not None:
        repeats = ", ".join(f"{each.dropped} of {each.n:,} in {name}" for name, each in beside.prompts.items())
        lines.append(f"prompts that repeat the others' (the same, or more than half of the 8-grams of one): {repeats}")
        lines.append(f"wordings that stand in the others' prompts: {len(beside.found)} of {beside.wordings}")
    return lines


def write(built: Built, folder: Path, sources: Sequence[str], seed: int, beside: Beside | None) -> None:
    """The files and their manifest. Raises DataError for a folder that holds other rows already, StorageError."""
    texts = {name: "".join(f"{json.dumps(row)}\n" for row in rows) for name, rows in built.rows().items()}
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            path = folder / name
            if not create_exclusive(path, text) and path.read_text(encoding="utf-8") != text:
                raise DataError(f"{path} exists with other rows; give another folder with --out")
    manifest = {
        "seed": seed,
        "sources": {source: checksum(Path(source)) for source in sources if Path(source).is_file()},
        "kinds": {group: [kind.name for kind in of_group(group)] for group in GROUPS},
        "rows": {name: dict(Counter(row["task"] for row in rows)) for name, rows in built.rows().items()},
        "left_out": dict(built.left_out),
        "refused": dict(sorted(built.refused.items())),
        "sha256": {name: checksum(folder / name) for name in texts},
    }
    if beside is not None:
        prompts = {name: each.as_dict() for name, each in beside.prompts.items()}
        manifest["beside"] = {"prompts": prompts, "wordings": beside.wordings, "found": beside.found}
    write_atomic(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")
