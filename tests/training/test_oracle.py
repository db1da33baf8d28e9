"""The trainer itself must reach the optimum that its objective has in closed form (docs/method.md).

With a KL penalty of weight beta to pi_anchor, the optimum over sequences is pi_anchor (pi_sft / pi_base)^(1/beta). With
5 tokens and 3 positions all 85 responses can be enumerated, so pi* and every KL are exact, in fp64.
"""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import (
    EOS,
    LIMIT,
    PROMPTS,
    SEQUENCES,
    VOCAB,
    Bench,
    NoDevelopment,
    base_and_sft,
    kl,
    sequence_logprobs,
    tiny_recipe,
)

from srppo.analysis.optimum import Draws
from srppo.config import RewardConfig
from srppo.models.language_model import LanguageModel
from srppo.stages.extrapolation import decoded_logprobs, generate_decoded
from srppo.stages.resampling import Sampled, ess_of, normalised_weights, resampled
from srppo.training.distil import train_distil
from srppo.training.ppo import train_ppo

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


def trained(
    folder: Path, anchor: str, beta: float, *, advantage: str = "gae", per_prompt: int = 1, **reward: object
) -> LanguageModel:
    torch.set_num_threads(1)
    base, sft = base_and_sft()
    policy = copy.deepcopy(sft)
    ppo = {"steps": 100, "epochs": 4, "schedule": "linear", "value_clip": None, "max_kl": 1000.0}
    recipe = tiny_recipe(
        reward={"anchor": anchor, "beta": beta, **reward},
        rollout={"per_prompt": per_prompt},
        ppo={**ppo, "advantage": advantage},
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


@pytest.mark.parametrize(("anchor", "beta"), [("sft", 0.5), ("base", 0.3)])
def test_rloo_reaches_the_closed_form(tmp_path: Path, anchor: str, beta: float) -> None:
    policy = trained(tmp_path / "run", anchor, beta, advantage="rloo", per_prompt=8)
    distance, start = distances(policy, anchor, beta)
    print(f"RLOO {anchor} beta {beta}: KL(pi, pi*) {distance:.4f}, KL(pi_sft, pi*) {start:.3f}")
    assert distance <= MAX_NATS and distance <= MAX_SHARE * start
    assert not reached(policy, anchor, 1.5 * beta)


def test_ppo_with_several_responses_to_a_prompt_reaches_it_too(tmp_path: Path) -> None:
    policy = trained(tmp_path / "run", "sft", 0.5, per_prompt=8)
    assert reached(policy, "sft", 0.5), distances(policy, "sft", 0.5)


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
        from srppo.training.reward import coherent_reward

        with torch.no_grad():
            ratio = sft.response_logprobs(tokens, attention, LIMIT) - base.response_logprobs(tokens, attention, LIMIT)
        expected = float((sft_log.exp() * coherent_reward(ratio, mask).double()).sum())
        assert expected == pytest.approx(kl(sft_log, base_log), abs=1e-5)
        assert expected > 0.1


# ---- without training


@torch.no_grad()
def tokenwise(prompt: tuple[int, ...], config: RewardConfig) -> torch.Tensor:
    """log of decode-time extrapolation over the enumerated responses, from the models' own logits."""
    base, sft = base_and_sft()
    logprobs = []
    for response in SEQUENCES:
        ids = torch.tensor([[*prompt, *response]])
        sft_TV, base_TV = (model.model(input_ids=ids).logits[0, len(prompt) - 1 : -1] for model in (sft, base))
        each_TV = decoded_logprobs(config, sft_TV, base_TV)
        logprobs.append(each_TV.double().gather(-1, torch.tensor(response)[:, None]).sum())
    return torch.stack(logprobs)


@pytest.mark.parametrize(("beta", "expected"), [(0.25, 0.674), (0.5, 0.129), (1.0, 0.018)])
def test_decode_time_extrapolation_is_near_the_closed_form_and_not_there(beta: float, expected: float) -> None:
    """Nearer than the SFT model, and at beta 0.5 far beyond the bar that PPO passes; the approximation has a price."""
    base, sft = base_and_sft()
    far, start = [], []
    for prompt in PROMPTS:
        sft_log, base_log = sequence_logprobs(sft, prompt), sequence_logprobs(base, prompt)
        star, own = optimum("sft", beta, sft_log, base_log), tokenwise(prompt, RewardConfig(beta=beta))
        assert float(own.exp().sum()) == pytest.approx(1, abs=1e-5)
        far.append(kl(own, star))
        start.append(kl(sft_log, star))
    print(f"beta {beta}: KL(decoded, pi*) {np.mean(far):.4f}, KL(pi_sft, pi*) {np.mean(start):.3f}")
    assert np.mean(far) == pytest.approx(expected, abs=0.003)
    assert np.mean(far) < np.mean(start) / 3 and (np.mean(far) > 5 * MAX_NATS or beta == 1.0)


@pytest.mark.parametrize("beta", [0.25, 0.35, 0.5, 0.7, 1.0, 2.0])
def test_what_a_token_at_a_time_costs(beta: float) -> None:
    """Decoding and distillation against the optimum over sequences: they lose beta KL(own || pi*) of the objective."""
    base, sft = base_and_sft()
    means = torch.zeros(3, 4, dtype=torch.float64)  # SFT model, teacher, optimum: reward, KL, objective, KL to optimum
    for prompt in PROMPTS:
        sft_log, base_log = sequence_logprobs(sft, prompt), sequence_logprobs(base, prompt)
        star = optimum("sft", beta, sft_log, base_log)
        for row, log_p in zip(means, (sft_log, tokenwise(prompt, RewardConfig(beta=beta)), star), strict=True):
            reward = float((log_p.exp() * (sft_log - base_log)).sum())
            own = torch.tensor([reward, kl(log_p, sft_log), reward - beta * kl(log_p, sft_log), kl(log_p, star)])
            row += own / len(PROMPTS)
    for name, row in zip(("SFT", "teacher", "optimum"), means.tolist(), strict=True):
        words = f"reward {row[0]:.3f}, KL to SFT {row[1]:.3f}, objective {row[2]:.3f}, KL to pi* {row[3]:.3f}"
        print(f"beta {beta} {name}: {words}")
    for row in means:
        assert float(means[2, 2] - row[2]) == pytest.approx(beta * float(row[3]), abs=1e-5)
    assert means[0, 2] < means[1, 2] < means[2, 2], "better than the SFT model, and not the optimum"


@pytest.mark.parametrize(
    "reward",
    [{"beta": 0.5}, {"beta": 0.7, "anchor": "base"}, {"beta": 0.5, "token_clip": 0.3}, {"beta": 1.0, "kind": "sft"}],
    ids=str,
)
def test_on_policy_distillation_reaches_its_teacher(tmp_path: Path, reward: dict[str, object]) -> None:
    """The bar that PPO passes on its way to the optimum over sequences, and the loss itself falls to nothing."""
    recipe = tiny_recipe(reward=reward, distil={"steps": 100, "lr": 4e-3})
    torch.set_num_threads(1)
    base, sft = base_and_sft()
    policy = copy.deepcopy(sft)
    with Bench(tmp_path / "run", recipe) as bench:
        train_distil(recipe, bench, policy, sft, base, PROMPTS, NoDevelopment(), stop_ids=[EOS], pad_id=EOS)
        rows = bench.stage.metrics()
    far, start = [], []
    for prompt in PROMPTS:
        own = tokenwise(prompt, recipe.reward)
        far.append(kl(sequence_logprobs(policy, prompt), own))
        start.append(kl(sequence_logprobs(sft, prompt), own))
    print(f"{reward}: KL(pi, teacher) {sum(far) / 2:.5f}, KL(pi_sft, teacher) {sum(start) / 2:.3f}")
    assert max(far) <= MAX_NATS and sum(far) <= MAX_SHARE * sum(start)
    assert rows[-1]["teacher_kl"] < MAX_SHARE * rows[1]["teacher_kl"]
    other = {**reward, "beta": 1.5 * recipe.reward.beta}
    apart = [kl(sequence_logprobs(policy, x), tokenwise(x, RewardConfig(**other))) for x in PROMPTS]  # type: ignore[arg-type]
    assert sum(apart) > 3 * sum(far), "the bar must tell beta from 1.5 beta"


def test_towards_the_base_at_beta_1_decoding_is_the_sft_model() -> None:
    """pi_base (pi_sft / pi_base)^1: token by token there is no approximation left."""
    _, sft = base_and_sft()
    own = tokenwise(PROMPTS[0], RewardConfig(anchor="base", beta=1.0))
    torch.testing.assert_close(own, sequence_logprobs(sft, PROMPTS[0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("anchor", ["sft", "base"])
def test_decoding_samples_follow_the_tokenwise_distribution(anchor: str) -> None:
    """20,000 samples with caches and padding against enumeration: every response within 5 standard errors."""
    base, sft = base_and_sft()
    config, each = RewardConfig(anchor=anchor, beta=0.5), 10000
    prompts = [prompt for prompt in PROMPTS for _ in range(each)]
    found = generate_decoded(
        sft, prompts, base=base, config=config, stop_ids=[EOS], pad_id=EOS, max_new_tokens=LIMIT, seed=0
    ).responses()
    for i, prompt in enumerate(PROMPTS):
        counts = Counter(tuple(response) for response in found[i * each : (i + 1) * each])
        assert sum(counts.values()) == each and set(counts) <= set(SEQUENCES)
        for response, p in zip(SEQUENCES, tokenwise(prompt, config).exp().tolist(), strict=True):
            assert counts[response] / each == pytest.approx(p, abs=5 * (p * (1 - p) / each) ** 0.5 + 1e-3), response


@pytest.mark.parametrize(("anchor", "beta"), [("sft", 0.8), ("base", 0.5)])
def test_resampling_is_the_closed_form(anchor: str, beta: float) -> None:
    """20,000 answers, each drawn from 200 weighted samples of pi_sft, against enumeration; the SFT model fails it."""
    base, sft = base_and_sft()
    sft_log, base_log = sequence_logprobs(sft, PROMPTS[0]), sequence_logprobs(base, PROMPTS[0])
    star, ratio = optimum(anchor, beta, sft_log, base_log), (sft_log - base_log).numpy()
    p = sft_log.exp().numpy()
    chosen_QK = np.random.default_rng(0).choice(len(p), size=(20000, 200), p=p / p.sum())
    draws = Draws(ratio[chosen_QK], ratio[chosen_QK], np.ones(chosen_QK.shape), None, np.zeros(chosen_QK.shape))
    weights_QK = normalised_weights(draws, RewardConfig(anchor=anchor, beta=beta))
    assert ess_of(weights_QK).enough
    answers: list[list[int]] = chosen_QK.tolist()
    drawn = resampled(Sampled(answers, draws, 1.0, 1.0), weights_QK, 1, seed=0)  # type: ignore[arg-type]
    share = np.bincount([each[0] for each in drawn], minlength=len(p)) / len(drawn)  # type: ignore[list-item]
    assert VOCAB == 5 and np.abs(share - star.exp().numpy()).sum() < 0.1
    assert np.abs(p - star.exp().numpy()).sum() > 0.3
