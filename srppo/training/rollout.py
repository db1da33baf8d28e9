"""From prompts to a RolloutBatch: the one sampler, then log-probs and values by the path that is trained.

`generate` writes everything: rollouts, answers to items, lm-eval's requests, and by a logits processor what two models
write together (`stages.extrapolation`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
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
from srppo.models.language_model import LanguageModel
from srppo.models.memory import is_out_of_memory, rows_that_fit
from srppo.models.value_model import ValueModel
from srppo.training.batch import Generated, RolloutBatch, left_pad, micro_slices
from srppo.training.scores import passes

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
    temperature: float | None = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    processor: Callable[[Tensor], Processor] | None = None,
    criteria: Sequence[StoppingCriteria] = (),
    settings: Mapping[str, Any] | None = None,
    rows: int | None = None,
    held: int | None = None,
) -> Generated:
    """Responses to prompts (token ids), sampled at `temperature` from the whole distribution, or greedy at None.

    The model's own generation_config is overridden: no top-k, top-p or penalties but those asked for, or the sampled
    distribution would not be the one whose log-probs are trained. Ids that no tokenizer makes are left out. A response
    ends with its first stop token, which counts. The global random state neither enters nor changes.

    seed: of all random numbers, or one a row, whose numbers are then its own. A row's probabilities come from products
    over the whole batch, whose last bits hang on its size and width: the same batch gives the same row, another one
    may, at a near tie, give another token (1 of 48 GSM8K responses, batches of 64 against 5).
    processor: makes, of the prompts' mask (BP), what turns logits into others for one batch; then the body runs in
    fp32, since it may blow up their rounding. criteria, settings: more of transformers' own.
    rows: at most so many at a time; None: as many as fit the memory beside the bytes `held` (`memory.rows_that_fit`).
    Where one seed is given, each batch after the first has one made of it.
    """
    tokens_BP, mask_BP = (x.to(model.device) for x in left_pad(prompts, pad_id))
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,  # the processors leave one token a row
        eos_token_id=list(stop_ids),
        pad_token_id=pad_id,
        use_cache=True,
        **(settings or {}),
    )
    size = rows or rows_that_fit(model, tokens_BP.shape[1] + max_new_tokens, held=held)
    parts: list[Tensor] = []
    half = model.precision == "bf16" and processor is None
    with _writing(model), torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=half):
        for part in micro_slices(len(prompts), size):
            processors: list[Any] = [lambda _, logits_BV: logits_BV[:, : model.vocab_size]]
            processors += [_taking_turns(model, processor(mask_BP[part]))] if processor else []
            if temperature is not None:
                processors += [TopKLogitsWarper(top_k)] if top_k else []
                processors += [TopPLogitsWarper(top_p)] if top_p < 1 else []
                if isinstance(seed, int):
                    own = derive_seed(seed, "part", part.start) if part.start else seed
                    processors.append(_by_one_seed(own, temperature, model.device))
                else:
                    processors.append(_by_row_seeds(seed[part], temperature, max_new_tokens, model.device))
            model.activate()
            parts.append(
                model.model.generate(
                    input_ids=tokens_BP[part],
                    attention_mask=mask_BP[part].long(),
                    generation_config=config,
                    logits_processor=LogitsProcessorList(processors),
                    stopping_criteria=StoppingCriteriaList(criteria),
                )
            )
    width = max(part_BS.shape[1] for part_BS in parts)
    tokens_BS = torch.cat([pad(part_BS, (0, width - part_BS.shape[1]), value=pad_id) for part_BS in parts])
    return _up_to_stop(tokens_BS, mask_BP, stop_ids)


def sample_step(
    recipe: Recipe,
    policy: LanguageModel,
    prompts: Sequence[Sequence[int]],
    step: int,
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    held: int,
) -> tuple[list[Sequence[int]], Generated]:
    """The prompts of a training step and the policy's responses: both are functions of (root seed, step) and the policy
    alone. held: bytes of memory that the training holds."""
    rollout = recipe.rollout
    places = scheduled(len(prompts), rollout.batch, step - 1, recipe.seed, per_prompt=rollout.per_prompt)
    chosen = [prompts[i] for i in places]
    return chosen, generate(
        policy,
        chosen,
        stop_ids=stop_ids,
        pad_id=pad_id,
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        seed=derive_seed(recipe.seed, "rollout", step),
        held=held,
    )


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


def _by_one_seed(seed: int, temperature: float, device: torch.device) -> Processor:
    """Leaves one token a row, drawn with the random numbers of one seed for the whole batch."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(_: Tensor, logits_BV: Tensor) -> Tensor:
        return _alone(logits_BV, torch.multinomial((logits_BV / temperature).softmax(-1), 1, generator=generator))

    return draw


def _by_row_seeds(seeds: Sequence[int], temperature: float, steps: int, device: torch.device) -> Processor:
    """Leaves one token a row: where the cumulative probability passes the row's own uniform number of the step."""
    numbers = [torch.rand(steps, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    uniforms = iter(torch.stack(numbers, dim=1).double().unsqueeze(2).to(device))

    def draw(_: Tensor, logits_BV: Tensor) -> Tensor:
        cumulative_BV = (logits_BV.double() / temperature).softmax(dim=-1).cumsum(dim=-1)
        token_B1 = torch.searchsorted(cumulative_BV, next(uniforms) * cumulative_BV[:, -1:], right=True)
        return _alone(logits_BV, token_B1.clamp(max=logits_BV.shape[-1] - 1))

    return draw


def _alone(logits_BV: Tensor, token_B1: Tensor) -> Tensor:
    return torch.full_like(logits_BV, -torch.inf).scatter(1, token_B1, 0.0)


def _up_to_stop(tokens_BS: Tensor, mask_BP: Tensor, stop_ids: Sequence[int]) -> Generated:
    """Prompts with what was sampled after them: a response ends with its first stop token, whatever follows."""
    response_BT = tokens_BS[:, mask_BP.shape[1] :]
    stopped_BT = torch.isin(response_BT, torch.tensor(list(stop_ids), device=tokens_BS.device))
    ended_B = stopped_BT.any(dim=1)
    first_B = torch.where(ended_B, stopped_BT.int().argmax(dim=1), response_BT.shape[1] - 1)
    response_mask_BT = torch.arange(response_BT.shape[1], device=tokens_BS.device) <= first_B.unsqueeze(1)
    return Generated(tokens_BS, torch.cat([mask_BP, response_mask_BT], dim=1), response_mask_BT, ended_B)


@torch.no_grad()
def to_batch(
    generated: Generated, policy: LanguageModel, value: ValueModel | None, *, micro_tokens: int, temperature: float
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
    return RolloutBatch(**vars(generated), old_logprobs_BT=logprobs_BT, old_values_BT=values_BT)
