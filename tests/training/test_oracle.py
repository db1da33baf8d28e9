"""The trainer itself must reach the optimum that its objective has in closed form (docs/method.md).

With a KL penalty of weight beta to pi_anchor, the optimum over sequences is pi_anchor exp(r/beta) / Z, for the coherent
reward pi_anchor (pi_sft / pi_base)^(1/beta). With 5 tokens and 3 positions all 85 responses can be enumerated, so pi*
and every KL are exact, in fp64.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
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
    each_logprob,
    kl,
    sequence_logprobs,
    tiny_llama,
    tiny_recipe,
)

from srppo.analysis.optimum import Draws
from srppo.config import ModelConfig, RewardConfig
from srppo.models.adapters import AdaptedModel, lora_settings
from srppo.models.language_model import LanguageModel
from srppo.stages.extrapolation import decoded_logprobs, generate_decoded
from srppo.stages.resampling import Sampled, ess_of, normalised_weights, resampled
from srppo.training.batch import Generated, left_pad
from srppo.training.distil import train_distil
from srppo.training.ppo import train_ppo
from srppo.training.reward import rewards_before_kl
from srppo.training.rollout import LocalSampler
from srppo.training.scores import full_kl, score_log_ratio

MAX_NATS, MAX_SHARE = 0.02, 0.05
LONG_RUN = {"epochs": 4, "schedule": "linear", "value_clip": None, "max_kl": 1000.0, "micro_tokens": 4096}
"""One pass a minibatch: that parts of one add up to it is tested elsewhere, and here takes four times as long."""


def reward_of(kind: str, prompt: tuple[int, ...]) -> torch.Tensor:
    """The reward of every possible response, fp64 nats, written anew from both models' log-probs of each token."""
    base, sft = (each_logprob(model, prompt) for model in base_and_sft())
    stop = torch.tensor([[i < len(y) and y[i] == EOS for i in range(LIMIT)] for y in SEQUENCES])
    lengths = torch.tensor([len(y) for y in SEQUENCES]).double()
    by_kind: dict[str, Callable[[], torch.Tensor]] = {
        "ratio": lambda: (sft - base).sum(1),
        "no-eos": lambda: torch.where(stop, 0.0, sft - base).sum(1),
        "eos": lambda: torch.where(stop, sft - base, 0.0).sum(1),
        "sft": lambda: sft.sum(1),
        "brevity": lambda: -0.1 * lengths,
        "verbosity": lambda: 0.1 * lengths,
        "random": lambda: by_package("random", prompt),
    }
    return by_kind[kind]()


def all_responses(prompt: tuple[int, ...]) -> Generated:
    """Every possible response as one padded batch."""
    tokens, prompt_mask = left_pad([prompt] * len(SEQUENCES), EOS)
    responses, mask = (x.flip(1) for x in left_pad([y[::-1] for y in SEQUENCES], EOS))
    ended = torch.tensor([y[-1] == EOS for y in SEQUENCES])
    return Generated(torch.cat([tokens, responses], 1), torch.cat([prompt_mask, mask], 1), mask, ended)


@torch.no_grad()
def by_package(kind: str, prompt: tuple[int, ...]) -> torch.Tensor:
    """The same by the functions that training calls, from one padded batch of all responses."""
    base, sft = base_and_sft()
    batch = all_responses(prompt)
    return rewards_before_kl(RewardConfig(kind=kind), score_log_ratio(sft, base, batch), batch).double().sum(1)


def optimum(anchor: str, beta: float, prompt: tuple[int, ...], kind: str = "ratio") -> torch.Tensor:
    """log pi* over the enumerated responses."""
    base, sft = base_and_sft()
    start = sequence_logprobs(sft if anchor == "sft" else base, prompt)
    return (start + reward_of(kind, prompt) / beta).log_softmax(0)


def distances(policy: LanguageModel, anchor: str, beta: float, kind: str = "ratio") -> tuple[float, float]:
    """(KL(pi, pi*), KL(pi_sft, pi*)), averaged over the prompts."""
    _, sft = base_and_sft()
    totals = torch.zeros(2)
    for prompt in PROMPTS:
        star = optimum(anchor, beta, prompt, kind)
        own = [kl(sequence_logprobs(model, prompt), star) for model in (policy, sft)]
        totals += torch.tensor(own) / len(PROMPTS)
    return float(totals[0]), float(totals[1])


def reached(policy: LanguageModel, anchor: str, beta: float, kind: str = "ratio") -> bool:
    """The bar: within 0.02 nats of pi*, and within 5% of the way that SFT had to go."""
    distance, start = distances(policy, anchor, beta, kind)
    return distance <= MAX_NATS and distance <= MAX_SHARE * start


def trained(
    folder: Path,
    anchor: str,
    beta: float,
    *,
    advantage: str = "gae",
    per_prompt: int = 1,
    steps: int = 100,
    **reward: object,
) -> LanguageModel:
    torch.set_num_threads(1)
    base, sft = base_and_sft()
    policy = copy.deepcopy(sft)
    recipe = tiny_recipe(
        reward={"anchor": anchor, "beta": beta, **reward},
        rollout={"per_prompt": per_prompt},
        ppo={**LONG_RUN, "steps": steps, "advantage": advantage},
    )
    with Bench(folder, recipe) as bench:
        train_ppo(recipe, bench, policy, sft, base, PROMPTS, NoDevelopment(), LocalSampler([EOS], EOS))
    return policy


@pytest.mark.parametrize("scale", [True, False], ids=["scaled", "unscaled"])
@pytest.mark.parametrize(("anchor", "beta"), [("sft", 0.5), ("sft", 0.8), ("base", 0.3), ("base", 0.5)])
def test_ppo_reaches_the_closed_form(tmp_path: Path, anchor: str, beta: float, scale: bool) -> None:
    policy = trained(tmp_path / "run", anchor, beta, steps=150 if beta < 0.5 else 100, scale=scale)
    distance, start = distances(policy, anchor, beta)
    print(f"{anchor} beta {beta} scale {scale}: KL(pi, pi*) {distance:.4f}, KL(pi_sft, pi*) {start:.3f}")
    assert distance <= MAX_NATS and distance <= MAX_SHARE * start
    other = "base" if anchor == "sft" else "sft"
    assert not reached(policy, other, beta), "the bar must tell the anchors apart"
    assert not reached(policy, anchor, 1.5 * beta), "the bar must tell beta from 1.5 beta"


def test_four_roles_with_adapters_of_full_rank_reach_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base, SFT model, policy and critic over one backbone; the optimum is that of the models with weights added."""
    settings = lora_settings(ModelConfig(adapters="lora", lora_rank=32, lora_alpha=32))
    base, _ = base_and_sft()
    sft = AdaptedModel(base, settings, seed=1)
    torch.manual_seed(7)
    for weight in sft.weights().values():
        weight.data = 0.05 * torch.randn_like(weight)
    start, plain = LanguageModel(tiny_llama()), sft.merged()
    monkeypatch.setitem(globals(), "base_and_sft", lambda: (start, plain))
    policy = sft.copy()
    recipe = tiny_recipe(reward={"beta": 0.5}, ppo={**LONG_RUN, "steps": 100})
    with Bench(tmp_path / "run", recipe) as bench:
        train_ppo(recipe, bench, policy, sft, base, PROMPTS, NoDevelopment(), LocalSampler([EOS], EOS))
    distance, begun = distances(policy.merged(), "sft", 0.5)
    print(f"adapters: KL(pi, pi*) {distance:.4f}, KL(pi_sft, pi*) {begun:.3f}")
    assert distance <= MAX_NATS and distance <= MAX_SHARE * begun
    assert not reached(policy.merged(), "sft", 0.75)


@pytest.mark.parametrize(("kind", "beta"), [("brevity", 0.08), ("no-eos", 0.4)])
def test_ppo_reaches_the_closed_form_of_a_control(tmp_path: Path, kind: str, beta: float) -> None:
    policy = trained(tmp_path / "run", "sft", beta, kind=kind)
    distance, start = distances(policy, "sft", beta, kind)
    print(f"{kind} beta {beta}: KL(pi, pi*) {distance:.4f}, KL(pi_sft, pi*) {start:.3f}")
    assert distance <= MAX_NATS and distance <= MAX_SHARE * start
    assert not reached(policy, "sft", beta, "ratio"), "the bar must tell the control from the coherent reward"


@pytest.mark.parametrize("kind", ["ratio", "no-eos", "eos", "sft", "brevity", "verbosity"])
def test_rewards_of_all_responses_are_those_written_anew(kind: str) -> None:
    for prompt in PROMPTS:
        torch.testing.assert_close(by_package(kind, prompt), reward_of(kind, prompt), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("anchor", "beta"), [("sft", 0.5), ("base", 0.3)])
def test_rloo_reaches_the_closed_form(tmp_path: Path, anchor: str, beta: float) -> None:
    policy = trained(tmp_path / "run", anchor, beta, steps=150 if beta < 0.5 else 100, advantage="rloo", per_prompt=8)
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


def test_the_kl_of_whole_distributions_along_responses_is_the_kl_over_responses() -> None:
    """E over pi_sft of `full_kl` = KL(pi_sft || pi_base), by enumeration; padding and micro-batches change nothing."""
    base, sft = base_and_sft()
    for prompt in PROMPTS:
        sft_log, base_log = sequence_logprobs(sft, prompt), sequence_logprobs(base, prompt)
        found = full_kl(sft, base, all_responses(prompt))
        assert float((sft_log.exp() * found.double()).sum()) == pytest.approx(kl(sft_log, base_log), abs=1e-5)
        torch.testing.assert_close(full_kl(sft, base, all_responses(prompt), micro_tokens=7), found)
        assert float(found.std()) < 0.5 * float((sft_log - base_log).std()), "it is there to be less noisy"


def test_a_random_reward_is_one_number_a_response_wherever_it_is_met() -> None:
    """The same for other prompts and beside other rows, of mean 0 and deviation 1, and no two alike."""
    first, second = (by_package("random", prompt) for prompt in PROMPTS)
    assert torch.equal(first, second) and len(set(first.tolist())) == len(SEQUENCES)
    n = len(SEQUENCES)
    assert abs(float(first.mean())) < 3 / n**0.5 and abs(float(first.std()) - 1) < 3 / (2 * n) ** 0.5
    one = all_responses(PROMPTS[1]).rows(slice(1))  # EOS alone, without the padding
    scores = score_log_ratio(*reversed(base_and_sft()), one)
    assert float(rewards_before_kl(RewardConfig(kind="random"), scores, one).sum()) == pytest.approx(float(first[0]))


@torch.no_grad()
def tokenwise(prompt: tuple[int, ...], config: RewardConfig) -> torch.Tensor:
    """log of decode-time extrapolation over the enumerated responses, from the models' own logits."""
    base, sft = base_and_sft()
    logprobs = []
    for response in SEQUENCES:
        ids = torch.tensor([[*prompt, *response]])
        sft_TV, base_TV = (model.model(input_ids=ids).logits[0, len(prompt) - 1 : -1] for model in (sft, base))
        each_TV = decoded_logprobs(config, sft_TV, base_TV, stop_ids=[EOS])
        logprobs.append(each_TV.double().gather(-1, torch.tensor(response)[:, None]).sum())
    return torch.stack(logprobs)


@pytest.mark.parametrize(("beta", "expected"), [(0.25, 0.674), (0.5, 0.129), (1.0, 0.018)])
def test_decode_time_extrapolation_is_near_the_closed_form_and_not_there(beta: float, expected: float) -> None:
    """Nearer than the SFT model, and at beta 0.5 far beyond the bar that PPO passes; the approximation has a price."""
    _, sft = base_and_sft()
    far, start = [], []
    for prompt in PROMPTS:
        star, own = optimum("sft", beta, prompt), tokenwise(prompt, RewardConfig(beta=beta))
        assert float(own.exp().sum()) == pytest.approx(1, abs=1e-5)
        far.append(kl(own, star))
        start.append(kl(sequence_logprobs(sft, prompt), star))
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
        star = optimum("sft", beta, prompt)
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
    recipe = tiny_recipe(reward=reward, distil={"steps": 100, "lr": 4e-3}, ppo={"micro_tokens": 4096})
    torch.set_num_threads(1)
    base, sft = base_and_sft()
    policy = copy.deepcopy(sft)
    with Bench(tmp_path / "run", recipe) as bench:
        train_distil(
            recipe, bench, policy, sft, base, PROMPTS, NoDevelopment(), LocalSampler([EOS], EOS), stop_ids=[EOS]
        )
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


@pytest.mark.parametrize("kind", ["brevity", "verbosity", "no-eos", "eos", "sft"])
def test_decoding_weighs_tokens_by_the_control(kind: str) -> None:
    """Of all first tokens, by hand: pi_sft exp(r / beta), where EOS would be the stop token."""
    base, sft = (
        model.model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].double().log_softmax(-1)
        for model in base_and_sft()
    )
    is_eos = torch.arange(VOCAB) == EOS
    reward = {
        "brevity": torch.full((VOCAB,), -0.1).double(),
        "verbosity": torch.full((VOCAB,), 0.1).double(),
        "no-eos": torch.where(is_eos, 0.0, sft - base),
        "eos": torch.where(is_eos, sft - base, 0.0),
        "sft": sft,
    }[kind]
    found = decoded_logprobs(RewardConfig(kind=kind, beta=0.5), sft[None], base[None], stop_ids=[EOS])
    expected = (sft + reward / 0.5).log_softmax(-1)
    torch.testing.assert_close(found[0].double(), expected, atol=1e-5, rtol=0)


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


@pytest.mark.parametrize(
    ("anchor", "beta", "kind"),
    [
        ("sft", 0.8, "ratio"),
        ("base", 0.5, "ratio"),
        ("sft", 0.1, "brevity"),
        ("sft", 0.1, "verbosity"),
        ("sft", 0.4, "no-eos"),
        ("sft", 0.2, "eos"),
        ("sft", 0.5, "sft"),
        ("sft", 0.8, "random"),
    ],
)
def test_resampling_is_the_closed_form(anchor: str, beta: float, kind: str) -> None:
    """20,000 answers, each drawn from 200 weighted samples of pi_sft, against enumeration; the SFT model fails it."""
    base, sft = base_and_sft()
    sft_log, base_log = sequence_logprobs(sft, PROMPTS[0]), sequence_logprobs(base, PROMPTS[0])
    star, ratio = optimum(anchor, beta, PROMPTS[0], kind), (sft_log - base_log).numpy()
    reward, p = by_package(kind, PROMPTS[0]).numpy(), sft_log.exp().numpy()
    chosen_QK = np.random.default_rng(0).choice(len(p), size=(20000, 200), p=p / p.sum())
    draws = Draws(reward[chosen_QK], ratio[chosen_QK], np.ones(chosen_QK.shape), None, np.zeros(chosen_QK.shape))
    weights_QK = normalised_weights(draws, RewardConfig(anchor=anchor, beta=beta, kind=kind))
    assert ess_of(weights_QK).enough
    answers: list[list[int]] = chosen_QK.tolist()
    drawn = resampled(Sampled(answers, draws, 1.0, 1.0), weights_QK, 1, seed=0)  # type: ignore[arg-type]
    share = np.bincount([each[0] for each in drawn], minlength=len(p)) / len(drawn)  # type: ignore[list-item]
    assert VOCAB == 5 and np.abs(share - star.exp().numpy()).sum() < 0.1
    assert np.abs(p - star.exp().numpy()).sum() > 0.2
