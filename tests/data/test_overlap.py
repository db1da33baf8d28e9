"""How far prompts repeat those of demonstrations."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from srppo.data.overlap import measure_overlap, normalise

WORD = st.sampled_from(["sun", "cat", "moon", "tree", "red", "blue"])


@given(st.text())
def test_normalising_twice_is_normalising_once(text):
    assert normalise(normalise(text)) == normalise(text)


@given(st.lists(WORD, min_size=1, max_size=12), st.lists(st.sampled_from([" ", ", ", "  \n", "! ", "-"]), min_size=12))
def test_case_space_and_punctuation_do_not_matter(words, gaps):
    odd = "".join(word.upper() + gap for word, gap in zip(words, gaps, strict=False))
    assert normalise(odd) == " ".join(words)


def test_normalising_keeps_what_carries_meaning():
    assert normalise("What's 2 + 2?") == "whats 2 + 2" != normalise("What's 2 = 2?")
    assert normalise("?!") == "?!"
    assert normalise("Ｆｕｌｌ ﬁt STRASSE") == "full fit strasse" == normalise("full fit straße")


def test_overlap_by_hand():
    def words(*numbers):
        return " ".join(f"w{number}" for number in numbers)

    sft = ["Reverse sun cat!", words(*range(20)), words(*range(100, 109)), words(*range(109, 118))]
    ppo = [
        "reverse cat sun",  # other order, no 8-grams
        "reverse  SUN, cat",  # equal
        words(*range(5, 13)),  # its one 8-gram is there
        words(*range(5, 13), 50),  # 1 of 2: half, not more
        words(*range(5, 14), 50),  # 2 of 3
        words(*range(100, 118)),  # 2 + 2 of 11, and never more than half
        words(*range(5, 12)),  # 7 words: no 8-grams
        words(*range(10, 19), *range(102, 109)),
    ]
    found = measure_overlap(sft, ppo)
    assert (found.n, found.exact, found.half_ngram, found.kept) == (8, 1, 2, (0, 3, 5, 6, 7))
    assert found.first == (1, 0)
    assert found.share == 3 / 8


def test_half_must_stand_in_one_prompt_not_in_their_union():
    words = [f"w{number}" for number in range(21)]  # 14 8-grams
    halves = [" ".join(words[:14]), " ".join(words[7:])]  # 7 of them each, all together
    assert measure_overlap(halves, [" ".join(words)]).dropped == 0
    assert measure_overlap([*halves, " ".join(words[:15])], [" ".join(words)]).first == (0, 2)


def brute_force(sft, ppo):
    def grams(text):
        words = normalise(text).split()
        return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}

    held = [grams(text) for text in sft]
    same = {normalise(text) for text in sft}
    kept = []
    for place, text in enumerate(ppo):
        own = grams(text)
        half = any(2 * len(own & other) > len(own) for other in held)
        if normalise(text) not in same and not half:
            kept.append(place)
    return tuple(kept)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_overlap_agrees_with_the_definition(data):
    piece = st.sampled_from(
        [" ".join(f"{k}{i}" for i in range(n)) for k, n in zip("abcdef", (3, 5, 8, 9, 4, 12), strict=True)]
    )
    text = st.lists(piece, max_size=5).map(" ".join)
    sft, ppo = data.draw(st.lists(text, max_size=8)), data.draw(st.lists(text, max_size=8))
    assert measure_overlap(sft, ppo).kept == brute_force(sft, ppo)
