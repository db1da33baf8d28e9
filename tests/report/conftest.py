"""A whole run of three training seeds, made on disk without any training."""

from __future__ import annotations

import pytest
from records import new_run, train

from srppo.record.store import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    found = new_run(tmp_path_factory.mktemp("whole") / "run", [0, 1, 2])
    for seed in (0, 1, 2):
        train(found, seed)
    return found
