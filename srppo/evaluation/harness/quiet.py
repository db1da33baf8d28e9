"""lm-eval's own bars, notes and warnings, kept out of our output; what a user must know is said by our own checks."""

from __future__ import annotations

import gc
import io
import logging
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import lru_cache
from typing import Any

import numpy as np


@contextmanager
def quiet(seed: int = 0) -> Iterator[None]:
    """Within, lm-eval prints nothing, compiles each template once (not once an item, 2 ms each), and the global random
    states that tasks draw from are seeded. What is in memory already is left out of garbage collections, each of
    which would walk through torch and all else for 0.3 s. All is restored. Within another `quiet` it only seeds.
    """
    import lm_eval.utils

    states = random.getstate(), np.random.get_state()
    nested = "from_string" in vars(lm_eval.utils.env)
    random.seed(seed)
    np.random.seed(seed)
    try:
        with nullcontext() if nested else _silenced():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def _silenced() -> Iterator[None]:
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.utils

    logger, templates = logging.getLogger("lm_eval"), lm_eval.utils.env
    modules: list[Any] = [lm_eval.api.task, lm_eval.api.model]
    bars, level = [m.tqdm for m in modules], logger.level
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
