"""Architectures of transformers, made tiny with random weights: what the trainer must hold for on each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from srppo.models.language_model import Head, LanguageModel

VOCAB, EOS = 40, 0  # pad = EOS: nothing may look at ids
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "pad_token_id": EOS,
}
GROUPED = {"num_key_value_heads": 1}
HEADS = {"num_key_value_heads": 1, "head_dim": 8}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_group": 1, "topk_group": 1}
LATENT = {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}  # keys wider than values
NAMED = {"vocab_size": VOCAB, "eos_token_id": EOS, "bos_token_id": EOS}  # of those that name their sizes otherwise
GPT = {**NAMED, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
STATES = {**NAMED, "pad_token_id": EOS, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
MAMBA = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
DROPOUT = 0.5  # wherever an architecture has one: it must be off


def _without(*names: str) -> dict[str, Any]:
    return {key: value for key, value in SHAPE.items() if key not in names}


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**SHAPE, tie_word_embeddings=False, attention_dropout=DROPOUT),
    "llama tied": lambda: hf.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mistral window": lambda: hf.MistralConfig(**SHAPE, **GROUPED, sliding_window=4),
    "mixtral": lambda: hf.MixtralConfig(**SHAPE, **GROUPED, **MIXTURE),
    "qwen2 tied": lambda: hf.Qwen2Config(**SHAPE, **GROUPED, tie_word_embeddings=True),
    "qwen3": lambda: hf.Qwen3Config(**SHAPE, **HEADS),
    "qwen2 moe": lambda: hf.Qwen2MoeConfig(**SHAPE, **GROUPED, **EXPERTS, shared_expert_intermediate_size=20),
    "qwen3 moe": lambda: hf.Qwen3MoeConfig(**SHAPE, **HEADS, **EXPERTS),
    "gemma": lambda: hf.GemmaConfig(**SHAPE, **HEADS),
    "gemma2 softcap": lambda: hf.Gemma2Config(
        **SHAPE, **HEADS, final_logit_softcapping=2.0, attn_logit_softcapping=5.0
    ),
    "gemma3 text": lambda: hf.Gemma3TextConfig(**SHAPE, **HEADS, final_logit_softcapping=3.0),
    "gemma3 nested": lambda: hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(**SHAPE, **HEADS, attention_dropout=DROPOUT),
        vision_config={**VISION, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    ),
    "phi bias": lambda: hf.PhiConfig(**SHAPE, resid_pdrop=DROPOUT),
    "phi3": lambda: hf.Phi3Config(**SHAPE, **GROUPED),
    "phi moe": lambda: hf.PhimoeConfig(**SHAPE, **GROUPED, **MIXTURE),
    "gpt2 positions": lambda: hf.GPT2Config(**GPT),  # dropout 0.1 by default
    "gpt neo": lambda: hf.GPTNeoConfig(
        **NAMED,
        **{"hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 32, "window_size": 4},
        attention_types=[[["global", "local"], 1]],
    ),
    "gpt neox": lambda: hf.GPTNeoXConfig(**SHAPE, hidden_dropout=DROPOUT, attention_dropout=DROPOUT),
    "gptj": lambda: hf.GPTJConfig(**GPT, rotary_dim=4),
    "gpt bigcode": lambda: hf.GPTBigCodeConfig(**GPT),
    "gpt oss": lambda: hf.GptOssConfig(**SHAPE, **HEADS, **MIXTURE, sliding_window=4, rope_scaling=None),
    "opt": lambda: hf.OPTConfig(
        **_without("intermediate_size"), ffn_dim=24, word_embed_proj_dim=16, dropout=DROPOUT, do_layer_norm_before=True
    ),
    "opt projected": lambda: hf.OPTConfig(
        **_without("intermediate_size"), ffn_dim=24, word_embed_proj_dim=8, do_layer_norm_before=False, init_std=0.3
    ),
    "bloom alibi": lambda: hf.BloomConfig(
        vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=2, hidden_dropout=DROPOUT, attention_dropout=DROPOUT
    ),
    "falcon": lambda: hf.FalconConfig(**NAMED, hidden_size=16, num_hidden_layers=2, num_attention_heads=2),
    "mpt alibi": lambda: hf.MptConfig(
        vocab_size=VOCAB, d_model=16, n_layers=2, n_heads=2, expansion_ratio=2, max_seq_len=32
    ),
    "stablelm": lambda: hf.StableLmConfig(**SHAPE, **GROUPED),
    "starcoder2": lambda: hf.Starcoder2Config(**SHAPE, **GROUPED),
    "olmo": lambda: hf.OlmoConfig(**SHAPE),
    "olmo2": lambda: hf.Olmo2Config(**SHAPE),
    "olmoe": lambda: hf.OlmoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2),
    "cohere scale": lambda: hf.CohereConfig(**SHAPE, **GROUPED, logit_scale=0.25),
    "cohere2 scale": lambda: hf.Cohere2Config(**SHAPE, **GROUPED, logit_scale=0.25),
    "granite scale": lambda: hf.GraniteConfig(**SHAPE, **GROUPED, logits_scaling=4.0),
    "granite moe": lambda: hf.GraniteMoeConfig(**SHAPE, **GROUPED, **MIXTURE, logits_scaling=4.0),
    "smollm3": lambda: hf.SmolLM3Config(**SHAPE, **GROUPED),
    "nemotron": lambda: hf.NemotronConfig(**SHAPE, **HEADS),
    "glm4": lambda: hf.Glm4Config(**SHAPE, **HEADS),
    "glm4 moe": lambda: hf.Glm4MoeConfig(**SHAPE, **HEADS, **ROUTED, first_k_dense_replace=1),
    "deepseek v3": lambda: hf.DeepseekV3Config(
        **SHAPE, **ROUTED, **LATENT, num_key_value_heads=2, q_lora_rank=8, n_shared_experts=1, first_k_dense_replace=1
    ),
    "llama4 text": lambda: hf.Llama4TextConfig(
        **SHAPE, **HEADS, num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=24
    ),
    "exaone4": lambda: hf.Exaone4Config(**SHAPE, **GROUPED),
    "helium": lambda: hf.HeliumConfig(**SHAPE, **HEADS),
    "persimmon": lambda: hf.PersimmonConfig(**SHAPE),
    "mamba": lambda: hf.MambaConfig(**STATES),
    "mamba2": lambda: hf.Mamba2Config(**STATES, head_dim=8, num_heads=4, n_groups=1, chunk_size=4),
    "falcon h1": lambda: hf.FalconH1Config(**SHAPE, **GROUPED, **MAMBA, mamba_chunk_size=4),
    "lfm2": lambda: hf.Lfm2Config(**SHAPE, **GROUPED, layer_types=["conv", "full_attention"]),
}
HEADS_OF = {
    "gemma2 softcap": Head(True, 1.0, 2.0),
    "gemma3 text": Head(True, 1.0, 3.0),
    "cohere scale": Head(True, 0.25),
    "cohere2 scale": Head(True, 0.25),
    "granite scale": Head(True, 0.25),
    "granite moe": Head(True, 0.25),
    "llama4 text": Head(False),  # its base model is itself, so its body cannot be found
}
"""Heads that are not plain; all others are `Head(True)`."""
MORE_THAN_COUNTED = ("mamba", "mamba2", "falcon h1", "lfm2", "llama4 text")
"""transformers computes more than is counted: recurrences and convolutions as matrix products, or all experts."""
REFUSED: dict[str, Callable[[], Any]] = {
    "rwkv": lambda: hf.RwkvConfig(
        vocab_size=VOCAB, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2, context_length=32
    ),
    "recurrent gemma": lambda: hf.RecurrentGemmaConfig(
        **_without("num_hidden_layers", "max_position_embeddings"),
        **{"num_hidden_layers": 3, "lru_width": 16, "attention_window_size": 8},
    ),
}
"""Right-padded or unpadded input only."""


def make_model(config: Any, seed: int = 0, attention: str = "eager") -> PreTrainedModel:
    """A random model whose logits spread over several nats, so that errors of head, scale or cap would show."""
    torch.manual_seed(seed)
    # Plain products throughout: what is counted is then what is computed.
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, experts_implementation="eager")
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data += 0.1 * torch.randn_like(weight)
    output = model.get_output_embeddings()
    output.weight.data.normal_(0, 1.0)
    if output.bias is not None:
        output.bias.data.normal_(0, 1.0)
    return model.train()


def make(name: str, *, precision: str = "fp32", seed: int = 0, attention: str = "eager") -> LanguageModel:
    """A model of the table, as the trainer holds it."""
    return LanguageModel(make_model(CONFIGS[name](), seed, attention), precision=precision)


def ragged(seed: int = 0) -> tuple[Tensor, Tensor, int, list[tuple[list[int], list[int]]]]:
    """(tokens_BS, attention_mask_BS, T, rows): prompts of 1 to 6 tokens to the right, answers of 1 to 4 to the left."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [(6, 4), (1, 2), (3, 4), (2, 1), (5, 3)]
    rows = [
        tuple(torch.randint(VOCAB, (n,), generator=generator).tolist() for n in pair) for pair in lengths
    ]  # EOS may stand anywhere
    tokens_BS = torch.full((len(rows), 10), EOS)
    mask_BS = torch.zeros(len(rows), 10, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(rows):
        span = slice(6 - len(prompt), 6 + len(answer))
        tokens_BS[i, span] = torch.tensor(prompt + answer)
        mask_BS[i, span] = True
    return tokens_BS, mask_BS, 4, rows  # type: ignore[return-value]
