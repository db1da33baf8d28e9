"""Templates and the loss boundary: which token ids a conversation has, and which of them are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from data_cases import CHATML, EXPLICIT_BOS, demo, encode, encode_prompt, make_tokenizer, message_of, write
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, PreTrainedTokenizerFast

from srppo.data.chat import (
    CHAT_TEMPLATE,
    encode_demonstrations,
    encode_prompts,
    ensure_chat_template,
    render,
    stop_ids,
    template_notes,
    use_template,
)
from srppo.data.order import prompt_text
from srppo.data.types import Demonstration, EncodedDemonstration, Message, Prompt
from srppo.errors import ConfigError, ModelError


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    assert ensure_chat_template(tokenizer)
    return tokenizer


def test_our_template_is_exact(plain):
    def text(*messages, generation=False):
        turns = [{"role": role, "content": content} for role, content in messages]
        return plain.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation)

    ask, answer = ("user", "reverse sun cat"), ("assistant", "cat sun")
    assert text(ask, answer) == "Q: reverse sun cat\nA: cat sun<eos>"
    assert text(ask, generation=True) == "Q: reverse sun cat\nA:"
    assert text(("system", "Be brief."), ask, answer, ("user", "  again "), answer) == (
        "Be brief.\n\nQ: reverse sun cat\nA: cat sun\nQ:   again \nA: cat sun<eos>"
    )


def test_a_template_that_is_there_stays():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    assert not ensure_chat_template(tokenizer)
    assert tokenizer.chat_template == CHATML


def test_loss_begins_where_the_answer_begins(plain):
    row = encode(plain, demo())
    assert plain.decode(row.ids[row.prompt_tokens :]) == " cat sun<eos>"
    assert plain.decode(row.ids[: row.prompt_tokens]) == "Q: reverse sun cat\nA:"


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(min_size=1), answer=st.text(min_size=1), system=st.none() | st.text(max_size=20))
def test_prompt_ids_are_those_of_rollouts_and_nothing_is_lost(plain, prompt, answer, system):
    row = encode(plain, demo(prompt, answer), system=system, max_tokens=9999, max_prompt_tokens=9998)
    fed = encode_prompt(plain, Prompt((Message("user", prompt),), "p:1"), system=system, max_prompt_tokens=9998)
    assert row.ids[: row.prompt_tokens] == fed
    assert plain.decode(row.ids[row.prompt_tokens :]) == f" {answer}<eos>"
    turns = [{"role": "system", "content": system}] if system is not None else []
    turns.append({"role": "user", "content": prompt})
    assert list(fed) == plain.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)


def test_a_token_across_the_boundary_is_split_as_generation_would_see_it():
    tokenizer = make_tokenizer()
    # The generation prompt ends in half of what the tokenizer holds as one token (" cat").
    tokenizer.chat_template = (
        "{{ messages[0]['content'] }} {% if not add_generation_prompt %}{{ messages[1]['content'] }}{% endif %}"
    )
    assert len(tokenizer(" cat")["input_ids"]) == 1
    row = encode(tokenizer, demo("say", "cat"))
    fed = encode_prompt(tokenizer, Prompt((Message("user", "say"),), "p:1"), system=None, max_prompt_tokens=9)
    assert row.ids[: row.prompt_tokens] == fed
    assert tokenizer.decode(row.ids[row.prompt_tokens :]) == "cat<eos>"


def test_bos_is_there_once_where_the_tokenizer_adds_it():
    tokenizer = make_tokenizer(bos=True)
    bos = tokenizer.bos_token_id
    assert ensure_chat_template(tokenizer)
    text = Demonstration((), "plain text", "t:1")
    for row in (encode(tokenizer, demo()), encode(tokenizer, text)):
        assert row.ids[0] == bos
        assert row.ids.count(bos) == 1
    assert encode(tokenizer, text).prompt_tokens == 1
    tokenizer.chat_template = EXPLICIT_BOS  # a template that writes its own
    assert encode(tokenizer, demo()).ids.count(bos) == 1
    tokenizer.chat_template = CHATML  # a template that wants none
    assert encode(tokenizer, demo()).ids.count(bos) == 0


TURNS = st.lists(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(["system", "user", "assistant", "tool"]),
        st.text() | st.sampled_from(["", " a ", "{{ eos_token }}", "{% raw %}", "<eos>", "two\n\nlines\n"]),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("bos", [False, True])
@given(turns=TURNS, generation=st.booleans())
@settings(max_examples=100, deadline=None)
def test_what_is_written_without_jinja_is_what_our_template_writes(bos, turns, generation):
    tokenizer = make_tokenizer(bos=bos)
    ensure_chat_template(tokenizer)
    written = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation)
    assert render(tokenizer, turns, generation=generation) == written


@pytest.mark.parametrize("template", [CHATML, EXPLICIT_BOS, CHAT_TEMPLATE + "!", "!" + CHAT_TEMPLATE])
def test_any_other_template_is_rendered_by_jinja(template):
    tokenizer = make_tokenizer(bos=True)
    tokenizer.chat_template = template
    turns = [{"role": "user", "content": "say"}]
    written = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert render(tokenizer, turns, generation=True) == written


def test_pad_that_is_eos_changes_nothing(plain):
    same = make_tokenizer(pad_is_eos=True)
    ensure_chat_template(same)
    assert encode(same, demo()) == encode(plain, demo())


def test_answers_end_in_a_stop_token_whatever_the_template_puts_there():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    row = encode(tokenizer, demo(), stop=[tokenizer.eos_token_id, end])
    assert tokenizer.decode(row.ids[row.prompt_tokens :]) == "cat sun<|im_end|>"  # the newline after it is dropped
    row = encode(tokenizer, demo())  # <|im_end|> does not stop this model
    assert tokenizer.decode(row.ids[row.prompt_tokens :]) == "cat sun<|im_end|>\n<eos>"


def test_reasons_to_leave_a_row_out(plain):
    assert encode(plain, demo("x " * 300)) == "prompt longer than 256 tokens"
    assert encode(plain, demo("reverse sun cat"), max_tokens=4) == "prompt longer than 3 tokens"
    assert encode(plain, demo(answer="one<eos>two")) == "a stop token inside the answer"
    odd = make_tokenizer()
    odd.chat_template = "{{ raise_exception('System role\nnot supported') if messages[0]['role'] == 'system' }}x"
    assert encode(odd, demo(), system="Be brief.") == "the chat template refuses it: System role not supported"
    odd.chat_template = "{{ messages[0]['content'] }}{% if add_generation_prompt %}A:{% endif %}"
    reason = (
        "the chat template does not write the answer after its generation prompt; set model.template_kwargs (such as "
        "enable_thinking = false) or model.chat_template"
    )
    assert encode(odd, demo()) == reason


SEVERAL = [
    demo(),
    demo("x " * 300, source="a:2"),
    Demonstration((), "plain text", "a:3"),
    demo(answer="one<eos>two", source="a:4"),
    Demonstration((Message("system", "mine"), Message("user", "u")), "ü 中", "a:5"),
    demo("say", "cat" * 400, source="a:6"),
    demo("again", "", source="a:7"),
]
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", [None, CHATML, EXPLICIT_BOS, NO_SYSTEM])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_rows_encoded_together_are_as_each_alone(template, bos, system):
    """Ids and reasons: neighbours that are refused or cut change nothing."""
    tokenizer = make_tokenizer(bos=bos)
    tokenizer.chat_template = template
    ensure_chat_template(tokenizer)
    limits = {"system": system, "max_tokens": 300, "max_prompt_tokens": 256}
    together = encode_demonstrations(tokenizer, SEVERAL, **limits)
    assert together == [encode(tokenizer, row, **limits) for row in SEVERAL]
    assert {type(row) for row in together} == {str, EncodedDemonstration}
    prompts = [Prompt(row.prompt, row.source) for row in SEVERAL if row.prompt]
    found = encode_prompts(tokenizer, prompts, system=system, max_prompt_tokens=256)
    for prompt, ids in zip(prompts, found, strict=True):
        turns = [{"role": turn.role, "content": turn.content} for turn in prompt.prompt]
        if system and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": system})
        if template == NO_SYSTEM and turns[0]["role"] == "system":
            assert ids == "the chat template refuses it: no system"
        else:
            alone = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
            assert ids == (tuple(alone) if len(alone) <= 256 else "prompt longer than 256 tokens")
    assert encode_demonstrations(tokenizer, [], **limits) == []


def test_long_answers_are_cut_without_eos(plain):
    whole = encode(plain, demo())
    for length in range(whole.prompt_tokens + 1, len(whole.ids)):
        assert encode(plain, demo(), max_tokens=length) == EncodedDemonstration(whole.ids[:length], whole.prompt_tokens)
    assert encode(plain, demo(), max_tokens=len(whole.ids)) == whole


def test_a_rows_own_system_message_stays(plain):
    own = Prompt((Message("system", "mine"), Message("user", "u")), "p:1")
    fed = encode_prompt(plain, own, system="yours", max_prompt_tokens=99)
    assert plain.decode(fed) == "mine\n\nQ: u\nA:"


def test_plain_text_is_all_answer_and_its_first_token_has_no_predictor(plain):
    text = Demonstration((), "the answer", "t:1")
    assert prompt_text(text) == "the answer"  # what overlap looks at
    row = encode(plain, text, system="ignored")
    assert plain.decode(row.ids) == "the answer<eos>"
    assert row.prompt_tokens == 1


def test_stop_ids_unite_tokenizer_and_generation_config(plain):
    eos = plain.eos_token_id
    assert stop_ids(plain) == [eos]
    assert stop_ids(plain, GenerationConfig(eos_token_id=7)) == [eos, 7]
    assert stop_ids(plain, GenerationConfig(eos_token_id=[7, eos, 7])) == [eos, 7]
    assert stop_ids(plain, GenerationConfig()) == [eos]
    mute = make_tokenizer()
    mute.eos_token = None
    assert stop_ids(mute, GenerationConfig(eos_token_id=7)) == [7]
    for call in (stop_ids, ensure_chat_template):
        with pytest.raises(ModelError) as error:
            call(mute)
        assert "EOS token" in message_of(error)


# ---- the shapes that templates come in, each written for this test

TURNS_OF = "{% for m in messages %}"
ASK = "{% if add_generation_prompt %}"
PHI = (  # two stop tokens after an answer, and the end of the text in every conversation
    TURNS_OF + "<|{{ m.role }}|>\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
PARTS = (  # contents are lists of parts; a text there vanishes
    TURNS_OF + "{{ m.role | capitalize }}: {% for part in m.content %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}" + ASK + "Assistant:{% endif %}"
)
FIRST_PART = (  # the same without a generation prompt
    TURNS_OF + "{% if m.role == 'user' %}[INST] {{ m.content[0]['text'] }} [/INST]{% else %} {{ m.content[0]['text'] }}"
    "<|im_end|> {% endif %}{% endfor %}"
)
OPENED = (  # only the generation prompt opens a think block, and reasoning is cut from what was said
    TURNS_OF + "[{{ m.role }}]{{ m.content.split('</think>')[-1] }}{% if m.role == 'assistant' %}<|im_end|>{% endif %}"
    "{% endfor %}" + ASK + "[assistant]<think>\n{% endif %}"
)
SWITCHED = (  # thinking can be switched off, and then both texts have an empty block
    TURNS_OF
    + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content | trim }}"
    "<|im_end|>\n{% endfor %}" + ASK + "<|im_start|>assistant\n{% if thinking is defined and not thinking %}"
    "<think></think>{% else %}<think>\n{% endif %}{% endif %}"
)
LAST_THINKS = (  # the last answer has an empty think block, earlier ones have none
    TURNS_OF
    + "<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}" + ASK + "<|im_start|>assistant\n{% endif %}"
)
CHANNELS = (  # the generation prompt ends before the header of the answer; of answers the last one ends in a stop token
    TURNS_OF + "<|im_start|>{{ m.role }}{% if m.role == 'assistant' %} to=user{% endif %}: {{ m.content }}"
    "{% if loop.last or m.role == 'user' %}<|im_end|>{% else %}<pad>{% endif %}{% endfor %}"
    + ASK
    + "<|im_start|>assistant{% endif %}"
)
NEXT_USER = (  # an answer ends where the next user begins
    TURNS_OF
    + "{{ '<|user|>' if m.role == 'user' else '<|im_start|>' }}{{ m.content }}{% endfor %}"
    + ASK
    + "<|im_start|>{% endif %}"
)
TWO_MARKS = (  # the answer's end and the turn's end; the first stops nothing
    TURNS_OF
    + "<|im_start|>{{ m.content.strip() }}{% if m.role == 'assistant' %}<pad>{% endif %}<|im_end|>{% endfor %}"
    + ASK
    + "<|im_start|>{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """A template, what its prompt ends in, and what is trained: of the last turn, and of the earlier one."""

    template: str
    prompt: str
    last: str
    earlier: str
    stops: tuple[str, ...] = ("<|im_end|>",)
    kwargs: Mapping[str, object] = field(default_factory=dict)
    noted: bool = False


SHAPES = {
    "chatml": Shape(CHATML, "<|im_start|>assistant\n", "it is a cat.<|im_end|>", "one cat<|im_end|>"),
    "ours": Shape(CHAT_TEMPLATE, "A:", " it is a cat.<eos>", " one cat", ("<eos>",)),
    "two stops": Shape(PHI, "<|assistant|>\n", "it is a cat.<|im_end|>", "one cat<|im_end|>", ("<eos>", "<|im_end|>")),
    "parts": Shape(PARTS, "Assistant:", " it is a cat.<|im_end|>", " one cat<|im_end|>"),
    "first part": Shape(FIRST_PART, "[/INST]", " it is a cat.<|im_end|>", " one cat<|im_end|>"),
    "opened": Shape(OPENED, "<think>\n", "it is a cat.<|im_end|>", "one cat<|im_end|>", noted=True),
    "switched on": Shape(SWITCHED, "<think>\n", "it is a cat.<|im_end|>", "one cat<|im_end|>", noted=True),
    "switched off": Shape(
        SWITCHED, "<think></think>", "it is a cat.<|im_end|>", "one cat<|im_end|>", kwargs={"thinking": False}
    ),
    "last thinks": Shape(
        LAST_THINKS, "assistant\n", "<think>\n\n</think>\n\nit is a cat.<|im_end|>", "one cat<|im_end|>"
    ),
    "channels": Shape(CHANNELS, "<|im_start|>assistant", " to=user: it is a cat.<|im_end|>", " to=user: one cat"),
    "next user": Shape(NEXT_USER, "<|im_start|>", "it is a cat.<eos>", "one cat<|user|>", ("<eos>", "<|user|>")),
    "two marks": Shape(TWO_MARKS, "<|im_start|>", "it is a cat.<pad><|im_end|>", "one cat<pad><|im_end|>"),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("bos", [False, True])
def test_what_is_trained_follows_the_generation_prompt_and_holds_the_answer(name, bos):
    shape, tokenizer = SHAPES[name], make_tokenizer(bos=bos)
    tokenizer.chat_template = shape.template
    use_template(tokenizer, None, shape.kwargs)
    stops = tokenizer.convert_tokens_to_ids(list(shape.stops))
    asked = Prompt((Message("user", "Which cat?"), Message("assistant", "one cat"), Message("user", "What?")), "a:1")
    row = Demonstration(asked.prompt, "it is a cat.", "a:1")
    fed = encode_prompt(tokenizer, asked, system=None, max_prompt_tokens=500)
    last = encode(tokenizer, row, stop=stops)
    assert isinstance(last, EncodedDemonstration), last
    assert last.ids[: last.prompt_tokens] == fed and tokenizer.decode(fed).endswith(shape.prompt)
    assert tokenizer.decode(last.ids[last.prompt_tokens :]) == shape.last and last.gaps == ()
    every = encode(tokenizer, row, stop=stops, turns="all")
    assert every.ids == last.ids
    assert [tokenizer.decode(every.ids[start:stop]) for start, stop in every.spans] == [shape.earlier, shape.last]
    assert (
        every.trained
        == sum(stop - start for start, stop in every.spans)
        == last.trained + every.spans[0][1] - every.spans[0][0]
    )
    (note,) = template_notes(tokenizer) or [""]
    assert bool(note) == shape.noted and ("model.template_kwargs" in note) == shape.noted


def test_an_answer_that_reasons_is_trained_whole_and_its_think_block_opened_once():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = OPENED
    stop = tokenizer.convert_tokens_to_ids(["<|im_end|>"])
    row = encode(tokenizer, demo(answer="<think>\nhm\n</think>\n\ncat sun"), stop=stop)
    assert tokenizer.decode(row.ids).endswith("[assistant]<think>\nhm\n</think>\n\ncat sun<|im_end|>")
    row = encode(tokenizer, demo(answer="hm\n</think>\n\ncat sun"), stop=stop)
    assert tokenizer.decode(row.ids).endswith("[assistant]<think>\nhm\n</think>\n\ncat sun<|im_end|>")


def test_an_answer_that_the_template_drops_or_shortens_is_trained_whole_or_left_out():
    """With its end of turn alone, a row would teach to say nothing."""
    tokenizer = make_tokenizer()
    stop = tokenizer.convert_tokens_to_ids(["<|im_end|>"])
    tokenizer.chat_template = CHATML.replace("m['content']", "(m['content'] if m['role'] == 'user' else '')")
    reason = encode(tokenizer, demo(), stop=stop)
    assert isinstance(reason, str) and reason.startswith("the chat template does not write the answer after its gen")
    tokenizer.chat_template = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    row = encode(tokenizer, demo(answer="hm</think>cat sun"), stop=stop)
    assert tokenizer.decode(row.ids[row.prompt_tokens :]) == "hm</think>cat sun<|im_end|>"


def test_a_stop_token_that_an_answer_spells_is_told_from_those_after_it():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = PHI
    stops = tokenizer.convert_tokens_to_ids(["<eos>", "<|im_end|>"])
    assert encode(tokenizer, demo(answer="one<|im_end|>two"), stop=stops) == "a stop token inside the answer"
    asked = (Message("user", "u"), Message("assistant", "one<eos>two"), Message("user", "v"))
    row = Demonstration(asked, "a", "a:1")
    assert tokenizer.decode(encode(tokenizer, row, stop=stops).ids).endswith("a<|im_end|>")
    assert encode(tokenizer, row, stop=stops, turns="all") == "a stop token inside the answer"


def test_every_answer_that_follows_a_user_is_trained_and_the_limits_are_of_the_first():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    stop = tokenizer.convert_tokens_to_ids(["<|im_end|>"])
    said = [
        Message("assistant", "hello"),
        *[Message(role, f"{role} {i}") for i in range(3) for role in ("user", "assistant")],
    ]
    row = Demonstration(tuple(said[:-1]), said[-1].content, "a:1")
    every = encode(tokenizer, row, stop=stop, turns="all")
    spans = [tokenizer.decode(every.ids[start:stop]) for start, stop in every.spans]
    assert spans == [
        "assistant 0<|im_end|>",
        "assistant 1<|im_end|>",
        "assistant 2<|im_end|>",
    ]  # a greeting answers nothing
    between = [tokenizer.decode(every.ids[start:stop]) for start, stop in every.gaps]
    assert between == [f"\n<|im_start|>user\nuser {i}<|im_end|>\n<|im_start|>assistant\n" for i in (1, 2)]
    first = every.prompt_tokens
    assert encode(tokenizer, row, stop=stop, turns="all", max_prompt_tokens=first) == every
    assert (
        encode(tokenizer, row, stop=stop, turns="all", max_prompt_tokens=first - 1)
        == f"prompt longer than {first - 1} tokens"
    )
    for most in range(first + 1, len(every.ids)):  # cut, and never ending in what is not trained
        cut = encode(tokenizer, row, stop=stop, turns="all", max_tokens=most)
        assert cut.ids == every.ids[: len(cut.ids)] and cut.spans[-1][1] == len(cut.ids) <= most
        trained = {place for start, stop in every.spans for place in range(start, stop) if place < most}
        assert {place for start, stop in cut.spans for place in range(start, stop)} == trained


CALLING = (
    "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}"
    + TURNS_OF
    + "<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}" + ASK + "<|im_start|>assistant\n{% endif %}"
)
TOOLS = '[{"type":"function","function":{"name":"look"}}]'
LOOK = Message("assistant", "", '[{"arguments":{"at":"sky"},"name":"look"}]')


def test_turns_of_tools_go_through_the_template_or_the_row_is_left_out(plain):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CALLING
    stop = tokenizer.convert_tokens_to_ids(["<|im_end|>"])
    row = Demonstration((Message("user", "u"), LOOK, Message("tool", "blue")), "it is blue", "a:1", tools=TOOLS)
    every = encode(tokenizer, row, stop=stop, turns="all")
    assert tokenizer.decode(every.ids).startswith("look;<|im_start|>user\nu<|im_end|>")
    call = '<call>look {"at": "sky"}<|im_end|>'
    assert [tokenizer.decode(every.ids[start:stop]) for start, stop in every.spans] == [call, "it is blue<|im_end|>"]
    ends = encode(tokenizer, Demonstration(row.prompt[:1], "", "a:1", calls=LOOK.calls, tools=TOOLS), stop=stop)
    assert tokenizer.decode(ends.ids[ends.prompt_tokens :]) == call
    tokenizer.chat_template = CHATML
    for left_out in (
        encode(tokenizer, row),
        encode(plain, row),
        encode_prompt(plain, Prompt(row.prompt, "a:1"), system=None, max_prompt_tokens=99),
    ):
        assert left_out == "the chat template leaves out turns of tools"


def test_an_earlier_answer_that_the_template_changes_leaves_the_row_out():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = OPENED
    row = Demonstration((Message("user", "u"), Message("assistant", "hm</think>b"), Message("user", "v")), "c", "a:1")
    assert (
        encode(tokenizer, row, turns="all") == "the chat template changes or drops an earlier answer (data.turns = all)"
    )
    assert isinstance(encode(tokenizer, row), EncodedDemonstration)


# ---- model.chat_template and model.template_kwargs


def test_a_template_from_a_file_with_its_variables_goes_with_the_tokenizer(tmp_path):
    path = Path(write(tmp_path, "chat.jinja", "\n" + SWITCHED + "{{ names | join(',') if names is defined else '' }}"))
    tokenizer = make_tokenizer()
    use_template(tokenizer, str(path), {"thinking": False, "names": ["a", '"%}é\n']})
    turns = [{"role": "user", "content": "u"}]
    expected = '\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n<think></think>a,"%}é\n'
    assert render(tokenizer, turns, generation=True) == expected
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    assert loaded.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == expected
    asked = loaded.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, thinking=True)
    assert asked == expected.replace("<think></think>", "<think>\n")  # whoever serves it may still choose
    before = loaded.chat_template
    use_template(loaded, None, {"thinking": False, "names": ["a", '"%}é\n']})
    assert loaded.chat_template == before  # once


def test_templates_and_variables_that_cannot_be_are_refused(tmp_path, plain):
    tokenizer = make_tokenizer()
    cases = [
        (
            None,
            {"thinking": False},
            "model.template_kwargs is set but the tokenizer has no chat template; set model.chat",
        ),
        (
            str(tmp_path / "no.jinja"),
            {},
            f"model.chat_template {tmp_path}/no.jinja cannot be read: No such file or direc",
        ),
        (
            write(tmp_path, "a.jinja", SWITCHED),
            {"thinkin": 1},
            "model.template_kwargs has thinkin, which the chat template",
        ),
    ]
    for path, kwargs, expected in cases:
        with pytest.raises(ConfigError) as error:
            use_template(tokenizer, path, kwargs)
        assert message_of(error).startswith(expected)
