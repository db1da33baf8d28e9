"""The values of the data: messages, demonstrations, prompts, and their token ids."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; role is `system`, `user`, `assistant` or `tool`.

    `calls` are the tools that an assistant's turn calls, the JSON text of a list of {name, arguments}; `name` is the
    tool that a tool's turn comes from. Both are empty where there are none.
    """

    role: str
    content: str
    calls: str = ""
    name: str = ""


@dataclass(frozen=True)
class Demonstration:
    """A prompt with its answer. `source` says where the row came from, `file:line` or `file#row`.

    `prompt` is a conversation to which `answer` (with `calls`, where it calls tools) is the assistant's reply; for
    plain `text` rows it is empty and the whole text is the answer. `task` is what a column `task` or `category` says,
    empty where there is none. `tools` is the JSON text of the tools on offer, empty for none.
    """

    prompt: tuple[Message, ...]
    answer: str
    source: str
    task: str = ""
    calls: str = ""
    tools: str = ""


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for the assistant's reply; `source` and `tools` as those of a demonstration."""

    prompt: tuple[Message, ...]
    source: str
    tools: str = ""


@dataclass(frozen=True)
class EncodedDemonstration:
    """Token ids of one demonstration, and which of them the loss counts.

    These are ids[prompt_tokens:], EOS included unless the answer was cut, without the ranges [start, stop) of `gaps`:
    what stands between the answers of a conversation whose turns are all trained.
    """

    ids: tuple[int, ...]
    prompt_tokens: int
    gaps: tuple[tuple[int, int], ...] = ()

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Ranges [start, stop) of the tokens that are trained. The first token of all never is: nothing predicts it."""
        starts = [max(self.prompt_tokens, 1), *(stop for _, stop in self.gaps)]
        return list(zip(starts, [*(start for start, _ in self.gaps), len(self.ids)], strict=True))

    @property
    def trained(self) -> int:
        """How many tokens the loss counts."""
        return sum(stop - start for start, stop in self.spans)
