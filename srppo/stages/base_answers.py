"""What the base says to prompts, as text: wrong answers for `data.noise = "base-answers"`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from srppo.models.language_model import LanguageModel
from srppo.training.rollout import generate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def sample_texts(
    base: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    prompts: Sequence[tuple[int, ...]],
    seed: int,
) -> list[str]:
    """One response to each prompt (token ids), sampled at temperature 1, without stop tokens and outer white space."""
    if not prompts:
        return []
    generated = generate(
        base,
        prompts,
        stop_ids=stop_ids,
        pad_id=int(tokenizer.pad_token_id),
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    said = [[token for token in ids if token not in stop_ids] for ids in generated.responses()]
    return [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in said]
