"""Build the embedded world from nothing: tokenizer, bases, checksums.

python -m srppo.world.build [OUT [BASE ...]]
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from srppo.world import ASSETS, BASES, checksums
from srppo.world.items import ITEM_GROUPS, Item, items
from srppo.world.operations import OPERATIONS, WORDS
from srppo.world.styles import STYLES
from srppo.world.tasks import CHAT, check
from srppo.world.texts import documents
from srppo.world.tokenizer import CONTEXT, train_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

TOKENS = 4_000_000  # of every base
LESSONS = 0.6  # share of them that teaches the tasks, before the mixture that the base is to speak
ROWS = 64  # documents an optimizer step
WARMUP = 100  # steps


@dataclass(frozen=True)
class Shape:
    """A size: its Llama dimensions and peak learning rate."""

    layers: int
    width: int
    heads: int
    inner: int
    rate: float


SHAPES = {
    "xs": Shape(layers=3, width=80, heads=4, inner=208, rate=5e-3),
    "s": Shape(layers=4, width=128, heads=4, inner=352, rate=3e-3),
    "l": Shape(layers=5, width=192, heads=4, inner=512, rate=2e-3),
}


def build(out: Path = ASSETS, names: Sequence[str] = tuple(BASES), tokens: int = TOKENS) -> None:
    """Write the bases of these names and checksums.json under `out`; each is trained on `tokens` tokens."""
    tokenizer = world_tokenizer()
    for name in names:
        base = BASES[name]
        model = train(name, corpus(tokenizer, name, tokens), tokenizer).bfloat16()
        folder = out / "bases" / name
        model.save_pretrained(folder)
        (folder / "model.safetensors").chmod(0o644)  # as a package's data must be
        tokenizer.save_pretrained(folder)
        model.float()  # as users load it: 16-bit values in fp32
        for group in ITEM_GROUPS["dev"]:
            dev = items(group, "dev", base.style)
            greedy, sampled = (accuracy(model, tokenizer, dev, sample=sample) for sample in (False, True))
            print(f"{name} {group}: greedy {greedy:.2f}, sampled {sampled:.2f} of {len(dev)} dev items", flush=True)
    (out / "checksums.json").write_text(json.dumps(checksums(out), indent=2) + "\n")


def world_tokenizer() -> PreTrainedTokenizerFast:
    """The one tokenizer of all bases, learnt from the lessons of both styles in turn."""
    streams = [documents(0, style, style.lessons) for style in STYLES.values()]
    return train_tokenizer(chain.from_iterable(zip(*streams, strict=False)), (*WORDS, *OPERATIONS))


def corpus(tokenizer: PreTrainedTokenizerFast, name: str, tokens: int) -> list[tuple[list[int], int]]:
    """Documents as (token ids, where the reply begins), `tokens` tokens in all: lessons, then the style's mixture."""
    seed, style = 2 * BASES[name].seed, STYLES[BASES[name].style]
    lessons = documents(seed + 1, style, style.lessons)
    mixture = documents(seed, style, style.replies)
    return [
        *_first_tokens(tokenizer, lessons, round(tokens * LESSONS)),
        *_first_tokens(tokenizer, mixture, round(tokens * (1 - LESSONS))),
    ]


def _first_tokens(
    tokenizer: PreTrainedTokenizerFast, stream: Iterator[str], tokens: int
) -> Iterator[tuple[list[int], int]]:
    while tokens > 0:
        question, mark, reply = next(stream).rpartition("\nA:")
        head = tokenizer.encode(question + mark)
        ids = head + tokenizer.encode(reply)
        yield ids, len(head)
        tokens -= len(ids)


def batches(rows: Sequence[tuple[list[int], int]], pad: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids (ROWS, S) and labels (ROWS, S) of one pass over the rows in their order; replies alone are labelled."""
    for start in range(0, len(rows) - ROWS + 1, ROWS):
        part = rows[start : start + ROWS]
        longest = max(len(ids) for ids, _ in part)
        tokens_BS = torch.full((ROWS, longest), pad)
        labels_BS = torch.full((ROWS, longest), -100)
        for i, (ids, begin) in enumerate(part):
            tokens_BS[i, : len(ids)] = torch.tensor(ids)
            labels_BS[i, begin : len(ids)] = torch.tensor(ids[begin:])
        yield tokens_BS, labels_BS


def new_model(name: str, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained base in fp32; the same seed gives the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES[BASES[name].size]
    torch.manual_seed(BASES[name].seed)
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


def train(name: str, rows: Sequence[tuple[list[int], int]], tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """One pass over the rows: AdamW on the replies, warm-up and cosine decay to zero.

    A document stands alone in its row. Packed into windows the same tokens taught next to nothing: a question's place
    then varies, and most of the loss is that of words drawn at random.
    """
    model = new_model(name, tokenizer)
    steps, peak = len(rows) // ROWS, SHAPES[BASES[name].size].rate
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    warmup = min(WARMUP, steps)
    start = time.monotonic()
    for step, (tokens_BS, labels_BS) in enumerate(batches(rows, tokenizer.pad_token_id)):
        decay = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = peak * min((step + 1) / warmup, decay)
        loss = model(input_ids=tokens_BS, labels=labels_BS).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"{name} step {step}/{steps} loss {loss.item():.3f} {time.monotonic() - start:.0f} s", flush=True)
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
    tokens = model.generate(**inputs, max_new_tokens=64, **settings)  # type: ignore[misc]
    replies = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(check(row.answer, reply) for row, reply in zip(rows, replies, strict=True)) / len(rows)


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else ASSETS, sys.argv[2:] or tuple(BASES))
