"""Conversations to token ids: the chat template, stop tokens, and the boundary where the loss starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from srppo.data.types import Demonstration, EncodedDemonstration, Message, Prompt
from srppo.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ message['content'] + '\\n\\n' }}"
    "{%- elif message['role'] == 'user' -%}{{ 'Q: ' + message['content'] + '\\n' }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ 'A: ' + message['content'] + (eos_token if loop.last else '\\n') }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'A:' }}{%- endif -%}"
)
"""Ours, for tokenizers without one: `Q: {user}\\nA: {assistant}{eos}`; only the last answer ends in EOS, earlier turns
end in a newline, a system message stands first with a blank line after it. The answer begins with a space. `render`
writes the same."""
_BOS = "{{ bos_token }}"


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give a tokenizer that has no chat template ours; True if it was given.

    Where the tokenizer begins every text with BOS, our template does too, so that a base model sees what it was
    trained on and `apply_chat_template` alone makes the right ids, here and wherever the model is served.
    """
    if tokenizer.chat_template is not None:
        return False
    if tokenizer.eos_token is None:
        raise ModelError(
            "the tokenizer has neither a chat template nor an EOS token; set its eos_token or chat_template"
        )
    begin = _BOS if _begins_with_bos(tokenizer) else ""
    tokenizer.chat_template = begin + CHAT_TEMPLATE
    return True


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], *, generation: bool) -> str:
    """The text of a conversation by the tokenizer's template; ours is written without jinja, at a 20th of its cost.

    Raises jinja2's TemplateError, or ValueError, where a template refuses it.
    """
    begin, ours, after = str(tokenizer.chat_template).partition(CHAT_TEMPLATE)
    if not ours or after or begin not in ("", _BOS) or not messages:
        turns = [dict(message) for message in messages]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation))
    parts = [str(tokenizer.bos_token)] if begin else []
    for place, message in enumerate(messages, start=1):
        role, content = message["role"], message["content"]
        if role == "system":
            parts.append(f"{content}\n\n")
        elif role == "user":
            parts.append(f"Q: {content}\n")
        elif role == "assistant":
            parts.append(f"A: {content}{tokenizer.eos_token if place == len(messages) else chr(10)}")
    return "".join([*parts, "A:"] if generation else parts)


def stop_ids(tokenizer: PreTrainedTokenizerBase, generation_config: Any = None) -> list[int]:
    """Token ids that end a response: the tokenizer's EOS and those of the generation config, each once."""
    configured = getattr(generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list | tuple) else [configured]
    ids = list(dict.fromkeys(int(i) for i in (tokenizer.eos_token_id, *listed) if i is not None))
    if not ids:
        raise ModelError(
            "neither the tokenizer nor the generation config names an EOS token, so no response could end; "
            "set eos_token in tokenizer_config.json or eos_token_id in generation_config.json"
        )
    return ids


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, system: str | None, max_prompt_tokens: int
) -> tuple[int, ...] | str:
    """Token ids of a prompt up to where the answer begins, or the reason why it is left out."""
    return encode_prompts(tokenizer, [prompt], system=system, max_prompt_tokens=max_prompt_tokens)[0]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], *, system: str | None, max_prompt_tokens: int
) -> list[tuple[int, ...] | str]:
    """`encode_prompt` of each, at less than half the cost: template and tokenizer are called once for all."""
    turns = [_with_system(prompt.messages, system) for prompt in prompts]
    heads = _prompt_ids(tokenizer, _rendered(tokenizer, turns, generation=True), max_prompt_tokens)
    return [str(head) if isinstance(head, _LeftOut) else head for head in heads]


def encode_demonstration(
    tokenizer: PreTrainedTokenizerBase,
    demonstration: Demonstration,
    *,
    system: str | None,
    max_tokens: int,
    max_prompt_tokens: int,
    stop: Sequence[int] | None = None,
) -> EncodedDemonstration | str:
    """Token ids of prompt and answer, or the reason why the row is left out.

    The prompt's ids are those that `encode_prompt` feeds to generation, and the answer ends in a stop token (`stop`,
    default the tokenizer's EOS): what a template puts after it (ChatML's newline) is dropped, and the first of `stop`
    is added where the template ends without one. Beyond `max_tokens` the answer is cut and has no stop token.

    A plain text has no prompt; it begins as the tokenizer begins texts (BOS or nothing), takes no system message, and
    without BOS its first token counts as prompt, since nothing stands before it to predict it from.
    """
    return encode_demonstrations(
        tokenizer,
        [demonstration],
        system=system,
        max_tokens=max_tokens,
        max_prompt_tokens=max_prompt_tokens,
        stop=stop,
    )[0]


def encode_demonstrations(
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    *,
    system: str | None,
    max_tokens: int,
    max_prompt_tokens: int,
    stop: Sequence[int] | None = None,
) -> list[EncodedDemonstration | str]:
    """`encode_demonstration` of each, with template and tokenizer called once for all."""
    stops = list(stop) if stop else stop_ids(tokenizer)
    asked = [row for row in demonstrations if row.prompt]
    plain = [row.answer for row in demonstrations if not row.prompt]
    pairs = iter(_asked_pairs(tokenizer, asked, system, min(max_prompt_tokens, max_tokens - 1)))
    begin = tuple(tokenizer("a")["input_ids"][:1]) if plain and _begins_with_bos(tokenizer) else ()
    texts = iter(_ids(tokenizer, plain))
    result: list[EncodedDemonstration | str] = []
    for row in demonstrations:
        pair = next(pairs) if row.prompt else (begin, next(texts))
        if isinstance(pair, _LeftOut):
            result.append(str(pair))
            continue
        head, tail = pair[0], _ended(tokenizer, pair[1], stops)
        if any(token in stops for token in tail[:-1]):
            result.append("a stop token inside the answer")
        else:
            result.append(EncodedDemonstration((head + tail)[:max_tokens], max(len(head), 1)))
    return result


class _LeftOut(Exception):
    """Stands for a row that cannot be encoded, among those that can; the message is the reason."""


def _asked_pairs(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Demonstration], system: str | None, most: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]] | _LeftOut]:
    """(prompt ids, answer ids) of demonstrations that have prompts."""
    turns = [_with_system(row.prompt, system) for row in rows]
    befores = _rendered(tokenizer, turns, generation=True)
    heads = _prompt_ids(tokenizer, befores, most)
    taught = [(*asked, Message("assistant", row.answer)) for asked, row in zip(turns, rows, strict=True)]
    wholes = _rendered(tokenizer, taught, generation=False)
    together = iter(_ids(tokenizer, [whole for whole in wholes if isinstance(whole, str)]))
    pairs: list[tuple[tuple[int, ...], tuple[int, ...]] | _LeftOut] = []
    for before, head, whole in zip(befores, heads, wholes, strict=True):
        ids = next(together) if isinstance(whole, str) else ()
        if isinstance(head, _LeftOut):
            pairs.append(head)
        elif isinstance(before, _LeftOut):
            pairs.append(before)
        elif isinstance(whole, _LeftOut):
            pairs.append(whole)
        elif not whole.startswith(before):
            pairs.append(_LeftOut("the chat template writes the answer otherwise than after its generation prompt"))
        elif ids[: len(head)] == head:
            pairs.append((head, ids[len(head) :]))
        else:
            # A token spans the boundary; generation cannot make it, since it starts after the prompt's last token.
            pairs.append((head, _ids(tokenizer, [whole[len(before) :]])[0]))
    return pairs


def _prompt_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str | _LeftOut], most: int
) -> list[tuple[int, ...] | _LeftOut]:
    found = iter(_ids(tokenizer, [text for text in texts if isinstance(text, str)]))
    result: list[tuple[int, ...] | _LeftOut] = []
    for text in texts:
        ids = text if isinstance(text, _LeftOut) else next(found)
        if not ids:
            ids = _LeftOut("the chat template makes nothing of the prompt")
        elif not isinstance(ids, _LeftOut) and len(ids) > most:
            ids = _LeftOut(f"prompt longer than {most:,} tokens")
        result.append(ids)
    return result


def _ended(tokenizer: PreTrainedTokenizerBase, tail: tuple[int, ...], stops: list[int]) -> tuple[int, ...]:
    last = max((place for place, token in enumerate(tail) if token in stops), default=None)
    if last is not None and (last + 1 == len(tail) or not str(tokenizer.decode(list(tail[last + 1 :]))).strip()):
        return tail[: last + 1]
    return (*tail, stops[0])


def _rendered(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]], *, generation: bool
) -> list[str | _LeftOut]:
    from jinja2.exceptions import TemplateError

    found: list[str | _LeftOut] = []
    for turns in conversations:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            found.append(render(tokenizer, messages, generation=generation))
        except TemplateError as error:  # for example a model without system messages
            found.append(_LeftOut(f"the chat template refuses it: {' '.join(str(error).split())}"))
    return found


def _with_system(turns: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    """A row's own system message stays; else `system` is put first."""
    if system is None or (turns and turns[0].role == "system"):
        return turns
    return (Message("system", system), *turns)


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[tuple[int, ...]]:
    # Without special tokens: what the template writes is all there is, so BOS is never doubled.
    if not texts:
        return []
    found = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [tuple(ids) for ids in found["input_ids"]]


def _begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
