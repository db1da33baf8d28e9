"""Mutants of `srppo/report`; the runner is tests/mutants.py."""

from __future__ import annotations

from mutant_lists import Mutant

MUTANTS = [
    Mutant(
        "report: nothing of srppo eval",
        "report/evaluated.py",
        'result.path.parent.name == "eval"',
        'result.path.parent.name == ""',
        "report/test_evaluated.py::test_every_evaluated_task_of_every_arm_is_shown",
    ),
    Mutant(
        "score: top and bottom swapped",
        "report/score_text.py",
        "key=lambda each: -each.reward",
        "key=lambda each: each.reward",
        "analysis/test_score.py::test_ranking_takes_each_response_once",
    ),
    Mutant(
        "sweep report: a comparison is left out",
        "report/sweep_layout.py",
        "    for each in family:\n        model, baseline = each.model.arm",
        "    for each in family[:-1]:\n        model, baseline = each.model.arm",
        "report/test_sweep.py::test_every_planned_comparison_and_cell_is_shown[lone]",
    ),
    Mutant(
        "sweep report: no result, cannot tell",
        "report/sweep_answer.py",
        "found.verdict if found else NO_RESULT",
        'found.verdict if found else "cannot tell"',
        "report/test_sweep.py::test_failed_and_diverged",
    ),
    Mutant(
        "sweep report: dropped training is free",
        "report/sweep_tables.py",
        "return (cell.flops + extra) / at[0].flops",
        "return cell.flops / at[0].flops",
        "report/test_sweep.py::test_compute_by_hand",
    ),
    Mutant(
        "sweep report: the mean at the low end",
        "report/sweep_tables.py",
        'marks[place(estimate.mean)] = "●"',
        'marks[place(estimate.low)] = "●"',
        "report/test_sweep.py::test_whiskers",
    ),
    Mutant(
        "sweep report: no seed ever failed",
        "report/sweep_files.py",
        "row |= {status: cell.statuses.get(status, 0) for status in STATUSES}",
        "row |= {status: 0 for status in STATUSES}",
        "report/test_sweep.py::test_failed_and_diverged",
    ),
    Mutant(
        "sweep report: _ as it is in LaTeX",
        "report/sweep_latex.py",
        'for each in "&%$#_{}"',
        'for each in "&%$#{}"',
        "report/test_sweep.py::test_special_characters_are_escaped",
    ),
    Mutant(
        "sweep report: a trend by its mean",
        "report/sweep_words.py",
        'return "rises" if low > 0 else',
        'return "rises" if trend.slope.mean > 0 else',
        "report/test_sweep.py::test_trends_in_words",
    ),
    Mutant(
        "sweep report: no interval, no slope",
        "report/sweep_words.py",
        'return "0" if abs(trend.slope.mean) <= ROUNDING else',
        'return "0" if True else',
        "report/test_sweep.py::test_a_slope_that_all_seeds_and_items_share_is_no_zero",
    ),
    Mutant(
        "sweep report: overshoots at both ends",
        "report/sweep_words.py",
        "in LOOSENS_DOWNWARDS and value < peak.at else",
        "in LOOSENS_DOWNWARDS else",
        "report/test_sweep.py::test_peaks_in_words",
    ),
]
