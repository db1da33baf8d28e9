"""Mutants of `srppo/report`; the runner is tests/mutants.py."""

from __future__ import annotations

from mutant_lists import Mutant

MUTANTS = [
    Mutant(
        "curves: nothing is said of the tasks",
        "report/sweep_curves.py",
        "seeds = tables.over_tasks(tasks) + seeds",
        "pass",
        "report/test_sweep_curves.py::test_the_answer_and_the_table_name_what_is_out_of_reach",
    ),
    Mutant(
        "report: nothing of srppo eval",
        "report/evaluated.py",
        'each.path.parent.name == "eval"',
        'each.path.parent.name == ""',
        "report/test_evaluated.py::test_every_evaluated_task_of_every_arm_is_shown",
    ),
    Mutant(
        "score: top and bottom swapped",
        "report/score.py",
        "key=lambda each: -each.reward",
        "key=lambda each: each.reward",
        "analysis/test_score.py::test_ranking_takes_each_response_once",
    ),
    Mutant(
        "sweep report: a comparison is left out",
        "report/sweep_tables.py",
        "    for each in family:\n        model, baseline = each.model.arm",
        "    for each in family[:-1]:\n        model, baseline = each.model.arm",
        "report/test_sweep.py::test_every_planned_comparison_and_cell_is_shown[lone]",
    ),
    Mutant(
        "sweep report: no result, cannot tell",
        "report/sweep_words.py",
        "found.finding.verdict if found else NO_RESULT",
        'found.finding.verdict if found else "cannot tell"',
        "report/test_sweep.py::test_failed_and_diverged",
    ),
    Mutant(
        "sweep report: dropped training is free",
        "report/sweep_tables.py",
        "(own + extra) / their",
        "own / their",
        "report/test_sweep.py::test_compute_by_hand",
    ),
    Mutant(
        "sweep report: the mean at the low end",
        "report/table.py",
        'marks[place(estimate.mean)] = "●"',
        'marks[place(estimate.low)] = "●"',
        "report/test_table.py::test_whiskers",
    ),
    Mutant(
        "sweep report: no seed ever failed",
        "report/sweep.py",
        "row |= {status: cell.statuses.get(status, 0) for status in STATUSES}",
        "row |= {status: 0 for status in STATUSES}",
        "report/test_sweep.py::test_failed_and_diverged",
    ),
    Mutant(
        "sweep report: _ as it is in LaTeX",
        "report/table.py",
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
        "in LOOSENS_DOWNWARDS and value < peak.at",
        "in LOOSENS_DOWNWARDS",
        "report/test_sweep.py::test_peaks_in_words",
    ),
    Mutant(
        "table: a folded name is a row of its own",
        "report/table.py",
        'folded(text: str, width: int, hang: str = "  ")',
        'folded(text: str, width: int, hang: str = "")',
        "report/test_table.py::test_a_folded_name_hangs_and_its_numbers_stand_beside_its_first_line",
    ),
    Mutant(
        "table: columns that do not fit are lost",
        "report/table.py",
        "rest = rest[len(keep) :]",
        "rest = []",
        "report/test_table.py::test_what_does_not_fit_stands_below_with_its_names",
    ),
    Mutant(
        "scores: the metrics without their names",
        "report/evaluated.py",
        "rows.append(Row([name, f",
        "rows.append(Row([summary['metric'], f",
        "report/test_evaluated.py::test_scores_of_srppo_eval_stand_one_a_row",
    ),
    Mutant(
        "compare: unscored items once a model",
        "report/comparison.py",
        'if not reason.startswith("not scored"):',
        "if reason:",
        "report/test_comparison.py::test_items_without_a_score_are_said_once_with_their_file",
    ),
]
