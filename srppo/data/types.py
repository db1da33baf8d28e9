"""The values of the data: messages, demonstrations, prompts, and their token ids."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; role is `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True)
class Demonstration:
    """A prompt with its answer. `source` says where the row came from, `file:line` or `file#row`.

    `prompt` is a conversation to which `answer` is the assistant's reply; for plain `text` rows it is empty and the
    whole text is the answer. `task` is what a column `task` or `category` says, empty where there is none.
    """

    prompt: tuple[Message, ...]
    answer: str
    source: str
    task: str = ""


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for the assistant's reply."""

    messages: tuple[Message, ...]
    source: str


@dataclass(frozen=True)
class EncodedDemonstration:
    """Token ids of one demonstration; the loss counts ids[prompt_tokens:], EOS included unless the answer was cut."""

    ids: tuple[int, ...]
    prompt_tokens: int
