"""Sampling by a server: a real HTTP process over our own sampler, which follows the documented API (`stand_in.py`)."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import worlds
from tiny import EOS, PROMPTS, base_and_sft

from srppo.config import ModelConfig, Recipe
from srppo.console import Console
from srppo.errors import RunError
from srppo.models.language_model import LanguageModel
from srppo.models.loading import load_model, load_tokenizer, to_train
from srppo.stages.run import prepare_run, run_stages
from srppo.training.batch import Sampled
from srppo.training.losses import importance_weights
from srppo.training.rollout import LocalSampler, generate
from srppo.training.scores import next_token_entropy, score_logprobs
from srppo.training.server import ServerSampler, check_whole

Start = Callable[..., str]
STAND_IN = Path(__file__).parents[1] / "stand_in.py"
PATIENCE_S = 300  # that a process has to start, beside others
BYTES = [[66, 67, 68, 69], [70, 71], [72] * 9, [65]] * 3


@pytest.fixture
def world(tmp_path: Path) -> worlds.World:
    (tmp_path / "world").mkdir()
    return worlds.make_world(tmp_path / "world")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a server of a model, with a fault or without; its URL. All end with the test."""
    running: list[subprocess.Popen[bytes]] = []

    def serve(model: str, fault: str | None = None) -> str:
        file = tmp_path / f"port-{len(running)}"
        command = [sys.executable, str(STAND_IN), model, "--port-file", str(file)]
        process = subprocess.Popen(command + (["--fault", fault] if fault else []))
        running.append(process)
        deadline = time.monotonic() + PATIENCE_S
        while not file.exists():
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.05)
        return f"http://127.0.0.1:{file.read_text()}/v1"

    yield serve
    for process in running:
        process.kill()
        process.wait()


def byte_model(world: worlds.World, *, adapters: bool = False, seed: int = 0) -> LanguageModel:
    """The world's base with other weights, whole or an adapter over it."""
    config = ModelConfig(base=world.base, adapters="lora" if adapters else "none")
    base = load_model(world.base, config, vocab_size=len(load_tokenizer(world.base, config)))
    policy = to_train(base, config)
    generator = torch.Generator().manual_seed(seed)
    for weight in policy.weights().values():
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    return policy


def sampler(url: str, folder: Path, timeout_s: float = PATIENCE_S) -> ServerSampler:
    return ServerSampler(url, folder / "served", [worlds.EOS], worlds.PAD, timeout_s=timeout_s)


def both(policy: LanguageModel, server: ServerSampler, temperature: float | None, seed: int) -> list[Sampled]:
    """What the server says and what is sampled here, to the same prompts by the same seeds."""
    seeds = [seed + i for i in range(len(BYTES))]
    limits = {"stop_ids": [worlds.EOS], "pad_id": worlds.PAD, "max_new_tokens": 6}
    here = generate(policy, BYTES, seed=seeds, temperature=temperature, **limits)  # type: ignore[arg-type]
    return [server.sample(policy, BYTES, seeds, max_new_tokens=6, temperature=temperature), here]


@pytest.mark.parametrize("adapters", [False, True])
def test_the_server_says_what_is_said_here(world: worlds.World, start: Start, tmp_path: Path, adapters: bool) -> None:
    """Greedy and sampled, before and after the weights have changed, which reach the server through a folder."""
    server = sampler(start(world.base), tmp_path)
    policy, said = byte_model(world, adapters=adapters), []
    for round_ in range(3):
        for temperature in (None, 1.0, 0.7):
            theirs, ours = both(policy, server, temperature, seed=100 * round_)
            assert theirs.responses() == ours.responses()
            assert torch.equal(theirs.ended_B, ours.ended_B)
            torch.testing.assert_close(theirs.sampled_logprobs_BT, ours.sampled_logprobs_BT, atol=1e-5, rtol=0)
        said.append(theirs.responses())
        for weight in policy.weights().values():
            weight.data += 0.1
    assert said[0] != said[1] != said[2]
    assert len(list((tmp_path / "served").iterdir())) == 1  # the last; the others are gone


@pytest.mark.parametrize("adapters", ["none", "lora"])
@pytest.mark.parametrize("method", ["ppo", "distil"])
def test_a_run_with_a_server_is_the_run_without(
    world: worlds.World, start: Start, tmp_path: Path, adapters: str, method: str
) -> None:
    if (adapters, method) == ("none", "distil"):
        pytest.skip("distillation is shown with adapters")
    keys = {"model.adapters": adapters, "rollout.temperature": 0.9}
    keys |= {"distil.steps": 2, "distil.lr": 0.01} if method == "distil" else {}
    here = run(world.recipe(keys), tmp_path / "here", method)
    there = run(world.recipe({**keys, "rollout.server": start(world.base)}), tmp_path / "there", method)
    assert [row["step"] for row in there] == [row["step"] for row in here] == [0, 1, 2]
    for name in ("reward", "kl_sft", "length", "ended", "grad_norm"):
        for ours, theirs in zip(here[1:], there[1:], strict=True):
            assert theirs[name] == pytest.approx(ours[name], abs=1e-4)
    if method == "ppo":
        assert max(row["sampler_gap"] for row in [*here[1:], *there[1:]]) < 1e-5


def run(recipe: Recipe, folder: Path, kind: str) -> list[dict[str, float]]:
    """The metrics of a stage."""
    prepared = prepare_run(recipe, [kind], folder, Console(plain=True, file=io.StringIO()))
    return run_stages(prepared)[kind].metrics()


def test_a_server_that_dies_ends_the_run_with_a_line_and_another_takes_it_up(
    world: worlds.World, start: Start, tmp_path: Path
) -> None:
    keys = {"ppo.steps": 4, "ppo.checkpoint_every": 1, "eval.every": 0, "model.adapters": "lora"}
    with pytest.raises(
        RunError, match=r"cannot be reached \(\w+ at v1/completions\); start it and run the same command"
    ):
        run(world.recipe({**keys, "rollout.server": start(world.base, "dies")}), tmp_path / "run", "ppo")
    again = run(world.recipe({**keys, "rollout.server": start(world.base)}), tmp_path / "run", "ppo")
    whole = run(world.recipe({**keys, "rollout.server": start(world.base)}), tmp_path / "whole", "ppo")
    assert sorted(len(list(path.iterdir())) for path in (tmp_path / "run/stages").glob("*/attempts")) == [1, 2]
    steps = {row["step"]: row["reward"] for row in again if row["step"]}
    assert steps == pytest.approx({row["step"]: row["reward"] for row in whole if row["step"]}, abs=1e-4)


WRONG = {
    "hangs": r"did not answer v1/completions within 1 s; raise rollout.server_timeout_s",
    "no-ids": r"without token ids or log-probs; one that knows return_token_ids is needed",
    "other-prompt": r"read other token ids than the prompt's",
    "other-model": r"answers as model 'another', and 'policy-\w+' was asked",
    "cut": r"ended a response after \d of 6 tokens \(length\); raise its length limit",
    "no-stop": r"does not end a response by the stop token",
    "foreign": r"returned token ids beyond the tokenizer's 258",
    "raw": r"gives log-probs before the temperature; start it with --logprobs-mode processed_logprobs",
    "no-lora": r"refused v1/load_lora_adapter with 404: .*; start it with --enable-lora and VLLM_ALLOW_RUNTIME",
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_a_server_does_wrong_is_one_line(world: worlds.World, start: Start, tmp_path: Path, fault: str) -> None:
    server, policy = sampler(start(world.base, fault), tmp_path), byte_model(world, adapters=True)
    if fault == "hangs":
        server._serve(policy)
        server.timeout_s = 1.0
    with pytest.raises(RunError, match=WRONG[fault]) as caught:
        both(policy, server, 0.7 if fault == "raw" else 1.0, seed=0)
    assert "\n" not in str(caught.value)


def test_a_server_that_is_busy_is_asked_again(world: worlds.World, start: Start, tmp_path: Path) -> None:
    theirs, ours = both(byte_model(world, adapters=True), sampler(start(world.base, "stammers"), tmp_path), 1.0, seed=0)
    assert theirs.responses() == ours.responses()


def test_no_server_at_all_is_one_line(world: worlds.World, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=re.escape("the server http://127.0.0.1:9/v1 cannot be reached")):
        both(byte_model(world, adapters=True), sampler("http://127.0.0.1:9/v1", tmp_path), 1.0, seed=0)


def test_an_adapter_that_is_gone_already_is_no_harm(world: worlds.World, start: Start, tmp_path: Path) -> None:
    server, policy = sampler(start(world.base, "forgets"), tmp_path), byte_model(world, adapters=True)
    for _ in range(2):
        both(policy, server, 1.0, seed=0)
        for weight in policy.weights().values():
            weight.data += 0.1


@pytest.mark.parametrize("adapters", [False, True])
def test_weights_that_are_not_loaded_are_noticed(
    world: worlds.World, start: Start, tmp_path: Path, adapters: bool
) -> None:
    """A server that answers by weights of before: whole ones by the first batch, since it has the base's, adapters by
    a later one."""
    server, policy = sampler(start(world.base, "stale"), tmp_path), byte_model(world, adapters=adapters)
    for weight in policy.weights().values():
        weight.data += 0.2
    if adapters:  # the first it is given are loaded
        both(policy, server, 1.0, seed=0)
        for weight in policy.weights().values():
            weight.data += torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    said = "does not load the weights that it is given" if adapters else "it serves other weights, or another model"
    with pytest.raises(RunError, match=f"nats a token from the policy's.*{said}"):
        both(policy, server, 1.0, seed=0)


# ---- the whole distribution, without a server


def drawn(model: LanguageModel, count: int, seed: int, **how: float) -> Sampled:
    prompts = [PROMPTS[i % 2] for i in range(count)]
    given = generate(model, prompts, stop_ids=[EOS], pad_id=EOS, max_new_tokens=3, seed=seed, **how)  # type: ignore[arg-type]
    said = score_logprobs(model, given, temperature=how.get("temperature", 1.0))  # as raw log-probs are
    return Sampled(**{**vars(given), "sampled_logprobs_BT": said})


def test_samples_of_the_whole_distribution_pass_and_cut_ones_do_not() -> None:
    _, model = base_and_sft()
    for seed in range(20):  # the odds of one in two million, twenty times
        check_whole(model, drawn(model, 200, seed), 1.0)
        check_whole(model, drawn(model, 200, seed, temperature=0.7), 0.7)
    for how in ({"top_k": 3}, {"top_p": 0.8}):
        with pytest.raises(RunError, match="does not sample from the whole distribution"):
            check_whole(model, drawn(model, 2000, 0, **how), 1.0)


def test_the_entropy_is_that_of_the_next_token() -> None:
    _, model = base_and_sft()
    given = drawn(model, 2, seed=3)
    entropy_BT = next_token_entropy(model, given, temperature=0.8)
    for i, response in enumerate(given.responses()):
        logits = model.model(input_ids=torch.tensor([[*PROMPTS[i], *response]])).logits[0].double() / 0.8
        log_p = logits.log_softmax(-1)[len(PROMPTS[i]) - 1 : -1]
        expected = -(log_p.exp() * log_p).sum(-1)
        torch.testing.assert_close(entropy_BT[i, : len(response)].double(), expected, atol=1e-5, rtol=0)


# ---- importance weights


def test_weighted_samples_of_another_model_estimate_under_the_policy() -> None:
    """By enumeration: the sum over tokens of mu(token) w(token) f(token) is the sum of pi f, without a cap; and the cap
    is reached by the tokens that the policy likes much more."""
    base, sft = base_and_sft()
    with torch.no_grad():
        pi, mu = (m.model(input_ids=torch.tensor([[1, 2, 3]])).logits[0, -1].log_softmax(-1) for m in (sft, base))
    value = torch.arange(len(pi)).float()
    mask = torch.ones(len(pi), 1, dtype=torch.bool)
    weights = importance_weights(pi[:, None], mu[:, None], mask, cap=1e6)[:, 0]
    torch.testing.assert_close((mu.exp() * weights * value).sum(), (pi.exp() * value).sum())
    capped = importance_weights(pi[:, None], mu[:, None], mask, cap=1.1)[:, 0]
    torch.testing.assert_close(capped, (pi - mu).exp().clamp(max=1.1))
    assert (capped == 1.1).any() and (capped < 1.1).any()
    assert importance_weights(pi[:, None], mu[:, None], ~mask, cap=2.0).eq(1).all()


def test_the_local_sampler_keeps_the_logprobs_of_what_it_drew() -> None:
    _, model = base_and_sft()
    for temperature in (1.0, 0.5):
        found = LocalSampler([EOS], EOS).sample(
            model, PROMPTS * 4, list(range(8)), max_new_tokens=3, temperature=temperature, held=0
        )
        own = score_logprobs(model, found, temperature=temperature)
        torch.testing.assert_close(found.sampled_logprobs_BT, own, atol=1e-5, rtol=0)
