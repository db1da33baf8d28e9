"""SFT against plain loops: the loss, a step, the order of rows, and the steps of a budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny import EOS, Bench, NoDevelopment, base_and_sft, tiny_recipe
from torch import Tensor

import srppo.training.sft
from srppo.config import Recipe
from srppo.data.types import EncodedDemonstration
from srppo.models.language_model import LanguageModel
from srppo.training.batch import answer_nll_sum, training_flops
from srppo.training.sft import epoch_rows, steps_within, train_sft


def demonstrations() -> list[EncodedDemonstration]:
    ids = [(1, 2, 3, 4, EOS), (2, 2, EOS), (4, 3, 2, 1, 2, 3, EOS), (3, 1, EOS), (1, EOS)]
    return [EncodedDemonstration(row, n) for row, n in zip(ids, (3, 1, 2, 0, 1), strict=True)]


def nll_by_hand(lm: LanguageModel, row: EncodedDemonstration) -> list[Tensor]:
    """Of each answer token, EOS included; nothing predicts the first token of all."""
    logprobs = lm.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
    return [-logprobs[t - 1, row.ids[t]] for start, stop in row.spans for t in range(start, stop)]


def test_the_sft_loss_counts_answers_with_eos_and_nothing_else() -> None:
    _, lm = base_and_sft()
    rows = demonstrations()
    by_hand = [nll for row in rows for nll in nll_by_hand(lm, row)]
    total, count = answer_nll_sum(lm, rows, pad_id=EOS)
    assert count == len(by_hand) == 2 + 2 + 5 + 2 + 1
    torch.testing.assert_close(total, torch.stack(by_hand).sum(), atol=1e-5, rtol=1e-5)


def test_the_sft_loss_of_a_conversation_counts_every_answer_and_nothing_between(tmp_path: Path) -> None:
    """Padded beside rows of one answer; a mean over the trained tokens of the batch, which a step logs."""
    _, lm = base_and_sft()
    turns = EncodedDemonstration((1, 2, 3, EOS, 4, 4, 2, EOS, 1, 3, EOS), 2, ((4, 6), (8, 9)))
    assert turns.spans == [(2, 4), (6, 8), (9, 11)] and turns.trained == 6
    rows = [turns, *demonstrations()]
    by_hand = torch.stack([nll for row in rows for nll in nll_by_hand(lm, row)])
    total, count = answer_nll_sum(lm, rows, pad_id=EOS)
    assert count == len(by_hand) == 6 + 12
    torch.testing.assert_close(total, by_hand.sum(), atol=1e-5, rtol=1e-5)
    weights = [weight for weight in lm.model.parameters() if weight.requires_grad]
    for ours, theirs in zip(
        torch.autograd.grad(total, weights), torch.autograd.grad(by_hand.sum(), weights), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    recipe = tiny_recipe(sft={"batch": 6, "micro_tokens": 4, "lr": 1e-2, "warmup": 0.0})
    with Bench(tmp_path, recipe) as bench:
        train_sft(recipe, bench, lm, rows, NoDevelopment(), pad_id=EOS)
        (_, first) = bench.stage.metrics()
    assert first["loss"] == pytest.approx(float(by_hand.mean().detach()), abs=1e-5)


def test_an_sft_step_is_a_mean_over_all_answer_tokens_whatever_the_micro_batch(tmp_path: Path) -> None:
    """One full-batch step of AdamW: equal weights from micro-batches of 2 and of all, and the loss by hand."""
    torch.set_num_threads(1)
    rows, weights = demonstrations(), []
    for size in (2, 5):
        _, lm = base_and_sft()
        expected = torch.stack([nll for row in rows for nll in nll_by_hand(lm, row)]).mean()
        settings = {"batch": 5, "micro_tokens": size, "lr": 1e-2, "warmup": 0.0}
        recipe = tiny_recipe(sft={**settings, "schedule": "constant", "max_grad_norm": 1e6})
        with Bench(tmp_path / str(size), recipe) as bench:
            train_sft(recipe, bench, lm, rows, NoDevelopment(), pad_id=EOS)
            (_, first) = bench.stage.metrics()
        assert first["loss"] == pytest.approx(float(expected.detach()), abs=1e-5) and first["lr"] == 1e-2
        weights.append(torch.cat([w.detach().flatten() for w in lm.parameters()]))
        gradient = torch.autograd.grad
        _, start = base_and_sft()
        loss = torch.stack([nll for row in rows for nll in nll_by_hand(start, row)]).mean()
        norm = torch.cat([g.flatten() for g in gradient(loss, list(start.parameters()))]).norm()
        assert first["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    torch.testing.assert_close(*weights, atol=1e-4, rtol=0)


def test_sft_epochs_take_each_row_once_in_a_seeded_order_each() -> None:
    rows = demonstrations()
    epochs = [[row for step in range(3 * e + 1, 3 * e + 4) for row in epoch_rows(rows, 2, step, 0)] for e in range(4)]
    assert all(sorted(epoch, key=rows.index) == rows for epoch in epochs)
    assert len({tuple(rows.index(row) for row in epoch) for epoch in epochs}) > 1
    assert any(epoch_rows(rows, 5, 1, seed) != epoch_rows(rows, 5, 1, 0) for seed in (1, 2, 3))


def by_steps(model: LanguageModel, rows: list[EncodedDemonstration], recipe: Recipe, budget_flops: int) -> int:
    """`steps_within` as it reads: step by step."""
    steps, spent = 0, 0
    while True:
        cost = training_flops(model, epoch_rows(rows, recipe.sft.batch, steps + 1, recipe.seed))
        if steps and spent + cost / 2 > budget_flops:
            return steps
        steps, spent = steps + 1, spent + cost


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_the_steps_of_a_budget_are_those_counted_one_by_one(batch: int) -> None:
    _, lm = base_and_sft()
    rows, recipe = demonstrations(), tiny_recipe(sft={"batch": batch})
    whole = training_flops(lm, rows)
    for budget in [0, 1, whole // 7, whole - 1, whole, whole + 1, *(i * whole // 9 + 1 for i in range(5, 60))]:
        assert steps_within(lm, rows, recipe, budget) == by_steps(lm, rows, recipe, budget), budget


def test_a_budget_of_a_million_passes_looks_at_one(monkeypatch: pytest.MonkeyPatch) -> None:
    _, lm = base_and_sft()
    rows, counted = demonstrations(), []

    def watched(model: LanguageModel, some: Sequence[EncodedDemonstration]) -> int:
        counted.append(len(some))
        return training_flops(model, some)

    monkeypatch.setattr(srppo.training.sft, "training_flops", watched)
    budget = 1_000_000 * training_flops(lm, rows)
    assert abs(steps_within(lm, rows, tiny_recipe(sft={"batch": 2}), budget) - 3_000_000) <= 1
    assert sum(counted) <= 40
