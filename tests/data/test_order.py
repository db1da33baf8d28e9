"""The order of rows: each once a pass, passes in orders of their own, a function of step and seed alone."""

from __future__ import annotations

import pytest
import torch

import srppo.data.order
from srppo.data.order import pass_order, scheduled


@pytest.mark.parametrize(("count", "batch"), [(7, 3), (5, 5), (3, 8), (1, 2), (10, 4)])
def test_each_prompt_comes_once_a_pass(count: int, batch: int) -> None:
    stream = [i for step in range(20) for i in scheduled(count, batch, step, seed=0)]
    assert len(stream) == 20 * batch
    passes = [stream[start : start + count] for start in range(0, len(stream) - count + 1, count)]
    assert all(sorted(one) == list(range(count)) for one in passes)
    if count > 3:
        assert len({tuple(one) for one in passes}) > 1  # each pass in its own order


def test_the_schedule_is_a_function_of_step_and_seed_alone() -> None:
    late = scheduled(50, 8, 40, seed=1)
    torch.manual_seed(123)
    [scheduled(50, 8, step, seed=1) for step in range(40)]
    assert scheduled(50, 8, 40, seed=1) == late
    assert scheduled(50, 8, 0, seed=1) != scheduled(50, 8, 0, seed=2)


def test_responses_to_one_prompt_stand_in_a_row_and_prompts_keep_their_order() -> None:
    alone = [i for step in range(6) for i in scheduled(7, 4, step, seed=3)]
    grouped = [scheduled(7, 12, step, seed=3, per_prompt=3) for step in range(6)]
    assert [i for step in grouped for i in step[::3]] == alone
    assert all(step == [i for i in step[::3] for _ in range(3)] for step in grouped)


def test_a_permutation_is_made_once_a_pass_and_not_for_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 steps through 3 passes; a worker that alternates between two orders makes none of them twice either."""
    made: list[int] = []
    plain = torch.randperm

    def counted(count: int, **options: object) -> torch.Tensor:
        made.append(count)
        return plain(count, **options)

    pass_order.cache_clear()
    monkeypatch.setattr(srppo.data.order.torch, "randperm", counted)
    for step in range(300):
        scheduled(101, 1, step, seed=7)
        scheduled(1000, 2, step, seed=8)
    assert sorted(made) == [101, 101, 101, 1000]
