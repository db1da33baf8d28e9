"""The values that flow between the parts, and the legend of shapes.

Shape suffixes: B rollouts, P prompt length, T response length, S = P + T, V vocabulary, D hidden, N flattened tokens.
A mask is True where a position counts. Models are `policy`, `sft_policy`, `base_policy`, `value`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


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


@dataclass(frozen=True)
class RolloutBatch:
    """Responses sampled from one policy, left-padded prompts and right-padded responses side by side.

    tokens_BS            int64, prompt (left-padded to P) then response (right-padded to T)
    attention_mask_BS    bool, True on real tokens
    response_mask_BT     bool, True on response tokens up to and including EOS: a prefix of every row
    old_logprobs_BT      float32, behaviour log-probs at the sampling temperature, 0 where masked
    old_values_BT        float32, the critic's value of the state before each response token, 0 where masked
    ended_B              bool, True when the response ended by a stop token within the length limit

    Raises ValueError naming the field whose shape, dtype or content does not fit.
    """

    tokens_BS: Tensor
    attention_mask_BS: Tensor
    response_mask_BT: Tensor
    old_logprobs_BT: Tensor
    old_values_BT: Tensor
    ended_B: Tensor

    def __post_init__(self) -> None:
        batch, seq = self.tokens_BS.shape
        response = self.response_mask_BT.shape[1]
        expected = {
            "tokens_BS": ((batch, seq), torch.int64),
            "attention_mask_BS": ((batch, seq), torch.bool),
            "response_mask_BT": ((batch, response), torch.bool),
            "old_logprobs_BT": ((batch, response), torch.float32),
            "old_values_BT": ((batch, response), torch.float32),
            "ended_B": ((batch,), torch.bool),
        }
        for name, (shape, dtype) in expected.items():
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                found = f"{tuple(tensor.shape)} {tensor.dtype}"
                raise ValueError(f"RolloutBatch.{name} is {found}, expected {shape} {dtype}")
        if response >= seq:
            raise ValueError(f"RolloutBatch: response length {response} leaves no prompt in {seq} columns")
        if not torch.equal(self.attention_mask_BS[:, -response:], self.response_mask_BT):
            raise ValueError("RolloutBatch.attention_mask_BS does not end in response_mask_BT")
        if (self.response_mask_BT[:, 1:] & ~self.response_mask_BT[:, :-1]).any():
            raise ValueError("RolloutBatch.response_mask_BT has a hole; it must be a prefix of each row")

    @property
    def prompt_width(self) -> int:
        """P, the padded prompt length."""
        return self.tokens_BS.shape[1] - self.response_mask_BT.shape[1]

    @property
    def response_BT(self) -> Tensor:
        """The response tokens."""
        return self.tokens_BS[:, self.prompt_width :]

    def lengths_B(self) -> Tensor:
        """Response lengths in tokens, EOS included; int64."""
        return self.response_mask_BT.sum(dim=1)

    def rows(self, index: Tensor | slice) -> RolloutBatch:
        """The rows at `index`, columns cut to what these rows need (padding changes no result, only time)."""
        part = {f.name: getattr(self, f.name)[index] for f in fields(self)}
        response = max(int(part["response_mask_BT"].sum(dim=1).max()), 1)
        width = self.prompt_width
        prompt = int(part["attention_mask_BS"][:, :width].sum(dim=1).max())
        keep = slice(width - prompt, width + response)
        for name in ("tokens_BS", "attention_mask_BS"):
            part[name] = part[name][:, keep]
        for name in ("response_mask_BT", "old_logprobs_BT", "old_values_BT"):
            part[name] = part[name][:, :response]
        return RolloutBatch(**part)
