"""PPO without a critic: leave-one-out advantages by hand and by enumeration, and runs that train with them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import EOS, LIMIT, PROMPTS, Bench, NoDevelopment, base_and_sft, tiny_recipe

from srppo.config import build_recipe
from srppo.errors import ConfigError
from srppo.models.flops import forward_flops
from srppo.models.language_model import LanguageModel
from srppo.models.value_model import ValueModel
from srppo.training.advantage import rloo
from srppo.training.ppo import Learners, step_flops, train_ppo
from srppo.training.rollout import LocalSampler, generate, to_batch


def test_leave_one_out_by_hand() -> None:
    """Three responses to each of two prompts; rewards 1, 2, 6 and 0, 3, 3, spread over tokens in every way."""
    mask_BT = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    rewards_BT = torch.tensor([[0, 1, 9], [2, 9, 9], [3, -1, 4], [0, 9, 9], [3, 0, 9], [1, 1, 1]]).float()
    expected = [1 - 4, 2 - 3.5, 6 - 1.5, 0 - 3, 3 - 1.5, 3 - 1.5]
    found_BT = rloo(rewards_BT, mask_BT, per_prompt=3)
    assert torch.equal(found_BT, torch.tensor(expected)[:, None] * mask_BT)


def test_the_baseline_does_not_see_the_response_itself() -> None:
    """A response that is paid d more has an advantage d higher, and takes d / (k - 1) from each of the others'."""
    mask_BT = torch.ones(4, 1, dtype=torch.bool)
    rewards_BT = torch.tensor([[1.0], [5.0], [-2.0], [0.5]])
    raised_BT = rewards_BT + torch.tensor([[0.0], [0.0], [3.0], [0.0]])
    change_BT = rloo(raised_BT, mask_BT, per_prompt=4) - rloo(rewards_BT, mask_BT, per_prompt=4)
    assert torch.allclose(change_BT[:, 0], torch.tensor([-1.0, -1.0, 3.0, -1.0]))


def test_the_gradient_is_unbiased_by_enumeration() -> None:
    """E over pairs of A grad log pi(y) = grad E[R] for a softmax over 7 actions, in fp64; the mean of both is not."""
    torch.manual_seed(0)
    p, reward = torch.randn(7).double().softmax(0), torch.randn(7).double()
    exact = p * (reward - (p * reward).sum())
    grad_log = torch.eye(7).double() - p  # row y: gradient of log pi(y) in the logits
    pairs = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    weight = p[pairs].prod(dim=1)
    rewards_BT = reward[pairs].view(-1, 1)
    own = rloo(rewards_BT, torch.ones_like(rewards_BT, dtype=torch.bool), per_prompt=2).view(-1, 2)
    mean = reward[pairs] - reward[pairs].mean(dim=1, keepdim=True)

    def expected(advantage: torch.Tensor) -> torch.Tensor:
        return sum((weight * advantage[:, i]) @ grad_log[pairs[:, i]] for i in (0, 1)) / 2  # type: ignore[return-value]

    assert torch.allclose(expected(own), exact, atol=1e-14)
    assert not torch.allclose(expected(mean), exact, atol=1e-2)


RLOO = {"rollout": {"batch": 8, "per_prompt": 4}, "ppo": {"advantage": "rloo", "steps": 4, "checkpoint_every": 2}}


class Fails:
    """Development that breaks down at a step."""

    def __init__(self, at: int | None) -> None:
        self.step, self.at = 0, at

    def measure(self, model: LanguageModel) -> tuple[dict[str, float], None]:
        if self.step == self.at:
            raise RuntimeError("a bug")
        self.step += 1
        return {}, None


def run_rloo(folder: Path, development: Any = None, **ppo: Any) -> tuple[LanguageModel, Any]:
    torch.set_num_threads(1)
    recipe = tiny_recipe(rollout=RLOO["rollout"], ppo={**RLOO["ppo"], **ppo}, eval={"every": 1})
    base, sft = base_and_sft()
    policy = LanguageModel(copy.deepcopy(sft.model))
    with Bench(folder, recipe) as bench:
        development = development or NoDevelopment()
        session = train_ppo(recipe, bench, policy, sft, base, PROMPTS, development, LocalSampler([EOS], EOS))
    return policy, session


def test_rloo_has_no_critic_anywhere(tmp_path: Path) -> None:
    _, session = run_rloo(tmp_path)
    checkpoint = session.bench.stage.checkpoint(4)
    assert not list(checkpoint.glob("value*")) and (checkpoint / "policy.safetensors").exists()
    assert session.state.models.keys() == session.state.optimizers.keys() == {"policy"}
    rows = session.bench.stage.metrics()
    assert not [name for row in rows for name in row if "value" in name or "explained" in name]
    assert rows[-1]["grad_norm"] > 0 and rows[-1]["clip_share"] >= 0


def test_rloo_counts_no_critic() -> None:
    """Sampling, three scoring passes and three times the policy a pass; with a critic, its score and its training."""
    _, policy = base_and_sft()
    generated = generate(policy, PROMPTS, stop_ids=[EOS], pad_id=EOS, max_new_tokens=LIMIT, seed=1)
    batch = to_batch(generated, policy, None, micro_tokens=2, temperature=1.0)
    assert not batch.old_values_BT.any()
    lengths, tokens = batch.attention_mask_BS.sum(dim=1), int(batch.response_mask_BT.sum())
    one, critic = forward_flops(policy, lengths, tokens), forward_flops(ValueModel(policy), lengths, tokens)
    without = Learners.start(policy, tiny_recipe(**RLOO).ppo)
    assert step_flops(without, batch, updates=(4, 2), critic_only=False) == 4 * one + 2 * 3 * one
    with_one = Learners.start(policy, tiny_recipe().ppo)
    assert step_flops(with_one, batch, updates=(4, 2), critic_only=False) == 4 * one + critic + 6 * (one + critic)


def test_an_rloo_run_that_broke_down_ends_with_the_same_bits(tmp_path: Path) -> None:
    policy, whole = run_rloo(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="a bug"):
        run_rloo(tmp_path / "again", Fails(at=3))
    other, resumed = run_rloo(tmp_path / "again")
    assert [row["event"] for row in events(resumed)].count("resumed") == 2
    for (name, ours), theirs in zip(policy.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    rows = [[{k: v for k, v in r.items() if k != "timing"} for r in s.bench.stage.metrics()] for s in (whole, resumed)]
    assert rows[0] == rows[1] and whole.state.counters == resumed.state.counters


def events(session: Any) -> list[dict[str, Any]]:
    files = [folder / "events.jsonl" for folder in session.bench.stage.attempts()]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_rloo_refuses_what_it_cannot_do() -> None:
    rloo_of_two = {"rollout": {"batch": 6, "per_prompt": 2}, "ppo": {"advantage": "rloo", "minibatches": 1}}
    build_recipe(rloo_of_two)
    for tree, message in (
        ({"ppo": {"advantage": "rloo"}}, r"rloo compares the responses to one prompt: set rollout\.per_prompt to 2"),
        (
            {"rollout": {"batch": 96, "per_prompt": 5}},
            r"rollout\.per_prompt \(5\) does not divide rollout\.batch \(96\)",
        ),
        ({**rloo_of_two, "ppo": {"advantage": "rloo", "gamma": 0.9}}, r"leave ppo\.gamma at 1 .*\(found 0\.9 and 0\)"),
        ({**rloo_of_two, "ppo": {"advantage": "rloo", "critic_warmup": 2}}, r"critic_warmup at 0 \(found 1 and 2\)"),
        ({"methods": {"alphas": [1.0, 1.0]}}, r"methods\.alphas: alphas are distinct, above -1"),
        ({"methods": {"alphas": [-0.5, 0.0]}}, r"methods\.alphas: alphas are .* not 0 \(the SFT model itself\)"),
        ({"methods": {"alphas": [-1.0]}}, r"methods\.alphas: alphas are distinct, above -1 \(the base\)"),
        ({"methods": {"alphas": []}}, r"methods\.alphas: .*at least 1 item"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            build_recipe(tree)
        assert "\n" not in str(caught.value)
