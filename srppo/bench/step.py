"""`srppo bench step`: one PPO step by phase, beside the bare rate of matrix products measured in the same run, and
beside TRL's trainers in environments of their own.

A step is what `train_ppo` does between two measurements: rollout, scoring (old log-probs, values, both frozen models,
reward, advantages) and update. Weights and prompts are random unless a model is named; how long an answer becomes is a
function of its first tokens, so that lengths are mixed whatever the model says.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from srppo.bench.measure import gemm_gflops
from srppo.bench.rows import append_rows, machine
from srppo.bench.step_rivals import OURS, Found, Rival, RivalGone, find_rivals
from srppo.bench.step_rows import RivalRow, StepRow, rival_table, step_table
from srppo.config import ModelConfig, Recipe, build_recipe, parse_override
from srppo.console import Console
from srppo.errors import ConfigError
from srppo.models.language_model import LanguageModel
from srppo.models.loading import load_model, load_tokenizer, pick_device, resolve, to_train
from srppo.models.narrow import keep_narrow
from srppo.training.ppo import Learners, make_targets, step_flops, update
from srppo.training.reward import RunningStd, compute_rewards
from srppo.training.rollout import generate, to_batch
from srppo.training.scores import score_log_ratio

PER_PROMPT = 2  # answers to each prompt, without a critic


class Shape(NamedTuple):
    """Sizes of a Llama. kv_heads: None: as many as heads. tied: the head's weight is the embedding's."""

    hidden: int
    inner: int
    layers: int
    heads: int
    vocabulary: int
    kv_heads: int | None = None
    tied: bool = False

    def config(self) -> dict[str, Any]:
        """As LlamaConfig takes it."""
        sizes = {"hidden_size": self.hidden, "intermediate_size": self.inner, "num_hidden_layers": self.layers}
        sizes |= {"num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads or self.heads}
        sizes |= {"vocab_size": self.vocabulary, "max_position_embeddings": 1024}
        return sizes | {"tie_word_embeddings": self.tied}


SMALL = Shape(128, 512, 4, 4, 512)


@dataclass(frozen=True)
class Work:
    """What one step does. Lengths are in tokens; of answers, the length limit is the longest.

    model: a folder or hub name, None: a random Llama of `shape`, its weights made on the device in `dtype`. settings:
    of the recipe, as `--set` takes them.
    """

    prompts: tuple[int, int]
    answers: tuple[int, int]
    rollouts: int
    epochs: int
    minibatches: int
    micro_tokens: int
    shape: Shape = SMALL
    model: str | None = None
    dtype: str = "float32"
    settings: tuple[str, ...] = ()


_LORA = ("model.adapters=lora", "model.precision=bf16")
PRESETS = {
    "tiny": Work((16, 16), (32, 32), 32, 4, 1, 4096),
    "mixed": Work((5, 60), (4, 48), 96, 2, 2, 4096),
    "smollm2": Work((20, 300), (8, 128), 32, 2, 2, 2048, model="HuggingFaceTB/SmolLM2-135M"),
    # The sizes of Qwen2.5 0.5B and 7B.
    "gpu-0.5b": Work(
        (20, 300), (8, 128), 256, 2, 4, 16384, Shape(896, 4864, 24, 14, 151936, 2, True), None, "bfloat16", _LORA
    ),
    "gpu-7b": Work(
        (20, 300), (8, 128), 256, 2, 4, 8192, Shape(3584, 18944, 28, 28, 152064, 4), None, "bfloat16", _LORA
    ),
}
COSTS = ("adapters", "lora_rank", "lora_alpha", "lora_targets", "precision", "scoring", "activation_checkpointing")
"""Keys of `model` that a step's cost hangs on."""


def model_settings(preset: str, name: str | None, sets: Sequence[str]) -> ModelConfig:
    """The model of a name (None: the preset's) under the preset's settings and then `model.key=value`.

    Raises ConfigError for an unknown preset, and for other keys.
    """
    keys = dict(map(parse_override, sets))
    for key in keys:
        if key.removeprefix("model.") not in COSTS:
            raise ConfigError(f"{key} is said by the preset, or changes no cost; --set takes model.{', '.join(COSTS)}")
    keys = dict(map(parse_override, _work(preset).settings)) | keys
    tree = {key.removeprefix("model."): value for key, value in keys.items()}
    return build_recipe({"model": {**tree, "base": name or ""}}).model


def rows_a_pass(work: Work) -> int:
    """How many rows of a minibatch a rival, which pads them all to one width, may take at a time, so that they are no
    more than `micro_tokens` with their padding: a whole minibatch or an even part of it."""
    minibatch, width = work.rollouts // work.minibatches, work.prompts[1] + work.answers[1]
    return max(n for n in range(1, minibatch + 1) if minibatch % n == 0 and (n == 1 or n * width <= work.micro_tokens))


def _work(preset: str) -> Work:
    if preset not in PRESETS:
        raise ConfigError(f"preset is {preset!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[preset]


def run_step_bench(
    preset: str,
    console: Console,
    *,
    steps: int,
    model: ModelConfig,
    threads: int | None,
    device: str,
    out: Path,
    rivals: Sequence[str] = (),
) -> list[StepRow]:
    """Measure a preset: one step to warm up, then `steps`; print the tables, append the rows.

    model: as `model_settings` makes it. rivals: Pythons of environments with TRL, whose trainers take turns with our
    step of the same method; one that fails drops out. Raises ConfigError for an unknown preset, rivals that are none or
    cannot do this work, or a file that cannot be written.
    """
    work, device = _work(preset), pick_device(device)
    try:  # before minutes of measuring
        append_rows([], out)
    except OSError as error:
        raise ConfigError(f"out is {str(out)!r}, which cannot be written: {error.strerror or error}") from None
    if rivals and (device != "cpu" or (model.adapters, model.precision, model.scoring) != ("none", "fp32", None)):
        raise ConfigError(
            "TRL is run with whole models in fp32 on a CPU: leave out --rival-python, or adapters, precision, scoring "
            "and other devices"
        )
    torch.set_num_threads(threads or torch.get_num_threads())
    found = find_rivals(rivals)
    benches = {}
    for method in dict.fromkeys(OURS[each.trainer] for each in found) if found else ("ppo",):
        benches[method] = _Bench(work, model, device, method)
    ours: list[StepRow] = []
    theirs: list[RivalRow] = []
    with ExitStack() as stack:
        running: list[Rival] = []
        for each in found:
            running.append(Rival(each, benches[OURS[each.trainer]].for_rivals(steps + 1)))
            stack.callback(running[-1].close)
        for step in range(steps + 1):
            for method, bench in benches.items():
                rate = gemm_gflops(device, "bfloat16" if model.precision == "bf16" else "float32")
                row, answers = bench.step(preset, step, rate)
                beside = []
                for rival in [each for each in running if OURS[each.found.trainer] == method]:
                    beside.append(_rival_step(rival, row, answers))
                    if beside[-1].missing:
                        running.remove(rival)
                if step:
                    ours.append(row)
                    append_rows([row], out)
                kept = beside if step else [each for each in beside if each.missing]
                theirs += kept
                append_rows(kept, out)
    for method in benches:
        console.print(step_table([row for row in ours if row.method == method]))
    if found:
        console.print(rival_table(ours, theirs))
    console.print(f"written: {out}")
    return ours


def _rival_step(rival: Rival, ours: StepRow, answers: Sequence[int]) -> RivalRow:
    """A rival's step next to ours, which had answers so long."""
    found: Found = rival.found
    missing: str | None = None
    took: dict[str, Any] = {}
    try:
        took = rival.step(answers, ours.tokens)
        for name, key in (("times_ours", "seconds"), ("times_ours_cpu", "cpu_s")):
            took[name] = sum(took[key].values()) / sum(getattr(ours, key).values())
    except RivalGone as gone:
        missing = str(gone)
    return RivalRow(
        date=_date(),
        preset=ours.preset,
        rival=found.name,
        trainer=found.trainer,
        method=ours.method,
        versions=found.versions,
        work=ours.work,
        step=ours.step,
        missing=missing,
        threads=ours.threads,
        load=_load(),
        machine=ours.machine,
        **took,
    )


class _Bench:
    """Our models and prompts of a preset under one method."""

    def __init__(self, work: Work, config: ModelConfig, device: str, method: str) -> None:
        self.work, self.config, self.device, self.method = work, config, device, method
        self.per_prompt = PER_PROMPT if method == "rloo" else 1
        self.base = self._model()
        sft = to_train(self.base, config)
        generator = torch.Generator().manual_seed(1)
        for weight in sft.weights().values():  # another model than the base
            weight.data += (0.01 * torch.randn(weight.shape, generator=generator)).to(weight)
        self.sft, self.policy = sft, to_train(sft, config)
        self.recipe = self._recipe()
        self.learners, self.running = Learners.start(self.policy, self.recipe.ppo), RunningStd()
        low, high = work.prompts
        lengths = torch.randint(low, high + 1, (work.rollouts // self.per_prompt,), generator=generator).tolist()
        prompts = [torch.randint(1, self.base.vocab_size, (n,), generator=generator).tolist() for n in lengths]
        self.prompts = [prompt for prompt in prompts for _ in range(self.per_prompt)]

    def _name(self) -> str | None:
        return self.config.base or self.work.model

    def _model(self) -> LanguageModel:
        if (name := self._name()) is not None:
            config = self.config.model_copy(update={"base": name})
            return load_model(name, config, device=self.device, vocab_size=len(load_tokenizer(name, config)))
        torch.manual_seed(0)
        with torch.device(self.device):
            llama, dtype = LlamaConfig(**self.work.shape.config()), getattr(torch, self.work.dtype)
            model: Any = AutoModelForCausalLM.from_config(llama, dtype=dtype)
        keep_narrow(model)
        return LanguageModel(model, precision=self.config.scoring or self.config.precision)

    def for_rivals(self, steps: int) -> dict[str, Any]:
        """The same work in words that `trl_worker` takes; all of it but which trainer."""
        name, work = self._name(), self.work
        if name is not None and (folder := Path(resolve(name))).is_dir():
            name = str(folder.absolute())
        told: dict[str, Any] = {key: getattr(work, key) for key in ("rollouts", "epochs", "minibatches")}
        told["rows"] = rows_a_pass(work)
        told |= {"model": name, "config": work.shape.config(), "longest": work.answers[1], "prompts": self.prompts}
        return told | {"per_prompt": self.per_prompt, "threads": torch.get_num_threads(), "steps": steps}

    def _recipe(self) -> Recipe:
        work = self.work
        return build_recipe(
            {
                "rollout": {"batch": work.rollouts, "max_new_tokens": work.answers[1], "per_prompt": self.per_prompt},
                "ppo": {"epochs": work.epochs, "minibatches": work.minibatches, "micro_tokens": work.micro_tokens}
                | {"lr": 1e-5, "value_lr": 1e-5, "advantage": "rloo" if self.method == "rloo" else "gae"},
            }
        )

    def step(self, preset: str, step: int, rate: float) -> tuple[StepRow, list[int]]:
        """One step, and how long its answers became."""
        recipe, learners, micro = self.recipe, self.learners, self.work.micro_tokens
        clock = _Clock(self.device)
        with clock("rollout"):
            generated = generate(
                self.policy,
                self.prompts,
                stop_ids=[],
                pad_id=0,
                max_new_tokens=self.work.answers[1],
                seed=step,
                until=ending(*self.work.answers),
            )
        with clock("score"):
            batch = to_batch(generated, self.policy, learners.value, micro_tokens=micro, temperature=1.0)
            scores = score_log_ratio(self.sft, self.base, batch, micro_tokens=micro)
            rewards = compute_rewards(recipe.reward, scores, batch, self.running, step, per_prompt=self.per_prompt)
            targets = make_targets(recipe, batch, rewards, scores.anchor_BT(recipe.reward.anchor))
        with clock("update"):
            _, done = update(recipe, learners, targets, step + 1)
        flops = step_flops(learners, batch, updates=(done, recipe.ppo.minibatches), critic_only=False)
        body = self.base.config
        row = StepRow(
            date=_date(),
            preset=preset,
            method=self.method,
            work=asdict(self.work),
            model={"hidden": body.hidden_size, "layers": body.num_hidden_layers, "vocabulary": self.base.vocab_size}
            | {key: getattr(self.config, key) for key in ("precision", "scoring", "adapters")},
            step=step,
            seconds=clock.seconds,
            cpu_s=clock.cpu_s,
            tokens=int(batch.attention_mask_BS.sum()),
            answer_tokens=int(batch.response_mask_BT.sum()),
            padded_tokens=batch.attention_mask_BS.numel(),
            flops=flops,
            gemm_gflops=rate,
            share=flops / sum(clock.seconds.values()) / rate / 1e9,
            peak_bytes=peak_bytes(self.device),
            threads=torch.get_num_threads(),
            load=_load(),
            machine=machine("cuda" if self.device.startswith("cuda") else "cpu"),
        )
        return row, batch.lengths_B().tolist()


def ending(low: int, high: int) -> Callable[[list[list[int]]], list[bool]]:
    """Rows are done at a length between the two that their first tokens decide, evenly."""

    def until(responses: list[list[int]]) -> list[bool]:
        return [len(row) >= low + (sum(row[:low]) * 2654435761 >> 8) % (high - low + 1) for row in responses]

    return until


class _Clock:
    """Wall and CPU seconds of each phase."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.cpu_s: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = self._now()
        yield
        wall, cpu = (now - then for now, then in zip(self._now(), began, strict=True))
        self.seconds[phase], self.cpu_s[phase] = wall, cpu

    def _now(self) -> tuple[float, float]:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


def peak_bytes(device: str) -> int:
    """The most memory so far: of the process on a CPU, allocated on a GPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _date() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _load() -> float | None:
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):  # a system without it
        return None
