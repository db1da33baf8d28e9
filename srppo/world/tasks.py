"""The word tasks of the embedded world: an instruction, a few words, one right answer.

A question reads `reverse sun cat` and its answer `cat sun`. Eighteen tasks stand in three disjoint groups of six:

    demonstrated   in the demonstrations of SFT (in-domain)
    prompted       among the prompts of PPO, never demonstrated
    unseen         in neither (out-of-domain)

Every answer is a function of the words, so checking is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from random import Random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ANIMALS = _words("cat dog cow pig hen fox owl bee ant bat rat frog duck goat bear lion wolf deer fish crab")
COLORS = _words("red blue green pink gray gold white black brown tan")
THINGS = _words(
    "sun moon star rain snow wind sea lake hill tree leaf rose seed sand rock road farm town park ship boat car bus "
    "train bike ball bell book pen map key box bag cup pot pan fork bowl lamp door wall roof bed desk coat hat shoe "
    "sock ring drum song game bread rice milk egg cake corn bean soup pear plum apple lemon salt nut pie tea jam ham "
    "hand foot head nose ear eye arm leg king boy girl man baby"
)
OPPOSITES = _words(
    "hot cold big small old new fast slow up down day night wet dry left right open shut soft hard full empty high low "
    "near far rich poor good bad happy sad early late"
)  # neighbours are pairs
WORDS = ANIMALS + COLORS + THINGS + OPPOSITES

_OPPOSITE = {word: OPPOSITES[i ^ 1] for i, word in enumerate(OPPOSITES)}


@dataclass(frozen=True)
class Task:
    """One task: `instruction` followed by `arity[0]` to `arity[1]` (both included) distinct words of `pool`."""

    name: str
    group: str
    instruction: str
    arity: tuple[int, int]
    answer: Callable[[tuple[str, ...]], str]
    """The right answer to the words; empty where they make no question, such as no animal among them."""
    pool: tuple[str, ...] = WORDS

    def question(self, words: tuple[str, ...]) -> str:
        """The raw instruction, such as `reverse sun cat`, without any chat template."""
        return f"{self.instruction} {' '.join(words)}"

    def draw(self, rng: Random) -> tuple[str, ...]:
        """Words that make a question, drawn with `rng`."""
        while True:
            words = tuple(rng.sample(self.pool, rng.randint(*self.arity)))
            if self.answer(words):
                return words


def _opposites(words: tuple[str, ...]) -> str:
    return " ".join(_OPPOSITE[word] for word in words) if all(word in _OPPOSITE for word in words) else ""


def _only(kind: tuple[str, ...]) -> Callable[[tuple[str, ...]], str]:
    return lambda words: " ".join(word for word in words if word in kind)


def _task(
    group: str,
    name: str,
    arity: tuple[int, int],
    answer: Callable[[tuple[str, ...]], str | tuple[str, ...]],
    pool: tuple[str, ...] = WORDS,
) -> Task:
    def text(words: tuple[str, ...]) -> str:
        result = answer(words)
        return result if isinstance(result, str) else " ".join(result)

    return Task(name=name, group=group, instruction=name, arity=arity, answer=text, pool=pool)


CHAT = "Q: {prompt}\nA:"
"""What stands before a reply; the reply starts with a space and ends with EOS."""

GROUPS = ("demonstrated", "prompted", "unseen")

TASKS = (
    _task("demonstrated", "first", (2, 3), lambda w: w[0]),
    _task("demonstrated", "reverse", (2, 3), lambda w: w[::-1]),
    _task("demonstrated", "double", (2, 3), lambda w: tuple(x for x in w for _ in range(2))),
    _task("demonstrated", "ends", (3, 3), lambda w: (w[0], w[-1])),
    _task("demonstrated", "swap", (2, 3), lambda w: (w[1], w[0], *w[2:])),
    _task("demonstrated", "opposite", (2, 3), _opposites, OPPOSITES),
    _task("prompted", "copy", (2, 3), lambda w: w),
    _task("prompted", "last", (2, 3), lambda w: w[-1]),
    _task("prompted", "mirror", (2, 2), lambda w: w + w[::-1]),
    _task("prompted", "drop", (2, 3), lambda w: w[1:]),
    _task("prompted", "rotate", (2, 3), lambda w: (*w[1:], w[0])),
    _task("prompted", "animals", (2, 3), _only(ANIMALS), ANIMALS + THINGS[::4]),
    _task("unseen", "second", (2, 3), lambda w: w[1]),
    _task("unseen", "join", (2, 3), lambda w: " and ".join(w)),
    _task("unseen", "twice", (2, 3), lambda w: w + w),
    _task("unseen", "chop", (2, 3), lambda w: w[:-1]),
    _task("unseen", "sort", (2, 3), lambda w: tuple(sorted(w))),
    _task("unseen", "colors", (2, 3), _only(COLORS), COLORS + THINGS[1::8]),
)


def check(answer: str, response: str) -> bool:
    """Whether `response`, all that the model wrote until EOS, is `answer`: equal after stripping outer white space."""
    return response.strip() == answer.strip()


def bucket(question: str) -> int:
    """Which of ten hash buckets a question falls in: 0 is test, 1 is dev, the rest train, whatever the seed."""
    return int.from_bytes(sha256(question.encode()).digest()[:8], "big") % 10
