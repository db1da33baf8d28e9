"""Mutants of `srppo/world`; the runner is tests/mutants.py."""

from __future__ import annotations

from mutant_lists import Mutant

MUTANTS = [
    Mutant(
        "world: wrong tasks of other groups",
        "world/items.py",
        "for other in of_groups(task.group) if",
        "for other in TASKS if",
        "data/test_noise.py::test_wrong_tasks_answer_the_same_words_within_the_group",
    ),
    Mutant(
        "world: prompts of the training words",
        "world/items.py",
        'Random(f"{name}:{seed}"), _PROMPTS, "short")',
        'Random(f"{name}:{seed}"), TRAIN, "short")',
        "data/test_noise.py::test_prompts_of_a_group_leak_nothing",
    ),
    Mutant(
        "world: the corpus asks absent tasks",
        "world/texts.py",
        'ASKED = tuple(task for task in TASKS if task.group != "absent")',
        "ASKED = TASKS",
        "world/test_world.py::test_corpus_asks_no_absent_task_and_no_dev_or_test_question_and_ends_every_document",
    ),
    Mutant(
        "world: the operation beside the words comes last",
        "world/tasks.py",
        "for name in reversed(self.operations):",
        "for name in self.operations:",
        "world/test_world.py::test_known_answers",
    ),
    Mutant(
        "world: steps are chosen on unseen tasks",
        "evaluation/development.py",
        'CHOOSE = ("demonstrated", "development")',
        'CHOOSE = ("demonstrated", "unseen")',
        "evaluation/test_development.py::test_a_step_is_chosen_on_tasks_that_are_not_reported_as_new",
    ),
]
