"""The embedded world: what its promises of disjointness, exactness and reproducibility come to."""

from itertools import islice
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import srppo.world.items
from srppo.errors import UserError
from srppo.world import ASSETS, BASES, base_path, verify
from srppo.world.items import SPLITS, TRAIN, demonstrations, items, prompts
from srppo.world.tasks import CHAT, GROUPS, TASKS, WORDS, bucket, check
from srppo.world.texts import LESSONS, REPLIES, documents
from srppo.world.tokenizer import EOS, PAD, load_tokenizer

ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=80)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(base_path("s"))


@pytest.fixture(scope="module")
def corpus():
    return list(islice(documents(0), 20_000))


def test_groups_are_disjoint_and_even():
    assert len({task.name for task in TASKS}) == len({task.instruction for task in TASKS}) == len(TASKS) == 18
    for group in GROUPS:
        assert sum(task.group == group for task in TASKS) == 6
    assert len(set(WORDS)) == len(WORDS)


@pytest.mark.parametrize("group", GROUPS)
def test_items_are_balanced_distinct_and_in_their_split(group):
    for split, (buckets, count) in SPLITS.items():
        found = items(group, split)
        assert len(found) == 6 * count == len({item.prompt for item in found})
        assert {bucket(item.prompt) for item in found} <= buckets
        assert all(item.group == group for item in found)
        assert items(group, split, per_task=3)[:3] == found[:3]


def test_nothing_is_drawn_twice_for_two_purposes():
    drawn = {
        "demonstrations": {row["prompt"] for seed in range(3) for row in demonstrations(300, seed)},
        "prompts": {row["prompt"] for seed in range(3) for row in prompts(600, seed)},
        "dev": {item.prompt for group in GROUPS for item in items(group, "dev")},
        "test": {item.prompt for group in GROUPS for item in items(group, "test")},
    }
    assert sum(map(len, drawn.values())) == len(set().union(*drawn.values()))


def test_demonstrations_are_right_nested_and_of_their_group():
    task_of = {task.instruction: task for task in TASKS}
    rows = demonstrations(60, 3)
    assert demonstrations(17, 3) == rows[:17]
    assert demonstrations(17, 4) != rows[:17]
    for row in rows:
        instruction, *words = row["prompt"].split()
        assert task_of[instruction].group == "demonstrated"
        assert check(task_of[instruction].answer(tuple(words)), row["completion"])


def test_prompts_are_balanced_nested_and_bare():
    rows = prompts(120, 0)
    assert prompts(50, 0) == rows[:50]
    counts = {name: 0 for name in (task.instruction for task in TASKS if task.group != "unseen")}
    for row in rows:
        assert set(row) == {"prompt"}
        counts[row["prompt"].split()[0]] += 1
    assert set(counts.values()) == {10}


def test_checker_is_exact():
    assert check("cat sun", " cat sun")
    assert check("cat sun", "cat sun\n")
    for wrong in ("cat", "cat sun .", "cat  sun", "Cat sun", "cat sun sun", "", "cat sun\nQ: first sun"):
        assert not check("cat sun", wrong)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_draws_make_answerable_questions(task):
    rng = Random(0)
    for _ in range(200):
        words = task.draw(rng)
        assert task.arity[0] <= len(words) == len(set(words)) <= task.arity[1]
        assert task.answer(words) == task.answer(words).strip() != ""


def test_known_answers():
    answers = {task.name: task.answer for task in TASKS}
    assert answers["reverse"](("sun", "cat", "pie")) == "pie cat sun"
    assert answers["swap"](("sun", "cat", "pie")) == "cat sun pie"
    assert answers["opposite"](("hot", "up")) == "cold down"
    assert answers["opposite"](("hot", "sun")) == ""
    assert answers["animals"](("cat", "pie", "dog")) == "cat dog"
    assert answers["join"](("cat", "pie", "dog")) == "cat and pie and dog"
    assert answers["double"](("cat", "pie")) == "cat cat pie pie"
    assert answers["twice"](("cat", "pie")) == "cat pie cat pie"


@pytest.mark.parametrize("shares", [LESSONS, REPLIES], ids=["lessons", "replies"])
def test_corpus_holds_no_dev_or_test_question_and_ends_every_document(shares):
    corpus = list(islice(documents(1, shares), 20_000))
    assert all(text.endswith(EOS) and text.count(EOS) == 1 for text in corpus)
    questions = [text.split("\n")[0].removeprefix("Q: ") for text in corpus if text.startswith("Q: ")]
    assert len(questions) > 0.8 * len(corpus)
    assert {bucket(question) for question in questions} == TRAIN
    held_out = [item for group in GROUPS for split in SPLITS for item in items(group, split)]
    assert not {CHAT.format(prompt=item.prompt) for item in held_out} & {text.split("A:")[0] + "A:" for text in corpus}


def test_right_answers_are_a_minor_share(corpus):
    task_of = {task.instruction: task for task in TASKS}
    right = 0
    for text in corpus:
        if text.startswith("Q: "):
            question, reply = text.removeprefix("Q: ").removesuffix(EOS).split("\nA:")
            instruction, *words = question.split()
            right += check(task_of[instruction].answer(tuple(words)), reply)
    assert sum(REPLIES.values()) == pytest.approx(1)
    assert 0.8 * REPLIES["right"] < right / len(corpus) < REPLIES["right"] + 0.02


def test_checksums_are_those_recorded():
    found = verify()
    assert all(found.values()), found
    names = {"lessons", "corpus", "demonstrations", "prompts", "dev", "test"}
    assert set(found) == names | {f"tokenizer {size}" for size in BASES}


def test_unknown_names_and_too_many_rows_are_the_users_mistake(monkeypatch):
    for call in (lambda: base_path("xl"), lambda: items("demo", "dev"), lambda: items("unseen", "train")):
        with pytest.raises(UserError, match="choose one of"):
            call()
    monkeypatch.setattr(srppo.world.items, "_TRIES", 20)
    with pytest.raises(UserError, match="no further questions"):
        items("unseen", "dev", per_task=1500)


@settings(max_examples=300, deadline=None)
@given(ANY_TEXT)
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


ODD_TEXTS = ["naïve café", "日本語 テスト", "👩‍👩‍👧 🙂", "\t\r\n  x  \n\n", "\x00\u200b\ufeff", "مرحبا"]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_unicode_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(ANY_TEXT, ANY_TEXT)
def test_prompt_and_reply_tokenise_apart_as_together(tokenizer, prompt, reply):
    head, tail = CHAT.format(prompt=prompt), f" {reply}{EOS}"
    assert tokenizer.encode(head) + tokenizer.encode(tail) == tokenizer.encode(head + tail)


def test_every_word_is_one_token(tokenizer):
    assert all(len(tokenizer.encode(f" {word}")) == 1 for word in WORDS)
    assert all(len(tokenizer.encode(f" {task.instruction}")) == 1 for task in TASKS)


def test_special_tokens(tokenizer):
    assert (tokenizer.eos_token, tokenizer.pad_token) == (EOS, PAD)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer.encode(f"a{EOS}")[-1] == tokenizer.eos_token_id
    assert tokenizer.chat_template is None
    assert len(tokenizer) <= 1024


@pytest.mark.parametrize("size", BASES)
def test_bases_load_as_fp32_from_16_bits(size, tokenizer):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    path = base_path(size)
    stored = load_file(path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert next(model.parameters()).dtype == torch.float32
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.vocab_size == len(load_tokenizer(path)) == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.encode(CHAT.format(prompt="copy cat dog"))])).logits
    assert torch.isfinite(logits).all()


def test_base_knows_eos_and_prefers_talk(tokenizer):
    """Off the base's support the log ratio explodes, so the base must end replies."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_path("s"), dtype=torch.float32)
    rows = [item for group in GROUPS for item in items(group, "dev", per_task=2)]
    right = 0
    for item in rows:
        prompt = tokenizer(CHAT.format(prompt=item.prompt), return_tensors="pt", return_token_type_ids=False)
        reply = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert reply[-1] == tokenizer.eos_token_id
        right += check(item.answer, tokenizer.decode(reply[:-1]))
    assert right / len(rows) < 0.3


def test_weights_are_small():
    assert sum(path.stat().st_size for path in ASSETS.glob("bases/*/model.safetensors")) < 12e6
