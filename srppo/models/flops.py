"""Counted operations of a forward pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from srppo.models.language_model import LanguageModel
from srppo.models.value_model import ValueModel


def forward_flops(model: LanguageModel | ValueModel, lengths_B: Tensor, head_tokens: int) -> int:
    """Counted operations of one forward pass: 2 a weight and token, attention, and the head on `head_tokens` tokens.

    Counts real tokens, not padding, so that the figure repeats on every machine. A training step counts three times.
    """
    body = model.model.base_model if isinstance(model, LanguageModel) else model.body
    embeddings = {id(module.weight) for module in body.modules() if isinstance(module, nn.Embedding)}
    matrices = sum(weight.numel() for weight in body.parameters() if weight.dim() >= 2 and id(weight) not in embeddings)
    config: Any = body.config
    tokens = int(lengths_B.sum())
    pairs = int((lengths_B.double() * (lengths_B + 1) / 2).sum())
    attention = 4 * config.num_hidden_layers * config.hidden_size * pairs
    head = config.hidden_size * (config.vocab_size if isinstance(model, LanguageModel) else 1)
    return 2 * matrices * tokens + attention + 2 * head * head_tokens
