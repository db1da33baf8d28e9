"""What a forward pass takes: rollouts as one padded batch, and demonstrations laid out the same way.

Shape suffixes: B rollouts, P prompt length, T response length, S = P + T, V vocabulary, D hidden, N flattened tokens.
A mask is True where a position counts. Models are `policy`, `sft_policy`, `base_policy`, `value`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from srppo.data.types import EncodedDemonstration
from srppo.models.language_model import LanguageModel, forward_flops


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


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(tokens_BP int64, mask_BP bool): real tokens to the right; the mask comes from lengths, so pad may equal EOS."""
    width = max(len(row) for row in rows)
    tokens_BP = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask_BP = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens_BP[i, width - len(row) :] = torch.tensor(row, dtype=torch.int64)
        mask_BP[i, width - len(row) :] = True
    return tokens_BP, mask_BP


def collate(rows: Sequence[EncodedDemonstration], pad_id: int) -> tuple[Tensor, Tensor, int]:
    """(tokens_BS, attention_mask_BS, T): prompts left-padded, answers right-padded, as in rollouts.

    A row without a prompt gives its first token as one: nothing predicts it.
    """
    splits = [max(row.prompt_tokens, 1) for row in rows]
    prompt_BP, prompt_mask_BP = left_pad([row.ids[:n] for row, n in zip(rows, splits, strict=True)], pad_id)
    answers = [row.ids[n:][::-1] for row, n in zip(rows, splits, strict=True)]
    answer_BT, answer_mask_BT = (x.flip(1) for x in left_pad(answers, pad_id))
    tokens_BS = torch.cat([prompt_BP, answer_BT], dim=1)
    return tokens_BS, torch.cat([prompt_mask_BP, answer_mask_BT], dim=1), answer_BT.shape[1]


def answer_nll_sum(model: LanguageModel, rows: Sequence[EncodedDemonstration], pad_id: int) -> tuple[Tensor, int]:
    """(summed NLL of the answers in nats, their token count). Differentiable."""
    tokens_BS, attention_mask_BS, width = collate(rows, pad_id)
    logprobs_BT = model.response_logprobs(tokens_BS.to(model.device), attention_mask_BS.to(model.device), width)
    return -logprobs_BT.sum(), int(attention_mask_BS[:, -width:].sum())


def training_flops(model: LanguageModel, rows: Sequence[EncodedDemonstration]) -> int:
    """Counted operations of forward and backward over some demonstrations."""
    lengths = torch.tensor([len(row.ids) for row in rows])
    answers = sum(len(row.ids) - max(row.prompt_tokens, 1) for row in rows)
    return 3 * forward_flops(model, lengths, answers)
