"""Conversations to token ids: the chat template, stop tokens, and which tokens are trained.

What is trained of a row begins where the template's generation prompt ends, where a rollout begins too. It ends with
the first stop token that follows the answer. Templates are found to be of these kinds, by trying them:

- the whole conversation begins with the generation prompt and holds the answer: its text is trained as it is;
- it does not (a think block that only the generation prompt opens, an answer that is changed or dropped): trained are
  the generation prompt, the answer, and the end of turn that the template writes after an answer;
- contents are read as lists of parts alone (SmolVLM, Idefics3): they are given parts.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from srppo.data.types import Demonstration, EncodedDemonstration, Message, Prompt
from srppo.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_T = TypeVar("_T")
_Ids = tuple[int, ...]
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
_MARK = "\ue000\ue001\ue000"  # stands for an answer where the text around it is looked for: private characters
_STOPPED = "a stop token inside the answer"
_KEYS = "model.template_kwargs (such as enable_thinking = false) or model.chat_template"


# ---- the template


def use_template(tokenizer: PreTrainedTokenizerBase, path: str | None, kwargs: Mapping[str, Any]) -> None:
    """Give a tokenizer the template of a file, and variables for every rendering by it.

    The variables are written into the template itself, as the values of those that a caller does not set, so that they
    go with it: to rollouts, to lm-eval, into the exported model and to whoever serves that.

    Raises:
        ConfigError: a file that cannot be read, no template to set variables for, or one that reads no such variable.
    """
    if path is not None:
        tokenizer.chat_template = template_text(path)
    if not kwargs:
        return
    if tokenizer.chat_template is None:
        raise ConfigError(
            "model.template_kwargs is set but the tokenizer has no chat template; set model.chat_template"
        )
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {"": tokenizer.chat_template}
    if unread := [key for key in kwargs if not any(re.search(rf"\b{key}\b", text) for text in named.values())]:
        raise ConfigError(
            f"model.template_kwargs has {', '.join(unread)}, which the chat template does not mention; check the name"
        )
    # `+%}` keeps a newline with which the template begins; a literal of Python is one of Jinja.
    head = "".join(
        f"{{% set {key} = {value!r} if {key} is not defined else {key} +%}}" for key, value in sorted(kwargs.items())
    )
    given = {name: text if text.startswith(head) else head + text for name, text in named.items()}
    tokenizer.chat_template = given if isinstance(tokenizer.chat_template, dict) else given[""]


def template_text(path: str) -> str:
    """The text of a template's file. Raises ConfigError in one line."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"model.chat_template {path} cannot be read: {why}; give a file with a template") from None


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
    tokenizer.chat_template = (_BOS if _begins_with_bos(tokenizer) else "") + CHAT_TEMPLATE
    return True


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    generation: bool,
    tools: str = "",
    unfinished: bool = False,
) -> str:
    """The text of a conversation by the tokenizer's template; ours is written without jinja, at a 20th of its cost.

    generation: with the generation prompt at its end. tools: the JSON text of those on offer. unfinished: the last
    message is left open, to be continued. Raises jinja2's TemplateError, or what a template's own mistakes raise.
    """
    template = str(tokenizer.chat_template)
    begin, ours, after = template.partition(CHAT_TEMPLATE)
    if not ours or after or begin not in ("", _BOS) or not messages or unfinished:
        turns = [dict(message) for message in messages]
        if _takes_parts(tokenizer, template):
            turns = [turn | {"content": _parts(turn.get("content"))} for turn in turns]
        more: Any = {"tools": json.loads(tools)} if tools else {}
        how: Any = {"continue_final_message": True} if unfinished else {"add_generation_prompt": generation}
        return str(tokenizer.apply_chat_template(turns, tokenize=False, **how, **more))
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


@lru_cache(maxsize=8)
def _takes_parts(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether the template loses contents that are text, and writes them where they are lists of parts."""

    def writes(content: Any) -> bool:
        turns = [{"role": role, "content": content} for role in ("user", "assistant")]
        try:
            return str(tokenizer.apply_chat_template(turns, tokenize=False)).count(_MARK) == 2
        except Exception:  # whatever the template stumbles over
            return False

    return not writes(_MARK) and writes(_parts(_MARK))


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def template_notes(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What is to be said of a template: that it writes answers otherwise than after its generation prompt."""
    asked = [Message("user", "q")]
    before = _attempt(_rendered, tokenizer, asked, "", True)
    whole = _attempt(_rendered, tokenizer, [*asked, Message("assistant", _MARK)], "", False)
    if isinstance(before, _LeftOut) or isinstance(whole, _LeftOut) or (whole.startswith(before) and _MARK in whole):
        return []
    return [
        "the chat template writes an answer otherwise than after its generation prompt, which ends in "
        f"{before[-24:]!r}: trained are that prompt, the answer and the end of turn; {_KEYS} would change it"
    ]


# ---- tokens


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


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the tokenizer's special tokens."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """What finds the tokenizer's special tokens in a text: there they are read as such, and not as text."""
    names = sorted(tokenizer.convert_ids_to_tokens(list(special_ids(tokenizer))), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[_Ids]:
    # Without special tokens: what the template writes is all there is, so BOS is never doubled.
    if not texts:
        return []
    found = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [tuple(ids) for ids in found["input_ids"]]


def _begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


# ---- conversations to text


class _LeftOut(Exception):
    """Stands for a row that cannot be encoded, among those that can; the message is the reason."""


def _attempt(make: Callable[..., _T], *args: Any) -> _T | _LeftOut:
    try:
        return make(*args)
    except _LeftOut as reason:
        return reason


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], tools: str, generation: bool) -> str:
    from jinja2.exceptions import TemplateError

    try:
        text = render(tokenizer, _as_asked(turns), generation=generation, tools=tools)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        # A model without system messages, for example; or a template that stumbles over a turn.
        raise _LeftOut(f"the chat template refuses it: {' '.join(str(error).split())[:200]}") from None
    if not _has_tools(text, turns):
        raise _LeftOut("the chat template leaves out turns of tools")
    return text


def _as_asked(turns: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates take them; a call and the tool's turn that answers it have one id, of nine digits."""
    messages: list[dict[str, Any]] = []
    called = answered = 0
    for turn in turns:
        message: dict[str, Any] = {"role": turn.role, "content": turn.content}
        if turn.calls:
            calls = json.loads(turn.calls)
            message["tool_calls"] = [
                {"id": f"{called + i:09}", "type": "function", "function": call} for i, call in enumerate(calls)
            ]
            called += len(calls)
        elif turn.role == "tool":
            message["tool_call_id"] = f"{answered:09}"
            answered += 1
        if turn.name:
            message["name"] = turn.name
        messages.append(message)
    return messages


def _has_tools(text: str, turns: Sequence[Message]) -> bool:
    """Whether a text has what tools said, and the names of those that were called; templates may know of no tools."""
    said = [turn.content for turn in turns if turn.role == "tool"]
    if not said and not any(turn.calls for turn in turns):
        return True
    asked = next((turn.content.strip() for turn in turns if turn.role == "user"), "")
    after = text.partition(asked)[2] if asked else text  # behind the list of tools on offer
    # A template may write a tool's answer as JSON: then its quotes and line ends are escaped.
    return all(_holds(text, each) or _holds(text, json.dumps(each, ensure_ascii=False)[1:-1]) for each in said) and all(
        call["name"] in after for turn in turns if turn.calls for call in json.loads(turn.calls)
    )


def _holds(text: str, said: str) -> bool:
    return said in text or _squeezed(said) in _squeezed(text)


def _squeezed(text: str) -> str:
    """Without white space, which templates trim and add."""
    return "".join(text.split())


def _with_system(row: Demonstration | Prompt, system: str | None) -> tuple[Message, ...]:
    """The prompt; a row's own system message stays, else `system` is put first."""
    if system is None or (row.prompt and row.prompt[0].role == "system"):
        return row.prompt
    return (Message("system", system), *row.prompt)


# ---- rows to tokens


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], *, system: str | None, max_prompt_tokens: int
) -> list[_Ids | str]:
    """Token ids of each prompt up to where the answer begins, or the reason why it is left out."""
    texts = [_attempt(_rendered, tokenizer, _with_system(row, system), row.tools, True) for row in prompts]
    ids = iter(_ids(tokenizer, [text for text in texts if isinstance(text, str)]))
    found = [next(ids) if isinstance(text, str) else str(text) for text in texts]
    return [each if isinstance(each, str) else _too_long(len(each), max_prompt_tokens) or each for each in found]


def _too_long(tokens: int, most: int) -> str:
    if tokens > most:
        return f"prompt longer than {most:,} tokens"
    return "" if tokens else "the chat template makes nothing of the prompt"


def encode_demonstrations(
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    *,
    system: str | None,
    max_tokens: int,
    max_prompt_tokens: int,
    stop: Sequence[int] | None = None,
    turns: str = "last",
) -> list[EncodedDemonstration | str]:
    """Token ids of each prompt and answer, or the reason why the row is left out.

    The prompt's ids are those that `encode_prompts` feeds to generation, and the answer ends in a stop token (`stop`,
    default the tokenizer's EOS): what a template puts after it (ChatML's newline) is dropped, and the first of `stop`
    is added where the template ends without one. Beyond `max_tokens` the answer is cut and has no stop token.

    With `turns` = "all" the assistant's earlier turns are trained too, each from its generation prompt to the stop
    token that the template writes after it, or to its own end where it writes none there; then the prompt, which
    `max_prompt_tokens` limits, ends where the first of them begins.

    A plain text has no prompt; it begins as the tokenizer begins texts (BOS or nothing), takes no system message, and
    without BOS its first token counts as prompt, since nothing stands before it to predict it from.
    """
    stops = list(stop) if stop else stop_ids(tokenizer)
    most, every = min(max_prompt_tokens, max_tokens - 1), turns == "all"
    texts = [_attempt(_texts, tokenizer, row, _with_system(row, system)) for row in demonstrations]
    ids = iter(_ids(tokenizer, [text for pair in texts if not isinstance(pair, _LeftOut) for text in pair]))
    begin = tuple(tokenizer("a")["input_ids"][:1]) if _begins_with_bos(tokenizer) else ()

    def encoded(row: Demonstration, before: str, text: str, head: _Ids, whole: _Ids) -> EncodedDemonstration:
        earlier = _earlier(tokenizer, row, _with_system(row, system), before, stops) if every else []
        if row.prompt and (reason := _too_long(earlier[0][0] if earlier else len(head), most)):
            raise _LeftOut(reason)
        answer = text[len(before) :]
        # Where a token spans the boundary: generation cannot make it, it starts after the prompt's last token.
        tail = whole[len(head) :] if whole[: len(head)] == head else _ids(tokenizer, [answer])[0]
        head = head if row.prompt else begin
        ids = head + _ended(tokenizer, tail, answer, row.answer, stops)
        spans = [*earlier, (max(len(head), 1), len(ids))]
        # Cut, a row ends in what is trained.
        kept = [(start, min(stop, max_tokens)) for start, stop in spans if start < max_tokens]
        gaps = tuple((one[1], other[0]) for one, other in pairwise(kept) if one[1] < other[0])
        return EncodedDemonstration(ids[: kept[-1][1]], kept[0][0], gaps)

    found = [
        pair if isinstance(pair, _LeftOut) else _attempt(encoded, row, *pair, next(ids), next(ids))
        for row, pair in zip(demonstrations, texts, strict=True)
    ]
    return [str(each) if isinstance(each, _LeftOut) else each for each in found]


def _texts(tokenizer: PreTrainedTokenizerBase, row: Demonstration, asked: Sequence[Message]) -> tuple[str, str]:
    """(what stands before the answer, the text to train on).

    The text is the whole conversation as its template writes it, where that begins with the generation prompt and holds
    the answer; else the generation prompt, the answer, and what the template writes after an answer.
    """
    if not row.prompt:
        return "", row.answer
    before = _rendered(tokenizer, asked, row.tools, True)
    whole = _rendered(tokenizer, [*asked, Message("assistant", row.answer, row.calls)], row.tools, False)
    after = whole.removeprefix(before)
    named = all(call["name"] in after for call in json.loads(row.calls or "[]"))
    if whole.startswith(before) and named and _holds(after, row.answer):
        return before, whole
    marked = _rendered(tokenizer, [*asked, Message("assistant", _MARK)], row.tools, False)
    if row.calls or _MARK not in marked:
        what = "a call of a tool" if row.calls else "the answer"
        raise _LeftOut(f"the chat template does not write {what} after its generation prompt; set {_KEYS}")
    return before, before + _continued(before, row.answer) + marked.rpartition(_MARK)[2]


def _continued(before: str, answer: str) -> str:
    """The answer without the opening tag (`<think>`) that the generation prompt has opened already."""
    opened = re.search(r"(<[\w:]+>)\s*$", before)
    if not opened or not answer.lstrip().startswith(opened[1]):
        return answer
    rest = answer.lstrip().removeprefix(opened[1])
    return rest.lstrip("\n") if before.endswith("\n") else rest


def _ended(tokenizer: PreTrainedTokenizerBase, tail: _Ids, text: str, answer: str, stops: list[int]) -> _Ids:
    """The tokens of an answer and what follows it (`text`) up to the first stop token after the answer."""
    places = [place for place, token in enumerate(tail) if token in stops]
    if not places:
        return (*tail, stops[0])
    if len(places) == 1 and not str(tokenizer.decode(list(tail[places[0] + 1 :]))).strip():
        return tail[: places[0] + 1]
    said, through = _ids(tokenizer, [answer, text[: _end_of(answer, text)]])
    if any(token in stops for token in said):
        raise _LeftOut(_STOPPED)
    past = sum(token in stops for token in through)
    return tail[: places[past] + 1] if past < len(places) else (*tail, stops[0])


def _end_of(answer: str, text: str) -> int:
    """Where the answer ends in a text, in characters; white space may have been changed."""
    solid = [place for place, character in enumerate(text) if not character.isspace()]
    said = _squeezed(answer)
    last = "".join(text[place] for place in solid).find(said) + len(said) - 1
    return solid[last] + 1 if said and last >= 0 else 0


def _earlier(
    tokenizer: PreTrainedTokenizerBase, row: Demonstration, turns: Sequence[Message], before: str, stops: list[int]
) -> list[tuple[int, int]]:
    """Where the assistant's turns stand in the prompt `before` (those after a user's), as ranges of its tokens.

    No template says so itself. The text of an answer stands where a mark stands when the same conversation is written
    with marks in place of answers, and what is trained begins where its own generation prompt ends.
    """
    places = [i for i, turn in enumerate(turns) if turn.role == "assistant" and "user" in [t.role for t in turns[:i]]]
    if not places:
        return []
    if any(token in stops for ids in _ids(tokenizer, [turns[i].content for i in places]) for token in ids):
        raise _LeftOut(_STOPPED)
    changed = _LeftOut("the chat template changes or drops an earlier answer (data.turns = all)")
    hidden = [Message("assistant", _MARK) if i in places and not t.calls else t for i, t in enumerate(turns)]
    pieces = iter(_rendered(tokenizer, hidden, row.tools, True).split(_MARK))
    cursor, following = 0, next(pieces)
    spans: list[tuple[int, int]] = []  # in characters, from where it is trained to the answer's end
    for place in places:
        opening = _attempt(_rendered, tokenizer, turns[:place], row.tools, True)
        begin = len(opening) if isinstance(opening, str) and before.startswith(opening) else None
        if turns[place].calls:  # no mark can stand for calls: they go on as where the conversation ends with them
            closing = _rendered(tokenizer, turns[: place + 1], row.tools, False)
            name = json.loads(turns[place].calls)[-1]["name"]
            here, there = before.find(name, begin), closing.find(name, begin)
            if begin is None or min(here, there) < 0:
                raise changed
            spans.append((begin, here + _common(before[here:], closing[there:])))
            continue
        start, content = cursor + len(following), turns[place].content
        written = before.startswith(following, cursor)
        following = next(pieces, "")
        forms = (content, content.strip(), content.rstrip(), content.lstrip())
        form = next((form for form in forms if before.startswith(form + following, start)), None)
        if not written or form is None:
            raise changed
        cursor = start + len(form)
        spans.append((start if begin is None or begin > start else begin, cursor))
    return _token_spans(tokenizer, before, spans, stops)


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _token_spans(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int]], stops: list[int]
) -> list[tuple[int, int]]:
    """Ranges of tokens that lie within ranges of characters, each with the stop token that follows it."""
    try:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except NotImplementedError:
        raise ConfigError(
            "data.turns = all needs a tokenizer that says where its tokens stand, and this one, without a "
            "tokenizer.json, does not; convert it, or leave data.turns at last"
        ) from None
    ids, special = found["input_ids"], special_ids(tokenizer)
    starts, ends = zip(*found["offset_mapping"], strict=True)
    result = []
    for begin, end in spans:
        first = last = bisect_left(starts, begin)
        while last < len(ids) and ends[last] <= end and ids[last] not in stops:
            last += 1
        # The end of turn: special tokens and white space up to the stop token. Without one there, the answer alone.
        after = last
        while (
            after < len(ids)
            and ids[after] not in stops
            and (ids[after] in special or not text[end : ends[after]].strip())
        ):
            after += 1
        last = after + 1 if after < len(ids) and ids[after] in stops else last
        if first < last:
            result.append((first, last))
    return result
