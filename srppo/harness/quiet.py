"""lm-eval's own bars, notes and warnings, kept out of our output; what a user must know is said by our own checks."""

from __future__ import annotations

import io
import logging
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import lru_cache
from typing import Any

import numpy as np


@contextmanager
def quiet(seed: int = 0) -> Iterator[None]:
    """Within, lm-eval prints nothing, compiles each template once (not once an item, 2 ms each), and the global random
    states that tasks draw from are seeded. All is restored.
    """
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.utils

    logger = logging.getLogger("lm_eval")
    modules: list[Any] = [lm_eval.api.task, lm_eval.api.model]
    bars, level, states = [m.tqdm for m in modules], logger.level, (random.getstate(), np.random.get_state())
    had_bars = not datasets.utils.are_progress_bars_disabled()
    templates = lm_eval.utils.env
    compiled = vars(templates).get("from_string")
    templates.from_string = compiled or lru_cache(maxsize=None)(templates.from_string)
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    for module in modules:
        module.tqdm = lambda rows, **_: rows
    random.seed(seed)
    np.random.seed(seed)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        if compiled is None:
            del templates.from_string
        logger.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()
        for module, bar in zip(modules, bars, strict=True):
            module.tqdm = bar
        random.setstate(states[0])
        np.random.set_state(states[1])
