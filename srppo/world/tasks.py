"""The word tasks of the embedded world: one operation or two in a row on three words, one right answer.

A question reads `reverse double sun cat dog`. The operation beside the words comes first, so this doubles each word and
then reverses the list. Tasks stand in five disjoint groups:

    demonstrated   in the demonstrations of SFT (in-domain)
    prompted       among the prompts of PPO, never demonstrated
    unseen         in neither (out-of-domain); the corpus of the bases asks them as it asks those above
    absent         not in the corpus either, but each operation is, in the same place of another task
    development    in the corpus and nowhere else: steps and settings are chosen on these
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from random import Random

from srppo.world.operations import OPERATIONS, WORDS, Words

ARGUMENTS = 3  # words of a question
LONGEST = 6  # words of a list on the way to the answer


@dataclass(frozen=True)
class Task:
    """`operations` as the question names them: the last one is applied first."""

    operations: Words
    group: str

    @property
    def name(self) -> str:
        """The operations as a question names them, such as `reverse double`."""
        return " ".join(self.operations)

    @property
    def pool(self) -> Words:
        """The words that a question may hold: those of the one operation that takes no others, or all."""
        return next((OPERATIONS[name].pool for name in self.operations if OPERATIONS[name].pool != WORDS), WORDS)

    def question(self, words: Words) -> str:
        """The raw instruction, such as `reverse double sun cat dog`, without any chat template."""
        return f"{self.name} {' '.join(words)}"

    def steps(self, words: Words) -> list[tuple[str, Words]]:
        """Each operation in the order of its application with the list it leaves; none where the words make no
        question, such as `animals` with no animal among them."""
        if not set(words) <= set(self.pool):
            return []
        steps = []
        for name in reversed(self.operations):
            if len(words) < OPERATIONS[name].shortest:
                return []
            words = OPERATIONS[name].apply(words)
            steps.append((name, words))
        return steps if words and all(len(left) <= LONGEST for _, left in steps) else []

    def answer(self, words: Words) -> str:
        """The list that the last step leaves; empty where the words make no question."""
        return " ".join((self.steps(words) or [("", ())])[-1][1])

    def draw(self, rng: Random) -> Words:
        """Distinct words that make a question, drawn with `rng`."""
        while True:
            words = tuple(rng.sample(self.pool, ARGUMENTS))
            if self.steps(words):
                return words


_GROUPS = {  # dealt by seed: all groups are alike in the length of answers and in what the operations look at
    "demonstrated": "drop, first, join, stutter, chop double, chop reverse, circle linger, circle reverse, "
    "drop mirror, linger chop, linger linger, mirror colors, mirror ends, opposite second, reverse twice, swap twice",
    "prompted": "chop, copy, ends, mirror, circle drop, circle rotate, double second, join rotate, mirror animals, "
    "mirror reverse, opposite rotate, reverse animals, rotate twice, second colors, stutter swap, twice swap",
    "unseen": "animals, double, last, linger, opposite, rotate, second, swap, twice, chop mirror, circle chop, "
    "circle ends, circle swap, double animals, double swap, drop twice, ends mirror, ends reverse, join drop, "
    "join ends, join reverse, mirror chop, mirror drop, mirror rotate, mirror swap, opposite chop, opposite drop, "
    "opposite first, opposite last, opposite stutter, reverse circle, reverse double, reverse stutter, reverse swap, "
    "rotate double, rotate mirror, stutter drop, stutter rotate, swap linger, twice ends",
    "absent": "chop stutter, circle animals, circle colors, drop linger, ends rotate, opposite double, rotate circle, "
    "rotate linger, stutter linger, stutter stutter, twice chop, twice drop",
    "development": "circle, colors, reverse, circle stutter, double colors, double drop, double ends, double last, "
    "opposite swap, opposite twice, reverse rotate, stutter ends",
}
GROUPS = tuple(_GROUPS)
REPORTED = ("demonstrated", "prompted", "unseen", "absent")
"""Groups with test items."""
TASKS = tuple(Task(tuple(name.split()), group) for group, names in _GROUPS.items() for name in names.split(", "))

CHAT = "Q: {prompt}\nA:"
"""What stands before a reply; the reply starts with a space and ends with EOS."""


def of_groups(*groups: str) -> tuple[Task, ...]:
    """The tasks of some groups."""
    return tuple(task for task in TASKS if task.group in groups)


def check(answer: str, response: str) -> bool:
    """Whether `response`, all that the model wrote until EOS, is `answer`: equal after stripping outer white space."""
    return response.strip() == answer.strip()


def bucket(question: str) -> int:
    """Which of ten hash buckets a question falls in: 0 is test, 1 is dev, the rest train, whatever the seed."""
    return int.from_bytes(sha256(question.encode()).digest()[:8], "big") % 10
