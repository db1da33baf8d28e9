"""Mutants of `srppo/instructions`, and of the rows that are made with it; the runner is tests/mutants.py."""

from __future__ import annotations

from mutant_lists import Mutant

VERDICTS = "instructions/test_checkers.py::test_verdicts_are_lm_evals_own"
MUTANTS = [
    Mutant(
        "checkers: one instruction obeyed is enough",
        "instructions/checkers.py",
        "return all(\n",
        "return any(\n",
        VERDICTS,
    ),
    Mutant(
        "checkers: nothing obeys",
        "instructions/checkers.py",
        "    if not response.strip():\n        return False\n",
        "",
        "instructions/test_checkers.py::test_an_empty_response_obeys_nothing",
    ),
    Mutant(
        "checkers: settings that are none are given",
        "instructions/checkers.py",
        "if value is not None}",
        "}",
        "instructions/test_checkers.py::test_settings_that_are_none_are_none_as_in_ifevals_file_from_the_hub",
    ),
    Mutant(
        "checkers: langdetect draws as it likes",
        "instructions/checkers.py",
        "langdetect.DetectorFactory.seed = 0",
        "langdetect.DetectorFactory.seed = None",
        "instructions/test_checkers.py::test_a_verdict_does_not_depend_on_those_before",
    ),
    Mutant(
        "checkers: a list of abbreviations less",
        "instructions/checkers.py",
        "sorted(english.ABBREV_TYPES)",
        "sorted(english.ABBREV_TYPES)[1:]",
        "instructions/test_checkers.py::test_the_package_stands_in_for_nltks_table",
    ),
    Mutant(
        "instructions: a changed answer is believed",
        "data/instructed.py",
        "elif not item.is_right(completion):",
        "elif not completion:",
        "data/test_instructed.py::test_an_answer_that_fails_its_checker_is_counted",
    ),
    Mutant(
        "instructions: a question serves twice",
        "data/instructed.py",
        "        pool[:] = rest\n",
        "        pool[:] = rest if count is None else pool\n",
        "data/test_instructed.py::test_the_command_makes_what_training_and_evaluation_read",
    ),
    Mutant(
        "instructions: kinds as they come",
        "data/instructed.py",
        "if had[kind.name] == fewest]",
        "]",
        "data/test_instructed.py::test_the_command_makes_what_training_and_evaluation_read",
    ),
    Mutant(
        "changes: one bullet less than asked for",
        "instructions/changes.py",
        'return {"num_bullets": len(found)}',
        'return {"num_bullets": len(found) + 1}',
        "instructions/test_kinds.py::test_the_changed_answer_obeys_and_the_plain_one_does_not",
    ),
    Mutant(
        "checkers: a draw at each verdict",
        "instructions/checkers.py",
        "    random.seed(seed)\n",
        "",
        "instructions/test_checkers.py::test_what_lm_eval_draws_is_drawn_by_the_prompt",
    ),
    Mutant(
        "checkers: settings may lack",
        "instructions/checkers.py",
        "if settings.keys() != set(needed) or not all(settings.values()):",
        "if settings.keys() - set(needed):",
        "instructions/test_checkers.py::test_what_no_checker_knows_is_one_line",
    ),
    Mutant(
        "instructions: what no kind in need could use is lost",
        "data/instructed.py",
        "while before < len(made) != count:",
        "while before < 0:",
        "data/test_instructed.py::test_what_no_kind_in_need_can_use_is_offered_again",
    ),
    Mutant(
        "instructions: new rows beside an old test",
        "data/instructed.py",
        "        if (folder / name).exists() and (folder / name).read_bytes() != text.encode():",
        "        if False:",
        "data/test_instructed.py::test_a_folder_is_written_whole_or_not_at_all",
    ),
    Mutant(
        "items: instructions without their packages",
        "evaluation/items.py",
        "if lacks := lacking(kinds, missing()):",
        "if lacks := lacking(kinds, []):",
        "instructions/test_checkers.py::test_items_whose_checker_is_not_here_are_refused",
    ),
    Mutant(
        "instructions: an answer of its own among the others'",
        "data/instructed.py",
        "rng.randrange(1, len(built.test))",
        "rng.randrange(0, 2) * len(built.test)",
        "data/test_instructed.py::test_other_questions_answers_are_those_of_others",
    ),
    Mutant(
        "instructions: however long they grow",
        "data/instructed.py",
        "if len(completion) > LONGEST:",
        "if len(completion) > 10 * LONGEST:",
        "data/test_instructed.py::test_an_answer_that_grows_too_long_is_not_taken",
    ),
]
