"""Build the embedded world from nothing: tokenizer, bases, checksums.

    python -m srppo.world.build [OUT [SIZE ...]]
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from srppo.world import ASSETS, BASES, checksums
from srppo.world.items import Item, items
from srppo.world.tasks import CHAT, GROUPS, WORDS, check
from srppo.world.texts import documents
from srppo.world.tokenizer import CONTEXT, train_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# Layers, width, heads, width of the feed-forward part, peak learning rate.
SHAPES = {"xs": (3, 64, 4, 176, 5e-3), "s": (4, 128, 4, 352, 3e-3), "l": (5, 256, 4, 672, 1.5e-3)}
WINDOW = 128  # tokens
BATCH = 16  # windows
TOKENS = 8_000_000
WARMUP = 100  # steps


def build(out: Path = ASSETS, sizes: Sequence[str] = BASES, seed: int = 0, tokens: int = TOKENS) -> None:
    """Write the bases of `sizes`, each trained on the same `tokens` tokens, and checksums.json under `out`."""
    tokenizer = train_tokenizer(documents(seed), WORDS)
    windows_NW = pack(tokenizer, seed, tokens)
    for size in sizes:
        model = train(size, windows_NW, tokenizer, seed).to(torch.bfloat16)
        folder = out / "bases" / size
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model.float()  # as users load it: 16-bit values in fp32
        for group in GROUPS:
            dev = items(group, "dev")
            greedy, sampled = (accuracy(model, tokenizer, dev, sample=sample) for sample in (False, True))
            print(f"{size} {group}: greedy {greedy:.2f}, sampled {sampled:.2f} of {len(dev)} dev items", flush=True)
    (out / "checksums.json").write_text(json.dumps(checksums(out), indent=2) + "\n")


def pack(tokenizer: PreTrainedTokenizerFast, seed: int, tokens: int) -> torch.Tensor:
    """The first `tokens` tokens of the corpus, one document after another, as windows of token ids (N, WINDOW)."""
    stream = documents(seed)
    ids: list[int] = []
    while len(ids) < tokens:
        for encoding in tokenizer(list(islice(stream, 20_000)))["input_ids"]:
            ids += encoding
    count = tokens // WINDOW
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)


def new_model(size: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """An untrained base in fp32; the same `seed` gives the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width, heads, inner, _ = SHAPES[size]
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=inner,
            initializer_range=0.06,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(
    size: str, windows_NW: torch.Tensor, tokenizer: PreTrainedTokenizerFast, seed: int, compiled: bool = False
) -> LlamaForCausalLM:
    """One pass over the windows: AdamW, warm-up and cosine decay to zero. `compiled` needs a C++ compiler."""
    model = new_model(size, tokenizer, seed)
    forward = torch.compile(model) if compiled else model
    steps, peak = len(windows_NW) // BATCH, SHAPES[size][-1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    warmup = min(WARMUP, steps)
    start = time.monotonic()
    for step in range(steps):
        decay = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = peak * min((step + 1) / warmup, decay)
        batch = windows_NW[step * BATCH : (step + 1) * BATCH]
        loss = forward(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"{size} step {step}/{steps} loss {loss.item():.3f} {time.monotonic() - start:.0f} s", flush=True)
    return model.eval()


@torch.no_grad()
def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Item], *, sample: bool
) -> float:
    """Share of `rows` answered exactly, greedily or with one sample each at temperature 1."""
    torch.manual_seed(0)
    prompts = [CHAT.format(prompt=row.prompt) for row in rows]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    tokens = model.generate(**inputs, max_new_tokens=32, do_sample=sample, top_k=0)
    replies = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(check(row.answer, reply) for row, reply in zip(rows, replies, strict=True)) / len(rows)


if __name__ == "__main__":
    build(*[Path(argument) for argument in sys.argv[1:2]], sizes=sys.argv[2:] or BASES)
