"""Order, held-out rows, rows that can be encoded, and passes over rows."""

from __future__ import annotations

import pytest
import torch
from data_cases import demo, message_of
from hypothesis import given, settings
from hypothesis import strategies as st

import srppo.data.order
from srppo.data.order import encoded, pass_order, permute, prompt_text, row_id, scheduled, split_held_out
from srppo.data.types import Message, Prompt
from srppo.errors import DataError


@given(st.integers(0, 10**9), st.integers(0, 60))
def test_permutation_is_one_per_seed(seed, n):
    ordered = permute(range(n), seed)
    assert sorted(ordered) == list(range(n))
    assert ordered == permute(range(n), seed)


def test_permutation_is_pinned():
    assert permute(range(8), 0) == [6, 5, 4, 3, 7, 1, 0, 2]  # another order would train other runs under old ids
    assert permute(range(8), 1) != permute(range(8), 0)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 40), min_size=5, max_size=60), st.integers(0, 99), st.integers(1, 59))
def test_held_out_rows_never_move(numbers, seed, cut):
    rows = [demo(f"task {number}", f"answer {place}", f"a:{place}") for place, number in enumerate(numbers)]
    try:
        train, held = split_held_out(rows, 0.3, seed)
        fewer_train, fewer_held = split_held_out(rows[:cut], 0.3, seed)
    except DataError:
        return
    assert sorted(row.source for row in train + held) == sorted(row.source for row in rows)
    assert fewer_held == [row for row in rows[:cut] if row in held]
    assert fewer_train == [row for row in rows[:cut] if row in train]
    assert not {prompt_text(row) for row in train} & {prompt_text(row) for row in held}


def test_held_out_share_and_its_edges():
    rows = [demo(f"task {number}") for number in range(4000)]
    held = split_held_out(rows, 0.1, 3)[1]
    assert 320 < len(held) < 480  # four standard deviations
    assert split_held_out(rows, 0.1, 4)[1] != held
    assert split_held_out(rows, 0.0, 3) == (rows, [])
    with pytest.raises(DataError) as error:
        split_held_out(rows[:3], 0.9999, 3)
    assert message_of(error) == "data.held_out = 0.9999 leaves none of 3 demonstrations to train on; lower it"


def test_row_ids_name_content():
    assert row_id(demo(source="x:1")) == row_id(demo(source="y:2")) != row_id(demo(answer="sun cat"))


@given(st.lists(st.booleans(), max_size=3000), st.none() | st.integers(1, 2500))
@settings(max_examples=30, deadline=None)
def test_size_counts_rows_that_can_be_used_and_few_more_are_encoded(usable, size):
    rows = [Prompt((Message("user", str(i)),), f"a:{i}") for i in range(len(usable))]
    asked = []

    def encode(some):
        asked.extend(some)
        return [(i,) if usable[i := int(row.prompt[0].content)] else "no" for row in some]

    found = encoded(rows, encode, size)
    right = [row for row, good in zip(rows, usable, strict=True) if good][:size]
    assert found.rows == right and found.ids == [(int(row.prompt[0].content),) for row in right]
    read = rows.index(right[-1]) + 1 if size is not None and len(right) == size else len(rows)
    assert found.refused == [("no", row.source) for row, good in zip(rows[:read], usable, strict=False) if not good]
    assert asked == rows[: len(asked)] and read <= len(asked) <= min(read + 32 if size else read, len(rows))


# ---- passes over rows


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
