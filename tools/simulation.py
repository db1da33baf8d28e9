"""How often verdicts err, by simulation: `python tools/simulation.py` writes its tables into docs/evaluation.md.

Paired differences of accuracy over training seeds and items of tasks, all effects drawn, so that the truth is known.
The rule that srppo had before is in here alone, to be set beside the one it has.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from blocks import write_block
from numpy.typing import NDArray

from srppo.statistics.tests import holm, sign_flip
from srppo.statistics.verdicts import Contrast, Finding, judge, t_interval

SEEDS, TASKS, ITEMS = 10, 40, 5  # training seeds, tasks, and items a task
MARGIN = 0.05


class Spread(NamedTuple):
    """Standard deviations of a difference's effects: of the seed, of the task, of the item, of a task for one seed, and
    of an answer. The recorded sweeps have 0.05 to 0.1 for seeds and about 0.25 for tasks, where SRPPO meets longer SFT.
    """

    seed: float
    task: float
    item: float
    seed_task: float
    answer: float


SPREADS = {
    "items": Spread(0.0, 0.0, 0.3, 0.0, 0.3),
    "tasks": Spread(0.02, 0.2, 0.3, 0.05, 0.3),
    "seeds": Spread(0.08, 0.05, 0.2, 0.05, 0.3),
    "seeds and tasks": Spread(0.08, 0.2, 0.3, 0.1, 0.3),
}


def drawn(
    rng: np.random.Generator, spread: Spread, comparisons: int, *, effect: float = 0.0, tasks: int = TASKS
) -> NDArray[np.float64]:
    """(comparisons, seeds, items): independent comparisons with a true difference of `effect`. Shared arms would make
    them alike, and errors of a family rarer."""

    def effects(deviation: float, *shape: int) -> NDArray[np.float64]:
        return rng.normal(0, deviation, (comparisons, *shape))

    by_task = effects(spread.task, 1, tasks) + effects(spread.seed_task, SEEDS, tasks)
    by_item = effects(spread.item, 1, tasks * ITEMS) + effects(spread.answer, SEEDS, tasks * ITEMS)
    return effect + effects(spread.seed, SEEDS, 1) + np.repeat(by_task, ITEMS, axis=2) + by_item


def contrasts(gaps: NDArray[np.float64], *, by_task: bool = True, margin: float | None = None) -> list[Contrast]:
    """What srppo makes of them; by_task: tasks are the units, else items."""
    clusters = [i // ITEMS for i in range(gaps.shape[2])] if by_task else None
    return [Contrast(each, sign_flip(each.mean(axis=1)), clusters, margin=margin) for each in gaps]


def families(
    trials: int, spread: Spread, comparisons: int, *, effect: float = 0.0, margin: float | None = None
) -> Iterator[list[Finding]]:
    """The findings of so many families, the same ones each time."""
    rng = generator(spread, comparisons)
    for _ in range(trials):
        yield judge(contrasts(drawn(rng, spread, comparisons, effect=effect), margin=margin))


def generator(spread: Spread, comparisons: int) -> np.random.Generator:
    return np.random.default_rng([comparisons, *(round(1000 * each) for each in spread)])


def old_verdicts(family: Sequence[Contrast]) -> list[bool]:
    """The rule before: Holm on the sign-flip p alone, and an uncorrected 95% interval without 0 (whose width was t's;
    its shape came from resampling, which is left out here)."""
    corrected, intervals = holm([each.exact.p for each in family]), map(t_interval, family)
    return [p <= 0.05 and not found.low <= 0 <= found.high for p, found in zip(corrected, intervals, strict=True)]


def differs(found: Sequence[Finding]) -> bool:
    return any(each.verdict in ("better", "worse") for each in found)


def all_hold(found: Sequence[Finding], truth: float) -> bool:
    return all(each.difference.low <= truth <= each.difference.high for each in found)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def share(held: Sequence[bool]) -> str:
    return f"{np.mean(held):.3f}"


def before_and_now(trials: int) -> str:
    """Equal arms, 300 items that are the units: families in which any comparison is called better or worse."""
    rows = []
    for name in ("items", "tasks", "seeds"):
        spread, cells = SPREADS[name]._replace(task=0.0, seed_task=0.0), []
        for comparisons in (6, 12):
            rng, old, new = generator(spread, comparisons), [], []
            for _ in range(trials):
                family = contrasts(drawn(rng, spread, comparisons, tasks=60), by_task=False)
                old.append(any(old_verdicts(family)))
                new.append(differs(judge(family)))
            cells += [share(old), share(new)]
        rows.append([f"seeds {spread.seed:g}, items {spread.item:g}", *cells])
    return table(["deviations", "6: before", "6: now", "12: before", "12: now"], rows)


def errors_and_coverage(trials: int) -> str:
    """Equal arms, tasks as units, families of 1, 6 and 12; then coverage of one interval and of all 12 together."""
    rows = []
    for name, spread in SPREADS.items():
        found = {k: list(families(trials, spread, k)) for k in (1, 6, 12)}
        apart = [(effect, list(families(trials, spread, 12, effect=effect))) for effect in (0.05, 0.1)]
        cells = [share([differs(each) for each in found[k]]) for k in found]
        cells += [share([all_hold(each, 0.0) for each in found[k]]) for k in (1, 12)]
        rows.append([name, *cells, *(share([all_hold(each, effect) for each in found]) for effect, found in apart)])
    heads = ["what varies", "error of 1", "of 6", "of 12", "coverage of 1", "of all 12", "0.05 apart", "0.1 apart"]
    return table(heads, rows)


def power(trials: int) -> str:
    """By true difference: the share of comparisons called better, and the share found to be below the margin."""
    rows = []
    for name, spread in SPREADS.items():
        for comparisons in (1, 12):
            found = {
                effect: [
                    each
                    for family in families(trials, spread, comparisons, effect=effect, margin=MARGIN)
                    for each in family
                ]
                for effect in (0.0, 0.05, 0.1, 0.2)
            }
            cells = [share([each.verdict == "better" for each in found[effect]]) for effect in (0.05, 0.1, 0.2)]
            cells += [share([each.p_same_holm <= 0.05 for each in found[effect]]) for effect in (0.0, 0.05)]
            rows.append([f"{name}, family of {comparisons}", *cells])
    heads = [
        "what varies",
        "0.05 apart: better",
        "0.1 apart",
        "0.2 apart",
        "equal: below 0.05",
        "0.05 apart: below (wrong)",
    ]
    return table(heads, rows)


PARTS: Sequence[tuple[str, Callable[[int], str], int]] = (
    ("Equal arms, 10 seeds, 300 items as units: families with a false verdict", before_and_now, 600),
    ("Equal arms, 10 seeds, 40 tasks of 5 items as units", errors_and_coverage, 1000),
    ("Power, and equivalence within 0.05, with the same seeds and tasks", power, 150),
)


def main() -> None:
    texts = []
    for title, part, trials in PARTS:
        texts.append(f"{title} ({trials} simulations).\n\n{part(trials)}")
        print(texts[-1], flush=True)
    write_block("docs/evaluation.md", "python tools/simulation.py", "\n\n".join(texts))


if __name__ == "__main__":
    sys.exit(main())
