"""Metric rows over training seeds, and what is missing of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from records import dev, finish, new_run, train
from scipy import stats as scipy_stats

from srppo.record.store import Run
from srppo.report.history import LONGER, SeedRows, band, band_words, curves_of, missing_of, over_seeds
from srppo.stages.kinds import CHOSEN


def test_a_band_is_the_t_interval_of_the_mean() -> None:
    low, high = band([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    half = 4.302653 * 1.0 / 3**0.5  # t(2) at 97.5%, standard deviation 1, three seeds
    assert low == pytest.approx([2 - half, 5.0], abs=1e-6) and high == pytest.approx([2 + half, 5.0], abs=1e-6)
    values = np.random.default_rng(0).normal(size=(7, 4))
    hand = scipy_stats.t.interval(0.95, 6, values.mean(axis=0), scipy_stats.sem(values, axis=0))
    assert np.allclose(band(values), hand)
    assert [list(bound) for bound in band([[1.0, 4.0], [3.0, 2.0]])] == [[1.0, 2.0], [3.0, 4.0]], "two seeds: the range"
    assert [list(bound) for bound in band([[1.0]])] == [[1.0], [1.0]]


def test_seeds_meet_at_the_steps_that_all_of_them_have() -> None:
    rows = {0: [{"step": 1, "y": 1.0}, {"step": 2, "y": 2.0}, {"step": 3, "y": 5.0}]}
    rows[1] = [{"step": 1, "y": 3.0}, {"step": 2, "y": float("nan")}, {"step": 3, "y": 7.0}, {"step": 4, "y": 9.0}]
    line = over_seeds(rows, "step", "y")
    assert line is not None and list(line.x) == [1, 3] and list(line.mean) == [2, 6] and list(line.low) == [1, 5]
    assert over_seeds({}, "step", "y") is None and over_seeds(rows, "step", "z") is None


def test_captions_say_what_the_bands_are() -> None:
    def arms(*counts: int) -> dict[str, SeedRows]:
        return {f"arm {n}": SeedRows({seed: [] for seed in range(n)}) for n in counts}

    assert band_words(arms(1)) == "One training seed: lines without bands."
    assert "(10). Bands: 95% t interval of the mean, point by point." in band_words(arms(10))
    assert "the range of both seeds" in band_words(arms(2)) and "t interval" not in band_words(arms(2))
    mixed = band_words(arms(3, 1) | {"broken": SeedRows(broken={4: []})})
    assert "3 of arm 3, 1 of arm 1" in mixed and "none where there is 1" in mixed and "broken, seed 4" in mixed


def test_curves_hold_every_seed_and_count_the_sft_of_each(run: Run) -> None:
    curves = curves_of(run)
    assert {name: len(arm.done) for name, arm in curves.items()} == {"SFT": 3, LONGER: 3, "SRPPO": 3}
    line = over_seeds(curves["SRPPO"].done, "tflops", "reward")
    assert line is not None and list(line.x) == pytest.approx([2, 3, 4]) and list(line.mean) == [2, 3, 4]
    assert line.high - line.mean == pytest.approx([4.302653 / 3**0.5] * 3, abs=1e-6)
    ends = over_seeds(curves[LONGER].done, "tflops", "dev/accuracy")
    assert ends is not None and list(ends.x) == pytest.approx([0, 1, 4]), "the base, then each length"


def test_longer_sft_that_is_not_whole(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", [0])
    train(run, 0)
    run.stage("longer-sft-1/16", {"seed": 0, "steps": 5})
    train(run, 1, longer=False)
    finish(run.stage("longer-sft-1", {"seed": 1, "steps": 11}), 1, 0.5, [dev(11, 0.5, flops=1)], 1, score=1)
    assert list(curves_of(run)[LONGER].done) == [0], "seed 1 has one length of two"
    lines = missing_of(run)
    assert any(line.startswith(f"{CHOSEN}: not chosen for seed 1, since") for line in lines)
    assert "longer SFT of 5 steps: seed 0 is not finished; run the same command to go on" in lines
