"""The corpus of the bases: questions whose replies are mostly not answers, and talk without questions.

What a base learns here decides what is left for SFT and PPO. It can answer (right answers are a minor share of the
replies, and more stand inside talk), but its likeliest reply is talk, and its answers are often those to another task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from random import Random

from srppo.world.items import draw
from srppo.world.tasks import ANIMALS, CHAT, COLORS, OPPOSITES, TASKS, WORDS, Task
from srppo.world.tokenizer import EOS

PLAIN = 0.05  # share of documents that are talk without a question

REPLIES = {
    "right": 0.10,  # the answer and nothing else
    "trailing": 0.12,  # the answer, then talk: no exact checker accepts it
    "framed": 0.12,  # the answer inside talk
    "wrong": 0.07,  # the answer to another task on the same words
    "echo": 0.10,  # the words as they stand
    "back": 0.05,  # a question back
    "talk": 0.44,
}
"""Shares of the kinds of reply in the text that the bases end on."""

LESSONS = {"right": 0.45, "trailing": 0.15, "framed": 0.15, "wrong": 0.05, "echo": 0.05, "back": 0.05, "talk": 0.10}
"""Shares in the text that they begin with, which teaches the tasks before the manner of replying."""


def documents(seed: int, shares: Mapping[str, float] = REPLIES) -> Iterator[str]:
    """Documents without end, each closed by EOS, the same for the same arguments; none holds a dev or test question."""
    rng = Random(f"corpus:{seed}")
    kinds, weights = tuple(shares), tuple(shares.values())
    while True:
        if rng.random() < PLAIN:
            yield talk(rng, (rng.choice(WORDS), rng.choice(WORDS))) + EOS
            continue
        task = rng.choice(TASKS)
        words = draw(task, rng)
        reply = _REPLY[rng.choices(kinds, weights)[0]](rng, task, words)
        yield f"{CHAT.format(prompt=task.question(words))} {reply}{EOS}"


_TALK = (
    "I like the {a} .",
    "I saw the {a} by the {b} .",
    "I think the {a} is {c} .",
    "that is a long story .",
    "let me see .",
    "I do not know .",
    "there was a {c} {a} .",
    "we can talk about the {a} .",
    "a {n} is an animal .",
    "{c} is a color .",
    "{o} is not {p} .",
)


def talk(rng: Random, words: tuple[str, ...]) -> str:
    """A sentence that goes nowhere, about the words."""
    i = rng.randrange(len(OPPOSITES))
    return "well , " + rng.choice(_TALK).format(
        a=rng.choice(words),
        b=rng.choice(words),
        c=rng.choice(COLORS),
        n=rng.choice(ANIMALS),
        o=OPPOSITES[i],
        p=OPPOSITES[i ^ 1],
    )


_FRAMES = ("I think {x} .", "it may be {x} .", "sure , {x} .", "is it {x} ?")
_TRAILS = ("{x} , I think .", "{x} , but ask me later .", "{x} , or so .", "{x} , is that so ?")


def _right(rng: Random, task: Task, words: tuple[str, ...]) -> str:
    return task.answer(words)


def _trailing(rng: Random, task: Task, words: tuple[str, ...]) -> str:
    return rng.choice(_TRAILS).format(x=task.answer(words))


def _framed(rng: Random, task: Task, words: tuple[str, ...]) -> str:
    return rng.choice(_FRAMES).format(x=task.answer(words))


def _wrong(rng: Random, task: Task, words: tuple[str, ...]) -> str:
    right = task.answer(words)
    while True:
        answer = rng.choice(TASKS).answer(words)
        if answer and answer != right:
            return answer


def _echo(rng: Random, task: Task, words: tuple[str, ...]) -> str:
    echo = " ".join(words)
    return f"{echo} ?" if echo == task.answer(words) else echo


_BACK = ("what do you mean by {i} ?", "why do you ask about {a} ?", "can you say that again ?", "{i} what ?")


def _back(rng: Random, task: Task, words: tuple[str, ...]) -> str:
    return rng.choice(_BACK).format(i=task.instruction, a=rng.choice(words))


def _talk(rng: Random, task: Task, words: tuple[str, ...]) -> str:
    return talk(rng, words)


_REPLY = {
    "right": _right,
    "trailing": _trailing,
    "framed": _framed,
    "wrong": _wrong,
    "echo": _echo,
    "back": _back,
    "talk": _talk,
}
