"""Tokenizers, rows and files for the tests of data."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from srppo.data.chat import encode_demonstrations, encode_prompts
from srppo.data.types import Demonstration, EncodedDemonstration, Message, Prompt

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
EXPLICIT_BOS = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"


def real(path: str) -> str:
    """A public data file under the folder that SRPPO_REAL_DATA names; without it the test is skipped."""
    folder = os.environ.get("SRPPO_REAL_DATA")
    if not folder or not Path(folder, path).exists():
        pytest.skip(f"needs the public data file {path} in the folder SRPPO_REAL_DATA")
    return str(Path(folder, path))


def make_tokenizer(*, bos: bool = False, pad_is_eos: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<eos>", "<pad>", "<bos>", "<|im_start|>", "<|im_end|>", "<|user|>"]
    text = ["Q: reverse sun cat\nA: cat sun", "Q: what is it?\nA: it is a cat.", "\n\n the answer"] * 30
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        bos_token="<bos>" if bos else None,
        pad_token="<eos>" if pad_is_eos else "<pad>",
    )


def demo(prompt: str = "reverse sun cat", answer: str = "cat sun", source: str = "a:1") -> Demonstration:
    return Demonstration((Message("user", prompt),), answer, source)


def write(folder: Path, name: str, content: str | bytes | list) -> str:
    path = folder / name
    if isinstance(content, list):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def encode(tokenizer, row: Demonstration, **options) -> EncodedDemonstration | str:
    how = {"system": None, "max_tokens": 512, "max_prompt_tokens": 256} | options
    return encode_demonstrations(tokenizer, [row], **how)[0]


def encode_prompt(tokenizer, row: Prompt, **options) -> tuple[int, ...] | str:
    return encode_prompts(tokenizer, [row], **options)[0]


def message_of(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text
