"""What PPO is compared with: RLOO, weight and decode-time extrapolation, resampling, best-of-n, and SFT by steps.

Numbers by hand and by enumeration; whether the trained and decoded distributions are those of the closed form is in
test_oracle.py.
"""

from __future__ import annotations

import copy
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import EOS, LIMIT, PROMPTS, Bench, NoDevelopment, base_and_sft, tiny_llama, tiny_recipe
from transformers import GPT2Config, GPT2LMHeadModel
from worlds import World, make_world

import srppo.stages.methods
import srppo.stages.run
from srppo.ablations import Ablation, Analysis, Arm, Sweep
from srppo.ablations.plan import Plan
from srppo.analysis.optimum import Draws
from srppo.config import Recipe, RewardConfig, build_recipe, with_overrides
from srppo.console import Console
from srppo.errors import ConfigError, ModelError, RecordError
from srppo.evaluation.development import Answer
from srppo.models.language_model import LanguageModel, ValueModel, forward_flops, load_model
from srppo.record.arms import METHODS, stages_by_arm
from srppo.record.store import Stage, stage_id
from srppo.stages.extrapolation import (
    Towards,
    check_decodable,
    choose_alpha,
    decoded_logprobs,
    extrapolate,
    generate_decoded,
)
from srppo.stages.kinds import stage_settings
from srppo.stages.methods import (
    best_of_n_stage,
    decoded_stage,
    extrapolated_stage,
    load_samples,
    resampled_stage,
    samples_stage,
)
from srppo.stages.resampling import (
    Sampled,
    best_of,
    check_ranks,
    check_resamples,
    ess_of,
    most_weighted,
    normalised_weights,
    resampled,
)
from srppo.stages.run import Pipeline
from srppo.training.advantage import rloo
from srppo.training.batch import left_pad
from srppo.training.ppo import Learners, step_flops, train_ppo
from srppo.training.rollout import generate, to_batch
from srppo.training.sft import evenly

# ---- RLOO


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
        session = train_ppo(recipe, bench, policy, sft, base, PROMPTS, development, stop_ids=[EOS], pad_id=EOS)
    return policy, session


def test_rloo_has_no_critic_anywhere(tmp_path: Path) -> None:
    _, session = run_rloo(tmp_path)
    checkpoint = session.bench.stage.checkpoint(4)
    assert not list(checkpoint.glob("value*")) and (checkpoint / "policy.safetensors").exists()
    assert session.state.modules.keys() == session.state.optimizers.keys() == {"policy"}
    rows = session.bench.stage.metrics()
    assert not [name for row in rows for name in row if "value" in name or "explained" in name]
    assert rows[-1]["grad_norm"] > 0 and rows[-1]["clip_share"] >= 0


def test_rloo_counts_no_critic() -> None:
    """Sampling, three scoring passes and three times the policy a pass; with a critic, its score and its training."""
    _, policy = base_and_sft()
    generated = generate(policy, PROMPTS, stop_ids=[EOS], pad_id=EOS, max_new_tokens=LIMIT, seed=1)
    batch = to_batch(generated, policy, None, micro_batch=2, temperature=1.0)
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
        ({"methods": {"alphas": [1.0, 1.0]}}, r"methods\.alphas: alphas are distinct and above 0"),
        ({"methods": {"alphas": [0.0]}}, r"methods\.alphas: alphas are distinct and above 0"),
        ({"methods": {"alphas": []}}, r"methods\.alphas: .*at least 1 item"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            build_recipe(tree)
        assert "\n" not in str(caught.value)


# ---- weight extrapolation


def test_weights_by_hand() -> None:
    base, sft = base_and_sft()
    target = LanguageModel(copy.deepcopy(sft.model))
    for alpha in (0.0, 0.5, 2.0, -1.0):
        extrapolate(target, sft, base, alpha)
        for (name, w), s, b in zip(
            target.model.named_parameters(), sft.model.parameters(), base.model.parameters(), strict=True
        ):
            torch.testing.assert_close(w, (1 + alpha) * s - alpha * b, atol=1e-5, rtol=0, msg=name)
    other = LanguageModel(tiny_llama(vocab=6))
    with pytest.raises(ModelError, match=r"base's architecture; lm_head\.weight differs"):
        extrapolate(target, sft, other, 1.0)


class Scored:
    """Development whose score is a function of the first weight, which tells the alphas apart."""

    def __init__(self, scores: dict[float, float], recipe: Recipe, *, ranks: bool = True) -> None:
        self.scores, self.recipe, self.ranks = scores, recipe, ranks
        self.seen: list[float] = []
        base, sft = base_and_sft()
        self.start, self.way = first(sft), first(sft) - first(base)

    def answers(self, model: LanguageModel) -> list[Any]:
        self.seen.append(round((first(model) - self.start) / self.way, 3))
        return []

    def flops(self, model: LanguageModel, verdicts: list[Any]) -> int:
        return 10

    def rated(self, model: LanguageModel, verdicts: list[Any]) -> tuple[dict[str, Any], float]:
        return {"dev/accuracy": 0.5}, self.scores[self.seen[-1]]


def first(model: LanguageModel) -> float:
    return float(model.model.lm_head.weight[0, 0].detach())


@pytest.mark.parametrize(
    ("scores", "best"),
    [({0.5: 0.1, 1.0: 0.7, 2.0: 0.6}, 1.0), ({0.5: 0.7, 1.0: 0.2, 2.0: 0.7}, 0.5)],
    ids=["best", "tie"],
)
def test_development_items_choose_alpha_and_ties_go_to_the_smaller(scores: dict[float, float], best: float) -> None:
    base, sft = base_and_sft()
    target = LanguageModel(copy.deepcopy(sft.model))
    development: Any = Scored(scores, tiny_recipe())
    chosen = choose_alpha(target, sft, base, (2.0, 0.5, 1.0), development)
    assert development.seen == [0.5, 1.0, 2.0]
    assert (chosen.alpha, chosen.score, chosen.flops) == (best, scores[best], 30)
    assert [row["alpha"] for row in chosen.tried] == [0.5, 1.0, 2.0]
    assert chosen.tried[1] == {"alpha": 1.0, "score": scores[1.0], "dev/accuracy": 0.5}
    development.answers(target)
    assert development.seen[-1] == best, "the model must be left at the chosen alpha"


def test_without_development_items_one_alpha_must_be_given() -> None:
    base, sft = base_and_sft()
    target = LanguageModel(copy.deepcopy(sft.model))
    nothing: Any = Scored({0.5: 0.0}, tiny_recipe(), ranks=False)
    with pytest.raises(ConfigError, match=r"nothing measures eval\.metric = accuracy .*; give one alpha"):
        choose_alpha(target, sft, base, (0.5, 1.0), nothing)
    assert choose_alpha(target, sft, base, (0.5,), nothing).alpha == 0.5


# ---- decode-time extrapolation


def test_next_token_distribution_by_hand() -> None:
    """pi_sft = (.5, .3, .2), pi_base = (.25, .5, .25): ratios 2, .6, .8."""
    sft, base = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    for config, weights in (
        ({"anchor": "sft", "beta": 0.5}, [0.5 * 4, 0.3 * 0.36, 0.2 * 0.64]),
        ({"anchor": "base", "beta": 0.5}, [0.25 * 4, 0.5 * 0.36, 0.25 * 0.64]),
        ({"anchor": "base", "beta": 1.0}, [0.5, 0.3, 0.2]),
        ({"anchor": "sft", "beta": 1.0, "token_clip": 0.1}, [0.5 * np.e**0.1, 0.3 * np.e**-0.1, 0.2 * np.e**-0.1]),
        ({"anchor": "sft", "beta": 1.0, "kind": "base"}, [0.5 / 0.25, 0.3 / 0.5, 0.2 / 0.25]),
        ({"anchor": "sft", "beta": 1.0, "kind": "zero"}, [0.5, 0.3, 0.2]),
    ):
        found = decoded_logprobs(RewardConfig(**config), sft + 3.0, base - 1.0)  # logits have a free constant
        torch.testing.assert_close(found.exp(), torch.tensor([weights]).float() / sum(weights), msg=str(config))


def test_what_no_single_token_decides_is_refused() -> None:
    for config, named in (
        ({"beta": 0.0}, r"reward\.beta = 0 has no closed-form optimum"),
        ({"kind": "shuffled"}, r"reward\.kind = shuffled is about whole responses"),
        ({"length_norm": True}, r"reward\.length_norm is"),
        ({"clip": 1.0}, r"reward\.clip is"),
        ({"at_limit": "zero"}, r"reward\.at_limit is"),
        ({"limit_penalty": 1.0}, r"reward\.limit_penalty is"),
    ):
        with pytest.raises(ConfigError, match=named):
            check_decodable(RewardConfig(**config))
    check_decodable(RewardConfig(token_clip=1.0, anchor="base", kind="sft"))


RAGGED = [(1, 2, 3), (4,), (2, 2), (3, 1, 4, 2)]


def decoded(prompts: Any = RAGGED, models: Any = None, **more: Any) -> Any:
    base, sft = models or base_and_sft()
    config = RewardConfig(beta=0.5)
    arguments = {"stop_ids": [EOS], "pad_id": EOS, "max_new_tokens": LIMIT, "seed": 1, **more}
    return generate_decoded(sft, prompts, base=base, config=config, **arguments)


@torch.no_grad()
def test_greedy_decoding_is_the_argmax_without_cache_or_padding() -> None:
    base, sft = base_and_sft()
    responses = decoded(temperature=None).responses()
    for prompt, response in zip(RAGGED, responses, strict=True):
        own: list[int] = []
        while len(own) < LIMIT and EOS not in own:
            ids = torch.tensor([[*prompt, *own]])
            logits = [model.model(input_ids=ids).logits[0, -1].log_softmax(-1) for model in (sft, base)]
            own.append(int((3 * logits[0] - 2 * logits[1]).argmax()))
        assert response == own
    assert len({len(response) for response in responses}) > 1 or len({tuple(r) for r in responses}) > 1


@torch.no_grad()
def test_reading_with_a_cache_gives_the_logits_of_unpadded_rows() -> None:
    """With learned absolute positions, which padding would shift, and with rotary ones."""
    torch.manual_seed(0)
    size = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 5, "initializer_range": 0.5}
    absolute = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=EOS))
    for model in (LanguageModel(absolute), LanguageModel(tiny_llama())):
        tokens_BS, mask_BP = left_pad(RAGGED, EOS)
        reader = Towards(model, RewardConfig(), mask_BP)
        written: list[list[int]] = [list(prompt) for prompt in RAGGED]
        for step in range(3):
            logits_BV = reader.base_logits(tokens_BS)
            for row, own_V in zip(written, logits_BV, strict=True):
                alone_V = model.model(input_ids=torch.tensor([row])).logits[0, -1]
                torch.testing.assert_close(own_V, alone_V, atol=1e-5, rtol=0)
                row.append(1 + (step + len(row)) % 4)
            tokens_BS = torch.cat([tokens_BS, torch.tensor([row[-1:] for row in written])], dim=1)


def test_decoding_samples_are_a_function_of_the_seed_and_leave_the_global_state() -> None:
    models = base_and_sft()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, again, other = (decoded(RAGGED * 8, models, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.responses() == again.responses() != other.responses()


def test_a_decoded_response_ends_with_its_first_stop_token() -> None:
    found = decoded(RAGGED * 8)
    for response, ended in zip(found.responses(), found.ended_B.tolist(), strict=True):
        assert ended == (EOS in response) and EOS not in response[:-1] and len(response) <= LIMIT
    assert 0 < sum(found.ended_B.tolist()) < 32


# ---- resampling and best of n

TEXTS = ["a", "b", "a", "c"]


def sampled_of(reward: list[float], log_ratio: list[float] | None = None, copies: int = 1) -> Sampled:
    """The same four samples for each of `copies` items."""
    reward_QK = np.array([reward] * copies)
    ratio_QK = reward_QK if log_ratio is None else np.array([log_ratio] * copies)
    answers = [[Answer(text, True, k + 1) for k, text in enumerate(TEXTS)] for _ in range(copies)]
    return Sampled(answers, Draws(reward_QK, ratio_QK, np.ones_like(reward_QK), None, 0 * reward_QK), 120.0, 10.0)


def test_weights_and_effective_samples_by_hand() -> None:
    """r = log 1, 2, 1, 4 at beta 0.5: exp(r / beta) = 1, 4, 1, 16 and exp(r / beta - r) = 1, 2, 1, 4."""
    some = sampled_of(np.log([1.0, 2.0, 1.0, 4.0]).tolist())
    at_sft = normalised_weights(some.draws, RewardConfig(anchor="sft", beta=0.5))
    at_base = normalised_weights(some.draws, RewardConfig(anchor="base", beta=0.5))
    assert at_sft == pytest.approx(np.array([[1, 4, 1, 16]]) / 22)
    assert at_base == pytest.approx(np.array([[1, 2, 1, 4]]) / 8)
    # a clipped reward r' = min(r, log 2) is not the log-ratio: exp(r'/beta - r) = 1, 2, 1, 4/4
    clipped = sampled_of(np.log([1.0, 2.0, 1.0, 2.0]).tolist(), np.log([1.0, 2.0, 1.0, 4.0]).tolist())
    assert normalised_weights(clipped.draws, RewardConfig(anchor="base", beta=0.5)) == pytest.approx(
        np.array([[1, 2, 1, 1]]) / 5
    )
    huge = normalised_weights(sampled_of([0.0, 900.0, 0.0, 0.0]).draws, RewardConfig(beta=0.01))
    assert huge == pytest.approx(np.array([[0, 1, 0, 0]]))
    ess = ess_of(np.concatenate([at_base, np.full((1, 4), 0.25)]))
    assert ess.harmonic == pytest.approx(2 / (22 / 64 + 1 / 4)) and ess.median == pytest.approx((64 / 22 + 4) / 2)
    assert (ess.below, ess.enough, ess.needed) == (1.0, False, 20)
    many = ess_of(np.concatenate([np.full((3, 40), 1 / 40), np.eye(40)[:1]]))
    assert many.below == 0.25 and many.harmonic == pytest.approx(4 / (3 / 40 + 1)) and not many.enough


def test_the_mode_of_the_weighted_set_adds_up_equal_texts() -> None:
    some = sampled_of([0.0] * 4)
    assert most_weighted(some, np.array([[0.3, 0.3, 0.1, 0.3]])) == [[Answer("a", True, 1)]]
    assert most_weighted(some, np.array([[0.1, 0.4, 0.1, 0.4]])) == [[Answer("b", True, 2)]], "the first of equals"


def test_draws_follow_the_weights_and_the_seed() -> None:
    some = sampled_of([0.0] * 4, copies=1000)
    weights = np.array([[0.1, 0.2, 0.0, 0.7]] * 1000)
    drawn = resampled(some, weights, 10, seed=0)
    assert drawn == resampled(some, weights, 10, seed=0) != resampled(some, weights, 10, seed=1)
    counts = Counter(answer.tokens for each in drawn for answer in each)
    assert counts[3] == 0 and [counts[k] / 10000 for k in (1, 2, 4)] == pytest.approx([0.1, 0.2, 0.7], abs=0.02)
    assert len({tuple(each) for each in drawn}) > 100, "items must not share their draws"


def test_best_of_n_by_hand() -> None:
    some = sampled_of([3.0, 5.0, 1.0, 5.0])
    assert best_of(some, 1) == [[Answer("b", True, 2)]], "the first of equals"
    assert best_of(some, 2) == [[Answer("b", True, 2), Answer("c", True, 4)]]
    assert best_of(some, 3) == [[Answer("a", True, 1), Answer("b", True, 2), Answer("a", True, 3)]]
    with pytest.raises(ConfigError, match=r"methods\.samples \(4\) is below eval\.samples \(5\)"):
        best_of(some, 5)
    assert some.cost() == {"inference_flops": 120.0, "inference_times": 12.0}


@pytest.mark.parametrize("known", [True, False], ids=["known answers", "unknown answers"])
def test_samples_survive_a_folder_to_the_bit(tmp_path: Path, known: bool) -> None:
    """Texts of any kind, and numbers that no decimal of few places holds; twice the same bytes."""
    generator = np.random.default_rng(0)
    texts = ["a b", "", '\n"\\', "é\u2028\U0001f600", "\ufffd"]
    answers = [[Answer(text, len(text) % 2 == 0, i * 5 + k) for k, text in enumerate(texts)] for i in range(3)]
    reward_QK, ratio_QK, right_QK = (generator.normal(size=(3, 5)) * scale for scale in (1e-300, 1e9, 1.0))
    reward_QK[0, :2] = -0.0, np.inf
    draws = Draws(reward_QK, ratio_QK, np.ones((3, 5)), right_QK if known else None, np.zeros((3, 5)))
    saved = Sampled(answers, draws, 1 / 3, 1e17 / 7)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        saved.save(tmp_path / name)
    again = Sampled.load(tmp_path / "one", flops=saved.flops, plain_flops=saved.plain_flops)
    assert again.answers == answers and again.cost() == saved.cost()
    assert (again.draws.right_QK is not None) == known
    for name, array in vars(draws).items():
        found = getattr(again.draws, name)
        assert found is array is None or (found.dtype, found.tobytes()) == (np.float64, array.tobytes()), name
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1] and len(files[0]) == 2


def test_rewards_that_single_responses_lack_are_refused() -> None:
    for check in (check_ranks, check_resamples):
        with pytest.raises(ConfigError, match=r"reward\.kind = shuffled pays by other rollouts"):
            check(RewardConfig(kind="shuffled"))
    check_ranks(RewardConfig(beta=0.0))
    with pytest.raises(ConfigError, match=r"reward\.beta = 0 has no closed-form optimum"):
        check_resamples(RewardConfig(beta=0.0))


# ---- the stages


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def pipeline_of(world: World, folder: Path, **overrides: Any) -> Pipeline:
    torch.set_num_threads(1)
    keys = {name.replace("__", "."): value for name, value in overrides.items()}
    recipe = world.recipe({"methods.samples": 8, "methods.alphas": [0.5, 1.0], **keys})
    return Pipeline(recipe, folder, Console(plain=True, file=io.StringIO()))


def methods_of(pipeline: Pipeline) -> dict[str, Stage]:
    sft, path = pipeline.sft_stage()
    samples = samples_stage(pipeline, sft, path)
    return {
        "extrapolated": extrapolated_stage(pipeline, sft, path),
        "decoded": decoded_stage(pipeline, sft, path),
        "resampled": resampled_stage(pipeline, samples),
        "best-of-n": best_of_n_stage(pipeline, samples),
    }


def verdicts(stage: Stage, decoding: str) -> list[dict[str, Any]]:
    lines = (stage.path / "eval" / f"kept-{decoding}" / "samples.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_each_method_is_an_arm_with_verdicts_like_any_other(world: World, tmp_path: Path) -> None:
    pipeline = pipeline_of(world, tmp_path / "run")
    base = pipeline.base_stage()
    found = methods_of(pipeline)
    assert list(stages_by_arm(pipeline.run)) == ["base", "SFT", *METHODS.values()]
    sft, path = pipeline.sft_stage()
    drawn = samples_stage(pipeline, sft, path)
    assert drawn.identity["parents"] == [pipeline.base_id, sft.id]
    for kind, stage in found.items():
        parent = drawn if kind in ("resampled", "best-of-n") else sft
        assert stage.identity["kind"] == kind and stage.identity["parents"] == [pipeline.base_id, parent.id]
        figures = (stage.result() or {})["figures"]
        assert figures["flops"] == figures["steps"] == 0
        for decoding, samples in (("greedy", 1), ("sampled", 2)):
            rows, theirs = verdicts(stage, decoding), verdicts(base, decoding)
            assert [row["prompt"] for row in rows] == [row["prompt"] for row in theirs]
            assert {k for row in rows for k in row} == {k for row in theirs for k in row}
            assert all(len(row[k]) == samples for row in rows for k in ("responses", "correct", "ended", "tokens"))
            group = [sum(row["correct"]) / samples for row in rows if row["group"] == "demonstrated"]
            assert figures["test"]["demonstrated"][decoding]["mean"] == pytest.approx(sum(group) / len(group))
    assert (found["decoded"].result() or {})["figures"]["inference_times"] == 2.0
    ess = (found["resampled"].result() or {})["figures"]["ess"]
    assert ess["harmonic"] < 8 and not ess["enough"]


def test_methods_find_their_finished_stages_without_work(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_time = methods_of(pipeline_of(world, tmp_path / "run"))
    again = pipeline_of(world, tmp_path / "run")

    def refuse(*args: Any, **more: Any) -> Any:
        raise AssertionError("a finished stage was measured again")

    for name in ("choose_alpha", "sample_items", "load_samples", "generate_decoded"):
        monkeypatch.setattr(srppo.stages.methods, name, refuse)
    monkeypatch.setattr(srppo.stages.run, "answer_items", refuse)
    assert {k: s.id for k, s in methods_of(again).items()} == {k: s.id for k, s in first_time.items()}


def test_two_runs_of_the_methods_are_equal_to_the_bit(world: World, tmp_path: Path) -> None:
    one, two = (methods_of(pipeline_of(world, tmp_path / name)) for name in ("one", "two"))
    for kind in one:
        assert one[kind].id == two[kind].id
        assert (one[kind].result() or {})["figures"] == (two[kind].result() or {})["figures"]
        assert all(verdicts(one[kind], d) == verdicts(two[kind], d) for d in ("greedy", "sampled"))


def test_resampling_and_best_of_n_choose_from_the_same_samples(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Sampled] = []
    plain = srppo.stages.methods.sample_items

    def watched(*args: Any) -> Sampled:
        seen.append(plain(*args))
        return seen[-1]

    monkeypatch.setattr(srppo.stages.methods, "sample_items", watched)
    pipeline = pipeline_of(world, tmp_path / "run")
    found = methods_of(pipeline)
    (sampled,) = seen
    samples = samples_stage(pipeline, *pipeline.sft_stage())
    saved = load_samples(samples)
    assert saved.answers == sampled.answers and saved.cost() == sampled.cost()
    assert np.array_equal(saved.draws.reward_QK, sampled.draws.reward_QK)
    assert {"samples/answers.json.gz", "samples/draws.npz"} <= (samples.result() or {})["files"].keys()
    for stage in (found["resampled"], found["best-of-n"]):
        for decoding in ("greedy", "sampled"):
            for row, answers in zip(verdicts(stage, decoding), sampled.answers, strict=True):
                assert set(row["responses"]) <= {answer.text for answer in answers}
    for row, answers, rewards in zip(
        verdicts(found["best-of-n"], "greedy"), sampled.answers, sampled.draws.reward_QK, strict=True
    ):
        assert row["responses"] == [answers[int(rewards.argmax())].text]
    recipe = with_overrides(pipeline.recipe, {"reward.beta": 0.7, "reward.anchor": "base"})
    again = methods_of(Pipeline(recipe, tmp_path / "run", pipeline.console, shared=pipeline.run))
    assert len(seen) == 1, "anchor and beta weigh samples and draw none"
    assert again["best-of-n"].id == found["best-of-n"].id and again["resampled"].id != found["resampled"].id
    (samples.path / "samples" / "draws.npz").write_bytes(b"")
    with pytest.raises(RecordError, match=r"draws\.npz changed after the result was committed"):
        samples_stage(pipeline, *pipeline.sft_stage())


def test_the_reward_of_the_recipe_chooses(world: World, tmp_path: Path) -> None:
    """Paid by -log pi_base, best-of-n takes another answer than paid by the ratio; the anchor changes nothing."""
    answers = {}
    for name, keys in (("ratio", {}), ("base", {"reward__kind": "base"}), ("anchor", {"reward__anchor": "base"})):
        pipeline = pipeline_of(world, tmp_path / name, **keys)
        stage = best_of_n_stage(pipeline, samples_stage(pipeline, *pipeline.sft_stage()))
        answers[name] = [row["responses"] for row in verdicts(stage, "sampled")]
    assert answers["ratio"] == answers["anchor"] != answers["base"]


def test_the_extrapolated_model_is_exported_as_measured(world: World, tmp_path: Path) -> None:
    pipeline = pipeline_of(world, tmp_path / "run", eval__metric="nll", methods__alphas=[0.5, 1.0, 2.0, 4.0])
    sft, path = pipeline.sft_stage()
    stage = extrapolated_stage(pipeline, sft, path)
    figures = (stage.result() or {})["figures"]
    by_alpha = {row["alpha"]: row["score"] for row in figures["alphas"]}
    assert by_alpha[figures["alpha"]] == max(by_alpha.values()) == figures["score"] and len(by_alpha) == 4
    assert figures["held_out_nll"] == pytest.approx(-figures["score"])
    assert figures["selection_flops"] > 0
    config = pipeline.recipe.model
    exported, start = (load_model(str(p), config) for p in (stage.path / "model", path))
    ours, ends = (dict(m.model.named_parameters()) for m in (exported, start))
    for name, weight in pipeline.base.model.named_parameters():
        expected = ends[name] + figures["alpha"] * (ends[name] - weight)
        torch.testing.assert_close(ours[name], expected, atol=1e-6, rtol=0)
    card = (stage.path / "model" / "README.md").read_text()
    assert f"alpha = {figures['alpha']:g}, chosen of 0.5, 1, 2, 4" in card and "was kept" not in card
    weights = stage.path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00\x01")
    with pytest.raises(Exception, match=r"model\.safetensors changed after the result was committed"):
        extrapolated_stage(pipeline, sft, path)


def test_methods_without_test_items_say_so(world: World, tmp_path: Path) -> None:
    pipeline = pipeline_of(world, tmp_path / "run", eval__items=None, methods__alphas=[1.0])
    sft, path = pipeline.sft_stage()
    for run in (decoded_stage, samples_stage):
        with pytest.raises(ConfigError, match=r"no test items to answer; set eval\.items"):
            run(pipeline, sft, path)
    assert extrapolated_stage(pipeline, sft, path).done


# ---- what decides a stage

CHANGES: dict[str, Any] = {
    "reward.beta": 0.7,
    "reward.anchor": "base",
    "reward.kind": "sft",
    "reward.token_clip": 2.0,
    "reward.clip": 5.0,
    "reward.limit_penalty": 1.0,
    "reward.length_norm": True,
    "reward.at_limit": "zero",
    "reward.scale": False,
    "reward.placement": "token",
    "reward.kl": "k2",
    "methods.alphas": [3.0],
    "methods.samples": 9,
    "eval.samples": 3,
    "eval.metric": "nll",
    "eval.limit": 4,
    "eval.keep": "last",
    "rollout.max_new_tokens": 9,
    "rollout.batch": 24,
    "rollout.temperature": 0.7,
    "sft.lr": 0.5,
    "ppo.lr": 0.5,
    "ppo.steps": 3,
    "seed": 4,
    "model.precision": "bf16",
}
COMMON = {"eval.samples", "rollout.max_new_tokens", "seed", "model.precision"}
SCORE = {f"reward.{k}" for k in ("kind", "token_clip", "clip", "limit_penalty", "length_norm", "at_limit")}
DECIDES = {
    "extrapolated": COMMON | {"methods.alphas", "eval.metric", "eval.limit"},
    "decoded": COMMON | {"reward.kind", "reward.token_clip", "reward.anchor", "reward.beta"},
    "samples": COMMON - {"eval.samples"} | SCORE | {"methods.samples"},
    "resampled": COMMON | {"reward.anchor", "reward.beta"},  # beside what its samples are
    "best-of-n": COMMON,
}


@pytest.mark.parametrize("kind", DECIDES)
def test_a_stage_is_known_by_the_settings_it_reads_and_no_others(kind: str) -> None:
    before = stage_settings(Recipe(), kind)
    found = {key for key, v in CHANGES.items() if stage_settings(with_overrides(Recipe(), {key: v}), kind) != before}
    assert found == DECIDES[kind]


def test_all_that_choose_share_the_samples_of_an_sft_model() -> None:
    """One draw a seed for three betas, two anchors and best-of-n."""
    points = [
        Ablation(f"{anchor} {beta}", {"reward.anchor": anchor, "reward.beta": beta})
        for anchor in ("sft", "base")
        for beta in (0.25, 0.5, 1.0)
    ]
    arms = (Arm("SFT", "sft"), Arm("resampling", "resampled"), Arm("best-of-n", "best-of-n"))
    sweep = Sweep("s", "?", Recipe(), (), tuple(points), arms, (0, 1), Analysis("unseen", "greedy", ()))
    kinds = Counter(task.kind for task in Plan(sweep).tasks.values())
    assert kinds == {"sft": 2, "samples": 2, "resampled": 12, "best-of-n": 2}


OLD_IDS = {
    "base": "39ef83c7c2610857",
    "given-sft": "bed47a96efe5d7aa",
    "sft": "3a208abb510a0634",
    "longer-sft": "0fee1388d384b8ce",
    "ppo": "df38de725c52a3f8",
}


def test_stages_made_before_these_keys_came_keep_their_ids() -> None:
    """Ids of the default recipe as commit f551e2b had them; records of that time are found again."""
    assert {kind: stage_id(kind, stage_settings(Recipe(), kind)) for kind in OLD_IDS} == OLD_IDS


def test_what_rloo_does_not_read_is_not_in_its_id() -> None:
    rloo_recipe = with_overrides(Recipe(), {"rollout.per_prompt": 4, "ppo.advantage": "rloo"})
    before = stage_settings(rloo_recipe, "ppo")
    assert before["ppo"]["advantage"] == "rloo" and before["rollout"]["per_prompt"] == 4
    for key, value, same in (("ppo.lam", 0.5, True), ("ppo.value_lr", 0.5, True), ("ppo.lr", 0.5, False)):
        assert (stage_settings(with_overrides(rloo_recipe, {key: value}), "ppo") == before) is same
    assert stage_settings(with_overrides(Recipe(), {"ppo.lam": 0.5}), "ppo") != stage_settings(Recipe(), "ppo")


# ---- SFT by steps


def test_sft_by_steps_is_measured_evenly(world: World, tmp_path: Path) -> None:
    assert evenly(20, 5) == {4, 8, 12, 16, 20} and evenly(3, 5) == {1, 2, 3} and evenly(1, 5) == {1}
    stage, _ = pipeline_of(world, tmp_path / "run", sft__steps=10, sft__epochs=7).sft_stage()
    rows = stage.metrics()
    assert [row["step"] for row in rows] == list(range(11))
    assert [row["step"] for row in rows if "dev/accuracy" in row] == [0, 2, 4, 6, 8, 10]
    assert rows[-1]["epoch"] == pytest.approx(10 / 3) and (stage.result() or {})["figures"]["steps"] == 10
    card = (stage.path / "model" / "README.md").read_text()
    assert "of 10 was kept" in card and "steps = 10" in card
    settings: Callable[[Recipe], Any] = lambda recipe: stage_settings(recipe, "sft")["sft"]  # noqa: E731
    assert settings(world.recipe({"sft.steps": 10}))["steps"] == 10 and "steps" not in settings(world.recipe())
