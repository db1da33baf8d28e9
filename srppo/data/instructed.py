"""From questions with answers to demonstrations, prompts and test items of instructions that a program can check.

    DIR/demonstrations.jsonl    prompt, completion, task                        kinds that are demonstrated
    DIR/prompts.jsonl           prompt, task                                    these, and kinds that are only prompted
    DIR/items.jsonl             prompt, instruction_id_list, kwargs, task, group, split: development items of
                                demonstrated kinds; test items of these, of prompted ones, and of unseen ones
    DIR/manifest.json           checksums of the sources and of the files, counts, what was left out and why, overlap

A question serves once. Its answer is changed so that it obeys the instruction, and IFEval's own checker must say so,
for test items too, whose answers are then thrown away: all of them can be obeyed, in LONGEST characters.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any, NamedTuple

from srppo.data.overlap import Overlap, measure_overlap, normalise
from srppo.data.sources import tables
from srppo.errors import DataError
from srppo.instructions.checkers import instructed_item, missing, need
from srppo.instructions.kinds import GROUPS, KINDS, Kind, of_group
from srppo.record.files import MANIFEST, checksum, storing, write_atomic

TEST = {"demonstrated": 30, "prompted": 30, "unseen": 112}  # items a kind: 1,008 of the nine unseen ones
DEV = 20  # development items a demonstrated kind
SHORTEST, LONGEST = 30, 500  # characters of an answer, and of one that was changed: some 120 tokens
OTHERS = 4
OFTEN = 0.2  # share of a kind's items that answers to other questions obey, from which on the kind is named
FILES = ("demonstrations.jsonl", "prompts.jsonl", "items.jsonl")
UNFIT, FAILED, LONG = "the answer does not lend itself", "fail their checker", "grow too long"

_CODE = re.compile(r"```|[{}<>=|\\\\]|^\s*(def|import|class|SELECT|function|#include|//)\b|;\s*$", re.MULTILINE)


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
    pair: Pair

    def demonstration(self) -> dict[str, Any]:
        """As SFT reads it."""
        return {"prompt": self.prompt, "completion": self.completion, "task": self.kind.name}

    def asked(self) -> dict[str, Any]:
        """As PPO reads it: a prompt without an answer."""
        return {"prompt": self.prompt, "task": self.kind.name}

    def item(self, split: str) -> dict[str, Any]:
        """As `eval.items` reads it."""
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
    if not pair.question or pair.question.endswith(":"):
        return "no whole question"
    if not (pair.question + pair.answer).isascii():
        return "not plain ASCII"
    if re.match(r"\W*no (in|out)put", pair.answer, flags=re.IGNORECASE):
        return "no answer"
    if "```" in pair.question or _CODE.search(pair.answer):
        return "code or markup"
    if len(pair.answer) < SHORTEST:
        return f"answer below {SHORTEST} characters"
    return f"answer above {LONGEST} characters" if len(pair.answer) > LONGEST else None


def build(sources: Sequence[str], *, demonstrations: int, prompts: int | None, seed: int) -> Built:
    """Test items first, then development items, then demonstrations, then prompts (None: of all that is left).

    Each takes the kinds in turn, so the kinds of one role have like shares, and another number of demonstrations asks
    the same test. Raises DataError where the sources hold too little, or the checkers' packages are not here.
    """
    if absent := missing():
        raise DataError(need(absent))
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
    if pool:
        built.left_out["not needed, or fit for no kind in need"] = len(pool)
    return built


def _take(
    pool: list[Pair], kinds: Sequence[Kind], count: int | None, seed: int, what: str, refused: Counter[str]
) -> list[Made]:
    """So many of the pool, which loses them, a kind after the other. What no kind in need can use is offered again
    until nothing more is taken; with None all kinds have the same share, to one row, of as much as they can all use."""
    made: list[Made] = []
    had = Counter[str]()
    before = -1
    while before < len(made) != count:
        before, rest = len(made), list[Pair]()
        for pair in pool:
            found = None
            if len(made) != count:
                fewest = min(had[kind.name] for kind in kinds)  # of these first: shares stay equal to one row
                found = _made(pair, [kind for kind in kinds if had[kind.name] == fewest], seed, refused)
            if found is None:
                rest.append(pair)
            else:
                had[found.kind.name] += 1
                made.append(found)
        pool[:] = rest
    if count is not None and len(made) < count:
        ask = ", or ask for fewer" if what in ("demonstrations", "prompts") else ""
        raise DataError(f"the sources give {len(made)} {what} of {count} wanted; give more files{ask}")
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
        prompt = f"{_closed(pair.question)}{kind.word(settings, rng)}"
        item = instructed_item(prompt, [kind.name], [settings], kind.name, kind.group)
        if len(completion) > LONGEST:
            refused[f"{kind.name}: {LONG}"] += 1
        elif not item.is_right(completion):
            refused[f"{kind.name}: {FAILED}"] += 1
        else:
            return Made(kind, prompt, settings, completion, pair)
    return None


def _closed(question: str) -> str:
    """With a mark at its end, and a space, or an empty line where it has a colon or lines of its own."""
    ended = question if re.search(r"[.?!][\"']?$", question) else f"{question}."
    return f"{ended}\n\n" if re.search(r"[:\n]", question) else f"{ended} "


def chance(built: Built, seed: int = 0) -> dict[str, dict[str, float]]:
    """Shares of the test items of each kind that are right by no merit: `unchanged`, of an item's own answer as it
    came; `of others`, of the answers to OTHERS other items, drawn by the seed."""
    rng, found = Random(f"chance:{seed}"), dict[str, list[tuple[float, float]]]()
    for place, made in enumerate(built.test):
        item = instructed_item(made.prompt, [made.kind.name], [made.settings], made.kind.name, made.kind.group)
        others = [built.test[place - rng.randrange(1, len(built.test))] for _ in range(OTHERS)]
        told = (item.is_right(made.pair.answer), mean(item.is_right(other.pair.answer) for other in others))
        found.setdefault(made.kind.name, []).append(told)
    return {
        name: {what: round(mean(share[i] for share in told), 3) for i, what in enumerate(("unchanged", "of others"))}
        for name, told in found.items()
    }


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
    there are, found: those that stand in one of the other prompts, whatever the settings."""

    prompts: Mapping[str, Overlap]
    wordings: int
    found: tuple[str, ...]


def overlap_with(built: Built, asked: Sequence[str]) -> Beside:
    """Ours beside others' prompts (IFEval's)."""
    ours = {name: [str(row["prompt"]) for row in rows] for name, rows in built.rows().items()}
    texts = [normalise(text) for text in asked]
    wordings = [wording for kind in KINDS for wording in kind.wordings]
    found = [wording for wording in wordings if any(_pattern(wording).search(text) for text in texts)]
    return Beside(
        {name: measure_overlap(asked, prompts) for name, prompts in ours.items()}, len(wordings), tuple(found)
    )


def _pattern(wording: str) -> re.Pattern[str]:
    """Of a wording in a normalised text, with any few words for each setting."""
    parts = [re.escape(normalise(part)) for part in re.split(r"\{\w+\}", wording)]
    return re.compile(r"\b" + r"( \S+){1,6} ".join(part for part in parts if part) + r"\b")


def account(built: Built, rates: Mapping[str, Mapping[str, float]], beside: Beside | None) -> list[str]:
    """What was made and what was left out, a line each. rates: of `chance`."""
    lines = []
    for name, rows in built.rows().items():
        kinds = Counter(row["task"] for row in rows)
        split = Counter(f"{row['split']} {row['group']}" for row in rows if "split" in row)
        parts = f" ({', '.join(f'{count:,} {what}' for what, count in split.items())})" if split else ""
        lines.append(f"{name}: {len(rows):,} rows{parts} of {len(kinds)} kinds")
    left = ", ".join(f"{count:,} {reason}" for reason, count in built.left_out.most_common())
    lines.append(f"questions left out: {left or 'none'}")
    often = {name: each["of others"] for name, each in rates.items() if each["of others"] > OFTEN}
    high = ", ".join(f"{name} {rate:.2f}" for name, rate in sorted(often.items(), key=lambda each: -each[1]))
    lines.append(f"test items that other questions' answers obey, above {OFTEN:g} of a kind: {high or 'none'}")
    failed = {why: count for why, count in built.refused.items() if why.endswith(FAILED)}
    said = "; ".join(f"{why.removesuffix(FAILED).rstrip(': ')} {count}" for why, count in sorted(failed.items()))
    lines.append(f"changed answers that {FAILED}: {said or 'none'}")
    if beside is not None:
        repeats = ", ".join(f"{each.dropped} of {each.n:,} in {name}" for name, each in beside.prompts.items())
        lines.append(f"prompts that repeat the others' (the same, or more than half of the 8-grams of one): {repeats}")
        said = "; ".join(beside.found)
        lines.append(
            f"wordings that stand in the others' prompts: {len(beside.found)} of {beside.wordings}"
            + (f" ({said})" if said else "")
        )
    return lines


def write(
    built: Built, folder: Path, sources: Sequence[str], seed: int, rates: Mapping[str, Any], beside: Beside | None
) -> None:
    """The files and their manifest. Raises DataError for a folder that holds other rows already, StorageError."""
    texts = {name: "".join(f"{json.dumps(row)}\n" for row in rows) for name, rows in built.rows().items()}
    check_folder(folder)
    for name, text in texts.items():
        if (folder / name).exists() and (folder / name).read_bytes() != text.encode():
            raise DataError(f"{folder / name} exists with other rows; give another folder with --out")
    manifest = {
        "seed": seed,
        "sources": {source: _sha256(source) for source in sources},
        "kinds": {group: [kind.name for kind in of_group(group)] for group in GROUPS},
        "rows": {name: dict(Counter(row["task"] for row in rows)) for name, rows in built.rows().items()},
        "left_out": dict(built.left_out),
        "refused": dict(sorted(built.refused.items())),
        "right_by_no_merit": dict(rates),
        "sha256": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()},
    }
    if beside is not None:
        prompts = {name: each.as_dict() for name, each in beside.prompts.items()}
        manifest["beside"] = {"prompts": prompts, "wordings": beside.wordings, "found": beside.found}
    texts[MANIFEST] = json.dumps(manifest, indent=1) + "\n"
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_atomic(folder / name, text)


def check_folder(folder: Path) -> None:
    """Raises DataError where it is a file, or holds a folder in place of one of ours."""
    blocked = [place for place in (folder, *folder.parents) if place.exists() and not place.is_dir()]
    blocked += [folder / name for name in (*FILES, MANIFEST) if (folder / name).is_dir()]
    if blocked:
        raise DataError(f"{blocked[0]} is in the way of the rows; give another folder with --out")


def _sha256(source: str) -> dict[str, str] | str:
    """Of a file, or of each of a folder; a hub set is known by its name alone."""
    path = Path(source).expanduser()
    if path.is_dir():
        return {each.name: checksum(each) for each in sorted(path.iterdir()) if each.is_file()}
    return checksum(path) if path.is_file() else "of the hub"
