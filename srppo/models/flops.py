"""Counted operations of forward and backward passes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from srppo.models.adapters import AdaptedModel
from srppo.models.language_model import LanguageModel, Trunk
from srppo.models.value_model import ValueModel


def forward_flops(model: LanguageModel | ValueModel, lengths_B: Tensor, head_tokens: int) -> int:
    """Counted operations of one forward pass: 2 a weight and token, attention, and the head on `head_tokens` tokens.

    Counts real tokens, not padding, so that the figure repeats on every machine. A token passes through the experts
    that are chosen for it, not through all. Attention is counted as causal and full, also where a window bounds it;
    of a recurrent layer its matrices are counted, not the recurrence itself. A critic on the policy's own trunk costs
    its head alone.
    """
    trunk: Trunk
    if isinstance(model, LanguageModel):
        trunk, head_weight = model, model.model.get_output_embeddings().weight
    else:
        trunk, head_weight = model.trunk, model.head.weight
    head = 2 * head_weight.numel() * head_tokens
    if isinstance(model, ValueModel) and model.shared:
        return head
    body = trunk.decoder
    config = body.config.get_text_config()
    tokens = int(lengths_B.sum())
    pairs = int((lengths_B.double() * (lengths_B + 1) / 2).sum())
    per_token = _matrices(body, head_weight, getattr(config, "num_experts_per_tok", None)) + _adapter(trunk)
    return 2 * per_token * tokens + _attention(config) * pairs + head


def update_flops(model: LanguageModel | ValueModel, lengths_B: Tensor, head_tokens: int) -> int:
    """Counted operations of forward and backward: three passes where all weights are trained; over a frozen backbone
    two, and the third of the adapter alone."""
    forward = forward_flops(model, lengths_B, head_tokens)
    adapter = _adapter(model if isinstance(model, LanguageModel) else model.trunk)
    return 2 * forward + 2 * adapter * int(lengths_B.sum()) if adapter else 3 * forward


def _adapter(trunk: Trunk) -> int:
    """Weights of the adapter that a role passes through."""
    return sum(weight.numel() for weight in trunk.weights().values()) if isinstance(trunk, AdaptedModel) else 0


def _matrices(body: nn.Module, head_weight: Tensor, experts_per_token: int | None) -> int:
    """Weights that one token is multiplied with, without embeddings, head and adapters.

    Experts: one 3-D weight or a list.
    """
    apart = {id(module.weight) for module in body.modules() if isinstance(module, nn.Embedding)} | {id(head_weight)}
    convolutions = {id(module.weight) for module in body.modules() if isinstance(module, nn.Conv1d)}
    lists = {name for name, module in body.named_modules() if isinstance(module, nn.ModuleList)}
    count = 0
    for name, weight in body.named_parameters():
        if weight.dim() < 2 or id(weight) in apart or name.endswith("bias") or ".lora_" in name:
            continue
        before, is_expert, _ = name.rpartition("experts.")
        if experts_per_token and weight.dim() == 3 and id(weight) not in convolutions:
            count += weight.numel() // len(weight) * experts_per_token
        elif experts_per_token and is_expert and (path := f"{before}experts") in lists:
            count += weight.numel() * experts_per_token // len(body.get_submodule(path))  # type: ignore[arg-type]
        else:
            count += weight.numel()
    return count


def _attention(config: Any) -> int:
    """Operations for each pair of a token and one that it looks at: scores, then weighted values, in every layer."""
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        return 0
    kinds = getattr(config, "layer_types", None) or ["attention"] * config.num_hidden_layers
    layers = sum("attention" in kind and "linear" not in kind for kind in kinds)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_size, value_size = (getattr(config, name, None) or size for name in ("qk_head_dim", "v_head_dim"))
    return 2 * layers * heads * (key_size + value_size)
