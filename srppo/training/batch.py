"""What a forward pass takes: rollouts as one padded batch, and demonstrations laid out the same way.

Shape suffixes: B rollouts, P prompt length, T response length, S = P + T, V vocabulary, D hidden, N flattened tokens.
A mask is True where a position counts. Models are `policy`, `sft_policy`, `base_policy`, `value`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from srppo.data.types import EncodedDemonstration
from srppo.models.flops import update_flops
from srppo.models.language_model import LanguageModel
from srppo.training import parallel

_DTYPES = {
    "tokens_BS": torch.int64,
    "sampled_logprobs_BT": torch.float32,
    "old_logprobs_BT": torch.float32,
    "old_values_BT": torch.float32,
}


@dataclass(frozen=True)
class Generated:
    """Responses, left-padded prompts and right-padded responses side by side.

    tokens_BS            int64, prompt (left-padded to P) then response (right-padded to T)
    attention_mask_BS    bool, True on real tokens
    response_mask_BT     bool, True on response tokens up to and including EOS: a prefix of every row
    ended_B              bool, True when the response ended by a stop token within the length limit

    Raises ValueError naming the field whose shape, dtype or content does not fit.
    """

    tokens_BS: Tensor
    attention_mask_BS: Tensor
    response_mask_BT: Tensor
    ended_B: Tensor

    def __post_init__(self) -> None:
        (batch, seq), response = self.tokens_BS.shape, self.response_mask_BT.shape[1]
        shapes = {"B": (batch,), "BS": (batch, seq), "BT": (batch, response)}
        name = type(self).__name__
        for field in fields(self):
            tensor, shape = getattr(self, field.name), shapes[field.name.rpartition("_")[2]]
            dtype = _DTYPES.get(field.name, torch.bool)
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                found = f"{tuple(tensor.shape)} {tensor.dtype}"
                raise ValueError(f"{name}.{field.name} is {found}, expected {shape} {dtype}")
        if response >= seq:
            raise ValueError(f"{name}: response length {response} leaves no prompt in {seq} columns")
        if not torch.equal(self.attention_mask_BS[:, seq - response :], self.response_mask_BT):
            raise ValueError(f"{name}.attention_mask_BS does not end in response_mask_BT")
        if (self.response_mask_BT[:, 1:] & ~self.response_mask_BT[:, :-1]).any():
            raise ValueError(f"{name}.response_mask_BT has a hole; it must be a prefix of each row")

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

    def responses(self) -> list[list[int]]:
        """Token ids of each response, EOS included."""
        return [row[:n] for row, n in zip(self.response_BT.tolist(), self.lengths_B().tolist(), strict=True)]

    def rows(self, index: Tensor | slice) -> Self:
        """The rows at `index`, columns cut to what these rows need (padding changes no result, only time)."""
        part = {field.name: getattr(self, field.name)[index] for field in fields(self)}
        width = self.prompt_width
        response = _most(part["response_mask_BT"].sum(dim=1))
        prompt = _most(part["attention_mask_BS"][:, :width].sum(dim=1))
        kept = {"S": slice(width - prompt, width + response), "T": slice(response)}
        return type(self)(**{name: x[:, kept[name[-1]]] if name[-1] in kept else x for name, x in part.items()})


@dataclass(frozen=True)
class Sampled(Generated):
    """Responses as a sampler returns them.

    sampled_logprobs_BT  float32, log-probs under the distribution that each token was drawn from (0 where greedy, at
                         its temperature elsewhere), as the sampler itself worked them out; 0 where masked
    """

    sampled_logprobs_BT: Tensor


@dataclass(frozen=True)
class RolloutBatch(Sampled):
    """Responses sampled from one policy, with what it and the critic said of them then.

    old_logprobs_BT      float32, the policy's log-probs at the sampling temperature by the path that is trained, 0
                         where masked
    old_values_BT        float32, the critic's value of the state before each response token, 0 where masked
    """

    old_logprobs_BT: Tensor
    old_values_BT: Tensor


def _most(count_B: Tensor) -> int:
    """The largest count, at least 1."""
    return max([1, *count_B.tolist()])


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(tokens_BP int64, mask_BP bool): real tokens to the right; the mask comes from lengths, so pad may equal EOS."""
    width = max((len(row) for row in rows), default=1)
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
    """(summed NLL of the trained tokens in nats, their count). Differentiable."""
    tokens_BS, attention_mask_BS, width = collate(rows, pad_id)
    logprobs_BT = model.response_logprobs(tokens_BS.to(model.device), attention_mask_BS.to(model.device), width)
    for place, row in enumerate(rows):
        for start, stop in row.gaps:  # the first column is the row's first answer token
            logprobs_BT[place, start - row.prompt_tokens : stop - row.prompt_tokens] = 0.0
    return -logprobs_BT.sum(), sum(row.trained for row in rows)


def extents(rows: Sequence[EncodedDemonstration]) -> tuple[Tensor, int]:
    """(tokens of each demonstration, answer tokens of all): what their operations are counted by."""
    lengths_B = torch.tensor([len(row.ids) for row in rows])
    return lengths_B, sum(len(row.ids) - max(row.prompt_tokens, 1) for row in rows)


def training_flops(model: LanguageModel, rows: Sequence[EncodedDemonstration]) -> int:
    """Counted operations of forward and backward over some demonstrations."""
    return update_flops(model, *extents(rows))


def micro_slices(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` rows that cover `count` rows."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def micro_batches(lengths_B: Tensor, tokens: int, *, shared: bool = False) -> Iterator[Tensor]:
    """Indices of rows for one pass each, rows in order of length, longest first: as many as together are no more than
    so many tokens, padding to the longest counted, and at least one. Within a pass they rise.

    shared: of several processes each has rows of its own, and all make as many passes: some of them without rows, at
    the end."""
    order = lengths_B.argsort(descending=True, stable=True).tolist()
    if not shared:
        yield from _cut(order, lengths_B, tokens)
        return
    plans = [list(_cut(each, lengths_B, tokens)) for each in parallel.shares(order)]
    own = plans[parallel.rank()]
    yield from own
    for _ in range(max(map(len, plans)) - len(own)):
        yield torch.tensor([], dtype=torch.int64)


def _cut(order: Sequence[int], lengths_B: Tensor, tokens: int) -> Iterator[Tensor]:
    while order:
        rows = max(tokens // max(int(lengths_B[order[0]]), 1), 1)
        yield torch.tensor(sorted(order[:rows]))
        order = order[rows:]
