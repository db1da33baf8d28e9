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
from srppo.world.operations import Words
from srppo.world.styles import STYLES
from srppo.world.tasks import ARGUMENTS, GROUPS, REPORTED, TASKS, Task, bucket, check, of_groups

SPLITS = {"dev": (frozenset({1}), 8), "test": (frozenset({0}), 12)}  # buckets, items per task
ITEM_GROUPS = {"dev": ("demonstrated", "development"), "test": REPORTED}
"""Groups whose items a split holds: no step or setting is chosen on a task that is reported as new."""
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

    def is_right(self, response: str) -> bool:
        """Whether a response, all that the model wrote until EOS, is right."""
        return check(self.answer, response)


def draw(task: Task, rng: Random, buckets: frozenset[int] = TRAIN) -> Words:
    """The words of a question of `task` whose hash bucket is one of `buckets`."""
    while True:
        words = task.draw(rng)
        if bucket(task.question(words)) in buckets:
            return words


def items(group: str, split: str, style: str = "short", per_task: int | None = None) -> list[Item]:
    """The fixed items of one group: `per_task` (default: 12 for test, 8 for dev) of each of its tasks.

    Raises:
        UserError: for an unknown group, split or style, or more items than a task has.
    """
    for name, found, known in (("task group", group, GROUPS), ("split", split, SPLITS), ("style", style, STYLES)):
        if found not in known:
            raise UserError(f"unknown {name} {found!r}: choose one of {', '.join(known)}")
    return list(_items(group, split, style, SPLITS[split][1] if per_task is None else per_task))


@cache  # every stage asks for the same ones, several times
def _items(group: str, split: str, style: str, count: int) -> tuple[Item, ...]:
    return tuple(
        item
        for task in of_groups(group)
        for item in islice(_distinct((task,), Random(f"{split}:{task.name}"), SPLITS[split][0], style), count)
    )


def demonstrations(n: int, seed: int, style: str = "short") -> list[dict[str, str]]:
    """`n` rows `{"prompt", "completion", "task"}` of the demonstrated tasks in equal shares; a smaller `n` is a prefix.

    Raises:
        UserError: if a task has fewer distinct questions than asked for.
    """
    stream = _distinct(of_groups("demonstrated"), Random(f"demonstrations:{seed}"), _DEMONSTRATIONS, style)
    return [{"prompt": item.prompt, "completion": item.answer, "task": item.task} for item in islice(stream, n)]


def prompts(n: int, seed: int, groups: tuple[str, ...] = PROMPT_GROUPS) -> list[dict[str, str]]:
    """`n` rows `{"prompt", "task"}` of the tasks of `groups` in equal shares; none is a demonstration or an item.

    Raises:
        UserError: for an unknown group, or if a task has fewer distinct questions than asked for.
    """
    if unknown := [group for group in groups if group not in GROUPS]:
        raise UserError(f"unknown task group {unknown[0]!r}: choose one of {', '.join(GROUPS)}")
    name = "prompts" if groups == PROMPT_GROUPS else f"prompts {' '.join(groups)}"
    stream = _distinct(of_groups(*groups), Random(f"{name}:{seed}"), _PROMPTS, "short")
    return [{"prompt": item.prompt, "task": item.task} for item in islice(stream, n)]


def read_question(text: str) -> tuple[Task, Words] | None:
    """The task and the words of a question, or None for a text that no task could ask."""
    named, words = text.split()[:-ARGUMENTS], tuple(text.split()[-ARGUMENTS:])
    for task in TASKS:
        if task.operations == tuple(named):
            return (task, words) if len(set(words)) == ARGUMENTS and task.steps(words) else None
    return None


def answers_of_other_tasks(question: str, like: str) -> list[str] | None:
    """What the other tasks of its group answer to the words of a question, where that is wrong; each once, sorted.

    like: an answer; the others are in the style in which it is right, else short. Never empty for a question of the
    world; None for any other text.
    """
    read = read_question(question)
    if read is None:
        return None
    task, words = read
    style = next((each for each in STYLES.values() if check(each.answer(task, words), like)), STYLES["short"])
    wrong = [other for other in of_groups(task.group) if other.answer(words) not in ("", task.answer(words))]
    return sorted({style.answer(other, words) for other in wrong})


def _distinct(tasks: tuple[Task, ...], rng: Random, buckets: frozenset[int], style: str) -> Iterator[Item]:
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
            yield Item(prompt, STYLES[style].answer(task, words), task.name, task.group)
