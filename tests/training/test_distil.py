"""On-policy distillation: its gradient by the definition, what it logs and counts, and that a kill changes no bit.

The kernel alone is in tests/kernels/test_divergence.py; where it ends, in test_oracle.py.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import (
    EOS,
    LIMIT,
    PROMPTS,
    SEQUENCES,
    Bench,
    NoDevelopment,
    base_and_sft,
    kl,
    sequence_logprobs,
    tiny_recipe,
)
from torch import Tensor

from srppo.config import Recipe, RewardConfig
from srppo.errors import Diverged
from srppo.models.flops import forward_flops
from srppo.models.language_model import Head, LanguageModel
from srppo.training.batch import Generated
from srppo.training.distil import add_gradient, step_flops, train_distil
from srppo.training.loop import Measure, Session
from srppo.training.rollout import LocalSampler, generate

REWARDS = [
    {"beta": 0.5},
    {"beta": 0.7, "anchor": "base"},
    {"beta": 0.5, "token_clip": 0.3},
    {"beta": 1.0, "kind": "sft"},
]


def distilled(recipe: Recipe, folder: Path, development: Measure | None = None) -> tuple[LanguageModel, Session]:
    torch.set_num_threads(1)
    base, sft = base_and_sft()
    policy = copy.deepcopy(sft)
    with Bench(folder, recipe) as bench:
        session = train_distil(
            recipe,
            bench,
            policy,
            sft,
            base,
            PROMPTS,
            development or NoDevelopment(),
            LocalSampler([EOS], EOS),
            stop_ids=[EOS],
        )
    return policy, session


def three_models(dtype: torch.dtype) -> tuple[LanguageModel, LanguageModel, LanguageModel]:
    """A policy that is neither, the SFT model and the base."""
    base, sft = base_and_sft()
    policy = base_and_sft(distance=0.8)[1]
    return tuple(LanguageModel(model.model.to(dtype)) for model in (policy, sft, base))  # type: ignore[return-value]


def rollouts(policy: LanguageModel, count: int = 12) -> Generated:
    return generate(policy, PROMPTS * (count // 2), stop_ids=[EOS], pad_id=EOS, max_new_tokens=LIMIT, seed=3)


def teacher_by_hand(reward: RewardConfig, sft_NV: Tensor, base_NV: Tensor) -> Tensor:
    """log of pi_anchor exp(r / beta) / Z."""
    ratio_NV = sft_NV - base_NV if reward.kind == "ratio" else sft_NV
    if reward.token_clip is not None:
        ratio_NV = ratio_NV.clip(-reward.token_clip, reward.token_clip)
    weighed_NV = (sft_NV if reward.anchor == "sft" else base_NV) + ratio_NV / reward.beta
    return weighed_NV - weighed_NV.logsumexp(-1, keepdim=True)


def by_hand(
    recipe: Recipe, models: tuple[LanguageModel, LanguageModel, LanguageModel], batch: Generated
) -> tuple[Tensor, list[Tensor]]:
    """KL to teacher, SFT model and base of each counted token, from the models' own logits, and the loss's gradient."""
    rows = batch.tokens_BS, batch.attention_mask_BS, batch.response_mask_BT.shape[1]
    temperatures = (recipe.rollout.temperature, 1.0, 1.0)
    policy_NV, sft_NV, base_NV = (
        (model.logit_rows(*rows) / temperature).log_softmax(-1)
        for model, temperature in zip(models, temperatures, strict=True)
    )
    others = (teacher_by_hand(recipe.reward, sft_NV.detach(), base_NV.detach()), sft_NV, base_NV)
    kl_3N = torch.stack([(policy_NV.exp() * (policy_NV - other_NV)).sum(-1) for other_NV in others])
    loss = kl_3N[0].sum() / int(batch.response_mask_BT.sum())
    return kl_3N.detach(), list(torch.autograd.grad(loss, list(models[0].parameters())))


@pytest.mark.parametrize("reward", REWARDS, ids=str)
@pytest.mark.parametrize("linear", [True, False], ids=["linear head", "any head"])
def test_the_gradient_is_that_of_the_definition(reward: dict[str, object], linear: bool) -> None:
    """In fp64, of every weight of the policy, at a temperature of its own; the frozen models get none."""
    dtype = torch.float64 if linear else torch.float32  # logits of any other head are raised to fp32 alone
    models = three_models(dtype)
    for model in models:
        model.head = model.head if linear else Head(linear=False)
    recipe, batch = tiny_recipe(reward=reward, rollout={"temperature": 0.8}), rollouts(models[0])
    kl_3BT = add_gradient(recipe, *models, batch, stop_ids=[EOS])
    want_3N, want = by_hand(recipe, models, batch)
    tight = {"rtol": 1e-9, "atol": 1e-12} if linear else {"rtol": 1e-3, "atol": 1e-5}
    for weight, gradient in zip(models[0].parameters(), want, strict=True):
        assert weight.grad is not None and gradient.abs().max() > 0
        torch.testing.assert_close(weight.grad, gradient, **tight)
    assert all(weight.grad is None for model in models[1:] for weight in model.parameters())
    torch.testing.assert_close(kl_3BT[:, batch.response_mask_BT], want_3N.float(), rtol=1e-4, atol=1e-5)
    assert not kl_3BT[:, ~batch.response_mask_BT].any()


def test_micro_batches_add_up_to_the_mean_over_all_tokens() -> None:
    found = []
    for size in (5, 12):
        models = three_models(torch.float32)
        batch = rollouts(models[0])
        assert len({int(batch.lengths_B()[part].sum()) for part in (slice(5), slice(5, 10))}) == 2
        kl_3BT = add_gradient(tiny_recipe(ppo={"micro_tokens": size}), *models, batch, stop_ids=[EOS])
        found.append([kl_3BT, *(weight.grad for weight in models[0].parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_a_step_says_has_the_mean_of_what_ppo_says() -> None:
    """Reward and KL of a response, expectations over the next token: against enumeration, within 5 standard errors."""
    policy, sft, base = three_models(torch.float32)
    batch = generate(policy, [PROMPTS[0]] * 4000, stop_ids=[EOS], pad_id=EOS, max_new_tokens=LIMIT, seed=1)
    kl_3BT = add_gradient(tiny_recipe(), policy, sft, base, batch, stop_ids=[EOS])
    own, *others = (sequence_logprobs(model, PROMPTS[0]) for model in (policy, sft, base))
    for kl_BT, other in zip(kl_3BT[1:], others, strict=True):
        kl_B = kl_BT.sum(dim=1)
        assert float(kl_B.mean()) == pytest.approx(kl(own, other), abs=5 * float(kl_B.std()) / 4000**0.5)
        noisy = (own.exp() * (own - other - kl(own, other)) ** 2).sum().sqrt()
        assert kl_B.std() < noisy, "the sampled log-ratio would say it with more noise"
    assert len(SEQUENCES) == 85


# ---- the loop


def small(**sections: dict[str, object]) -> Recipe:
    return tiny_recipe(**{"rollout": {"batch": 8}, "distil": {"steps": 2}, **sections})


def test_every_weight_moves_by_a_schedule_and_all_is_logged(tmp_path: Path) -> None:
    recipe = small(distil={"steps": 4, "lr": 1e-3}, ppo={"max_grad_norm": 1e-3})
    policy, session = distilled(recipe, tmp_path)
    _, sft = base_and_sft()
    assert all((a != b).any() for a, b in zip(policy.parameters(), sft.parameters(), strict=True))
    rows = session.bench.stage.metrics()[1:]
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert rows[0]["kl_sft"] == 0 < rows[0]["teacher_kl"] and rows[0]["reward"] == rows[0]["kl_base"] > 0
    assert all(row["grad_norm"] > 1e-3 for row in rows), "reported as it was before the clip"
    written = session.bench.stage.rollouts()
    assert len(written) == 4 * 8 and written[0].keys() == {"step", "prompt", "response", "tokens", "reward"}
    assert sum(row["reward"] for row in written[:8]) / 8 == pytest.approx(rows[0]["reward"], abs=1e-5)
    assert sum(row["tokens"] for row in written[:8]) / 8 == rows[0]["length"]


def test_counted_operations() -> None:
    """Sampling, a pass of each frozen model, forward and backward of the policy."""
    policy, sft, base = three_models(torch.float32)
    batch = rollouts(policy)
    lengths_B, tokens = batch.attention_mask_BS.sum(dim=1), int(batch.lengths_B().sum())
    assert step_flops(policy, sft, base, batch) == 6 * forward_flops(policy, lengths_B, tokens)


def test_a_policy_that_runs_away_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"step 2: KL to the SFT model is .* nats a response, beyond ppo.max_kl = 0.01"):
        distilled(small(distil={"steps": 3, "lr": 0.05}, ppo={"max_kl": 0.01}), tmp_path)


# ---- a real kill


class Kills:
    """Ends its own process by SIGKILL while step 7 is measured: the last checkpoint is of step 6."""

    def __init__(self) -> None:
        self.measured = 0

    def measure(self, model: LanguageModel) -> tuple[dict[str, float], None]:
        if self.measured == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        self.measured += 1
        return {}, None


LIFE = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
from pathlib import Path
from srppo.config import build_recipe
from test_distil import Kills, distilled
distilled(build_recipe(json.loads(sys.argv[3])), Path(sys.argv[2]), Kills())
"""


def test_killed_in_the_middle_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    recipe = small(distil={"steps": 10}, ppo={"checkpoint_every": 3, "micro_tokens": 3}, eval={"every": 1})
    policy, whole = distilled(recipe, tmp_path / "whole")
    tests, killed = Path(__file__).parent, tmp_path / "killed"
    orders = [json.dumps([str(tests), str(tests.parent)]), str(killed), json.dumps(recipe.model_dump(mode="json"))]
    assert subprocess.run([sys.executable, "-c", LIFE, *orders]).returncode == -signal.SIGKILL
    other_policy, resumed = distilled(recipe, killed)
    assert len(resumed.bench.stage.attempts()) == 2
    rows, other_rows = (
        [{key: value for key, value in row.items() if key != "timing"} for row in session.bench.stage.metrics()]
        for session in (whole, resumed)
    )
    assert rows == other_rows and [row["step"] for row in rows] == [*range(11)]
    assert whole.state.counters == resumed.state.counters
    for one, two in zip(policy.parameters(), other_policy.parameters(), strict=True):
        assert torch.equal(one, two)
        moments = (session.state.optimizers["policy"].state[w] for session, w in ((whole, one), (resumed, two)))
        assert all(map(torch.equal, *(found.values() for found in moments)))
