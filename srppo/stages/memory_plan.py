"""What a recipe will take before it is run: memory by part and phase, disk, counted operations. From the configuration
alone: models are built without weights (`models.blueprint`), and what a pass holds is followed without running it
(`models.footprint`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from srppo.config import ModelConfig, Recipe, is_embedded, resolved, with_overrides
from srppo.data.prepare import PreparedData
from srppo.errors import ConfigError, UserError
from srppo.models.adapters import AdaptedModel, adapter_settings, is_adapter
from srppo.models.blueprint import META, blueprint, over
from srppo.models.flops import update_flops
from srppo.models.footprint import read_bytes, train_bytes, write_bytes
from srppo.models.generation import LEAST
from srppo.models.heap import ruled
from srppo.models.language_model import LanguageModel
from srppo.models.loading import prepare_alone, resolve, to_train
from srppo.models.memory import cache_numbers, rows_that_fit, weight_bytes
from srppo.models.value_model import ValueModel
from srppo.training.loop import Trained, parameters, trained_bytes
from srppo.training.ppo import Learners, rollout_flops
from srppo.training.sft import steps_per_epoch

HEAP = {"none": 0.5, "lora": 1.1}
"""Of what a pass with gradients holds, that glibc's heap takes besides, by model.adapters, which make small tensors.
Fitted to the runs of docs/models.md."""
RECOMPUTED_HEAP = 0.2
"""The same where activations are recomputed, and the heap is told to keep small blocks alone."""
LIBRARIES = 50_000_000
"""Bytes that a process on a CPU grows by as it begins to compute: tokenizer, compiled kernels, BLAS; by measurement."""
WORTH = 0.99  # of the peak, below which a change is worth a line
KEPT = 3  # checkpoints of a stage on disk: the two newest, and the step that is kept

Parts = dict[str, int]
"""Bytes by part."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of rows. demonstrations: (prompt, prompt and answer) of each; prompts: of each of PPO's. rows: the number
    of demonstrations, None where it is not known.

    counted: the data said so. Else they are assumed, one row and one prompt stand for all, and may be as long as
    `limits` (prompt, row).
    """

    demonstrations: Sequence[tuple[int, int]]
    prompts: Sequence[int]
    rows: int | None
    counted: bool
    limits: tuple[int, int] = (0, 0)

    @property
    def longest_prompt(self) -> int:
        """Of PPO's."""
        return max(self.limits[0], *self.prompts)


@dataclass(frozen=True)
class StagePlan:
    """One stage. phases: bytes by part, of each phase. flops: counted operations, None where the number of rows is not
    known. checkpoint_bytes, model_bytes: of a checkpoint, and of the model that is exported. passes: what was followed.
    """

    name: str
    phases: Mapping[str, Parts]
    flops: int | None
    checkpoint_bytes: int
    model_bytes: int
    steps: int | None
    passes: str

    @property
    def peak(self) -> tuple[str, int]:
        """The phase that takes most, and its bytes."""
        return max(((name, sum(parts.values())) for name, parts in self.phases.items()), key=lambda pair: pair[1])


@dataclass(frozen=True)
class MemoryPlan:
    """The stages of a recipe on a device of `memory` bytes."""

    recipe: Recipe
    stages: tuple[StagePlan, ...]
    memory: int
    device: str
    lengths: Lengths
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> tuple[str, str, int]:
        """Stage, phase and bytes of the most."""
        return max(((stage.name, *stage.peak) for stage in self.stages), key=lambda each: each[2])

    @property
    def fits(self) -> bool:
        """Whether the device has as much."""
        return self.peak[2] <= self.memory

    @property
    def disk_bytes(self) -> int:
        """Of all stages: checkpoints, with the one that is being written, and exported models."""
        return sum((KEPT + 1) * stage.checkpoint_bytes + stage.model_bytes for stage in self.stages)


# ---- what the passes are made of


def assumed_lengths(recipe: Recipe, prompt_tokens: int | None = None) -> Lengths:
    """Rows where the data are not at hand: prompts of `prompt_tokens` (None: half of data.max_prompt_tokens), and
    demonstrations that answer them with as much again as fits half of data.max_tokens."""
    data = recipe.data
    prompt = min(prompt_tokens or max(data.max_prompt_tokens // 2, 1), data.max_prompt_tokens)
    row = max(data.max_tokens // 2, prompt + 1)
    return Lengths([(prompt, row)], [prompt], data.size, False, (data.max_prompt_tokens, data.max_tokens))


def counted_lengths(recipe: Recipe) -> Lengths:
    """Rows as they are, encoded by the tokenizer of the model. Raises UserError where data or tokenizer are missing."""
    found: PreparedData = prepare_alone(recipe)[0]
    rows = [(max(row.prompt_tokens, 1), len(row.ids)) for row in found.demonstrations]
    return Lengths(rows, [len(ids) for ids in found.prompts], len(rows), counted=True)


def lengths_of(recipe: Recipe, prompt_tokens: int | None = None) -> Lengths:
    """Counted where all data and the tokenizer are local files, unless a length is given; else assumed."""
    recipe = resolved(recipe)
    names = [*recipe.data.demonstrations, *recipe.data.prompts, recipe.model.base]
    if prompt_tokens is None and all(is_embedded(name) or Path(name).exists() for name in names):
        try:
            return counted_lengths(recipe)
        except UserError:  # a folder with config.json alone
            pass
    return assumed_lengths(recipe, prompt_tokens)


def largest_pass(
    rows: Sequence[tuple[int, int]], batch: int, micro_tokens: int, limit: int = 0
) -> tuple[list[int], int, int]:
    """(lengths of the rows, answered tokens, passes) of the largest pass of a batch, cut as `micro_batches` does, the
    longest rows first; rows stand more often than they are there where the batch takes more.

    limit: of a row, where `rows` are only assumed: then a pass is as full as it may be.
    """
    if limit:
        ((prompt, total),) = rows
        tokens = min(max(micro_tokens, limit), batch * limit)
        count = max(tokens // total, 1)
        return _even(tokens, count), tokens - tokens * prompt // total, -(-batch * total // tokens)
    longest = sorted(rows, key=lambda row: -row[1])[:batch]
    longest += longest[-1:] * (batch - len(longest))
    passes, place = [], 0
    while place < batch:
        count = max(micro_tokens // longest[place][1], 1)
        passes.append(longest[place : place + count])
        place += count
    most = max(passes, key=lambda rows: sum(total for _, total in rows))
    lengths = _even(sum(total for _, total in most), len(most))
    return lengths, sum(total - prompt for prompt, total in most), len(passes)


def _even(total: int, rows: int) -> list[int]:
    """So many tokens in so many rows of two lengths at most: attention is followed once for each length."""
    return [total // rows + (place >= rows - total % rows) for place in range(rows)]


# ---- the stages


@dataclass(frozen=True)
class Roles:
    """The models of a recipe, without weights. sft: as PPO starts from it. trained: what SFT trains, None where the
    recipe gives its model."""

    base: LanguageModel
    trained: LanguageModel | None
    sft: LanguageModel
    learners: Learners


def build_roles(recipe: Recipe, *, on_cpu: bool = True) -> Roles:
    """As the stages build them: what SFT gives is stored in fp32, or as an adapter. Raises UserError."""
    config = recipe.model
    base = blueprint(config.base, config, on_cpu=on_cpu)
    with META:
        trained = to_train(base, config) if config.sft is None else None
        if trained is None:
            sft = _given(str(config.sft), base, config, on_cpu)
        else:
            sft = trained.copy()
            sft.precision = base.precision
            sft.recomputes = False
            if not isinstance(sft, AdaptedModel):
                sft.model.requires_grad_(False)
        return Roles(base, trained, sft, Learners.start(to_train(sft, config), recipe.ppo))


def _given(spec: str, base: LanguageModel, config: ModelConfig, on_cpu: bool) -> LanguageModel:
    path = Path(resolve(spec))
    return over(base, adapter_settings(path)) if is_adapter(path) else blueprint(spec, config, on_cpu=on_cpu)


def plan(recipe: Recipe, lengths: Lengths, memory: int, device: str) -> MemoryPlan:
    """What SFT, unless its model is given, and PPO take on a device (`cpu`, `cuda`, ...) of `memory` bytes.

    Raises UserError: a model that cannot be read, or whose passes cannot be followed.
    """
    recipe = resolved(recipe)
    on_cpu = not device.startswith("cuda")
    roles = build_roles(recipe, on_cpu=on_cpu)
    heap = 0.0
    if on_cpu and ruled():
        heap = RECOMPUTED_HEAP if recipe.model.activation_checkpointing else HEAP[recipe.model.adapters]
    stages = [_ppo_stage(recipe, roles, lengths, memory, on_cpu, heap)]
    if roles.trained is not None:
        stages.insert(0, _sft_stage(recipe, roles, lengths, on_cpu, heap))
    policy = roles.learners.policy
    counts = {"weights": _numbers(roles.base), "trained": sum(weight.numel() for weight in parameters(policy))}
    return MemoryPlan(recipe, tuple(stages), memory, device, lengths, counts)


def least_bytes(recipe: Recipe, base: LanguageModel, kinds: Sequence[str]) -> int:
    """What weights, gradients and moments alone take, with a base that is loaded; 0 with adapters, which are small."""
    if recipe.model.adapters != "none":
        return 0
    ppo = "ppo" in kinds
    own_critic = recipe.ppo.advantage == "gae" and recipe.ppo.critic == "own"
    copies = 1 + 4 + 4 * own_critic if ppo else 4  # the SFT model; a trained one with a gradient and two moments
    return weight_bytes(base) + 4 * _numbers(base) * copies


def _numbers(model: torch.nn.Module) -> int:
    return sum(weight.numel() for name, weight in model.named_parameters() if ".lora_" not in name)


def _sft_stage(recipe: Recipe, roles: Roles, lengths: Lengths, on_cpu: bool, heap: float) -> StagePlan:
    config, model = recipe.sft, roles.trained
    assert model is not None
    rows, scored, passes = largest_pass(lengths.demonstrations, config.batch, config.micro_tokens, lengths.limits[1])
    standing = _standing([roles.base], [model], on_cpu)
    transient = _beside_gradients(lambda many: _trained(model, rows, scored, many), [model], passes, on_cpu)
    count = lengths.rows
    known = config.steps is not None or count is not None
    epoch = steps_per_epoch(count, config.batch) if count is not None else 0
    steps = (config.steps or config.epochs * epoch) if known else None
    each = [total for _, total in lengths.demonstrations]
    answered = sum(total - prompt for prompt, total in lengths.demonstrations)
    per_row = update_flops(model, torch.tensor(each), answered) / len(each)
    trained_rows = config.steps * config.batch if config.steps else config.epochs * (count or 0)
    return StagePlan(
        "SFT",
        {"update": standing | _activations(transient, heap)},
        round(per_row * trained_rows) if known else None,
        _checkpoint(model),
        _saved(model),
        steps,
        f"{sum(rows)} tokens",
    )


def _ppo_stage(recipe: Recipe, roles: Roles, lengths: Lengths, memory: int, on_cpu: bool, heap: float) -> StagePlan:
    config, new, learners = recipe.ppo, recipe.rollout.max_new_tokens, roles.learners
    policy, value = learners.policy, learners.value
    answered = [(prompt, prompt + new) for prompt in lengths.prompts]
    minibatch = -(-recipe.rollout.batch // config.minibatches)
    limit = lengths.limits[0] + new if lengths.limits[0] else 0
    rows, scored, passes = largest_pass(answered, minibatch, config.micro_tokens, limit)
    learning = [model for model in (policy, value) if model is not None]
    standing = _standing([roles.base, roles.sft], learning, on_cpu)
    # Writing: as many rows at once as the memory takes, the longest prompts last.
    longest = lengths.longest_prompt
    held = trained_bytes(*learning) + weight_bytes(roles.sft, roles.base)
    fit = rows_that_fit(policy, longest + new, held=held, total=memory)
    written = min(fit, recipe.rollout.batch)
    written = max(written, LEAST) if on_cpu else written
    most = sorted(lengths.prompts)[-written:]
    prompts = _even(sum(most) * written // len(most), written) if lengths.counted else [longest] * written
    writing = write_bytes(policy, prompts, longest + new - max(prompts), on_cpu=on_cpu)
    cache = written * (longest + new) * cache_numbers(policy.config) * (2 if policy.precision == "bf16" else 4)
    rollout = standing | {"keys and values": cache, "activations": max(writing - cache, 0)}

    reading = read_bytes(roles.base, rows, scored)
    score = standing | {"activations": reading + 8 * scored * policy.config.hidden_size}

    def passing(many: bool) -> Iterator[tuple[int, int]]:
        """(gradients that are there before a pass, what it holds) of policy and critic in turn."""
        if value is None or value.shared:
            yield 0, _followed(value or policy, rows, scored, many)
        else:
            yield 0, _followed(policy, rows, scored, many)
            yield _gradients(policy), _followed(value, rows, scored, many)

    transient = _beside_gradients(passing, learning, passes, on_cpu)
    update = standing | _activations(transient, heap)
    mean = sum(lengths.prompts) / len(lengths.prompts)
    batch = torch.full((recipe.rollout.batch,), round(mean) + new)
    tokens = recipe.rollout.batch * new
    warmup = min(config.critic_warmup, config.steps)
    flops = {
        critic_only: rollout_flops(
            learners, (batch, tokens), (batch, tokens), updates=(config.epochs, 1), critic_only=critic_only
        )
        for critic_only in (True, False)
    }
    return StagePlan(
        "PPO",
        {"rollout": rollout, "score": score, "update": update},
        warmup * flops[True] + (config.steps - warmup) * flops[False],
        _checkpoint(*learning),
        _saved(policy),
        config.steps,
        f"{sum(rows)} tokens, {written} answers at a time",
    )


def _standing(frozen: Sequence[LanguageModel], learning: Sequence[Any], on_cpu: bool) -> Parts:
    """What a stage holds throughout. With adapters, the roles share the weights below them."""
    gradients = _gradients(*learning)
    weights = weight_bytes(*frozen, *learning)
    parts = {"weights": weights, "gradients": gradients, "optimizer": 2 * gradients}
    return parts | ({"libraries": LIBRARIES} if on_cpu else {})


def _gradients(*models: Trained | None) -> int:
    return trained_bytes(*models) // 4


def _trained(model: LanguageModel, rows: Sequence[int], scored: int, many: bool) -> Iterator[tuple[int, int]]:
    yield 0, _followed(model, rows, scored, many)


def _followed(model: LanguageModel | ValueModel, rows: Sequence[int], scored: int, gradients: bool) -> int:
    return train_bytes(model, rows, scored, gradients=gradients)


def _beside_gradients(passing: Any, learning: Sequence[Any], passes: int, on_cpu: bool) -> int:
    """The most bytes beside weights, gradients and moments, of passes and of the optimizers' steps.

    Where a minibatch is one pass, gradients appear as activations go.
    """
    whole = _gradients(*learning)
    if passes > 1:
        most = max(held for _, held in passing(True))
    else:
        most = max(before + held for before, held in passing(False)) - whole
    return max(most, *(_stepping(model, on_cpu) for model in learning))


def _stepping(model: Any, on_cpu: bool) -> int:
    """An optimizer's own: two numbers for each of the largest weight; on a GPU one for each of all, which are stepped
    at once. torch's fused ones take nothing."""
    sizes = [weight.numel() * weight.element_size() for weight in parameters(model)]
    return 2 * max(sizes) if on_cpu else sum(sizes)


def _activations(transient: int, heap: float) -> Parts:
    return {"activations": transient, "heap": round(heap * transient)}


def _checkpoint(*models: Any) -> int:
    """Weights, and two moments of what is trained."""
    return sum(_saved(model) for model in models) + 2 * _gradients(*models)


def _saved(model: Trained) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.weights().values())


# ---- what to change


@dataclass(frozen=True)
class Change:
    """keys: of the recipe, as `--set` takes them. words: what it costs."""

    keys: Mapping[str, Any]
    words: str


def changes(recipe: Recipe) -> list[Change]:
    """What takes less memory than this recipe, the cheapest in quality first."""
    model, ppo, rollout = recipe.model, recipe.ppo, recipe.rollout
    found = []
    least = max(recipe.data.max_prompt_tokens + rollout.max_new_tokens, 256)
    small = {
        f"{name}.micro_tokens": max(section.micro_tokens // 4, min(least, section.micro_tokens))
        for name, section in (("sft", recipe.sft), ("ppo", ppo))
    }
    if any(small[key] < getattr(recipe, key.split(".")[0]).micro_tokens for key in small):
        found.append(Change(small, "smaller passes: the same result, somewhat slower"))
    if not model.activation_checkpointing:
        found.append(Change({"model.activation_checkpointing": True}, "the same result, a third more work"))
    if model.precision == "fp32":
        found.append(Change({"model.precision": "bf16"}, "the bodies run in bf16; heads stay in fp32"))
    elif model.scoring == "fp32":
        found.append(Change({"model.scoring": "bf16"}, "the frozen models' bodies run in bf16"))
    if model.adapters == "none":
        found.append(Change({"model.adapters": "lora"}, "adapters are trained: raise the learning rates tenfold"))
    if ppo.advantage == "gae" and ppo.critic == "own":
        found.append(Change({"ppo.critic": "shared"}, "the critic is a head on the policy's trunk"))
    if ppo.advantage == "gae" and not ppo.critic_warmup and ppo.gamma == 1 and rollout.batch % 4 == 0:
        found.append(Change({"ppo.advantage": "rloo", "rollout.per_prompt": 4}, "no critic; four answers a prompt"))
    if rollout.max_new_tokens >= 128:
        found.append(Change({"rollout.max_new_tokens": rollout.max_new_tokens // 2}, "shorter answers"))
    return found


@dataclass(frozen=True)
class Advice:
    """bytes: the peak with each change alone. together: the changes that make it fit, None where all do not."""

    bytes: Mapping[str, int]
    changes: Mapping[str, Change]
    together: tuple[str, ...] | None
    together_bytes: int


def advise(planned: MemoryPlan) -> Advice:
    """What each change would take, and which of them together fit: found by planning again."""
    known = {" ".join(f"{key}={_word(value)}" for key, value in c.keys.items()): c for c in changes(planned.recipe)}
    peaks = {}
    for name, change in known.items():
        try:
            peaks[name] = _again(planned, change.keys).peak[2]
        except ConfigError:  # does not go with the rest of the recipe
            continue
    peaks = {name: peak for name, peak in peaks.items() if peak < WORTH * planned.peak[2]}
    taken: list[str] = []
    keys: dict[str, Any] = {}
    least = planned.peak[2]
    for name in sorted(peaks, key=lambda name: peaks[name]):
        try:
            found = _again(planned, keys | dict(known[name].keys)).peak[2]
        except ConfigError:
            continue
        if found < least:
            taken, keys, least = [*taken, name], keys | dict(known[name].keys), found
        if least <= planned.memory:
            return Advice(peaks, known, tuple(taken), least)
    return Advice(peaks, known, None, least)


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _again(planned: MemoryPlan, keys: Mapping[str, Any]) -> MemoryPlan:
    return plan(with_overrides(planned.recipe, keys), planned.lengths, planned.memory, planned.device)
