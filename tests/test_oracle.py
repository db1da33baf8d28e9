"""The trainer itself must reach the optimum that its objective has in closed form (design section 1).

With a KL penalty of weight beta to pi_anchor, the optimum over sequences is pi_anchor (pi_sft / pi_base)^(1/beta). With
5 tokens and 3 positions all 85 responses can be enumerated, so pi* and every KL are exact, in fp64.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny import EOS, LIMIT, PROMPTS, SEQUENCES, Bench, NoDevelopment, base_and_sft, kl, sequence_logprobs, tiny_recipe

from srppo.models import LanguageModel
from srppo.ppo import train_ppo

MAX_NATS, MAX_SHARE = 0.02, 0.05


def optimum(anchor: str, beta: float, sft: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """log pi* over the enumerated responses."""
    return ((sft if anchor == "sft" else base) + (sft - base) / beta).log_softmax(0)


def distances(policy: LanguageModel, anchor: str, beta: float) -> tuple[float, float]:
    """(KL(pi, pi*), KL(pi_sft, pi*)), averaged over the prompts."""
    base, sft = base_and_sft()
    totals = torch.zeros(2)
    for prompt in PROMPTS:
        sft_log, base_log = sequence_logprobs(sft, prompt), sequence_logprobs(base, prompt)
        star = optimum(anchor, beta, sft_log, base_log)
        totals += torch.tensor([kl(sequence_logprobs(policy, prompt), star), kl(sft_log, star)]) / len(PROMPTS)
    return float(totals[0]), float(totals[1])


def reached(policy: LanguageModel, anchor: str, beta: float) -> bool:
    """The bar: within 0.02 nats of pi*, and within 5% of the way that SFT had to go."""
    distance, start = distances(policy, anchor, beta)
    return distance <= MAX_NATS and distance <= MAX_SHARE * start


def trained(folder: Path, anchor: str, beta: float, **reward: object) -> LanguageModel:
    torch.set_num_threads(1)
    base, sft = base_and_sft()
    policy = copy.deepcopy(sft)
    recipe = tiny_recipe(
        reward={"anchor": anchor, "beta": beta, **reward},
        ppo={"steps": 100, "epochs": 4, "schedule": "linear", "value_clip": None, "max_kl": 1000.0},
    )
    with Bench(folder, recipe) as bench:
        train_ppo(recipe, bench, policy, sft, base, PROMPTS, NoDevelopment(), stop_ids=[EOS], pad_id=EOS)
    return policy


@pytest.mark.parametrize("scale", [True, False], ids=["scaled", "unscaled"])
@pytest.mark.parametrize(("anchor", "beta"), [("sft", 0.5), ("sft", 0.8), ("base", 0.3), ("base", 0.5)])
def test_ppo_reaches_the_closed_form(tmp_path: Path, anchor: str, beta: float, scale: bool) -> None:
    policy = trained(tmp_path / "run", anchor, beta, scale=scale)
    distance, start = distances(policy, anchor, beta)
    print(f"{anchor} beta {beta} scale {scale}: KL(pi, pi*) {distance:.4f}, KL(pi_sft, pi*) {start:.3f}")
    assert distance <= MAX_NATS and distance <= MAX_SHARE * start
    other = "base" if anchor == "sft" else "sft"
    assert not reached(policy, other, beta), "the bar must tell the anchors apart"
    assert not reached(policy, anchor, 1.5 * beta), "the bar must tell beta from 1.5 beta"


def test_k2_in_the_loss_has_the_same_optimum(tmp_path: Path) -> None:
    policy = trained(tmp_path / "run", "sft", 0.5, kl="k2")
    assert reached(policy, "sft", 0.5), distances(policy, "sft", 0.5)


def test_k3_in_the_loss_ends_elsewhere(tmp_path: Path) -> None:
    policy = trained(tmp_path / "run", "sft", 0.5, kl="k3")
    assert distances(policy, "sft", 0.5)[0] > 3 * MAX_NATS, "the warning that k3 is biased would be wrong"


def test_expected_reward_under_sft_is_the_kl() -> None:
    """E over pi_sft of log pi_sft - log pi_base = KL(pi_sft || pi_base) >= 0, by enumeration."""
    base, sft = base_and_sft()
    for prompt in PROMPTS:
        sft_log, base_log = sequence_logprobs(sft, prompt), sequence_logprobs(base, prompt)
        assert abs(float(sft_log.exp().sum()) - 1) < 1e-12
        mask = torch.tensor([[i < len(y) for i in range(LIMIT)] for y in SEQUENCES])
        tokens = torch.tensor([[*prompt, *y, *[EOS] * (LIMIT - len(y))] for y in SEQUENCES])
        attention = torch.cat([torch.ones(len(SEQUENCES), len(prompt), dtype=torch.bool), mask], dim=1)
        from srppo.reward import coherent_reward

        with torch.no_grad():
            ratio = (
                sft.response_logprobs(tokens, attention, LIMIT).logprobs_N
                - base.response_logprobs(tokens, attention, LIMIT).logprobs_N
            )
        expected = float((sft_log.exp() * coherent_reward(ratio, mask).double()).sum())
        assert expected == pytest.approx(kl(sft_log, base_log), abs=1e-5)
        assert expected > 0.1
