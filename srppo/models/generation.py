"""Generation from packed rows: prompts of any lengths are read without padding, equal ones once, and others begin where
rows are done.

Of each row the keys and values lie in a cache of its own length. On a CPU a row's tokens do not hang on those beside
it: no pass has fewer than LEAST rows, since BLAS rounds smaller products otherwise, and attention sums over BLOCK
places at a time, since a longer row beside it would have its sums taken in another order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from srppo.models.language_model import LanguageModel, body_hidden
from srppo.models.packed import Asked, Rows, Segments

LEAST = 16
BLOCK = 64  # places of the cache: shorter blocks are more calls, longer ones more places that no row has
KEPT = 0.75  # other rows begin, or the cache is made smaller, when fewer than this share of its rows is still written

Draw = Callable[[Tensor, list[int], list[int]], tuple[Tensor, Tensor]]
"""(logits BV fp32, which rows they are of, how many tokens each has) -> next token of each and its log-prob, B."""

Written = tuple[list[int], list[float]]
"""The token ids of a response, and the log-prob with which each was drawn."""


def can_generate(lm: LanguageModel) -> bool:
    """Whether a model's responses can be generated here."""
    return lm.packs and lm.head.linear


class KvCache:
    """Keys and values of rows, by layer: (rows, heads, positions, width), made when the first come."""

    def __init__(self, rows: int, positions: int) -> None:
        self.rows, self.positions = rows, _whole_blocks(positions)
        self.by_layer: dict[int | None, list[Tensor]] = {}

    def put(self, layer: int | None, rows_N: Tensor, places_N: Tensor, *new_HND: Tensor) -> list[Tensor]:
        """Store keys and values of N tokens, each in its row and place; all that are known.

        In the precision of the values: under autocast rotated keys are fp32, which attention would narrow anyway.
        """
        if layer not in self.by_layer:
            sizes = [(self.rows, len(x), self.positions, x.shape[2]) for x in new_HND]
            self.by_layer[layer] = [new_HND[-1].new_zeros(size) for size in sizes]
        for known, new in zip(self.by_layer[layer], new_HND, strict=True):
            known[rows_N, :, places_N] = new.transpose(0, 1).to(known.dtype)
        return self.by_layer[layer]

    def copy(self, from_K: Tensor, to_K: Tensor, length: int) -> None:
        """Have in some rows what others have in their first `length` places."""
        for x in (x for each in self.by_layer.values() for x in each):
            x[to_K, :, :length] = x[from_K, :, :length]

    def keep(self, rows_K: Tensor) -> None:
        """Let all other rows go."""
        self.rows = len(rows_K)
        for layer, each in self.by_layer.items():  # one by one: never all of them twice
            self.by_layer[layer] = [x[rows_K] for x in each]


class Prefill:
    """Prompts: packed rows whose keys and values are remembered, each prompt's in a row of the cache."""

    def __init__(self, lengths: Sequence[int], rows: Sequence[int], cache: KvCache, device: torch.device) -> None:
        self.segments, self.cache = Segments(tuple(lengths)), cache
        self.rows_N = torch.tensor(rows).repeat_interleave(torch.tensor(lengths)).to(device)
        self.places_N = torch.cat([torch.arange(length) for length in lengths]).to(device)

    def attend(self, q_HND: Tensor, k_HND: Tensor, v_HND: Tensor, asked: Asked) -> Tensor:
        """As `Rows.attend`."""
        self.cache.put(asked.layer, self.rows_N, self.places_N, k_HND, v_HND)
        return self.segments.attend(q_HND, k_HND, v_HND, asked)


class DecodeStep:
    """One more token of each row, which sees all before it."""

    def __init__(self, lengths_B: Tensor, cache: KvCache) -> None:
        self.lengths_B, self.cache = lengths_B, cache
        # What all layers share; the longest is asked for once a step, since a GPU is waited for.
        self.longest = _whole_blocks(int(lengths_B.max()) + 1)
        self.rows_B = torch.arange(len(lengths_B), device=lengths_B.device)
        self.back_BS = lengths_B[:, None] - torch.arange(self.longest, device=lengths_B.device)
        self.masks: dict[int | None, Tensor] = {}

    def attend(self, q_HND: Tensor, k_HND: Tensor, v_HND: Tensor, asked: Asked) -> Tensor:
        """As `Rows.attend`."""
        scaling, window, layer = asked
        known = self.cache.put(layer, self.rows_B, self.lengths_B, k_HND, v_HND)
        k_BHSD, v_BHSD = (x[:, :, : self.longest] for x in known)
        if window not in self.masks:
            seen_BS = (self.back_BS >= 0) if window is None else (self.back_BS >= 0) & (self.back_BS < window)
            self.masks[window] = seen_BS[:, None, None]
        q_BHGD = q_HND.transpose(0, 1).unflatten(1, (k_BHSD.shape[1], -1))  # queries of one key head side by side
        attention = attention_by_blocks if q_BHGD.device.type == "cpu" else F.scaled_dot_product_attention
        return attention(q_BHGD, k_BHSD, v_BHSD, attn_mask=self.masks[window], scale=scaling).flatten(1, 2)


def attention_by_blocks(
    q_BHGD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, *, attn_mask: Tensor, scale: float | None = None
) -> Tensor:
    """`F.scaled_dot_product_attention` with one order of sums whatever the number of places S, a multiple of BLOCK:
    places that are not seen add exact zeros at its end. At least in fp32; the result in the precision of the values.

    attn_mask: (B, 1, 1, S), True where a row sees. scale: of the scores, None: by the root of the width.
    """
    dtype, heads = torch.promote_types(v_BHSD.dtype, torch.float32), k_BHSD.shape[1]
    q_RGD, k_RSD, v_RSD = (x.flatten(0, 1).to(dtype) for x in (q_BHGD, k_BHSD, v_BHSD))
    scale = q_RGD.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q_RGD.device.type, enabled=False):
        scores_BHGS = torch.bmm(q_RGD * scale, k_RSD.mT).unflatten(0, (-1, heads))
        weights_RGS = scores_BHGS.masked_fill_(~attn_mask, -torch.inf).softmax(dim=-1).flatten(0, 1)
        out_RGV = q_RGD.new_zeros((*q_RGD.shape[:2], v_RSD.shape[2]))
        for weights_RGK, v_RKV in zip(weights_RGS.split(BLOCK, dim=2), v_RSD.split(BLOCK, dim=1), strict=True):
            out_RGV.baddbmm_(weights_RGK, v_RKV)
    return out_RGV.to(v_BHSD.dtype).unflatten(0, (-1, heads))


def _whole_blocks(places: int) -> int:
    return -(-places // BLOCK) * BLOCK


@torch.no_grad()
def generate_packed(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    draw: Draw,
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    rows: int,
    until: Callable[[list[list[int]]], list[bool]] | None = None,
) -> list[Written]:
    """The response to each prompt (token ids), its stop token included, of at most `max_new_tokens`.

    draw: chooses the next tokens. rows: that are written at a time, the shortest prompts first; on a CPU LEAST or more.
    until: which of the rows that it is shown, responses so far, are done for another reason than a stop token.
    """
    stops, least = {*stop_ids}, LEAST if lm.device.type == "cpu" else 1
    order, size = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), max(rows, least)
    inside, waiting = order[:size], deque(order[size:])
    inside += inside[-1:] * (least - len(inside))  # who is written in each row of the cache
    written: list[Written] = [([], []) for _ in prompts]
    done = [False] * len(prompts)
    cache = KvCache(len(inside), len(prompts[order[-1]]) + max_new_tokens)
    with lm.merged_layers():
        last_BD, lengths_B = _read(lm, [prompts[i] for i in inside], range(len(inside)), cache, least)
        while True:
            steps = [min(len(written[i][0]), max_new_tokens - 1) for i in inside]
            tokens_B, logprobs_B = draw(_logits(lm, last_BD), inside, steps)
            fresh = [i for i in dict.fromkeys(inside) if not done[i]]
            chosen = dict(zip(inside, zip(tokens_B.tolist(), logprobs_B.tolist(), strict=True), strict=True))
            for i in fresh:
                (ids, logprobs), (token, logprob) = written[i], chosen[i]
                ids.append(token)
                logprobs.append(logprob)
                done[i] = token in stops or len(ids) == max_new_tokens
            if until is not None:
                for i, over in zip(fresh, until([written[i][0] for i in fresh]), strict=True):
                    done[i] = done[i] or over
            left = [place for place, i in enumerate(inside) if not done[i]]
            if not left and not waiting:
                return written
            # While rows wait, places that are done stay until a quarter is: reading few prompts is dear.
            if not waiting and max(len(left), least) < KEPT * len(inside):
                others = [place for place in range(len(inside)) if done[inside[place]]]
                kept = sorted(left + others[: least - len(left)] if len(left) < least else left)
                inside = [inside[place] for place in kept]
                kept_K = torch.tensor(kept, device=lm.device)
                cache.keep(kept_K)
                lengths_B, tokens_B = lengths_B[kept_K], tokens_B[kept_K]
            last_BD = _step(lm, tokens_B, lengths_B, cache)
            lengths_B = lengths_B + torch.tensor([not done[i] for i in inside], device=lm.device)
            if waiting and len(left) < KEPT * len(inside):
                free = [place for place, i in enumerate(inside) if done[i]][: len(waiting)]
                for place in free:
                    inside[place] = waiting.popleft()
                free_K = torch.tensor(free, device=lm.device)
                begun = [prompts[inside[place]] for place in free]
                last_BD[free_K], lengths_B[free_K] = _read(lm, begun, free, cache, least)


def _read(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], rows: Sequence[int], cache: KvCache, least: int
) -> tuple[Tensor, Tensor]:
    """(hidden states after the prompts BD, their lengths B), each prompt's keys and values in its row of the cache.

    Equal prompts are read once. Of fewer than `least` tokens the last prompt is read several times.
    """
    first: dict[tuple[int, ...], int] = {}  # by prompt, the row of the cache that it is read into
    for prompt, row in zip(map(tuple, prompts), rows, strict=True):
        first.setdefault(prompt, row)
    read, own = [*first], [*first.values()]
    places = {prompt: place for place, prompt in enumerate(read)}
    place = [places[tuple(prompt)] for prompt in prompts]
    while sum(map(len, read)) < least:
        own, read = own + own[-1:], read + read[-1:]
    lengths = [len(prompt) for prompt in read]
    prefill = Prefill(lengths, own, cache, lm.device)
    tokens_N = torch.tensor([token for prompt in read for token in prompt], device=lm.device)
    lengths_R, place_B = (torch.tensor(each, device=lm.device) for each in (lengths, place))
    last_RD = _pass(lm, tokens_N, prefill.places_N, prefill)[lengths_R.cumsum(0) - 1]
    if copies := [(own[i], row) for i, row in zip(place, rows, strict=True) if own[i] != row]:
        from_K, to_K = (torch.tensor(each, device=lm.device) for each in zip(*copies, strict=True))
        cache.copy(from_K, to_K, max(lengths))
    return last_RD[place_B], lengths_R[place_B]


def _step(lm: LanguageModel, tokens_B: Tensor, lengths_B: Tensor, cache: KvCache) -> Tensor:
    return _pass(lm, tokens_B, lengths_B, DecodeStep(lengths_B, cache))


def _pass(lm: LanguageModel, tokens_N: Tensor, positions_N: Tensor, rows: Rows) -> Tensor:
    lm.activate()
    mask = torch.zeros((1, 1, 1, 1), device=tokens_N.device)
    inputs: dict[str, Any] = {"input_ids": tokens_N[None], "position_ids": positions_N[None], "attention_mask": mask}
    return body_hidden(lm.model.base_model, inputs | {"segments": rows}, lm.precision)[0]


def _logits(lm: LanguageModel, hidden_BD: Tensor) -> Tensor:
    """As the model's own head gives them in fp32, also over a body in bf16: what is sampled is what is scored."""
    (weight_VD, bias_V), scale = lm.head_rows(), lm.head.logit_scale
    dtype = torch.promote_types(weight_VD.dtype, torch.float32)
    with torch.autocast(lm.device.type, enabled=False):
        logits_BV = F.linear(hidden_BD.to(dtype), weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype))
    logits_BV = logits_BV if scale == 1 else logits_BV * scale
    cap = lm.head.softcap
    return logits_BV if cap is None else cap * torch.tanh(logits_BV / cap)
