"""The tokenizer of the embedded world: byte-level BPE, so any text goes through it and comes back unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

EOS = "<eos>"
PAD = "<pad>"
VOCAB = 1024
CONTEXT = 2048  # tokens, max_position_embeddings of the bases

# Plain English that the world itself does not hold, so that foreign text costs fewer tokens.
_ENGLISH = """the of and to in a is that it was for on are as with his they at be this from have or by one had not but
what all were when we there can an your which their said if do will each about how up out them then she many some so
these would other into has more her two like him see time could no make than first been its who now people my made over
did down only way find use may water long little very after words called just where most know get through back much
before go good new write our used me man too any day same right look think also around another came come work three
word must because does part even place well such here take why things help put years different away again off went
number great tell men say small every found still between name should home big give air line set own under read last
never us left end along while might next sound below saw something thought both few those always show large often
together asked house world going want school important until form food keep children feet land side without once
please list sentence answer question explain describe number example response language model data system"""
_ENDINGS = "ing ed er est ly tion ment ness able ous ive al ity ful less ies es s ation ence ance ant ent ist ism"
_STEMS = "work help play read walk talk train form state use act move mark port press count pass point"


def train_tokenizer(documents: Iterable[str], words: Iterable[str], count: int = 20_000) -> PreTrainedTokenizerFast:
    """Learn the merges from `count` documents, `words` (each becomes one token after a space) and common English.

    The same input gives the same merges. There is no chat template: the caller adds its own.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(documents, words, count), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer stored in a base's folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def _training_text(documents: Iterable[str], words: Iterable[str], count: int) -> Iterator[str]:
    for document in islice(documents, count):
        yield document.removesuffix(EOS)
    for word in words:  # rare words as well are to be one token
        yield f" {word}" * 500
    for word in _ENGLISH.split():
        yield f" {word}" * 40
    for ending in _ENDINGS.split():
        yield "".join(f" {stem}{ending}" for stem in _STEMS.split()) * 2
