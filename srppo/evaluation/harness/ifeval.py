"""What IFEval's checkers need beyond lm-eval, found before anything is generated; checking without part of it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from srppo.errors import DataError
from srppo.evaluation.harness.guards import way_to

NEEDS = {
    "language:response_language": "langdetect",
    "change_case:english_capital": "langdetect",
    "change_case:english_lowercase": "langdetect",
    "length_constraints:number_sentences": "punkt_tab",
    "change_case:capital_word_frequency": "punkt_tab",
}
"""Checkers that need a package or a table of nltk. The names are IFEval's own."""


def missing() -> list[str]:
    """Packages that the checkers need and that are not here, and nltk's table of sentence ends."""
    absent = [name for name in ("langdetect", "immutabledict", "nltk") if importlib.util.find_spec(name) is None]
    if "nltk" not in absent:
        import nltk

        try:
            nltk.data.find("tokenizers/punkt_tab")
        except LookupError:
            absent.append("punkt_tab")
    return absent


def check_packages(score_rest: bool) -> None:
    """Raises DataError for what is not here, unless the prompts that need it may be left out."""
    absent = missing()
    if "nltk" in absent or (absent and not score_rest):
        ways = "; ".join(dict.fromkeys(map(way_to, absent)))
        rest = "" if "nltk" in absent else "; or pass --score-rest to score the other prompts and list these"
        raise DataError(f"IFEval's checkers need {', '.join(absent)}, not found here: {ways}{rest}")


def reason_not_scored(doc: Mapping[str, Any], absent: list[str]) -> str | None:
    """Why one prompt cannot be checked here; None where it can."""
    needed = sorted({f"{NEEDS[name]} ({name})" for name in doc["instruction_id_list"] if NEEDS.get(name) in absent})
    return f"its checker needs {', '.join(needed)}" if needed else None


def is_ifeval(config: Mapping[str, Any]) -> bool:
    """Whether a task's results are made by lm-eval's IFEval checkers; config as lm-eval reads it from YAML."""
    check = config.get("process_results")
    module = str(getattr(check, "__module__", check)).replace("/", ".").removesuffix(".process_results")
    return module.endswith("lm_eval.tasks.ifeval.utils")


@contextmanager
def checkers_importable() -> Iterator[None]:
    """Within, IFEval's checkers import without the packages that only some of them use, and nothing is downloaded.

    A stand-in for langdetect raises where it is used: prompts that need it must be left out before. langdetect guesses
    from random draws; its seed is fixed here, so that two runs give one verdict.
    """
    import nltk

    added = {name: _stub(name) for name in ("langdetect", "immutabledict") if importlib.util.find_spec(name) is None}
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
