"""What the word tasks are made of: the words, and operations from a list of words to another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Words = tuple[str, ...]


def _words(text: str) -> Words:
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
class Operation:
    """`apply` maps a list of at least `shortest` words of `pool` to a list of words."""

    apply: Callable[[Words], Words]
    shortest: int = 1
    pool: Words = WORDS


OPERATIONS = {
    "copy": Operation(lambda w: w),
    "first": Operation(lambda w: w[:1], 2),
    "second": Operation(lambda w: w[1:2], 2),
    "last": Operation(lambda w: w[-1:], 2),
    "ends": Operation(lambda w: (w[0], w[-1]), 3),
    "drop": Operation(lambda w: w[1:], 2),
    "chop": Operation(lambda w: w[:-1], 2),
    "reverse": Operation(lambda w: w[::-1], 2),
    "swap": Operation(lambda w: (w[1], w[0], *w[2:]), 2),
    "rotate": Operation(lambda w: (*w[1:], w[0]), 2),
    "double": Operation(lambda w: tuple(x for x in w for _ in range(2))),
    "twice": Operation(lambda w: w + w),
    "mirror": Operation(lambda w: w + w[::-1], 2),
    "circle": Operation(lambda w: (*w, w[0]), 2),
    "stutter": Operation(lambda w: (w[0], *w)),
    "linger": Operation(lambda w: (*w, w[-1])),
    "join": Operation(lambda w: tuple(x for word in w for x in ("and", word))[1:], 2),
    "opposite": Operation(lambda w: tuple(_OPPOSITE[word] for word in w), pool=OPPOSITES),
    "animals": Operation(lambda w: tuple(word for word in w if word in ANIMALS), pool=ANIMALS + THINGS[::4]),
    "colors": Operation(lambda w: tuple(word for word in w if word in COLORS), pool=COLORS + THINGS[1::8]),
}
"""Operations by the word that asks for them; none of these words is an argument."""
