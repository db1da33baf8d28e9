"""The text of each token of a response. No torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"  # how decoders write the bytes of an unfinished character


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], special: Collection[int]) -> list[str]:
    """The text of each token, such that those between special tokens join to their decoded text exactly.

    A character of several bytes may span tokens: its text goes to the token that completes it, the others have "". A
    token is decoded behind the one before it, since decoders may write the first token of a text otherwise.
    """
    texts: list[str] = []
    run: list[int] = []
    for token in ids:
        if token in special:
            texts += [*_pieces_of_run(tokenizer, run), str(tokenizer.convert_ids_to_tokens(token))]
            run = []
        else:
            run.append(token)
    return texts + _pieces_of_run(tokenizer, run)


def _pieces_of_run(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    def decode(start: int, end: int) -> str:
        return str(tokenizer.decode(list(ids[start:end]), clean_up_tokenization_spaces=False))

    texts, start, done = [""] * len(ids), 0, 0  # [start, done) is context whose text is out already
    for i in range(len(ids)):
        before, now = decode(start, done), decode(start, i + 1)
        whole = not now.endswith(INCOMPLETE) or i == len(ids) - 1
        if whole and now.startswith(before):
            texts[i] = now[len(before) :]
            start, done = done, i + 1
    if "".join(texts) != decode(0, len(ids)):  # a decoder that is not local: the text counts, not where it stands
        return [""] * (len(ids) - 1) + [decode(0, len(ids))]
    return texts
