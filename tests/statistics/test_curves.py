"""Reading a curve between its measured points."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from srppo.statistics.curves import interpolated


def of_items(kl: float) -> NDArray[np.float64]:
    """Three items, each linear in KL with a slope of its own."""
    return np.array([0.0, 1.0, -2.0]) * kl + np.array([0.25, 0.0, 1.0])


def test_what_is_linear_is_read_exactly_whatever_the_order_of_the_points() -> None:
    kls = [1.5, 0.0, 0.25, 4.0, 0.75]
    for at in (0.0, 0.1, 0.25, 1.0, 2.75, 4.0):
        found = interpolated(kls, [of_items(kl) for kl in kls], at)
        np.testing.assert_allclose(found, of_items(at), atol=1e-12)  # type: ignore[arg-type]


def test_only_the_two_neighbours_count() -> None:
    """At 1.5 between 1 and 2, by hand; what lies beyond may be anything."""
    for far in (0.0, 100.0):
        found = interpolated([3.0, 2.0, 0.0, 1.0], [[far], [0.8], [far], [0.4]], 1.5)
        assert found == pytest.approx([0.6])


def test_points_at_one_distance_count_as_their_mean() -> None:
    found = interpolated([1.0, 0.0, 1.0], [[0.2], [0.0], [0.6]], 1.0)
    assert found == pytest.approx([0.4])
    assert interpolated([1.0, 0.0, 1.0], [[0.2], [0.0], [0.6]], 0.5) == pytest.approx([0.2])


def test_no_curve_is_drawn_on() -> None:
    assert interpolated([0.0, 1.0], [[0.1], [0.2]], 1.0) == pytest.approx([0.2])
    assert interpolated([0.0, 1.0], [[0.1], [0.2]], 1.0001) is None
    assert interpolated([0.5, 1.0], [[0.1], [0.2]], 0.4) is None
    assert interpolated([], [], 0.0) is None


def test_a_plain_number_a_point() -> None:
    assert interpolated([0.0, 2.0], [10.0, 20.0], 0.5) == pytest.approx(12.5)
