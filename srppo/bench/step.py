"""`srppo bench step`: one PPO step by phase, beside the bare rate of matrix products measured in the same run.

A step is what `train_ppo` does between two measurements: rollout, scoring (old log-probs, values, both frozen models,
reward, advantages) and update. Weights and prompts are random unless a model is named; how long an answer becomes is a
function of its first tokens, so that lengths are mixed whatever the model says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich import box
from rich.console import Group
from rich.constrain import Constrain
from rich.table import Table
from rich.text import Text
from transformers import LlamaConfig, LlamaForCausalLM

from srppo.bench.measure import gemm_gflops
from srppo.bench.rows import append_rows, machine
from srppo.config import ModelConfig, Recipe, build_recipe, parse_override
from srppo.console import Console, figure
from srppo.errors import ConfigError
from srppo.models.language_model import LanguageModel
from srppo.models.loading import load_model, load_tokenizer, pick_device, to_train
from srppo.training.ppo import Learners, make_targets, step_flops, update
from srppo.training.reward import RunningStd, compute_rewards
from srppo.training.rollout import generate, to_batch
from srppo.training.scores import score_log_ratio

PHASES = ("rollout", "score", "update")


@dataclass(frozen=True)
class Work:
    """What one step does. Lengths are in tokens; of answers, the length limit is the longest.

    model: a folder or hub name, None: a random Llama of `shape` (hidden, inner, layers, heads, vocabulary).
    """

    prompts: tuple[int, int]
    answers: tuple[int, int]
    rollouts: int
    epochs: int
    minibatches: int
    micro_tokens: int
    shape: tuple[int, int, int, int, int] = (128, 512, 4, 4, 512)
    model: str | None = None


PRESETS = {
    "tiny": Work((16, 16), (32, 32), 32, 4, 1, 4096),
    "mixed": Work((5, 60), (4, 48), 96, 2, 2, 4096),
    "smollm2": Work((20, 300), (8, 128), 32, 2, 2, 2048, model="HuggingFaceTB/SmolLM2-135M"),
}


COSTS = ("adapters", "lora_rank", "lora_alpha", "lora_targets", "precision", "scoring", "activation_checkpointing")
"""Keys of `model` that a step's cost hangs on."""


def model_settings(name: str | None, sets: Sequence[str]) -> ModelConfig:
    """The model of a name (None: the preset's) under settings `model.key=value`. Raises ConfigError for other keys."""
    keys = dict(map(parse_override, sets))
    for key in keys:
        if key.removeprefix("model.") not in COSTS:
            raise ConfigError(f"{key} is said by the preset, or changes no cost; --set takes model.{', '.join(COSTS)}")
    tree = {key.removeprefix("model."): value for key, value in keys.items()}
    return build_recipe({"model": {**tree, "base": name or ""}}).model


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """One step of one preset. seconds, cpu_s: by phase; cpu: of this process, over its threads.

    tokens: of prompts and answers, without padding. flops: counted operations (`models.flops`), of which `share` is the
    part of the bare rate that was reached: flops over seconds over gemm_gflops. peak_bytes: of the process on a CPU, of
    the device on a GPU.
    """

    date: str
    preset: str
    work: dict[str, Any]
    model: dict[str, Any]
    step: int
    seconds: dict[str, float]
    cpu_s: dict[str, float]
    tokens: int
    answer_tokens: int
    padded_tokens: int
    flops: int
    gemm_gflops: float
    share: float
    peak_bytes: int
    threads: int
    machine: dict[str, Any]


def run_step_bench(
    preset: str, console: Console, *, steps: int, model: ModelConfig, threads: int | None, device: str, out: Path
) -> list[StepRow]:
    """Measure a preset: one step to warm up, then `steps`; print the table, append the rows.

    model: as `model_settings` makes it. Raises ConfigError for an unknown preset, or a file that cannot be written.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset is {preset!r}; the presets are {', '.join(PRESETS)}")
    try:  # before minutes of measuring
        append_rows([], out)
    except OSError as error:
        raise ConfigError(f"out is {str(out)!r}, which cannot be written: {error.strerror or error}") from None
    work, device = PRESETS[preset], pick_device(device)
    torch.set_num_threads(threads or torch.get_num_threads())
    bench = _Bench(work, model, device)
    found = []
    for step in range(steps + 1):
        rate = gemm_gflops(device, "bfloat16" if model.precision == "bf16" else "float32")
        row = bench.step(preset, step, rate)
        if step:
            append_rows([row], out)
            found.append(row)
    console.print(_table(found))
    console.print(f"written: {out}")
    return found


class _Bench:
    def __init__(self, work: Work, config: ModelConfig, device: str) -> None:
        self.work, self.config, self.device = work, config, device
        self.base = self._model()
        sft = to_train(self.base, config)
        generator = torch.Generator().manual_seed(1)
        for weight in sft.weights().values():  # another model than the base
            weight.data += (0.01 * torch.randn(weight.shape, generator=generator)).to(weight)
        self.sft, self.policy = sft, to_train(sft, config)
        self.recipe = self._recipe()
        self.learners, self.running = Learners.start(self.policy, self.recipe.ppo), RunningStd()
        low, high = work.prompts
        lengths = torch.randint(low, high + 1, (work.rollouts,), generator=generator).tolist()
        self.prompts = [torch.randint(1, self.base.vocab_size, (n,), generator=generator).tolist() for n in lengths]

    def _model(self) -> LanguageModel:
        name = self.config.base or self.work.model
        if name is not None:
            config = self.config.model_copy(update={"base": name})
            return load_model(name, config, device=self.device, vocab_size=len(load_tokenizer(name, config)))
        hidden, inner, layers, heads, vocabulary = self.work.shape
        torch.manual_seed(0)
        shape: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
        shape |= {"num_attention_heads": heads, "vocab_size": vocabulary, "tie_word_embeddings": False}
        model: Any = LlamaForCausalLM(LlamaConfig(max_position_embeddings=1024, **shape))
        return LanguageModel(model.to(self.device), precision=self.config.precision)

    def _recipe(self) -> Recipe:
        work = self.work
        return build_recipe(
            {
                "rollout": {"batch": work.rollouts, "max_new_tokens": work.answers[1]},
                "ppo": {"epochs": work.epochs, "minibatches": work.minibatches, "micro_tokens": work.micro_tokens}
                | {"lr": 1e-5, "value_lr": 1e-5},
            }
        )

    def step(self, preset: str, step: int, rate: float) -> StepRow:
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
            rewards = compute_rewards(recipe.reward, scores, batch, self.running, step, per_prompt=1)
            targets = make_targets(recipe, batch, rewards, scores.anchor_BT(recipe.reward.anchor))
        with clock("update"):
            _, done = update(recipe, learners, targets, step + 1)
        flops = step_flops(learners, batch, updates=(done, recipe.ppo.minibatches), critic_only=False)
        body = self.base.config
        return StepRow(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            preset=preset,
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
            machine=machine("cuda" if self.device.startswith("cuda") else "cpu"),
        )


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


def _table(rows: list[StepRow]) -> Group:
    first = rows[0]
    title = (
        f"PPO step, {first.preset}: {first.work['rollouts']} rollouts, {first.tokens} tokens, {first.threads} threads"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=Text(title, "bold"), title_justify="left")
    for name in ("", "s", "CPU s", "tokens/s", "of the step"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    whole = median(sum(row.seconds.values()) for row in rows)
    for phase in PHASES:
        seconds, cpu_s = (median(getattr(row, key)[phase] for row in rows) for key in ("seconds", "cpu_s"))
        tokens = median(row.answer_tokens if phase == "rollout" else row.tokens for row in rows)
        table.add_row(phase, figure(seconds), figure(cpu_s), figure(tokens / seconds), f"{seconds / whole:.0%}")
    tokens = median(row.tokens for row in rows)
    cpu_s = median(sum(row.cpu_s.values()) for row in rows)
    table.add_row("step", figure(whole), figure(cpu_s), figure(tokens / whole), "100%", style="bold")
    share, peak = median(row.share for row in rows), max(row.peak_bytes for row in rows)
    rate = median(row.gemm_gflops for row in rows)
    padded = median(row.padded_tokens for row in rows)
    note = (
        f"{share:.0%} of the bare matrix rate ({rate:.0f} GF/s) on {tokens:.0f} real tokens; peak memory "
        f"{peak / 1e9:.2f} GB; padded to one width it would be {padded / tokens:.2f} times the tokens. Rollout: answer "
        "tokens a second."
    )
    return Group(table, Constrain(Text(note, "dim"), 80))
