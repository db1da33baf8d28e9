"""Mutants of `srppo/world`; the runner is tests/mutants.py."""

from __future__ import annotations

from mutant_lists import Mutant

MUTANTS = [
    Mutant(
        "world: wrong tasks of other groups",
        "world/items.py",
        "for other in _of(task.group)}",
        "for other in TASKS}",
        "data/test_noise.py::test_wrong_tasks_answer_the_same_words_within_the_group",
    ),
    Mutant(
        "world: prompts of the training words",
        "world/items.py",
        'Random(f"{name}:{seed}"), _PROMPTS)',
        'Random(f"{name}:{seed}"), TRAIN)',
        "data/test_noise.py::test_prompts_of_a_group_leak_nothing",
    ),
]
