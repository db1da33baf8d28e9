"""Which tasks of lm-eval are checked by IFEval's code, and which of their prompts cannot be checked here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from srppo.errors import DataError
from srppo.instructions import checkers
from srppo.instructions.checkers import lacking


def is_ifeval(config: Mapping[str, Any]) -> bool:
    """Whether a task's results are made by lm-eval's IFEval checkers; config as lm-eval reads it from YAML."""
    check = config.get("process_results")
    module = str(getattr(check, "__module__", check)).replace("/", ".").removesuffix(".process_results")
    return module.endswith("lm_eval.tasks.ifeval.utils")


def check_packages(score_rest: bool) -> None:
    """Raises DataError for what is not here, unless the prompts that need it may be left out."""
    absent = checkers.missing()
    if "nltk" in absent or (absent and not score_rest):
        rest = "" if "nltk" in absent else "; or pass --score-rest to score the other prompts and list these"
        raise DataError(f"{checkers.need(absent)}{rest}")


def reason_not_scored(doc: Mapping[str, Any], absent: list[str]) -> str | None:
    """Why one prompt cannot be checked here; None where it can."""
    needed = lacking(doc["instruction_id_list"], absent)
    return f"its checker needs {', '.join(needed)}" if needed else None
