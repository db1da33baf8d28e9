"""A critic on the policy's own trunk: one pass gives both losses, and the trunk is trained by their sum."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import EOS, LIMIT, PROMPTS, Bench, NoDevelopment, base_and_sft, tiny_recipe

from srppo.config import Recipe
from srppo.models.flops import forward_flops, update_flops
from srppo.models.value_model import ValueModel
from srppo.training.loop import parameters
from srppo.training.losses import clipped_policy_loss, clipped_value_loss
from srppo.training.ppo import Learners, Targets, minibatch_update, step_flops, train_ppo
from srppo.training.rollout import LocalSampler, generate, to_batch


def setting(**ppo: object) -> tuple[Recipe, Learners, Targets]:
    """A policy that has moved since it sampled, under a critic on its trunk, whose head says something."""
    torch.set_num_threads(1)
    recipe = tiny_recipe(ppo={"critic": "shared", "max_grad_norm": 1e9, "micro_tokens": 5, **ppo})
    _, policy = base_and_sft()
    learners = Learners.start(policy, recipe.ppo)
    assert learners.value is not None
    torch.manual_seed(3)
    torch.nn.init.normal_(learners.value.head.weight)
    generated = generate(policy, [*PROMPTS] * 6, stop_ids=[EOS], pad_id=EOS, max_new_tokens=LIMIT, seed=1)
    batch = to_batch(generated, policy, learners.value, micro_tokens=5, temperature=1.0)
    for weight in parameters(policy):
        weight.data += 0.05 * torch.randn_like(weight)
    mask_BT = batch.response_mask_BT
    advantages_BT, returns_BT = (torch.randn(mask_BT.shape).masked_fill(~mask_BT, 0.0) for _ in range(2))
    learners.policy_optimizer = torch.optim.SGD(parameters(policy), lr=0.0)  # type: ignore[misc]
    return recipe, learners, Targets(batch, mask_BT, advantages_BT, returns_BT, torch.zeros_like(advantages_BT), 1.0)


@pytest.fixture(autouse=True)
def thawed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Learners, "__setattr__", object.__setattr__)


def test_values_and_log_probs_of_one_pass_are_those_of_two() -> None:
    _, learners, targets = setting()
    inputs = targets.batch.tokens_BS, targets.batch.attention_mask_BS, LIMIT
    assert learners.value is not None
    with torch.no_grad():
        hidden_ND = learners.policy.hidden_rows(*inputs)
        for model, call in ((learners.policy, "response_logprobs"), (learners.value, "response_values")):
            torch.testing.assert_close(
                getattr(model, call)(*inputs, hidden_ND=hidden_ND), getattr(model, call)(*inputs)
            )
    own = ValueModel(learners.policy)
    own.load_state_dict(
        {"head.weight": learners.value.head.weight, "head.bias": learners.value.head.bias}, strict=False
    )
    torch.testing.assert_close(own.response_values(*inputs), learners.value.response_values(*inputs))
    assert {id(w) for w in parameters(learners.value)} == {id(w) for w in learners.value.head.parameters()}


def test_one_pass_gives_the_gradient_of_both_losses() -> None:
    recipe, learners, targets = setting(value_coef=0.3)
    policy, value, batch = learners.policy, learners.value, targets.batch
    assert value is not None
    inputs = batch.tokens_BS, batch.attention_mask_BS, LIMIT
    surrogate = clipped_policy_loss(
        policy.response_logprobs(*inputs), batch.old_logprobs_BT, targets.advantages_BT, targets.loss_mask_BT, clip=0.2
    )
    critic = clipped_value_loss(
        value.response_values(*inputs), batch.old_values_BT, targets.returns_BT, targets.loss_mask_BT, clip=0.2
    )
    weights = [*parameters(policy), *parameters(value)]
    expected = torch.autograd.grad(surrogate.loss + 0.3 * critic.loss, weights)
    metrics = minibatch_update(recipe, learners, targets, torch.arange(len(batch.ended_B)), step=1)
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, atol=1e-6, rtol=1e-4)
    assert metrics["policy_loss"] == pytest.approx(float(surrogate.loss), abs=1e-5)
    assert metrics["value_loss"] == pytest.approx(float(critic.loss), abs=1e-5)


def test_the_warm_up_trains_the_head_alone() -> None:
    recipe, learners, targets = setting(critic_warmup=1)
    minibatch_update(recipe, learners, targets, torch.arange(len(targets.batch.ended_B)), step=1)
    assert learners.value is not None
    assert all(weight.grad is None for weight in parameters(learners.policy))
    assert all(weight.grad is not None for weight in parameters(learners.value))
    head = 2 * learners.value.head.weight.numel() * int(targets.batch.response_mask_BT.sum())
    lengths_B = targets.batch.attention_mask_BS.sum(dim=1)
    policy = forward_flops(learners.policy, lengths_B, int(targets.batch.response_mask_BT.sum()))
    counted: dict[bool, Any] = {
        only: step_flops(learners, targets.batch, updates=(2, 1), critic_only=only) for only in (True, False)
    }
    assert counted == {
        True: 4 * policy + head + 2 * (policy + 3 * head),
        False: 4 * policy + head + 6 * (policy + head),
    }
    assert update_flops(learners.value, lengths_B, int(targets.batch.response_mask_BT.sum())) == 3 * head


def test_a_run_holds_one_trunk_and_resumes(tmp_path: Path) -> None:
    """What was trained in two attempts is what one gives."""
    recipe = tiny_recipe(
        rollout={"batch": 16}, ppo={"steps": 3, "epochs": 1, "critic": "shared", "checkpoint_every": 1}
    )
    found = []
    for name, stop in (("whole", None), ("parts", 2)):
        base, sft = base_and_sft()
        for attempt in (stop, None) if stop else (None,):
            policy = copy.deepcopy(sft)
            with Bench(tmp_path / name, recipe) as bench:
                after = stopping_after(attempt)
                try:
                    session = train_ppo(
                        recipe,
                        bench,
                        policy,
                        sft,
                        base,
                        PROMPTS,
                        NoDevelopment(),
                        LocalSampler([EOS], EOS),
                        after_step=after,
                    )
                except RuntimeError:
                    continue
        models = session.state.models
        assert {*models["value"].weights()} == {"head.weight", "head.bias"}
        found.append([weight.detach() for name in ("policy", "value") for weight in models[name].weights().values()])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def stopping_after(last: int | None) -> Any:
    def after(step: int) -> dict[str, Any]:
        if step == last:
            raise RuntimeError("stopped")
        return {}

    return after
