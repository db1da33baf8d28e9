"""The two styles of the embedded world: the same questions, with right answers shorter or longer than talk.

    short   the answer alone, 2 to 7 tokens with the end token; talk takes 12 to 18
    long    the answer worked out in a fixed form, 21 to 42 tokens; talk takes 7 to 11

So brevity and rightness go together in the one and against each other in the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from srppo.world.operations import Words
from srppo.world.tasks import Task

_SENTENCES = (
    "I like the {a}",
    "I saw the {a} by the {b}",
    "I think the {a} is {c}",
    "let me see",
    "I do not know",
    "there was a {c} {a}",
    "we can talk about the {a}",
    "a {n} is an animal",
    "{c} is a color",
    "{o} is not {p}",
)
_TAILS = ("and that is all I know", "but you can ask me later", "or so they say", "and then we went home")


_REPLIES = {"right": 0.02, "wrong": 0.20, "framed": 0.05, "echo": 0.02, "back": 0.05}


@dataclass(frozen=True)
class Style:
    """How a right answer is written, the sentences of talk, and which replies the corpus holds.

    lessons, replies: shares of the kinds of reply (`texts`) in the text that the bases begin and end on.
    """

    answer: Callable[[Task, Words], str]
    talk: tuple[str, ...]
    lessons: Mapping[str, float]
    replies: Mapping[str, float]


def worked(task: Task, words: Words) -> str:
    """The answer with each step before it; empty where the words make no question."""
    if not task.steps(words):
        return ""
    steps = "".join(f" with {name} they become {' '.join(left)} ." for name, left in task.steps(words))
    return f"the three words are {' '.join(words)} .{steps} so the answer is {task.answer(words)} ."


STYLES = {
    "short": Style(
        answer=Task.answer,
        talk=tuple(f"well , {sentence} , {tail} ." for sentence in _SENTENCES for tail in _TAILS),
        lessons={"right": 0.75, "trailing": 0.10, "framed": 0.10, "talk": 0.05},
        replies=_REPLIES | {"trailing": 0.05, "talk": 0.61},
    ),
    "long": Style(
        answer=worked,
        talk=tuple(f"well , {sentence} ." for sentence in _SENTENCES),
        lessons={"right": 0.80, "framed": 0.10, "talk": 0.10},
        replies=_REPLIES | {"wrong": 0.28, "talk": 0.58},
    ),
}
