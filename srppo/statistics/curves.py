"""Curves through measured points: what is read off between two of them. numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def interpolated(xs: Sequence[float], values: ArrayLike, at: float) -> NDArray[np.float64] | None:
    """`values` (points, ...) at `at`: linear between the two points whose x lies nearest on either side.

    Points come in any order, and those of equal x count as their mean. None outside of them: no curve is drawn on.
    """
    places, inverse, counts = np.unique(np.asarray(xs, dtype=float), return_inverse=True, return_counts=True)
    if not len(places) or not places[0] <= at <= places[-1]:
        return None
    points = np.asarray(values, dtype=float)
    sums = np.zeros((len(places), *points.shape[1:]))
    np.add.at(sums, inverse, points)
    means = sums / counts.reshape(-1, *[1] * (points.ndim - 1))
    right = int(np.searchsorted(places, at))
    if places[right] == at:
        return np.asarray(means[right])
    share = (at - places[right - 1]) / (places[right] - places[right - 1])
    return np.asarray((1 - share) * means[right - 1] + share * means[right])
