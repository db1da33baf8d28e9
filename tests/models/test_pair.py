"""The two models whose difference is the reward."""

from __future__ import annotations

import pytest
import worlds

from srppo.errors import ModelError
from srppo.models.pair import check_same_vocabulary


def test_vocabularies_must_agree() -> None:
    one, other = worlds.byte_llama(0), worlds.byte_llama(0, vocab=worlds.VOCAB + 1)
    check_same_vocabulary(one, worlds.byte_llama(1))
    with pytest.raises(ModelError, match="the base has a vocabulary of 258, the SFT model of 259"):
        check_same_vocabulary(one, other)
