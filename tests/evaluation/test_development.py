"""What a step is chosen by: items of the demonstrated and the development tasks, and of no task reported as new."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from worlds import byte_llama, byte_tokenizer, write_rows

from srppo.config import build_recipe, derive_seed
from srppo.evaluation import development
from srppo.evaluation.development import Answer, Development, answer_items, encode_items, verdict_of
from srppo.models import generation
from srppo.models.language_model import LanguageModel
from srppo.training.rollout import generate
from srppo.world.items import Item


@pytest.mark.parametrize(
    ("groups", "score"),
    [
        ("demonstrated demonstrated development unseen prompted", 2 / 3),
        ("demonstrated unseen unseen unseen", 1.0),
        ("unseen mine mine mine mine", 1 / 5),  # no group has such a name: all count
    ],
)
def test_a_step_is_chosen_on_tasks_that_are_not_reported_as_new(tmp_path: Path, groups: str, score: float) -> None:
    """Demonstrated tasks, or where there are none unseen ones, are answered rightly, and no others."""
    rows = [
        {"prompt": f"p{i}", "answer": "a", "group": group, "split": "dev"} for i, group in enumerate(groups.split())
    ]
    path = write_rows(tmp_path / "items.jsonl", rows)
    recipe = build_recipe({"eval": {"items": str(path)}, "data": {"demonstrations": ["none.jsonl"]}})
    development = Development(recipe, byte_tokenizer(), [], [0])
    right = {"demonstrated"} if score > 0.5 else {"unseen"}
    verdicts = [verdict_of(item, [Answer("a" if item.group in right else "b", True, 1)]) for item in development.items]
    row, found = development.rated(cast(Any, None), verdicts)
    assert found == pytest.approx(score)
    assert row["dev/accuracy"] == pytest.approx(sum(v.correct[0] for v in verdicts) / len(verdicts))


@pytest.mark.parametrize("samples", [None, 3])
def test_samples_of_all_items_are_written_together(samples: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is what it would be by itself, with random numbers of its own that go by its block of items: records name
    them."""
    monkeypatch.setattr(development, "SEED_BLOCK", 3)
    lm, tokenizer = LanguageModel(byte_llama(0)), byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}Q: {{ m['content'] }}\nA:{% endfor %}"
    recipe = build_recipe({"rollout": {"max_new_tokens": 8}, "data": {"demonstrations": ["none.jsonl"]}})
    items = [Item(f"Say {word}", "a", "say", "unseen") for word in ("aa", "b", "cc", "d", "aa", "f", "gg", "h")]
    how: dict[str, Any] = {"stop_ids": [97], "pad_id": 0, "max_new_tokens": 8}
    verdicts = answer_items(lm, tokenizer, items, recipe, samples=samples, stops=[97])
    for i, (ids, verdict) in enumerate(zip(encode_items(tokenizer, items, recipe), verdicts, strict=True)):
        for draw, text in enumerate(verdict.responses):
            block = derive_seed(recipe.seed, "eval", draw * len(items) + i // 3 * 3)
            seed = derive_seed(block, "row", i % 3)
            alone = generate(lm, [ids], seed=[seed], temperature=None if samples is None else 1.0, **how)
            assert tokenizer.decode(alone.responses()[0], skip_special_tokens=True) == text
            assert verdict.tokens[draw] == len(alone.responses()[0])
    assert [len(verdict.responses) for verdict in verdicts] == [samples or 1] * len(items)
    if samples:
        assert len({text for verdict in verdicts for text in verdict.responses}) > 2 * len(items)
    assert answer_items(lm, tokenizer, [], recipe, samples=samples, stops=[97]) == []


def test_ways_to_answer_read_each_prompt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, tokenizer = LanguageModel(byte_llama(0)), byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}Q: {{ m['content'] }}\nA:{% endfor %}"
    recipe = build_recipe({"rollout": {"max_new_tokens": 8}, "data": {"demonstrations": ["none.jsonl"]}})
    items = [Item(f"Say {word}", "a", "say", "unseen") for word in ("aa", "b", "cc", "d", "ee", "f", "gg", "h")]
    each = {"greedy": None, "sampled": 3}
    apart = {way: answer_items(lm, tokenizer, items, recipe, samples=n, stops=[97]) for way, n in each.items()}
    read = list[int]()
    prefill = generation.Prefill

    def counted(lengths: Sequence[int], *rest: Any) -> Any:
        read.append(len(lengths))
        return prefill(lengths, *rest)

    monkeypatch.setattr(generation, "Prefill", counted)
    both = development.answer_in_ways(lm, tokenizer, items, recipe, each, stops=[97])
    assert both == apart and read == [len(items)]
    assert all(len(v.responses) == 1 for v in both["greedy"])
    firsts = zip(both["greedy"], both["sampled"], strict=True)
    assert any(greedy.responses[0] != sampled.responses[0] for greedy, sampled in firsts), "drawn by the same numbers"
    assert development.answer_in_ways(lm, tokenizer, [], recipe, each, stops=[97]) == {"greedy": [], "sampled": []}
