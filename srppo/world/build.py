"""Build the embedded world from nothing: tokenizer, bases, checksums.

python -m srppo.world.build [OUT [SIZE ...]]
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from srppo.world import ASSETS, BASES, checksums
from srppo.world.items import Item, items
from srppo.world.tasks import CHAT, GROUPS, WORDS, check
from srppo.world.texts import LESSONS, REPLIES, documents
from srppo.world.tokenizer import CONTEXT, train_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

WINDOW = 128  # tokens
BATCH = 16  # windows
WARMUP = 100  # steps


@dataclass(frozen=True)
class Shape:
    """A base: its Llama dimensions, peak learning rate and length of training in tokens."""

    layers: int
    width: int
    heads: int
    inner: int
    rate: float
    tokens: int


SHAPES = {
    "xs": Shape(layers=3, width=64, heads=4, inner=176, rate=5e-3, tokens=4_000_000),
    "s": Shape(layers=4, width=128, heads=4, inner=352, rate=3e-3, tokens=4_000_000),
    "l": Shape(layers=5, width=256, heads=4, inner=512, rate=2e-3, tokens=2_400_000),
}


def build(out: Path = ASSETS, sizes: Sequence[str] = BASES, seed: int = 0, tokens: int | None = None) -> None:
    """Write the bases of `sizes` and checksums.json under `out`; `tokens` overrides the length of training."""
    tokenizer = train_tokenizer(documents(seed), WORDS)
    for size in sizes:
        windows_NW = corpus(tokenizer, seed, tokens or SHAPES[size].tokens)
        model = train(size, windows_NW, tokenizer, seed).bfloat16()
        folder = out / "bases" / size
        model.save_pretrained(folder)
        (folder / "model.safetensors").chmod(0o644)  # as a package's data must be
        tokenizer.save_pretrained(folder)
        model.float()  # as users load it: 16-bit values in fp32
        for group in GROUPS:
            dev = items(group, "dev")
            greedy, sampled = (accuracy(model, tokenizer, dev, sample=sample) for sample in (False, True))
            print(f"{size} {group}: greedy {greedy:.2f}, sampled {sampled:.2f} of {len(dev)} dev items", flush=True)
    (out / "checksums.json").write_text(json.dumps(checksums(out), indent=2) + "\n")


def corpus(tokenizer: PreTrainedTokenizerFast, seed: int, tokens: int) -> torch.Tensor:
    """`tokens` token ids as windows (N, WINDOW): half of them lessons, then the mixture that the base is to speak."""
    halves = (pack(tokenizer, documents(seed + i, shares), tokens // 2) for i, shares in ((1, LESSONS), (0, REPLIES)))
    return torch.cat(list(halves))


def pack(tokenizer: PreTrainedTokenizerFast, stream: Iterator[str], tokens: int) -> torch.Tensor:
    """The first `tokens` tokens of `stream`, one document after another, as windows of token ids (N, WINDOW)."""
    ids: list[int] = []
    while len(ids) < tokens:
        for encoding in tokenizer(list(islice(stream, 5000)))["input_ids"]:
            ids += encoding
    count = tokens // WINDOW
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)


def new_model(size: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """An untrained base in fp32; the same `seed` gives the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES[size]
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            intermediate_size=shape.inner,
            initializer_range=0.06,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(size: str, windows_NW: torch.Tensor, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """One pass over the windows in their order: AdamW, warm-up and cosine decay to zero."""
    model = new_model(size, tokenizer, seed)
    steps, peak = len(windows_NW) // BATCH, SHAPES[size].rate
    # Compiled, a step takes a quarter less time, which pays only in a long run.
    forward = torch.compile(model) if steps > 500 and shutil.which("c++") else model
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
    settings = {"do_sample": True, "top_k": 0} if sample else {"do_sample": False}
    tokens = model.generate(**inputs, max_new_tokens=32, **settings)  # type: ignore[misc]
    replies = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(check(row.answer, reply) for row, reply in zip(rows, replies, strict=True)) / len(rows)


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else ASSETS, sys.argv[2:] or BASES)
