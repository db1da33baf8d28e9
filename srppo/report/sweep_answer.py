"""What a sweep answers to its question, by the tests that were planned, and what these could have seen. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from srppo.ablations.analysis import SweepResult, Tested
from srppo.ablations.spec import Comparison
from srppo.evaluation.comparison import number, p_text
from srppo.report.sweep_layout import Pair, joined, metric_words, primary_metric, tested_by_pair, varying
from srppo.report.sweep_words import NO_RESULT, count_range
from srppo.statistics.tests import seeds_needed

VERDICTS = ("better", "worse", "cannot tell", NO_RESULT)


def answer(result: SweepResult) -> str:
    """The answer to the sweep's question by the tests that were planned, in plain words."""
    sweep, family = result.plan.sweep, result.plan.sweep.analysis.family
    metric = primary_metric(sweep)
    if not family:
        return "The plan tests no difference: what follows describes, and shows nothing."
    tested = [each for each in result.differences if each.primary]
    if not tested:
        return f"No answer yet: none of the {len(family)} planned comparisons has a result."
    seeds = count_range([len(each.seeds) for each in tested], "seed")
    said = [_pair_sentence(result, pair, rows) for pair, rows in tested_by_pair(result, metric).items()]
    holm = f"{sweep.analysis.correction} over {len(family)}; " if len(family) > 1 else ""
    return f"{'. '.join(said)} ({metric_words(metric)}; {holm}{seeds})."


def _pair_sentence(result: SweepResult, pair: Pair, rows: Sequence[tuple[str, Comparison, Tested | None]]) -> str:
    """`SRPPO is better than SFT at 3 of 6 sizes, worse at none, cannot tell at 3`; arms by name at a single point."""
    by: dict[str, list[str]] = {verdict: [] for verdict in VERDICTS}
    for row, _, found in rows:
        by[found.verdict if found else NO_RESULT].append(row)
    model, baseline = pair
    if not model or not baseline:
        return _arms_sentence(model, baseline, by)
    if len(rows) == 1:
        verdict = next(verdict for verdict, named in by.items() if named)
        return _clause(model, verdict, baseline) + (f" at {rows[0][0]}" if rows[0][0] else "")
    where = f"{len(rows)} {_places(result)}"
    without = f"{NO_RESULT} at {len(by[NO_RESULT])}" if by[NO_RESULT] else ""
    if len(by[NO_RESULT]) == len(rows):
        return f"{model} against {baseline}: {NO_RESULT} at any of {where}"
    if not by["better"] and not by["worse"]:
        at = "any" if not without else str(len(by["cannot tell"]))
        return ", ".join(filter(None, [f"{model} cannot be told from {baseline} at {at} of {where}", without]))
    text = f"{model} is better than {baseline} at {_count(by['better'])} of {where}"
    text += f", worse at {_count(by['worse'])}, cannot tell at {_count(by['cannot tell'])}"
    return ", ".join(filter(None, [text, without]))


def _arms_sentence(model: str, baseline: str, by: Mapping[str, Sequence[str]]) -> str:
    """One arm against several, or several against one: `SRPPO is better than A and B, SRPPO cannot be told from C`."""
    if model:
        return ", ".join(_clause(model, verdict, joined(arms)) for verdict, arms in by.items() if arms)
    return ", ".join(_clause(joined(arms), verdict, baseline, len(arms)) for verdict, arms in by.items() if arms)


def _clause(model: str, verdict: str, baseline: str, models: int = 1) -> str:
    """`A is better than B`; `models`: how many A names."""
    be = "is" if models == 1 else "are"
    words = {"cannot tell": "cannot be told from", NO_RESULT: f"{be} without a result against"}
    return f"{model} {words.get(verdict, f'{be} {verdict} than')} {baseline}"


def _count(rows: Sequence[str]) -> str:
    return str(len(rows)) if rows else "none"


def _places(result: SweepResult) -> str:
    axes = varying(result.plan.sweep)
    return f"{axes[0].replace('_', ' ')}s" if len(axes) == 1 else "points"


def power_lines(result: SweepResult) -> list[str]:
    """Whether so few seeds can show anything at all, and what the tests that cannot tell could have seen."""
    tested = [each for each in result.differences if each.primary]
    return [*_seeds_lines(result, tested), *_detectable_lines(tested)] if tested else []


def _seeds_lines(result: SweepResult, tested: Sequence[Tested]) -> list[str]:
    analysis = result.plan.sweep.analysis
    needed, counts = seeds_needed(analysis.alpha, len(analysis.family)), [len(each.seeds) for each in tested]
    few = [count for count in counts if count < needed]
    if not few:
        return []
    holm = f" by {analysis.correction} over {len(analysis.family)}" if len(analysis.family) > 1 else ""
    who = "Nothing can be significant here"
    if len(few) < len(counts):  # what stands first in Holm's order may let those through that come after
        who = f"{len(few)} of {len(counts)} comparisons can only be significant after others"
    one = " One seed says nothing of other seeds." if max(counts) == 1 else ""
    lines = [
        f"{who}: with {count_range([max(few)], 'seed')} the {analysis.test} test gives no p below "
        f"{p_text(2.0 ** (1 - max(few)))}; p <= {analysis.alpha:g}{holm} needs {needed}.{one}"
    ]
    if len(few) == len(counts):
        above, below = (
            sum(each.difference.low > 0 for each in tested),
            sum(each.difference.high < 0 for each in tested),
        )
        lines.append(
            f"By the intervals alone, which no test backs: above 0 at {above} of {len(few)}, below at {below}."
        )
    return lines


def _detectable_lines(tested: Sequence[Tested]) -> list[str]:
    unsure = [each.detectable for each in tested if each.verdict == "cannot tell" and math.isfinite(each.detectable)]
    if not unsure:
        return []
    low, high = number(min(unsure)), number(max(unsure))
    size = low if low == high else f"{low} to {high}"
    return [
        f"Where it cannot tell, a true difference of about {size} or more would have been seen in 80% of such "
        "sweeps, before correction."
    ]
