"""lm-eval kept in hand: nothing printed, what tasks raise in one line, and several problems said at once."""

from __future__ import annotations

import gc
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import numpy as np

from srppo.environment import way_to
from srppo.errors import DataError, SrppoError, UserError
from srppo.instructions.checkers import drawing_by

_AWAY = ("offline", "couldn't reach", "couldn't connect", "connection", "max retries", "resolve")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within, the global random states that tasks draw from start at `seed`; then they are as before."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        with drawing_by(seed):
            yield
    finally:
        np.random.set_state(state)


@contextmanager
def quiet() -> Iterator[None]:
    """Within, lm-eval and datasets print nothing, and each template is compiled once (not once an item, 2 ms each).

    What is in memory already is left out of garbage collections, each of which would walk through torch and all else
    for 0.3 s. All is restored.
    """
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.utils

    logger, templates = logging.getLogger("lm_eval"), lm_eval.utils.env
    modules: list[Any] = [lm_eval.api.task, lm_eval.api.model]
    bars, level = [module.tqdm for module in modules], logger.level
    had_bars = not datasets.utils.are_progress_bars_disabled()
    templates.from_string = lru_cache(maxsize=None)(templates.from_string)
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    for module in modules:
        module.tqdm = lambda rows, **_: rows
    gc.freeze()
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        gc.unfreeze()
        del templates.from_string
        logger.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()
        for module, bar in zip(modules, bars, strict=True):
            module.tqdm = bar


# ---- several problems at once


class Problems:
    """A user's errors, each text once, in the order they were met."""

    def __init__(self) -> None:
        self.found: dict[str, UserError] = {}

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within, a UserError ends the block and is kept for later."""
        try:
            yield
        except UserError as error:
            self.found.setdefault(str(error), error)

    def raise_any(self) -> None:
        """Raise the one error as it was, or DataError with all of them in one line."""
        if len(self.found) == 1:
            raise next(iter(self.found.values()))
        if self.found:
            numbered = "; ".join(f"({number}) {text}" for number, text in enumerate(self.found, start=1))
            raise DataError(f"{len(self.found)} problems: {numbered}")


# ---- what a task raises


@contextmanager
def restating(name: str, config: Mapping[str, Any], doing: str = "loaded") -> Iterator[None]:
    """Within, what the task `name` raises becomes a DataError of one line; our own errors pass through."""
    try:
        yield
    except SrppoError:
        raise
    except Exception as error:  # templates, columns, functions and metrics of a task may raise anything
        raise DataError(restate(name, error, config, doing)) from error


def restate(name: str, error: BaseException, config: Mapping[str, Any], doing: str = "loaded") -> str:
    """One line for an error of the task `name`; config: what its YAML says, as far as known; doing: what failed."""
    text = " ".join(str(error).split())
    source = config.get("dataset_path")
    chain = [error]
    while len(chain) < 9 and (cause := chain[-1].__cause__ or chain[-1].__context__):
        chain.append(cause)
    if broken := next((e for e in chain if isinstance(e, ImportError) and e.name), None):
        return _needs(name, broken)
    if hinted := re.search(r"`?pip install ([\w\[\].-]+)", text):
        return f"task {name} needs the package {hinted[1]}: {way_to(hinted[1])}"
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
    return f"task {name} cannot be {doing}: {type(error).__name__}: {text[:240] or 'no reason given'}"


def _needs(name: str, error: ImportError) -> str:
    """What to do for a module that cannot be imported: its package is not here, or here in another version."""
    absent = str(error.name)
    top = absent.split(".")[0]
    if find_spec(top) is None:
        return f"task {name} needs the package {absent}: {way_to(absent)}"
    try:
        version = f" {metadata.version(top)}"
    except metadata.PackageNotFoundError:
        version = ""
    text = " ".join(str(error).split())[:160]
    return (
        f"task {name} does not go with the installed {top}{version} ({text}): leave the task out, or install the "
        f"version of {top} that it was written for"
    )


def _unknown_metrics(config: Mapping[str, Any]) -> list[str]:
    from lm_eval.api.registry import METRIC_REGISTRY

    named = [each.get("metric") for each in config.get("metric_list") or () if isinstance(each, Mapping)]
    return [] if config.get("process_results") else [str(m) for m in named if m not in METRIC_REGISTRY]
