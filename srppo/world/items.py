"""Items to evaluate on, demonstrations and prompts, drawn from the tasks by seed.

The hash bucket of a question (`tasks.bucket`) says what it may serve, so no draw can leak into another:

    0      test items                        2, 3      demonstrations
    1      dev items                         4 to 9    prompts
                                             2 to 9    the corpus of the bases
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from random import Random

from srppo.errors import UserError
from srppo.world.tasks import GROUPS, TASKS, Task, bucket, check

SPLITS = {"dev": (frozenset({1}), 20), "test": (frozenset({0}), 50)}  # buckets, items per task
TRAIN = frozenset(range(2, 10))
_DEMONSTRATIONS = frozenset({2, 3})
_PROMPTS = TRAIN - _DEMONSTRATIONS
PROMPT_GROUPS = ("demonstrated", "prompted")
"""Groups that PPO prompts are drawn from unless others are named."""
_TRIES = 1000  # draws in a row that bring nothing new before a task counts as exhausted


@dataclass(frozen=True)
class Item:
    """A question with its one right answer."""

    prompt: str
    answer: str
    task: str
    group: str


def draw(task: Task, rng: Random, buckets: frozenset[int] = TRAIN) -> tuple[str, ...]:
    """The words of a question of `task` whose hash bucket is one of `buckets`."""
    while True:
        words = task.draw(rng)
        if bucket(task.question(words)) in buckets:
            return words


def items(group: str, split: str, per_task: int | None = None) -> list[Item]:
    """The fixed items of one group: `per_task` (default: 50 for test, 20 for dev) of each of its six tasks.

    Raises:
        UserError: for an unknown group or split, or more items than a task has.
    """
    if group not in GROUPS:
        raise UserError(f"unknown task group {group!r}: choose one of {', '.join(GROUPS)}")
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    buckets, default = SPLITS[split]
    return list(_items(group, split, buckets, default if per_task is None else per_task))


@cache  # every stage asks for the same ones, several times
def _items(group: str, split: str, buckets: frozenset[int], count: int) -> tuple[Item, ...]:
    return tuple(
        item
        for task in TASKS
        if task.group == group
        for item in islice(_distinct((task,), Random(f"{split}:{task.name}"), buckets), count)
    )


def demonstrations(n: int, seed: int) -> list[dict[str, str]]:
    """`n` rows `{"prompt", "completion"}` of the demonstrated tasks in equal shares; a smaller `n` gives a prefix.

    Raises:
        UserError: if a task has fewer distinct questions than asked for.
    """
    stream = _distinct(_of("demonstrated"), Random(f"demonstrations:{seed}"), _DEMONSTRATIONS)
    return [{"prompt": item.prompt, "completion": item.answer} for item in islice(stream, n)]


def prompts(n: int, seed: int, groups: tuple[str, ...] = PROMPT_GROUPS) -> list[dict[str, str]]:
    """`n` rows `{"prompt"}` of the tasks of `groups` in equal shares; none is a demonstration, or a dev or test item.

    Raises:
        UserError: for an unknown group, or if a task has fewer distinct questions than asked for.
    """
    if unknown := [group for group in groups if group not in GROUPS]:
        raise UserError(f"unknown task group {unknown[0]!r}: choose one of {', '.join(GROUPS)}")
    name = "prompts" if groups == PROMPT_GROUPS else f"prompts {' '.join(groups)}"
    stream = _distinct(_of(*groups), Random(f"{name}:{seed}"), _PROMPTS)
    return [{"prompt": item.prompt} for item in islice(stream, n)]


def read_question(text: str) -> tuple[Task, tuple[str, ...]] | None:
    """The task and the words of a question, or None for a text that no task could ask."""
    instruction, *rest = text.split() or [""]
    words = tuple(rest)
    for task in TASKS:
        if task.instruction == instruction and task.arity[0] <= len(words) <= task.arity[1]:
            distinct = len(set(words)) == len(words) and set(words) <= set(task.pool)
            return (task, words) if distinct and task.answer(words) else None
    return None


def answers_of_other_tasks(question: str) -> list[str] | None:
    """What the other tasks of its group answer to the words of a question, where that is wrong; each once, sorted.

    Never empty for a question of the world; None for any other text.
    """
    read = read_question(question)
    if read is None:
        return None
    task, words = read
    answers = {other.answer(words) for other in _of(task.group)} - {""}
    return sorted(answer for answer in answers if not check(task.answer(words), answer))


def _of(*groups: str) -> tuple[Task, ...]:
    return tuple(task for task in TASKS if task.group in groups)


def _distinct(tasks: tuple[Task, ...], rng: Random, buckets: frozenset[int]) -> Iterator[Item]:
    """Questions without repetition, the tasks in a new order each round, so every prefix is balanced."""
    seen: set[str] = set()
    while True:
        for task in rng.sample(tasks, len(tasks)):
            for _ in range(_TRIES):
                words = draw(task, rng, buckets)
                prompt = task.question(words)
                if prompt not in seen:
                    break
            else:
                raise UserError(f"the embedded task {task.name!r} has no further questions: ask for fewer rows")
            seen.add(prompt)
            yield Item(prompt=prompt, answer=task.answer(words), task=task.name, group=task.group)
