"""The two styles of the embedded world: the same questions, with right answers shorter or longer than talk.

    short   the answer alone, up to seven tokens (end included); talk takes 10 to 18
    long    the answer worked out in a fixed form, 20 to 42 tokens; talk takes 6 to 11

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
        replies={"right": 0.03, "trailing": 0.07, "framed": 0.07, "wrong": 0.07, "echo": 0.03, "back": 0.05, "talk": 0.68},
    ),
    "long": Style(
        answer=worked,
        talk=tuple(f"well , {sentence} ." for sentence in _SENTENCES),
        lessons={"right": 0.80, "framed": 0.10, "talk": 0.10},
        replies={"right": 0.03, "framed": 0.07, "wrong": 0.08, "echo": 0.03, "back": 0.05, "talk": 0.74},
    ),
}
