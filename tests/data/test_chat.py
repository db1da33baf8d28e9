"""Templates and the loss boundary: which token ids a conversation has, and which of them are trained."""

from __future__ import annotations

import pytest
from data_cases import CHATML, EXPLICIT_BOS, demo, encode, make_tokenizer, message_of
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, PreTrainedTokenizerFast

from srppo.data.chat import (
    CHAT_TEMPLATE,
    encode_demonstration,
    encode_demonstrations,
    encode_prompt,
    encode_prompts,
    ensure_chat_template,
    render,
    stop_ids,
)
from srppo.data.order import prompt_text
from srppo.data.types import Demonstration, EncodedDemonstration, Message, Prompt
from srppo.errors import ModelError


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
    assert together == [encode_demonstration(tokenizer, row, **limits) for row in SEVERAL]
    assert {type(row) for row in together} == {str, EncodedDemonstration}
    prompts = [Prompt(row.prompt, row.source) for row in SEVERAL if row.prompt]
    found = encode_prompts(tokenizer, prompts, system=system, max_prompt_tokens=256)
    for prompt, ids in zip(prompts, found, strict=True):
        turns = [{"role": turn.role, "content": turn.content} for turn in prompt.messages]
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
