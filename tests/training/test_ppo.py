"""The wiring of the trainer, against plain loops: what enters the reward, one optimizer step, schedules, a resumed run.

The maths alone is in test_advantage.py, test_losses.py and test_reward.py, the fixed point of it all in test_oracle.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import (
    ENDED_B,
    EOS,
    LENGTHS,
    LIMIT,
    MASK_BT,
    PROMPTS,
    Bench,
    NoDevelopment,
    base_and_sft,
    ragged_batch,
    ragged_logprobs,
    tiny_recipe,
)
from torch import Tensor
from worlds import make_world, run_world

import srppo.training.ppo
import srppo.training.rollout
import srppo.training.sft
from srppo.config import Recipe, RewardConfig
from srppo.models.language_model import LanguageModel
from srppo.models.value_model import ValueModel
from srppo.record.store import Run
from srppo.training.batch import RolloutBatch
from srppo.training.loop import TrainState
from srppo.training.ppo import Learners, Targets, make_targets, minibatch_update, minibatches, train_ppo, update
from srppo.training.reward import Rewards, compute_rewards
from srppo.training.rollout import LocalSampler, generate, to_batch
from srppo.training.scores import Scores


@pytest.mark.parametrize("whitened", [True, False])
def test_targets_by_hand(whitened: bool) -> None:
    """Advantages whitened over what is trained on, returns not; a KL in the loss goes into the same units."""
    batch = ragged_batch()
    values_BT = batch.old_values_BT
    rewards = Rewards(ragged_logprobs(6), torch.zeros(4), ENDED_B, 2.5)
    recipe = tiny_recipe(ppo={"gamma": 0.9, "lam": 0.8, "whiten": whitened}, reward={"kl": "k2", "center": "none"})
    targets = make_targets(recipe, batch, rewards, ragged_logprobs(1))
    advantages = torch.zeros(4, 4)
    for b, length in enumerate(LENGTHS):
        after, later = 0.0, 0.0
        for t in reversed(range(length)):
            later = float(rewards.rewards_BT[b, t]) + 0.9 * after - float(values_BT[b, t]) + 0.9 * 0.8 * later
            advantages[b, t], after = later, float(values_BT[b, t])
    torch.testing.assert_close(targets.returns_BT, advantages + values_BT)
    trained = [float(advantages[b, t]) for b in (1, 2, 3) for t in range(LENGTHS[b])]
    mean = sum(trained) / len(trained)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in trained) / len(trained))
    assert targets.loss_mask_BT.tolist() == (MASK_BT & ENDED_B[:, None]).tolist()
    assert targets.kl_scale == pytest.approx(1 / 2.5 / (deviation if whitened else 1), rel=1e-5)
    if whitened:
        advantages = (advantages - mean) / deviation
    torch.testing.assert_close(targets.advantages_BT[targets.loss_mask_BT], advantages[targets.loss_mask_BT])


# ---- what train_ppo hands to what


@torch.no_grad()
def own_logprobs(lm: LanguageModel, batch: RolloutBatch, temperature: float) -> Tensor:
    """From the model's own logits, row by row, without padding."""
    result = torch.zeros(batch.response_mask_BT.shape)
    for i, (prompt, response) in enumerate(texts(batch)):
        logits = lm.model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
        result[i, : len(response)] = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
    return result


def texts(batch: RolloutBatch) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) token ids of each row."""
    split = batch.prompt_width
    return [
        (row[:split][mask[:split]].tolist(), row[split:][mask[split:]].tolist())
        for row, mask in zip(batch.tokens_BS, batch.attention_mask_BS, strict=True)
    ]


def run_ppo(recipe: Recipe, folder: Path, development: Any = None) -> tuple[LanguageModel, Any]:
    """(policy, session) after train_ppo from the tiny SFT model."""
    torch.set_num_threads(1)
    base, sft = base_and_sft()
    policy = LanguageModel(copy.deepcopy(sft.model))
    with Bench(folder, recipe) as bench:
        session = train_ppo(
            recipe, bench, policy, sft, base, PROMPTS, development or NoDevelopment(), LocalSampler([EOS], EOS)
        )
    return policy, session


@pytest.mark.parametrize("anchor", ["sft", "base"])
def test_rewards_are_taken_at_temperature_1_and_kl_from_the_anchor(
    anchor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def watch_rewards(config: RewardConfig, scores: Scores, batch: RolloutBatch, *rest: Any, **more: Any) -> Rewards:
        seen.append(
            {**scores._asdict(), "policy_logprobs_BT": batch.old_logprobs_BT, "mask_BT": batch.response_mask_BT}
        )
        return compute_rewards(config, scores, batch, *rest, **more)

    def watch_targets(recipe: Recipe, batch: RolloutBatch, rewards: Rewards, anchor_logprobs_BT: Tensor) -> Targets:
        seen[-1] |= {"batch": batch, "anchor": anchor_logprobs_BT}
        return make_targets(recipe, batch, rewards, anchor_logprobs_BT)

    monkeypatch.setattr(srppo.training.ppo, "compute_rewards", watch_rewards)
    monkeypatch.setattr(srppo.training.ppo, "make_targets", watch_targets)
    recipe = tiny_recipe(
        rollout={"batch": 12, "temperature": 0.6}, reward={"anchor": anchor, "kl": "k2"}, ppo={"steps": 1}
    )
    run_ppo(recipe, tmp_path)
    base, sft = base_and_sft()
    (step,) = seen
    expected = {
        "sft_logprobs_BT": own_logprobs(sft, step["batch"], 1.0),
        "base_logprobs_BT": own_logprobs(base, step["batch"], 1.0),
        "policy_logprobs_BT": own_logprobs(sft, step["batch"], 0.6),  # the policy starts as the SFT model
    }
    for name, logprobs_BT in expected.items():
        torch.testing.assert_close(step[name], logprobs_BT, atol=1e-5, rtol=0)
    assert torch.equal(step["anchor"], step[f"{anchor}_logprobs_BT"])
    assert step["mask_BT"].sum() == sum(len(response) for _, response in texts(step["batch"]))
    assert not torch.allclose(expected["sft_logprobs_BT"], expected["base_logprobs_BT"], atol=1e-2)


def test_every_weight_of_policy_and_critic_moves_and_the_frozen_models_stand(tmp_path: Path) -> None:
    recipe = tiny_recipe(rollout={"batch": 16}, ppo={"steps": 2, "epochs": 1})
    torch.set_num_threads(1)
    base, sft = base_and_sft()
    before = [copy.deepcopy(lm.model.state_dict()) for lm in (base, sft)]
    policy = LanguageModel(copy.deepcopy(sft.model))
    with Bench(tmp_path, recipe) as bench:
        session = train_ppo(recipe, bench, policy, sft, base, PROMPTS, NoDevelopment(), LocalSampler([EOS], EOS))
    for lm, weights in zip((base, sft), before, strict=True):
        assert all(torch.equal(weight, weights[name]) for name, weight in lm.model.state_dict().items())
    for name, weight in policy.model.named_parameters():
        assert not torch.equal(weight, before[1][name]), f"policy: {name} stands still"
    value = session.state.models["value"]
    for name, weight in value.named_parameters():
        assert not torch.equal(weight, ValueModel(sft).state_dict()[name]), f"critic: {name} stands still"


# ---- one optimizer step


def a_minibatch() -> tuple[Learners, Targets]:
    """A policy that has moved since it sampled, a critic with a head, random targets; one rollout is left out."""
    torch.set_num_threads(1)
    base, policy = base_and_sft()
    value = ValueModel(policy)
    torch.manual_seed(3)
    torch.nn.init.normal_(value.head.weight)
    prompts = [*PROMPTS, (2,), (1, 1)] * 3
    generated = generate(policy, prompts, stop_ids=[EOS], pad_id=EOS, max_new_tokens=LIMIT, temperature=0.8, seed=2)
    batch = to_batch(generated, policy, value, micro_tokens=5, temperature=0.8)
    assert len(set(batch.lengths_B().tolist())) == 3
    for weight in [*policy.parameters(), *value.parameters()]:
        weight.data += 0.05 * torch.randn_like(weight)
    mask_BT = batch.response_mask_BT.clone()
    mask_BT[2] = False
    advantages_BT, returns_BT = (torch.randn(mask_BT.shape).masked_fill(~mask_BT, 0.0) for _ in range(2))
    anchor_BT = own_logprobs(base, batch, 1.0)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.0) for m in (policy, value)]
    return Learners(policy, value, *optimizers), Targets(batch, mask_BT, advantages_BT, returns_BT, anchor_BT, 0.37)


def losses_by_hand(learners: Learners, targets: Targets, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(surrogate, k2, critic) loss of a minibatch, token by token on unpadded rows; clips at 0.1."""
    surrogate, k2, critic, count = 0.0, 0.0, 0.0, 0
    batch = targets.batch
    for i in rows:
        prompt, response = texts(batch)[i]
        logits = learners.policy.model(input_ids=torch.tensor([prompt + response])).logits[0] / 0.8
        hidden = learners.value.trunk.model(input_ids=torch.tensor([prompt + response])).last_hidden_state[0]
        gap: Tensor | float = 0.0  # of the whole response: k2 squares the sum
        for t, token in enumerate(response):
            if targets.loss_mask_BT[i, t]:
                new = logits[len(prompt) - 1 + t].log_softmax(-1)[token]
                ratio, advantage = (new - batch.old_logprobs_BT[i, t]).exp(), targets.advantages_BT[i, t]
                surrogate = surrogate - torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage)
                gap = gap + new - targets.anchor_logprobs_BT[i, t]
                value = learners.value.head(hidden[len(prompt) - 1 + t])[0]
                old, target = batch.old_values_BT[i, t], targets.returns_BT[i, t]
                near = old + (value - old).clamp(-0.1, 0.1)
                critic = critic + 0.5 * torch.maximum((value - target) ** 2, (near - target) ** 2)
                count += 1
        k2 = k2 + 0.5 * gap**2
    assert isinstance(surrogate, Tensor) and isinstance(k2, Tensor) and isinstance(critic, Tensor)
    return surrogate / count, k2 / count, critic / count


def small_step(**ppo: Any) -> Recipe:
    """Micro-batches of 4 with unequal numbers of tokens, beta 0.7 in the loss."""
    return tiny_recipe(
        rollout={"batch": 12, "temperature": 0.8},
        reward={"kl": "k2", "beta": 0.7},
        ppo={"micro_tokens": 4, "clip": 0.1, "value_clip": 0.1, "max_grad_norm": 1e6, **ppo},
    )


def test_one_optimizer_step_by_hand() -> None:
    learners, targets = a_minibatch()
    rows = torch.tensor([0, 1, 2, 3, 4, 6, 7, 9, 10])
    metrics = minibatch_update(small_step(), learners, targets, rows, step=1)
    ours = [[w.grad.clone() for w in m.parameters()] for m in (learners.policy, learners.value)]
    surrogate, k2, critic = losses_by_hand(learners, targets, rows.tolist())
    assert metrics["policy_loss"] == pytest.approx(float(surrogate.detach()), abs=1e-5)
    assert metrics["value_loss"] == pytest.approx(float(critic.detach()), abs=1e-5)
    assert 0 < metrics["clip_share"] < 1 and 0 < metrics["value_clip_share"] < 1 and metrics["approx_kl"] > 0
    theirs = [
        torch.autograd.grad(surrogate + 0.7 * 0.37 * k2, list(learners.policy.parameters())),
        torch.autograd.grad(critic, list(learners.value.parameters())),
    ]
    for our, their in zip(ours, theirs, strict=True):
        for a, b in zip(our, their, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_gradients_are_clipped_to_the_norm_and_reported_as_they_were() -> None:
    learners, targets = a_minibatch()
    rows = torch.arange(12)
    free = minibatch_update(small_step(), learners, targets, rows, step=1)
    before = [torch.cat([w.grad.flatten() for w in m.parameters()]) for m in (learners.policy, learners.value)]
    clipped = minibatch_update(small_step(max_grad_norm=0.01), learners, targets, rows, step=1)
    for model, whole, name in zip(
        (learners.policy, learners.value), before, ("grad_norm", "value_grad_norm"), strict=True
    ):
        assert free[name] == clipped[name] == pytest.approx(float(whole.norm()), rel=1e-5) and free[name] > 0.01
        now = torch.cat([w.grad.flatten() for w in model.parameters()])
        assert float(now.norm()) == pytest.approx(0.01, rel=1e-3)
        torch.testing.assert_close(now / now.norm(), whole / whole.norm(), atol=1e-5, rtol=1e-3)


def test_the_policy_stands_still_while_the_critic_warms_up() -> None:
    learners, targets = a_minibatch()
    recipe = small_step(critic_warmup=3)
    for step, trained in ((3, False), (4, True)):
        metrics = minibatch_update(recipe, learners, targets, torch.arange(12), step)
        assert (learners.policy.model.lm_head.weight.grad is not None) == trained == ("grad_norm" in metrics)
        assert learners.value.head.weight.grad is not None


# ---- metrics of a step


def test_a_step_that_was_not_taken_is_in_no_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second minibatch moves too far: it has losses and no gradient norm, and 4.0 stays 4.0."""
    learners, targets = a_minibatch()
    found = [
        {"policy_loss": 1.0, "approx_kl": 0.1, "grad_norm": 4.0, "value_grad_norm": 6.0},
        {"policy_loss": 3.0, "approx_kl": 0.5},
    ]
    monkeypatch.setattr(srppo.training.ppo, "minibatch_update", lambda *_: found.pop(0))
    recipe = small_step(minibatches=2, epochs=3, target_kl=0.4)
    metrics, done = update(recipe, learners, targets, step=1)
    assert metrics == {"policy_loss": 2.0, "approx_kl": 0.3, "grad_norm": 4.0, "value_grad_norm": 6.0}
    assert done == 2 and not found


def test_a_minibatch_that_moves_too_far_takes_no_step_and_reports_no_norm() -> None:
    learners, targets = a_minibatch()
    metrics = minibatch_update(small_step(target_kl=1e-9), learners, targets, torch.arange(12), step=1)
    assert metrics.keys() == {"policy_loss", "value_loss", "clip_share", "value_clip_share", "approx_kl"}


def test_a_minibatch_of_which_nothing_is_trained_is_in_no_mean() -> None:
    """reward.at_limit = drop leaves 3 rollouts of 12 in the loss: of 6 minibatches at most 3 have anything."""
    learners, targets = a_minibatch()
    targets.loss_mask_BT[3:] = False
    recipe = small_step(minibatches=6, epochs=1)
    alone = [minibatch_update(recipe, learners, targets, rows, step=1) for rows in minibatches(recipe, 12, step=1)]
    some = [metrics for metrics in alone if metrics]
    assert 1 <= len(some) <= 3
    metrics, done = update(recipe, learners, targets, step=1)
    assert done == 6 and metrics.keys() == some[0].keys()
    for name, number in metrics.items():
        assert number == pytest.approx(sum(each[name] for each in some) / len(some), rel=1e-6), name


def test_rollouts_that_are_left_out_of_the_loss_go_through_no_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures are those with them, of which all that is masked is 0; the passes are of the others alone."""
    learners, targets = a_minibatch()
    targets.loss_mask_BT[3:7] = False
    seen: list[int] = []
    forward = LanguageModel.response_logprobs

    def watched(self: LanguageModel, tokens_BS: Tensor, *rest: Any, **more: Any) -> Tensor:
        seen.append(len(tokens_BS))
        return forward(self, tokens_BS, *rest, **more)

    monkeypatch.setattr(LanguageModel, "response_logprobs", watched)
    rows = torch.arange(12)
    all_of_them = minibatch_update(small_step(), learners, targets, rows, step=1)
    assert sum(seen) == 12 - 5, "rows 2 to 6 have no loss"
    trained = minibatch_update(small_step(), learners, targets, rows[targets.loss_mask_BT.any(dim=1)], step=1)
    assert all_of_them == trained


def test_what_a_server_sampled_counts_by_its_importance() -> None:
    """Advantages, whitened, times min(policy / server, cap); here they are as they were."""
    batch = ragged_batch()
    torch.manual_seed(0)
    batch.sampled_logprobs_BT.copy_(batch.old_logprobs_BT + 0.5 * torch.randn(4, 4) * MASK_BT)
    rewards = Rewards(ragged_logprobs(6), torch.zeros(4), torch.ones(4, dtype=torch.bool), 1.0)
    plain = make_targets(tiny_recipe(), batch, rewards, ragged_logprobs(1))
    server = tiny_recipe(rollout={"server": "http://localhost:8000/v1", "importance_cap": 1.2})
    weighted = make_targets(server, batch, rewards, ragged_logprobs(1))
    weight_BT = (batch.old_logprobs_BT - batch.sampled_logprobs_BT).exp().clamp(max=1.2)
    assert (weight_BT[MASK_BT] == 1.2).any() and (weight_BT[MASK_BT] < 1).any()
    torch.testing.assert_close(weighted.advantages_BT, plain.advantages_BT * weight_BT)
    torch.testing.assert_close(weighted.returns_BT, plain.returns_BT)


def test_while_the_critic_warms_up_nothing_is_said_of_the_policy() -> None:
    learners, targets = a_minibatch()
    metrics, _ = update(small_step(critic_warmup=3), learners, targets, step=1)
    assert metrics.keys() == {"value_loss", "value_clip_share", "value_grad_norm"}


# ---- memory


def test_rollouts_are_sized_beside_all_that_training_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []

    def watched(*args: Any, **options: Any) -> Any:
        held.append(options["held"])
        return generate(*args, **options)

    monkeypatch.setattr(srppo.training.rollout, "generate", watched)
    run_ppo(tiny_recipe(rollout={"batch": 4}, ppo={"steps": 1, "epochs": 1}), tmp_path)
    _, sft = base_and_sft()
    one, critic = (4 * sum(w.numel() for w in model.parameters()) for model in (sft, ValueModel(sft)))
    assert held == [2 * one + 4 * (one + critic)]  # weights, gradients and two moments of what is trained


# ---- schedules


def test_training_follows_the_schedule(tmp_path: Path) -> None:
    recipe = tiny_recipe(
        rollout={"batch": 4}, ppo={"steps": 5, "epochs": 1, "lr": 1e-3, "schedule": "linear", "warmup": 0.2}
    )
    _, session = run_ppo(recipe, tmp_path)
    rows = session.bench.stage.metrics()
    assert [row["lr"] for row in rows[1:]] == pytest.approx([1e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4])
    lrs = [optimizer.param_groups[0]["lr"] for optimizer in session.state.optimizers.values()]
    assert lrs == pytest.approx([2.5e-4, 0.25 * recipe.ppo.value_lr])


# ---- the kept step


def test_the_kept_step_is_measured_and_exported(tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    recipe = make_world(tmp_path / "world").recipe(
        {"eval.metric": "nll", "ppo.steps": 3, "ppo.lr": 0.05, "reward.beta": 0.25}
    )
    run_world(recipe, tmp_path / "run")
    (stage,) = [s for s in Run.load(tmp_path / "run").stages() if s.identity["kind"] == "ppo"]
    figures, rows = (stage.result() or {})["figures"], {row["step"]: row for row in stage.metrics()}
    kept, total = figures["kept_step"], figures["steps"]
    assert 0 < kept < total and rows[kept]["dev/nll"] == min(row["dev/nll"] for s, row in rows.items() if s)
    assert (
        figures["held_out_nll"] == rows[kept]["dev/nll"] and figures["last"]["held_out_nll"] == rows[total]["dev/nll"]
    )
    exported, saved = (
        load_file(path)
        for path in (stage.path / "model/model.safetensors", stage.checkpoint(kept) / "policy.safetensors")
    )
    assert exported.keys() == saved.keys() and all(torch.equal(exported[name], saved[name]) for name in saved)


# ---- a resumed run, in one process


class BestEarly:
    """Development scores that are best at steps 1 and 2; once, the measurement of step 3 fails."""

    def __init__(self, fails: bool) -> None:
        self.fails, self.step = fails, -1

    def measure(self, model: LanguageModel) -> tuple[dict[str, float], float]:
        self.step += 1
        if self.fails and self.step == 3:
            raise RuntimeError("a bug")
        return {}, -max(self.step - 2.0, 0.0)


def state_of(state: TrainState, folder: Path) -> tuple[list[bytes], Any]:
    folder.mkdir()
    state.save(folder)
    weights = [(folder / f"{name}.safetensors").read_bytes() for name in state.models]
    return weights, torch.load(folder / "trainer.pt", weights_only=True)


def test_a_resumed_run_ends_with_the_same_state(tmp_path: Path) -> None:
    """Weights, both optimizers, flops, running deviation, and the kept step (the first of two as good), on disk too."""
    recipe = tiny_recipe(
        rollout={"batch": 8}, ppo={"steps": 5, "checkpoint_every": 2, "minibatches": 2}, eval={"every": 1}
    )
    _, whole = run_ppo(recipe, tmp_path / "whole", BestEarly(fails=False))
    with pytest.raises(RuntimeError, match="a bug"):
        run_ppo(recipe, tmp_path / "again", BestEarly(fails=True))
    later = BestEarly(fails=False)
    later.step = 2
    _, resumed = run_ppo(recipe, tmp_path / "again", later)
    weights, trainer = state_of(whole.state, tmp_path / "a")
    other_weights, other = state_of(resumed.state, tmp_path / "b")
    assert weights == other_weights
    assert trainer["counters"] == other["counters"]
    assert trainer["counters"]["kept_step"] == 1 and trainer["counters"]["running"]["count"] == 40
    assert whole.bench.stage.checkpoint_steps() == resumed.bench.stage.checkpoint_steps() == [1, 4, 5]
    for name in ("policy", "value"):
        one, two = (t["optimizers"][name] for t in (trainer, other))
        assert one["param_groups"] == two["param_groups"]
        for index, moments in one["state"].items():
            for key, tensor in moments.items():
                assert torch.equal(tensor, two["state"][index][key]), (name, index, key)
    rows = [
        [{k: v for k, v in row.items() if k != "timing"} for row in s.bench.stage.metrics()] for s in (whole, resumed)
    ]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == list(range(6))
