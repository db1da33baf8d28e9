"""Building the embedded world: the same from the same seed."""

import copy
from itertools import islice, pairwise

import pytest
import torch

from srppo.world import BASES, base_path
from srppo.world.build import LESSONS, ROWS, SHAPES, accuracy, batches, corpus, new_model, train, world_tokenizer
from srppo.world.items import items
from srppo.world.styles import STYLES
from srppo.world.texts import documents


@pytest.fixture(scope="module")
def trained():
    return world_tokenizer()


@pytest.fixture
def tokenizer(trained):
    """Each test's own: whoever pads a batch leaves that in the tokenizer, which would be saved with it."""
    return copy.deepcopy(trained)


def test_tokenizer_is_rebuilt_byte_for_byte(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for name in BASES:
        assert (tmp_path / "tokenizer.json").read_bytes() == (base_path(name) / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", ["xs", "long-xs-1"])
def test_corpus_is_lessons_then_the_mixture_of_the_bases_own_seed(tokenizer, name):
    rows, style, seed = corpus(tokenizer, name, 4000), STYLES[BASES[name].style], BASES[name].seed
    texts = [tokenizer.decode(ids) for ids, _ in rows]
    lessons = list(islice(documents(2 * seed + 1, style, style.lessons), len(texts)))
    mixture = list(islice(documents(2 * seed, style), len(texts)))
    cut = next(i for i, text in enumerate(texts) if text != lessons[i])
    assert texts[cut:] == mixture[: len(texts) - cut]
    tokens = [len(ids) for ids, _ in rows]
    assert abs(sum(tokens[:cut]) - 4000 * LESSONS) < 60 and abs(sum(tokens) - 4000) < 120


def test_labels_are_the_replies_alone(tokenizer):
    rows = corpus(tokenizer, "xs", 3000)
    tokens_BS, labels_BS = next(batches(rows, tokenizer.pad_token_id))
    assert tokens_BS.shape == labels_BS.shape and len(tokens_BS) == ROWS
    for (ids, _), tokens_S, labels_S in zip(rows, tokens_BS, labels_BS, strict=False):
        assert tokens_S[: len(ids)].tolist() == ids and set(tokens_S[len(ids) :].tolist()) <= {tokenizer.pad_token_id}
        labelled = labels_S >= 0
        assert torch.equal(labels_S[labelled], tokens_S[labelled])
        whole = tokenizer.decode(ids)
        assert tokenizer.decode(labels_S[labelled]) == whole.partition("\nA:")[2] or whole


def test_training_lowers_the_loss_and_is_reproducible(tokenizer):
    rows = corpus(tokenizer, "xs-1", 6000)
    first, second = (train("xs-1", rows, tokenizer) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    tokens_BS, labels_BS = next(batches(rows, tokenizer.pad_token_id))
    with torch.no_grad():
        before, after = (
            model.eval()(input_ids=tokens_BS, labels=labels_BS).loss for model in (new_model("xs-1", tokenizer), first)
        )
    assert after < before


def test_accuracy_of_an_untrained_base_is_zero(tokenizer):
    model = new_model("xs", tokenizer).eval()
    for sample in (False, True):
        assert accuracy(model, tokenizer, items("development", "dev", per_task=1), sample=sample) == 0


def test_sizes_grow_and_pretrainings_differ(tokenizer):
    counts = {name: sum(p.numel() for p in new_model(name, tokenizer).parameters()) for name in BASES}
    assert 0.25e6 < counts["xs"] < 0.4e6 and 0.8e6 < counts["s"] < 1.2e6 and 2e6 < counts["l"] < 3e6
    assert {base.size for base in BASES.values()} == set(SHAPES)
    weights = [next(new_model(name, tokenizer).parameters()) for name in ("xs", "xs-1", "xs-2")]
    assert not any(torch.equal(a, b) for a, b in pairwise(weights))
