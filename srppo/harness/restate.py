"""What lm-eval and datasets raise while a task is loaded, in one line: what is wrong, and what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

EXTRAS = {"math_verify": "math", "sympy": "math", "antlr4": "math", "langdetect": "ifeval", "immutabledict": "ifeval"}
"""Packages that come with an extra of ours."""

_AWAY = ("offline", "couldn't reach", "couldn't connect", "connection", "max retries", "resolve")


def restate(name: str, error: BaseException, config: Mapping[str, Any]) -> str:
    """One line for an error of loading the task `name`; config: what its YAML says, as far as known."""
    text = " ".join(str(error).split())
    source = config.get("dataset_path")
    chain = [error, *_causes(error)]
    absent = next((e.name for e in chain if isinstance(e, ModuleNotFoundError) and e.name), None)
    absent = absent or next(iter(re.findall(r"`?pip install ([\w\[\].-]+)", text)), None)
    if absent:
        known = EXTRAS.get(absent.split(".")[0])
        return f"task {name} needs the package {absent}: pip install {f'srppo[{known}]' if known else absent}"
    if any(isinstance(e, ConnectionError) for e in chain) or (source and any(word in text.lower() for word in _AWAY)):
        local = "pass --data with a local file" if name in ("ifeval", "gsm8k") else "run once with the hub in reach"
        return f"task {name} needs the hub's data set {source}, which is not in the cache, and the hub is away: {local}"
    if type(error).__name__ in ("DatasetNotFoundError", "GatedRepoError"):
        return f"task {name}: the hub has no open data set {source}; if it is gated, accept its terms and log in"
    if isinstance(error, FileNotFoundError):
        return f"task {name}: a file it names does not exist ({text[:160]}); paths count from the working directory"
    if isinstance(error, KeyError):
        if unknown := _unknown_metrics(config):
            return f"task {name}: lm-eval has no metric {', '.join(unknown)}, and it could not be had from the hub"
        splits = [config[key] for key in ("test_split", "validation_split", "training_split") if config.get(key)]
        return (
            f"task {name}: {text} is in none of its data or settings; its YAML asks for the splits "
            f"{', '.join(map(str, splits)) or 'of no name'}: name splits and columns that the data have"
        )
    if type(error).__name__ == "UndefinedError":
        return f"task {name}: a template names a column that its data do not have ({text[:160]})"
    if "yaml" in type(error).__module__ or (isinstance(error, TypeError) and "unexpected keyword" in text):
        return f"task {name}: its YAML cannot be used: {text[:200]}"
    if isinstance(error, ValueError) and "valid or test docs" in text:
        return f"task {name}: its YAML names neither test_split nor validation_split; name one that the data have"
    return f"task {name} cannot be loaded: {type(error).__name__}: {text[:240] or 'no reason given'}"


def _unknown_metrics(config: Mapping[str, Any]) -> list[str]:
    from lm_eval.api.registry import METRIC_REGISTRY

    named = [each.get("metric") for each in config.get("metric_list") or () if isinstance(each, Mapping)]
    return [] if config.get("process_results") else [str(m) for m in named if m not in METRIC_REGISTRY]


def _causes(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    cause = error.__cause__ or error.__context__
    while cause is not None and len(found) < 8:
        found.append(cause)
        cause = cause.__cause__ or cause.__context__
    return found
