"""The corpus of the bases: questions whose replies are mostly not answers, and talk without questions.

What a base learns here decides what is left for SFT and PPO. It can answer (right answers are a minor share of the
replies, and more stand inside talk), but its likeliest reply is talk, and its answers are often those to another task.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from srppo.world.items import draw
from srppo.world.tasks import ANIMALS, CHAT, COLORS, OPPOSITES, TASKS, WORDS, Task
from srppo.world.tokenizer import EOS

PLAIN = 0.06  # share of documents that are talk without a question

REPLIES = {
    "right": 0.17,  # the answer and nothing else
    "framed": 0.28,  # the answer inside talk, which no exact checker accepts
    "wrong": 0.10,  # the answer to another task on the same words
    "echo": 0.08,  # the words, or the question, as they stand
    "back": 0.09,  # a question back
    "talk": 0.28,
}


def documents(seed: int) -> Iterator[str]:
    """Documents without end, each closed by EOS, the same for the same `seed`; none holds a dev or test question."""
    rng = Random(f"corpus:{seed}")
    kinds, shares = tuple(REPLIES), tuple(REPLIES.values())
    while True:
        if rng.random() < PLAIN:
            yield talk(rng, (rng.choice(WORDS), rng.choice(WORDS))) + EOS
            continue
        task = rng.choice(TASKS)
        words = draw(task, rng)
        reply = _REPLY[rng.choices(kinds, shares)[0]](rng, task, words)
        yield f"{CHAT.format(prompt=task.question(words))} {reply}{EOS}"


_OPENINGS = ("well", "well", "well", "hmm", "oh", "I")
_TALK = (
    "I like the {a} .",
    "I saw the {a} by the {b} .",
    "I think the {a} is {c} .",
    "that is a long story about a {a} .",
    "let me tell you about the {b} .",
    "my {a} is at home with the {b} .",
    "I do not know what to say .",
    "there was a {c} {a} and it was very nice .",
    "we can talk about the {a} some other time .",
    "you can see a {a} and a {b} from here .",
    "one {n} saw a {c} {a} .",
    "a {n} is an animal .",
    "{c} is a color , and so is {d} .",
    "{o} is not {p} .",
)


def talk(rng: Random, words: tuple[str, ...]) -> str:
    """A sentence that goes nowhere, about the words."""
    first = rng.choice(_OPENINGS)
    text = f"{first} ," if first != "I" else "I see ,"
    i = rng.randrange(len(OPPOSITES))
    return f"{text} " + rng.choice(_TALK).format(
        a=rng.choice(words),
        b=rng.choice(words),
        c=rng.choice(COLORS),
        d=rng.choice(COLORS),
        n=rng.choice(ANIMALS),
        o=OPPOSITES[i],
        p=OPPOSITES[i ^ 1],
    )


_FRAMES = (
    "I think {x} .",
    "it may be {x} .",
    "I would say {x} , is that so ?",
    "sure , {x} .",
    "{x} , but ask me later .",
    "{x} and that is all I know .",
    "{x} ?",
)


def _right(rng: Random, task: Task, words: tuple[str, ...]) -> str:
    return task.answer(words)


def _framed(rng: Random, task: Task, words: tuple[str, ...]) -> str:
    return rng.choice(_FRAMES).format(x=task.answer(words))


def _wrong(rng: Random, task: Task, words: tuple[str, ...]) -> str:
    right = task.answer(words)
    while True:
        answer = rng.choice(TASKS).answer(words)
        if answer and answer != right:
            return answer


def _echo(rng: Random, task: Task, words: tuple[str, ...]) -> str:
    return " ".join(words) if rng.random() < 0.5 and task.name != "copy" else f"{task.question(words)} ?"


_BACK = (
    "what do you mean by {i} ?",
    "why do you ask about {a} ?",
    "do you like the {a} ?",
    "can you say that again ?",
    "{i} what ?",
    "is it about the {a} or the {b} ?",
)


def _back(rng: Random, task: Task, words: tuple[str, ...]) -> str:
    return rng.choice(_BACK).format(i=task.instruction, a=words[0], b=words[-1])


def _talk(rng: Random, task: Task, words: tuple[str, ...]) -> str:
    return talk(rng, words)


_REPLY = {"right": _right, "framed": _framed, "wrong": _wrong, "echo": _echo, "back": _back, "talk": _talk}
