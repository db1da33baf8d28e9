"""What a sweep is: points on axes, arms at each point, seeds, and the analysis that is fixed before it starts.

A value that can be built, printed, saved and compared without torch. No number of a result is in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from srppo.config import CODE_EPOCH, Recipe, build_recipe, with_overrides
from srppo.errors import ConfigError

MOST_COMPARISONS = 25  # the first of so many that 10 seeds can still show: 2^(1-10) * 25 < 0.05


@dataclass(frozen=True)
class Ablation:
    """A point of a sweep: the recipe keys it sets, and its values on the axes, as tables and plots show them."""

    name: str
    overrides: Mapping[str, Any]
    values: Mapping[str, Any] = field(default_factory=dict)


def grid(**axes: Sequence[Any]) -> list[Ablation]:
    """Every combination of `section.key` values, the last axis fastest: grid(**{"ppo.lr": (1e-5, 3e-5)})."""
    short = [key.rpartition(".")[2] for key in axes]
    names = [key if short.count(last) > 1 else last for key, last in zip(axes, short, strict=True)]  # ppo.lr, sft.lr
    return [
        Ablation(
            ", ".join(f"{name} {label(value)}" for name, value in zip(names, values, strict=True)),
            dict(zip(axes, values, strict=True)),
            dict(zip(names, values, strict=True)),
        )
        for values in itertools.product(*axes.values())
    ]


def label(value: Any) -> str:
    """A value in a name: numbers short, None as none."""
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)


@dataclass(frozen=True)
class Arm:
    """What is trained and measured at a point.

    kind: the stage that is measured (`kinds.KINDS`). overrides: recipe keys on top of the point's.
    """

    name: str
    kind: str
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """An arm at a point, by their names."""

    point: str
    arm: str


@dataclass(frozen=True)
class Comparison:
    """A paired difference to be tested: model minus baseline."""

    model: Cell
    baseline: Cell


@dataclass(frozen=True)
class Curves:
    """Arms that are compared at equal distance from the SFT model, whatever point of the sweep brought them there.

    start: the arm that stands at KL 0. model: the arm whose curve is compared with those of the others, at these shares
    of the KL that it reaches at every seed.
    """

    start: str
    model: str
    others: tuple[str, ...]
    shares: tuple[float, ...] = (0.05, 0.25)  # KL grows fast as the pull grows weak, and most is gained early


@dataclass(frozen=True)
class Analysis:
    """Fixed beforehand; whatever is looked at beside it is marked exploratory.

    The primary metric is accuracy on one group of test items under one decoding. family: the comparisons that Holm's
    correction is over; with `curves` it is over theirs instead. trend: the axis along which a slope is fitted, on
    `scale` (log2 or linear), or None. margin: two arms whose accuracies differ by less are the same.
    """

    group: str
    decoding: str
    family: tuple[Comparison, ...]
    trend: str | None = None
    scale: str = "linear"
    test: str = "exact sign-flip over seeds"
    correction: str = "Holm"
    alpha: float = 0.05
    margin: float = 0.05
    curves: Curves | None = None

    @property
    def comparisons(self) -> int:
        """How many are tested."""
        return len(self.family) + (len(self.curves.others) * len(self.curves.shares) if self.curves else 0)


@dataclass(frozen=True)
class Sweep:
    """All of it. `question` in one sentence; `notes`: what a reader must know, such as what was not tuned.

    bases: pretrainings of one architecture that the seeds take turns with, so that the variance between seeds holds
    that between pretrainings; empty: every seed has the recipe's. A point that sets model.base has its own.
    """

    name: str
    question: str
    recipe: Recipe
    axes: tuple[str, ...]
    points: tuple[Ablation, ...]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    analysis: Analysis
    notes: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises ConfigError for what could not be analysed."""
        if not self.points:
            raise ConfigError(f"sweep {self.name} has no points: an axis is empty; give at least one value")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"sweep {self.name} has the seeds {list(self.seeds)}; give one or more, each once")
        for names, what in (([p.name for p in self.points], "point"), ([a.name for a in self.arms], "arm")):
            if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
                raise ConfigError(f"sweep {self.name} has the {what} {twice[0]!r} twice; give each value once")
        cells, family, margin = set(self.cells()), self.analysis.family, self.analysis.margin
        if not 0 < margin < 1:
            raise ConfigError(f"margin {margin} of sweep {self.name}: give a difference of accuracy between 0 and 1")
        for cell in (cell for each in family for cell in (each.model, each.baseline)):
            if cell not in cells:
                raise ConfigError(f"sweep {self.name} compares {cell.arm!r} at {cell.point!r}, which it does not run")
        curves = self.analysis.curves
        for name in (curves.start, curves.model, *curves.others) if curves else ():
            if name not in [arm.name for arm in self.arms]:
                raise ConfigError(f"sweep {self.name} compares the curve of {name!r}, which it does not run")
        if self.analysis.comparisons > MOST_COMPARISONS:
            raise ConfigError(
                f"sweep {self.name} would test {self.analysis.comparisons} differences; its family may have "
                f"{MOST_COMPARISONS}, or Holm's correction leaves little to see: trim an axis (--axis KEY=V1,V2), "
                "leave out arms (--arms of grid), or run two sweeps"
            )

    def cells(self) -> list[Cell]:
        """Arms within points, in the order of tables."""
        return [Cell(point.name, arm.name) for point in self.points for arm in self.arms]

    def recipe_of(self, cell: Cell, seed: int) -> Recipe:
        """The complete recipe of a cell. Raises ConfigError where the keys contradict each other."""
        point, arm = self.point(cell.point), self.arm(cell.arm)
        base = {"model.base": self.bases[self.seeds.index(seed) % len(self.bases)]} if self.bases else {}
        return with_overrides(self.recipe, {**base, **point.overrides, **arm.overrides, "seed": seed})

    def point(self, name: str) -> Ablation:
        return next(point for point in self.points if point.name == name)

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def beside(self, axis: str) -> list[str]:
        """What sets lines along an axis apart: all other values, but those that go one to one with it (a model beside
        its number of parameters)."""
        keys = dict.fromkeys(key for point in self.points for key in point.values)
        return [key for key in keys if key != axis and not _one_to_one(self.points, key, axis)]

    def lines(self, axis: str) -> dict[str, list[Ablation]]:
        """Points along an axis of numbers, in its order, apart for each combination of what is beside it."""
        beside, found = self.beside(axis), dict[str, list[Ablation]]()
        for point in sorted((p for p in self.points if axis in p.values), key=lambda p: float(p.values[axis])):
            where = ", ".join(f"{key} {point.values[key]}" for key in beside if key in point.values)
            found.setdefault(where, []).append(point)
        return found

    def as_spec(self) -> dict[str, Any]:
        """What sweep.json holds."""
        spec = _ADAPTER.dump_python(self, mode="json")
        return {"sweep": spec.pop("name"), "code_epoch": CODE_EPOCH, **spec}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Sweep:
        """The sweep that `as_spec` wrote."""
        return _ADAPTER.validate_python({**spec, "name": spec["sweep"], "recipe": build_recipe(spec["recipe"])})


_ADAPTER = TypeAdapter(Sweep)


def _one_to_one(points: Sequence[Ablation], one: str, other: str) -> bool:
    pairs = {(label(point.values.get(one)), label(point.values.get(other))) for point in points}
    return 1 < len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def every(points: Iterable[Ablation], model: str, *baselines: str) -> tuple[Comparison, ...]:
    """At each point, an arm minus each of others."""
    return tuple(
        Comparison(Cell(point.name, model), Cell(point.name, other)) for point in points for other in baselines
    )
