"""SFT on the SFT model's own answers: which are trained on, on which prompts, and what it all took."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import EOS, World, make_world

import srppo.stages.self_training
from srppo.analysis.samples import Question, rewarded
from srppo.console import Console
from srppo.data.order import scheduled
from srppo.data.types import EncodedDemonstration
from srppo.errors import RunError
from srppo.models.flops import forward_flops
from srppo.models.loading import load_model
from srppo.models.pair import Pair
from srppo.record.store import Stage
from srppo.stages.arms import compute_of, figures_of
from srppo.stages.run import PreparedRun, prepare_run, run_stages
from srppo.stages.self_training import _load, chosen_rows
from srppo.training.batch import training_flops

PROMPTS, SAMPLES, EPOCHS = 5, 6, 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    return make_world(tmp_path_factory.mktemp("world"))


def prepared(world: World, folder: Path, *kinds: str, **keys: Any) -> PreparedRun:
    methods = {"methods.self_prompts": PROMPTS, "methods.self_samples": SAMPLES, "methods.self_epochs": EPOCHS}
    recipe = world.recipe({**methods, **{name.replace("__", "."): value for name, value in keys.items()}})
    return prepare_run(recipe, kinds, folder, Console(plain=True, file=io.StringIO()))


def test_answers_that_were_cut_are_never_trained_on() -> None:
    """Prompt 2 has none that ended; of prompt 1 the choice is among those that did."""
    seen: list[Any] = []

    def last(place: int, ended: Any) -> int:
        seen.append((place, ended))
        return len(ended) - 1

    prompts, responses = [(1, 2), (3,), (4,)], [[(5, 0), (6, 6), (7, 0)], [(8, 8)], [(9, 1)]]
    found = chosen_rows(prompts, responses, [0, 1], last)
    assert found == [EncodedDemonstration((1, 2, 7, 0), 2), EncodedDemonstration((4, 9, 1), 1)]
    assert seen == [(0, [(5, 0), (7, 0)]), (2, [(9, 1)])]


def test_both_train_on_their_choice_of_the_same_answers_to_ppos_first_prompts(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand from what was drawn: the majority's answer, and the one with the highest reward; each token is paid for.

    The recipe's PPO has two steps of eight rollouts: its prompts, in its order.
    """
    trained: dict[str, list[EncodedDemonstration]] = {}
    plain = srppo.stages.self_training.train_sft

    def noted(recipe: Any, bench: Any, model: Any, rows: Any, development: Any, **more: Any) -> Any:
        assert (recipe.sft.epochs, recipe.sft.steps) == (EPOCHS, None)
        trained[bench.stage.identity["kind"]] = rows
        return plain(recipe, bench, model, rows, development, **more)

    monkeypatch.setattr(srppo.stages.self_training, "train_sft", noted)
    run = prepared(world, tmp_path / "run", "self-distilled", "rejection-ft")
    found = run_stages(run)
    drawn, sft = _load(found), load_model(str(found["sft"].path / "model"), run.recipe.model)
    places = scheduled(len(run.data.prompts), 8, 0, run.recipe.seed)[:PROMPTS]
    prompts = [tuple(run.data.prompts[i]) for i in places]
    assert len(drawn) == PROMPTS and {len(each) for each in drawn} == {SAMPLES}

    pair = Pair(sft, run.base, run.tokenizer, run.recipe, "sft", "base")
    rewards = rewarded(pair, [Question("", ids) for ids in prompts], drawn, run.recipe.reward).reward_QK
    majority, best = [], []
    for prompt, each, own in zip(prompts, drawn, rewards, strict=True):
        ended = [(ids, float(reward)) for ids, reward in zip(each, own, strict=True) if ids[-1] == EOS]
        if ended:
            counts = Counter(ids for ids, _ in ended)
            majority.append((*prompt, *counts.most_common(1)[0][0]))
            best.append((*prompt, *max(ended, key=lambda pair: pair[1])[0]))
    assert [row.ids for row in trained["self-distilled"]] == majority
    assert [row.ids for row in trained["rejection-ft"]] == best != majority

    def forward(model: Any, rows: Any) -> int:
        lengths = torch.tensor([len(prompts[i]) + len(ids) for i, ids in rows])
        return forward_flops(model, lengths, sum(len(ids) for _, ids in rows))

    written = forward(sft, [(i, ids) for i, each in enumerate(drawn) for ids in each])
    scored = 2 * forward(sft, list(dict.fromkeys((i, ids) for i, each in enumerate(drawn) for ids in each)))
    before = figures_of(found["sft"])["flops"] + written
    for kind, more in (("self-distilled", 0), ("rejection-ft", scored)):
        passes = EPOCHS * training_flops(sft, trained[kind])
        assert compute_of(found[kind])[0] == before + more + passes, kind
        rows = found[kind].metrics()
        measured = [row["step"] for row in rows if "dev/accuracy" in row]
        assert len(measured) == EPOCHS + 1 and figures_of(found[kind])["kept_step"] in measured[1:]
        assert figures_of(found[kind])["rows"] == len(trained[kind])
    assert found["self-distilled"].identity["parents"] == [run.base_id, found["prompt-samples"].id]


def test_they_start_from_the_sft_model(world: World, tmp_path: Path) -> None:
    """At a learning rate of nothing they are the SFT model: the same answers."""

    def answers(stage: Stage) -> list[str]:
        return [file.read_text() for file in sorted(stage.path.glob("eval/kept-*/samples.jsonl"))]

    run = prepared(world, tmp_path / "run", "self-distilled", "base", sft__lr=1e-12)
    found = run_stages(run)
    assert answers(found["self-distilled"]) == answers(found["sft"])
    moved = run_stages(prepared(world, tmp_path / "moved", "self-distilled"))
    assert answers(moved["self-distilled"]) != answers(moved["sft"])


def test_a_model_that_never_ends_cannot_teach(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared(world, tmp_path / "run", "self-distilled")
    monkeypatch.setattr(srppo.stages.self_training, "chosen_rows", lambda *args: [])
    with pytest.raises(RunError, match=r"no answer of the SFT model ended within rollout\.max_new_tokens"):
        run_stages(run)
