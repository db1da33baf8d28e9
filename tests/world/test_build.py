"""Building the embedded world: the same from the same seed."""

import copy

import pytest

from srppo.world import base_path
from srppo.world.build import BATCH, SHAPES, WINDOW, accuracy, corpus, new_model, train
from srppo.world.items import items
from srppo.world.tasks import WORDS
from srppo.world.texts import LESSONS, REPLIES, documents
from srppo.world.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(documents(0), WORDS)


@pytest.fixture
def tokenizer(trained):
    """Each test's own: whoever pads a batch leaves that in the tokenizer, which would be saved with it."""
    return copy.deepcopy(trained)


def test_tokenizer_is_rebuilt_byte_for_byte(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (base_path("s") / "tokenizer.json").read_bytes()


def test_corpus_is_lessons_then_the_mixture(tokenizer):
    windows_NW = corpus(tokenizer, 0, 8 * WINDOW)
    assert windows_NW.shape == (8, WINDOW)
    lessons, mixture = (tokenizer.decode(half.flatten()) for half in windows_NW.chunk(2))
    assert next(documents(1, LESSONS)) in lessons
    assert next(documents(0, REPLIES)) in mixture


def test_training_lowers_the_loss_and_is_reproducible(tokenizer):
    import torch

    windows_NW = corpus(tokenizer, 0, 3 * BATCH * WINDOW)
    first, second = (train("xs", windows_NW, tokenizer, seed=1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with torch.no_grad():
        before, after = (
            model.eval()(input_ids=windows_NW[:8], labels=windows_NW[:8]).loss
            for model in (new_model("xs", tokenizer, seed=1), first)
        )
    assert after < before


def test_accuracy_of_an_untrained_base_is_zero(tokenizer):
    model = new_model("xs", tokenizer, seed=0).eval()
    for sample in (False, True):
        assert accuracy(model, tokenizer, items("unseen", "dev", per_task=1), sample=sample) == 0


def test_sizes_grow(tokenizer):
    counts = [sum(p.numel() for p in new_model(size, tokenizer, 0).parameters()) for size in SHAPES]
    assert counts == sorted(counts)
    assert 0.15e6 < counts[0] < 0.25e6 and 0.8e6 < counts[1] < 1e6 and 3e6 < counts[2] < 4.2e6
