"""The meter of an evaluation: what it says at which time, by a clock that is told."""

from __future__ import annotations

import io

import pytest

from srppo.console import Console
from srppo.evaluation.meter import LINE_SECONDS, Meter


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def meter_of(clock: Clock, total: int) -> tuple[Meter, io.StringIO]:
    said = io.StringIO()
    return Meter(Console(plain=True, file=said, clock=clock), "letters", total), said


def test_time_left_before_the_first_batch_is_a_bound_from_the_tokens_after_the_first(clock: Clock) -> None:
    meter, _ = meter_of(clock, 8)
    clock.now += 30  # reading the prompts, which does not repeat
    assert meter.words(clock.now) == "0/8  30 s, reading prompts"
    meter.advance(0.5)
    assert meter.words(clock.now) == "0/8  30 s, reading prompts"
    clock.now += 4
    meter.advance(0.5)
    assert meter.words(clock.now) == "1/8  34 s, at most 56 s left"  # half a row in 4 s, 7 rows to go


def test_time_left_after_a_batch_is_from_whole_batches_and_all_time(clock: Clock) -> None:
    meter, _ = meter_of(clock, 8)
    clock.now += 6
    meter.advance(1.0)
    meter.finish(2)  # ended before its last possible token
    assert meter.words(clock.now) == "2/8  6 s, 18 s left"
    clock.now += 6
    meter.advance(1.0)
    assert meter.words(clock.now) == "3/8  12 s, 20 s left"
    meter.advance(100.0)
    assert meter.words(clock.now) == "8/8  12 s, 0 s left"  # never beyond the total


def test_a_line_every_few_seconds_and_none_between(clock: Clock) -> None:
    meter, said = meter_of(clock, 4)
    with meter:
        for _ in range(4):
            clock.now += LINE_SECONDS / 2
            meter.advance(0.5)
    lines = said.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0] == "letters  1/4  5 s, at most 15 s left" and lines[1].startswith("letters  2/4  10 s, at most ")


def test_a_quiet_console_says_nothing(clock: Clock) -> None:
    said = io.StringIO()
    with Meter(Console(plain=True, quiet=True, file=said, clock=clock), "letters", 4) as meter:
        clock.now += 100
        meter.advance(1)
    assert said.getvalue() == ""


def test_the_bar_is_one_line_on_the_console_that_all_is_said_on(clock: Clock) -> None:
    said = io.StringIO()
    console = Console(plain=False, file=said, clock=clock)
    with Meter(console, "letters", 4) as meter:
        clock.now += 6
        meter.finish(2)
        console.warn("about the letters")
        console.print(meter)
    warning, bar = said.getvalue().splitlines()
    assert warning == "warning: about the letters"
    assert bar.split() == ["letters", *bar.split()[1:2], "2/4", "6", "s,", "6", "s", "left"]
