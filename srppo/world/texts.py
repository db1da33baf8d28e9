"""The corpus of the bases: questions whose replies are mostly not answers, and talk without questions.

What a base learns here decides what is left for SFT and PPO. It can answer (right answers are a minor share of the
replies, and more stand inside talk), but its likeliest reply is talk, and its answers are often those to another task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from random import Random

from srppo.world.items import draw
from srppo.world.operations import ANIMALS, COLORS, OPERATIONS, OPPOSITES, WORDS, Words
from srppo.world.styles import STYLES, Style
from srppo.world.tasks import CHAT, TASKS, Task
from srppo.world.tokenizer import EOS

PLAIN = 0.05  # share of documents that are talk without a question
ASKED = tuple(task for task in TASKS if task.group != "absent")


def documents(seed: int, style: Style = STYLES["short"], shares: Mapping[str, float] | None = None) -> Iterator[str]:
    """Documents without end, each closed by EOS, the same for the same arguments.

    None asks a dev or test question or an absent task. shares: of the kinds of reply; by default the style's last.
    """
    rng = Random(f"corpus:{seed}")
    shares = style.replies if shares is None else shares
    kinds, weights = tuple(shares), tuple(shares.values())
    while True:
        if rng.random() < PLAIN:
            yield talk(rng, style, tuple(rng.sample(WORDS, 2))) + EOS
            continue
        task = rng.choice(ASKED)
        words = draw(task, rng)
        reply = _REPLY[rng.choices(kinds, weights)[0]](rng, style, task, words)
        yield f"{CHAT.format(prompt=task.question(words))} {reply}{EOS}"


def talk(rng: Random, style: Style, words: Words) -> str:
    """A sentence that goes nowhere, about the words."""
    i = rng.randrange(len(OPPOSITES))
    return rng.choice(style.talk).format(
        a=rng.choice(words),
        b=rng.choice(words),
        c=rng.choice(COLORS),
        n=rng.choice(ANIMALS),
        o=OPPOSITES[i],
        p=OPPOSITES[i ^ 1],
    )


_FRAMES = ("I think {x} .", "it may be {x} .", "sure , {x} .", "is it {x} ?")
_TRAILS = ("{x} , I think .", "{x} , but ask me later .", "{x} , or so .", "{x} , is that so ?")
_BACK = ("what do you mean by {i} ?", "why do you ask about {a} ?", "can you say that again ?", "{i} what ?")


def _right(rng: Random, style: Style, task: Task, words: Words) -> str:
    return style.answer(task, words)


def _trailing(rng: Random, style: Style, task: Task, words: Words) -> str:
    """The answer and then talk, which no exact checker accepts."""
    return rng.choice(_TRAILS).format(x=task.answer(words))


def _framed(rng: Random, style: Style, task: Task, words: Words) -> str:
    """The answer inside talk."""
    return rng.choice(_FRAMES).format(x=task.answer(words))


def _wrong(rng: Random, style: Style, task: Task, words: Words) -> str:
    """The answer to a question half heard: without one of two operations, or with a neighbour of the only one."""
    wrong = [other for other in _half_heard(task) if other.answer(words) not in ("", task.answer(words))]
    while not wrong:
        wrong = [other for other in (rng.choice(ASKED),) if other.answer(words) not in ("", task.answer(words))]
    return style.answer(rng.choice(wrong), words)


def _half_heard(task: Task) -> list[Task]:
    if len(task.operations) > 1:
        return [Task((name,), task.group) for name in task.operations]
    names, at = tuple(OPERATIONS), tuple(OPERATIONS).index(task.name)
    return [Task((names[(at + step) % len(names)],), task.group) for step in (-1, 1)]


def _echo(rng: Random, style: Style, task: Task, words: Words) -> str:
    """The words as they stand."""
    echo = " ".join(words)
    return f"{echo} ?" if echo == style.answer(task, words) else echo


def _back(rng: Random, style: Style, task: Task, words: Words) -> str:
    """A question back."""
    return rng.choice(_BACK).format(i=task.operations[0], a=rng.choice(words))


def _talk(rng: Random, style: Style, task: Task, words: Words) -> str:
    return talk(rng, style, words)


_REPLY = {
    "right": _right,
    "trailing": _trailing,
    "framed": _framed,
    "wrong": _wrong,
    "echo": _echo,
    "back": _back,
    "talk": _talk,
}
