"""From prompts to a RolloutBatch: sampling here, then log-probs and values by the path that is trained.

`generate` writes everything: rollouts, answers to items, lm-eval's requests, and by a logits processor what two models
write together (`stages.extrapolation`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from srppo.config import Recipe, derive_seed
from srppo.data.order import scheduled
from srppo.errors import OutOfMemory
from srppo.models.generation import Draw, Written, can_generate, generate_packed
from srppo.models.language_model import LanguageModel
from srppo.models.memory import is_out_of_memory, rows_that_fit
from srppo.models.value_model import ValueModel
from srppo.training import parallel
from srppo.training.batch import RolloutBatch, Sampled, left_pad, micro_slices
from srppo.training.scores import passes

PADDED_ROWS = 300  # by transformers' generate(), where all wait for the last
EVEN = 16  # different prompts that make the processes' shares of them even, though some come several times
Until = Callable[[list[list[int]]], list[bool]]
Processor = Callable[[Tensor, Tensor], Tensor]
"""(token ids so far BS, logits BV) -> logits BV."""


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    seed: int | Sequence[int],
    temperature: float | Sequence[float | None] | None = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    processor: Callable[[Tensor], Processor] | None = None,
    until: Until | None = None,
    settings: Mapping[str, Any] | None = None,
    rows: int | None = None,
    held: int | None = None,
) -> Sampled:
    """Responses to prompts (token ids), sampled at `temperature` from the whole distribution, or greedy at None; of one
    temperature, or one a row.

    The model's own generation_config is overridden: no top-k, top-p or penalties but those asked for, or the sampled
    distribution would not be the one whose log-probs are trained. Ids that no tokenizer makes are left out. A response
    ends with its first stop token, which counts. The global random state neither enters nor changes.

    seed: one a row, or one of which each row's is made: a row's random numbers are its own, whatever the batch. Where
    `models.generation` writes on a CPU so are its probabilities. Elsewhere their last bits may hang on the rows beside
    it, and another batch may give another token: with a large vocabulary not rarely (of 49,152 tokens two in a
    thousand), since a last bit moves the places of all tokens behind it.
    processor: makes, of the prompts' mask (BP), what turns logits into others for one batch; then the body runs in
    fp32, since it may blow up their rounding. until: which rows of those it is shown (responses so far) are done.
    settings: more of transformers' own. With either of processor and settings, or a model that cannot be packed,
    transformers' generate() writes; otherwise `models.generation` does.
    rows: at most so many at a time; None: as many as fit the memory beside the bytes `held` (`memory.rows_that_fit`).
    Where one is done another begins.
    """
    longest = max(map(len, prompts))
    size = rows or rows_that_fit(model, longest + max_new_tokens, held=held)
    seeds = row_seeds(seed, len(prompts)) if isinstance(seed, int) else seed
    temperatures = temperature if isinstance(temperature, Sequence) else [temperature] * len(prompts)
    order = _own_rows(prompts)
    own = processor is None and not settings and can_generate(model)
    most = max(len(order), 1) if own else min(size, PADDED_ROWS)  # a process may have no row at all
    written: dict[int, Written] = {}
    half = model.precision == "bf16" and processor is None
    with model.gathered(), _writing(model), torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=half):
        for part in micro_slices(len(order), most):
            places = order[part]
            chosen = [prompts[i] for i in places]
            own_seeds, own_temperatures = [seeds[i] for i in places], [temperatures[i] for i in places]
            draw = drawing(own_seeds, own_temperatures, max_new_tokens, top_k=top_k, top_p=top_p)
            if own:
                limits: dict[str, Any] = {"stop_ids": stop_ids, "max_new_tokens": max_new_tokens, "until": until}
                found = generate_packed(model, chosen, draw, rows=size, **limits)
            else:
                config = GenerationConfig(
                    max_new_tokens=max_new_tokens,
                    do_sample=False,  # the processors leave one token a row
                    eos_token_id=list(stop_ids),
                    pad_token_id=pad_id,
                    use_cache=True,
                    **(settings or {}),
                )
                found = _by_transformers(model, chosen, draw, config, processor, until)
            for i, response in zip(places, found, strict=True):
                written[i] = response
    return sampled(prompts, together(written), stop_ids, pad_id, model.device)


def _own_rows(prompts: Sequence[Sequence[int]]) -> Sequence[int]:
    """Those that this process writes, the shortest first: of equal prompts all, which are read once, or its share where
    there are too few others to even it out."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i])))
    equal = [[*group] for _, group in groupby(order, key=lambda i: tuple(prompts[i]))]
    return [i for group in parallel.share(equal) for i in group] if len(equal) >= EVEN else parallel.share(order)


def _by_transformers(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    draw: Draw,
    config: GenerationConfig,
    processor: Callable[[Tensor], Processor] | None,
    until: Until | None,
) -> list[Written]:
    """The response to each prompt, up to its stop token, by transformers' generate()."""
    tokens_BP, mask_BP = (x.to(model.device) for x in left_pad(prompts, int(config.pad_token_id)))  # type: ignore[arg-type]
    width, everyone = tokens_BP.shape[1], list(range(len(prompts)))
    logprobs_TB: list[Tensor] = []

    def drawn(tokens_BS: Tensor, logits_BV: Tensor) -> Tensor:
        token_B, logprob_B = draw(logits_BV, everyone, [tokens_BS.shape[1] - width] * len(everyone))
        logprobs_TB.append(logprob_B)
        return torch.full_like(logits_BV, -torch.inf).scatter(1, token_B[:, None], 0.0)

    processors: list[Any] = [lambda _, logits_BV: logits_BV[:, : model.vocab_size]]
    processors += [_taking_turns(model, processor(mask_BP))] if processor else []
    model.activate()
    tokens_BS = model.model.generate(
        input_ids=tokens_BP,
        attention_mask=mask_BP.long(),
        generation_config=config,
        logits_processor=LogitsProcessorList([*processors, drawn]),
        stopping_criteria=StoppingCriteriaList([_Until(until, width)] if until else []),
        synced_gpus=False,  # weights that are spread over processes are gathered
    )
    stops: set[int] = {*config.eos_token_id}  # type: ignore[misc]
    logprobs_BT = torch.stack(logprobs_TB, dim=1).tolist()
    found = []
    for row, logprobs in zip(tokens_BS[:, width:].tolist(), logprobs_BT, strict=True):
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        found.append((row[:end], logprobs[:end]))
    return found


class _Until(StoppingCriteria):
    """`until` as transformers has it."""

    def __init__(self, until: Until, width: int) -> None:
        self.until, self.width = until, width

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.tensor(self.until(input_ids[:, self.width :].tolist()), device=input_ids.device)


class Sampler(Protocol):
    """Who writes the responses that a policy is trained on: `LocalSampler`, or a server (`training.server`)."""

    def sample(
        self,
        policy: LanguageModel,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        held: int,
    ) -> Sampled:
        """One response of the policy as it is now to each prompt (token ids), from its whole distribution at a
        temperature. seeds: one a row, so that a row has the same random numbers in any batch, and but for rounding
        (`generate`) the same tokens. held: bytes of memory that training holds."""


@dataclass(frozen=True)
class LocalSampler:
    """Samples where the policy is."""

    stop_ids: Sequence[int]
    pad_id: int

    def sample(
        self,
        policy: LanguageModel,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        held: int,
    ) -> Sampled:
        """As `Sampler.sample`."""
        return generate(
            policy,
            prompts,
            stop_ids=self.stop_ids,
            pad_id=self.pad_id,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seeds,
            held=held,
        )


def sample_step(
    recipe: Recipe,
    sampler: Sampler,
    policy: LanguageModel,
    prompts: Sequence[Sequence[int]],
    step: int,
    *,
    held: int,
) -> tuple[list[Sequence[int]], Sampled]:
    """The prompts of a training step and the policy's responses: both are functions of (root seed, step) and the policy
    alone. held: bytes of memory that the training holds."""
    rollout = recipe.rollout
    places = scheduled(len(prompts), rollout.batch, step - 1, recipe.seed, per_prompt=rollout.per_prompt)
    chosen = [prompts[i] for i in places]
    seeds = row_seeds(derive_seed(recipe.seed, "rollout", step), len(chosen))
    limits: dict[str, Any] = {"max_new_tokens": rollout.max_new_tokens, "temperature": rollout.temperature}
    return chosen, sampler.sample(policy, chosen, seeds, **limits, held=held)


def row_seeds(seed: int, rows: int) -> list[int]:
    """A seed for each row of a batch, made of the batch's own."""
    return [derive_seed(seed, "row", i) for i in range(rows)]


@contextmanager
def _writing(model: LanguageModel) -> Iterator[None]:
    """The model's own settings aside; raises OutOfMemory, in one line, where its memory does not suffice."""
    own = model.model.generation_config
    model.model.generation_config = GenerationConfig()  # generate() fills gaps of ours from the model's own
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise OutOfMemory(
            f"generating ran out of memory ({reason}), with batches that go by memory already: lower "
            "rollout.max_new_tokens or data.max_prompt_tokens, or take another --device"
        ) from error
    finally:
        model.model.generation_config = own


def _taking_turns(model: LanguageModel, processor: Processor) -> Processor:
    """A processor that may read another role of the model's own backbone, after which it is the model's turn again."""

    def process(tokens_BS: Tensor, logits_BV: Tensor) -> Tensor:
        processed_BV = processor(tokens_BS, logits_BV)
        model.activate()
        return processed_BV

    return process


def drawing(
    seeds: Sequence[int], temperatures: Sequence[float | None], steps: int, *, top_k: int = 0, top_p: float = 1.0
) -> Draw:
    """How the next token is chosen: where the cumulative probability passes the row's own uniform number of the step,
    or, at temperature None, the likeliest. Top-k and top-p as transformers has them: after the temperature. The
    log-prob is that of the distribution which was drawn from, 0 for the likeliest."""
    warpers = [*([TopKLogitsWarper(top_k)] if top_k else []), *([TopPLogitsWarper(top_p)] if top_p < 1 else [])]
    uniform_RT = torch.stack([torch.rand(steps, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def draw(logits_BV: Tensor, rows: list[int], steps_done: list[int]) -> tuple[Tensor, Tensor]:
        drawn = [place for place, row in enumerate(rows) if temperatures[row] is not None]
        if len(drawn) == len(rows):
            return sample(logits_BV, rows, steps_done)
        token_B, logprob_B = logits_BV.argmax(dim=-1), torch.zeros_like(logits_BV[:, 0])
        if drawn:
            at = torch.tensor(drawn, device=logits_BV.device)
            chosen = sample(logits_BV[at], [rows[i] for i in drawn], [steps_done[i] for i in drawn])
            token_B[at], logprob_B[at] = chosen[0], chosen[1].to(logprob_B.dtype)
        return token_B, logprob_B

    def sample(logits_BV: Tensor, rows: list[int], steps_done: list[int]) -> tuple[Tensor, Tensor]:
        temperature_B = torch.tensor([temperatures[row] for row in rows], device=logits_BV.device)
        scores_BV = logits_BV.float() / temperature_B[:, None]
        for warper in warpers:
            scores_BV = warper(None, scores_BV)
        probs_BV = scores_BV.softmax(dim=-1)
        cumulative_BV = probs_BV.cumsum(dim=-1, dtype=torch.float64)
        number_B = uniform_RT[rows, steps_done].double().to(logits_BV.device)
        found_B1 = torch.searchsorted(cumulative_BV, number_B[:, None] * cumulative_BV[:, -1:], right=True)
        token_B1 = found_B1.clamp(max=logits_BV.shape[-1] - 1)
        return token_B1[:, 0], probs_BV.gather(1, token_B1)[:, 0].log()

    return draw


def together(written: Mapping[int, Written]) -> list[Written]:
    """The responses of all processes, in order of their prompts."""
    found = {place: response for each in parallel.gather(written) for place, response in each.items()}
    return [found[place] for place in sorted(found)]


def sampled(
    prompts: Sequence[Sequence[int]],
    written: Sequence[Written],
    stop_ids: Sequence[int],
    pad_id: int,
    device: torch.device,
) -> Sampled:
    """Prompts with what was written after them."""
    tokens_BP, mask_BP = left_pad(prompts, pad_id)
    response_BT, mask_BT = (x.flip(1) for x in left_pad([row[::-1] for row, _ in written], pad_id))
    logprobs_BT = torch.zeros(mask_BT.shape)
    logprobs_BT[mask_BT] = torch.tensor([logprob for _, logprobs in written for logprob in logprobs])
    ended_B = torch.tensor([row[-1] in stop_ids for row, _ in written])
    tokens_BS, mask_BS = torch.cat([tokens_BP, response_BT], dim=1), torch.cat([mask_BP, mask_BT], dim=1)
    return Sampled(*(x.to(device) for x in (tokens_BS, mask_BS, mask_BT, ended_B, logprobs_BT)))


@torch.no_grad()
def to_batch(
    generated: Sampled, policy: LanguageModel, value: ValueModel | None, *, micro_tokens: int, temperature: float
) -> RolloutBatch:
    """Add behaviour log-probs (at the sampling temperature, by the same path as training) and values, 0 without a
    critic."""
    logprobs_BT, values_BT = torch.zeros((2, *generated.response_mask_BT.shape), device=generated.tokens_BS.device)
    for index, inputs in passes(generated, micro_tokens, policy):
        seen_ND = policy.hidden_rows(*inputs) if policy.head.linear else None
        logprobs_BT[index, : inputs[2]] = policy.response_logprobs(*inputs, temperature=temperature, hidden_ND=seen_ND)
        if value is not None:
            trunk_ND = seen_ND if value.shared else None
            values_BT[index, : inputs[2]] = value.response_values(*inputs, hidden_ND=trunk_ND)
    parallel.add_up(logprobs_BT)
    parallel.add_up(values_BT)
    return RolloutBatch(**vars(generated), old_logprobs_BT=logprobs_BT, old_values_BT=values_BT)
