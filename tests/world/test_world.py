"""The embedded world: what its promises of disjointness, exactness and reproducibility come to."""

from itertools import islice
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import srppo.world.items
from srppo.errors import UserError
from srppo.world import ASSETS, BASES, base_path, verify
from srppo.world.items import (
    ITEM_GROUPS,
    SPLITS,
    TRAIN,
    answers_of_other_tasks,
    demonstrations,
    items,
    prompts,
    read_question,
)
from srppo.world.operations import OPERATIONS, WORDS
from srppo.world.styles import STYLES
from srppo.world.tasks import CHAT, GROUPS, REPORTED, TASKS, Task, bucket, check
from srppo.world.texts import documents
from srppo.world.tokenizer import EOS, PAD, load_tokenizer

ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=80)
TASK_OF = {task.name: task for task in TASKS}
STREAMS = [(name, part) for name in STYLES for part in ("lessons", "replies")]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(base_path("xs"))


@pytest.fixture(scope="module", params=STREAMS, ids=lambda stream: " ".join(stream))
def corpus(request):
    """(style's name, shares, documents) of what the bases begin on, and of what they end on."""
    name, part = request.param
    shares = getattr(STYLES[name], part)
    return name, shares, list(islice(documents(1, STYLES[name], shares), 20_000))


def asked_and_said(documents):
    """(task, words, reply) of each document that holds a question."""
    for text in documents:
        if text.startswith("Q: "):
            question, reply = text.removeprefix("Q: ").removesuffix(EOS).split("\nA: ")
            yield *read_question(question), reply


def all_items():
    return [item for split, groups in ITEM_GROUPS.items() for group in groups for item in items(group, split)]


def test_groups_are_disjoint_and_of_the_sizes_promised():
    assert len(TASK_OF) == len(TASKS)
    sizes = {group: sum(task.group == group for task in TASKS) for group in GROUPS}
    assert sizes == {"demonstrated": 16, "prompted": 16, "unseen": 40, "absent": 12, "development": 12}
    assert len(set(WORDS)) == len(WORDS) and not set(WORDS) & set(OPERATIONS)
    assert {task.name for task in TASKS if len(task.operations) == 1} == set(OPERATIONS)


def test_groups_are_alike():
    """In length of answers and in how many tasks look at the words; each but `absent` has single operations."""
    rng = Random(0)
    for group in GROUPS:
        tasks = [task for task in TASKS if task.group == group]
        lengths = [len(task.answer(task.draw(rng)).split()) for task in tasks for _ in range(50)]
        assert 3.3 < sum(lengths) / len(lengths) < 4.1
        share = sum(bool({"join", "opposite", "animals", "colors"} & set(task.operations)) for task in tasks) / len(
            tasks
        )
        assert 0.15 < share < 0.4
        assert (min(len(task.operations) for task in tasks) == 1) == (group != "absent")


def test_no_two_tasks_agree_on_most_questions():
    rng = Random(0)
    drawn = [(task, task.draw(rng)) for task in TASKS for _ in range(40)]
    agree = {}
    for task, words in drawn:
        for other in TASKS:
            if other is not task:
                agree[task.name, other.name] = agree.get((task.name, other.name), 0) + (
                    other.answer(words) == task.answer(words)
                )
    assert max(agree.values()) / 40 < 0.75, max(agree, key=agree.get)


def test_operations_of_absent_tasks_stand_in_the_same_place_elsewhere():
    known = [task.operations for task in TASKS if task.group != "absent" and len(task.operations) == 2]
    for task in TASKS:
        if task.group == "absent":
            outer, inner = task.operations
            assert outer in {pair[0] for pair in known} and inner in {pair[1] for pair in known}


@pytest.mark.parametrize("style", STYLES)
def test_items_are_balanced_distinct_and_in_their_split(style):
    for split, (buckets, count) in SPLITS.items():
        for group in ITEM_GROUPS[split]:
            found = items(group, split, style)
            assert len({item.prompt for item in found}) == len(found)
            assert [item.task for item in found] == [t.name for t in TASKS if t.group == group for _ in range(count)]
            assert {bucket(item.prompt) for item in found} <= buckets
            assert {item.group for item in found} == {group}
            assert items(group, split, style, per_task=3)[:3] == found[:3]


def test_steps_are_chosen_on_no_task_that_is_reported_as_new():
    assert ITEM_GROUPS == {"dev": ("demonstrated", "development"), "test": REPORTED}
    assert "development" not in REPORTED


def test_nothing_is_drawn_twice_for_two_purposes():
    drawn = {
        "demonstrations": {row["prompt"] for seed in range(3) for row in demonstrations(300, seed)},
        "prompts": {row["prompt"] for seed in range(3) for row in prompts(600, seed)},
        "items": {item.prompt for item in all_items()},
    }
    assert sum(map(len, drawn.values())) == len(set().union(*drawn.values()))


@pytest.mark.parametrize("style", STYLES)
def test_demonstrations_are_right_nested_and_of_their_group(style):
    rows = demonstrations(60, 3, style)
    assert demonstrations(17, 3, style) == rows[:17]
    assert demonstrations(17, 4, style) != rows[:17]
    for row in rows:
        task, words = read_question(row["prompt"])
        assert task.group == "demonstrated" and task.name == row["task"]
        assert STYLES[style].answer(task, words) == row["completion"] != ""


def test_prompts_are_balanced_nested_and_bare():
    rows = prompts(320, 0)
    assert prompts(50, 0) == rows[:50]
    counts = {task.name: 0 for task in TASKS if task.group in ("demonstrated", "prompted")}
    for row in rows:
        assert set(row) == {"prompt", "task"}
        counts[row["task"]] += 1
    assert set(counts.values()) == {10}


def test_checker_is_exact():
    assert check("cat sun", " cat sun")
    assert check("cat sun", "cat sun\n")
    for wrong in ("cat", "cat sun .", "cat  sun", "Cat sun", "cat sun sun", "", "cat sun\nQ: first sun"):
        assert not check("cat sun", wrong)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_draws_make_answerable_questions(task):
    rng = Random(0)
    for _ in range(100):
        words = task.draw(rng)
        assert read_question(task.question(words)) == (task, words)
        assert task.answer(words) == task.answer(words).strip() != ""
        for style in STYLES:
            wrong = answers_of_other_tasks(task.question(words), like=STYLES[style].answer(task, words))
            assert wrong and STYLES[style].answer(task, words) not in wrong
            assert all(answer.startswith("the three words are ") == (style == "long") for answer in wrong)


@pytest.mark.parametrize(
    "text", ["", "sun", "reverse", "reverse sun cat", "reverse sun cat sun", "reverse sun cat blah", "sort sun cat pie"]
)
def test_other_texts_are_no_questions(text):
    assert read_question(text) is None and answers_of_other_tasks(text, like="") is None


KNOWN = {
    "copy": "sun cat pie",
    "first": "sun",
    "second": "cat",
    "last": "pie",
    "ends": "sun pie",
    "drop": "cat pie",
    "chop": "sun cat",
    "reverse": "pie cat sun",
    "swap": "cat sun pie",
    "rotate": "cat pie sun",
    "double": "sun sun cat cat pie pie",
    "twice": "sun cat pie sun cat pie",
    "mirror": "sun cat pie pie cat sun",
    "circle": "sun cat pie sun",
    "stutter": "sun sun cat pie",
    "linger": "sun cat pie pie",
    "join": "sun and cat and pie",
    "reverse double": "pie pie cat cat sun sun",
    "drop mirror": "cat pie pie cat sun",
    "join rotate": "cat and pie and sun",
    "animals": "",
    "double double": "",
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_answers(name):
    assert Task(tuple(name.split()), "any").answer(("sun", "cat", "pie")) == KNOWN[name]


def test_known_answers_by_what_the_words_are():
    for name, words, answer in (
        ("opposite", "hot up sad", "cold down happy"),
        ("opposite second", "hot up sad", "down"),
        ("animals", "cat sun dog", "cat dog"),
        ("mirror animals", "cat sun dog", "cat dog dog cat"),
        ("reverse animals", "cat sun snow", ""),
        ("colors", "red moon tree", "red"),
    ):
        assert Task(tuple(name.split()), "any").answer(tuple(words.split())) == answer


def test_a_long_answer_works_each_step_out():
    assert STYLES["long"].answer(TASK_OF["reverse double"], ("sun", "cat", "pie")) == (
        "the three words are sun cat pie . with double they become sun sun cat cat pie pie . with reverse they become "
        "pie pie cat cat sun sun . so the answer is pie pie cat cat sun sun ."
    )


def test_styles_ask_the_same_and_stand_on_both_sides_of_talk(tokenizer):
    right, talk = {}, {}
    for name, style in STYLES.items():
        found = [item for group in GROUPS for item in items(group, "dev", name)]
        right[name] = [len(tokenizer.encode(f" {item.answer}{EOS}")) for item in found]
        said = [text.split("\nA:")[1] for text in islice(documents(0, style, {"talk": 1.0}), 2000) if "\nA:" in text]
        talk[name] = [len(tokenizer.encode(text)) for text in said]
    assert max(right["short"]) == 7 < 10 <= min(talk["short"]) and max(talk["short"]) <= 20
    assert max(talk["long"]) <= 12 < 20 <= min(right["long"]) and max(right["long"]) <= 48
    questions = [[item.prompt for item in items("unseen", "test", name)] for name in STYLES]
    assert questions[0] == questions[1]


def test_corpus_asks_no_absent_task_and_no_dev_or_test_question_and_ends_every_document(corpus):
    _, _, texts = corpus
    assert all(text.endswith(EOS) and text.count(EOS) == 1 for text in texts)
    asked = [(task, task.question(words)) for task, words, _ in asked_and_said(texts)]
    assert len(asked) > 0.9 * len(texts)
    assert {task.group for task, _ in asked} == set(GROUPS) - {"absent"}
    assert {task for task, _ in asked} == {task for task in TASKS if task.group != "absent"}
    absent = {f" {task.name} " for task in TASKS if task.group == "absent"}
    assert not any(name in f" {' '.join(text.split())} " for text in texts for name in absent)
    assert {bucket(question) for _, question in asked} == TRAIN
    assert not {item.prompt for item in all_items()} & {question for _, question in asked}


def test_corpus_holds_right_answers_in_their_share(corpus):
    name, shares, texts = corpus
    assert sum(shares.values()) == pytest.approx(1)
    replies = list(asked_and_said(texts))
    right = sum(check(STYLES[name].answer(task, words), reply) for task, words, reply in replies)
    assert abs(right / len(replies) - shares["right"]) < 0.01
    assert shares["right"] > 0.5 or shares["right"] < 0.05 < shares["wrong"]


def test_checksums_are_those_recorded():
    found = verify()
    assert all(found.values()), found
    assert {f"tokenizer {name}" for name in BASES} <= set(found)
    assert {f"{style} {what}" for style in STYLES for what in ("lessons", "corpus", "dev", "test")} <= set(found)


def test_unknown_names_and_too_many_rows_are_the_users_mistake(monkeypatch):
    for call in (
        lambda: base_path("xl"),
        lambda: items("demo", "dev"),
        lambda: items("unseen", "train"),
        lambda: items("unseen", "test", "longer"),
        lambda: prompts(1, 0, ("demo",)),
    ):
        with pytest.raises(UserError, match="choose one of"):
            call()
    monkeypatch.setattr(srppo.world.items, "_TRIES", 20)
    with pytest.raises(UserError, match="no further questions"):
        items("development", "dev", per_task=1500)


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
    assert all(len(tokenizer.encode(f" {name}")) == 1 for name in OPERATIONS)


def test_special_tokens(tokenizer):
    assert (tokenizer.eos_token, tokenizer.pad_token) == (EOS, PAD)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer.encode(f"a{EOS}")[-1] == tokenizer.eos_token_id
    assert tokenizer.chat_template is None
    assert len(tokenizer) <= 1024


@pytest.mark.parametrize("name", BASES)
def test_bases_load_as_fp32_from_16_bits(name, tokenizer):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    path = base_path(name)
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


@pytest.mark.parametrize("name", BASES)
def test_base_knows_eos_and_prefers_talk(name):
    """Off the base's support the log ratio explodes, so the base must end replies."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(base_path(name))
    model = AutoModelForCausalLM.from_pretrained(base_path(name), dtype=torch.float32)
    rows = [item for group in ITEM_GROUPS["dev"] for item in items(group, "dev", BASES[name].style, per_task=2)]
    texts = [CHAT.format(prompt=item.prompt) for item in rows]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    replies = model.generate(**inputs, max_new_tokens=48, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert (replies == tokenizer.eos_token_id).any(1).all()
    said = tokenizer.batch_decode(replies, skip_special_tokens=True)
    assert sum(check(item.answer, reply) for item, reply in zip(rows, said, strict=True)) / len(rows) < 0.3


def test_weights_are_small():
    assert sum(path.stat().st_size for path in ASSETS.glob("bases/*/model.safetensors")) < 12e6
