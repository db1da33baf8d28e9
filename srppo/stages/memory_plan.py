"""What a recipe will take before it is run: memory by part and phase, disk, counted operations. From the configuration
alone: models are built without weights (`models.blueprint`), and what a pass holds is followed without running it
(`models.footprint`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from srppo.models.footprint import read_bytes, train_peaks, write_bytes
from srppo.models.generation import LEAST, KvCache
from srppo.models.gguf import NAMED
from srppo.models.heap import ruled
from srppo.models.language_model import LanguageModel
from srppo.models.loading import prepare_alone, resolve, to_train
from srppo.models.memory import bytes_here, cache_numbers, rows_that_fit, weight_bytes
from srppo.models.value_model import ValueModel
from srppo.stages.division import ADAPTER, Division
from srppo.training.loop import Trained, parameters
from srppo.training.parallel import check_rows
from srppo.training.ppo import Learners, rollout_flops
from srppo.training.sft import steps_per_epoch

HEAP = 0.5
"""Of what a pass with gradients holds, that glibc's heap takes besides. Fitted to the runs of docs/models.md."""
MAPPED_HEAP = 0.2
"""The same where activations are recomputed or weights spread, and the heap is told to keep small blocks alone."""
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
    """One stage. phases: bytes by part, of each phase, in one process. flops: counted operations of one process, None
    where the number of rows is not known. checkpoint_bytes, model_bytes: of a checkpoint, and of the model that is
    exported, by all processes. passes: what was followed.
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
    """The stages of a recipe in several processes, each on a device of `memory` bytes; on CPUs all share them."""

    recipe: Recipe
    stages: tuple[StagePlan, ...]
    memory: int
    device: str
    lengths: Lengths
    counts: Mapping[str, int] = field(default_factory=dict)
    processes: int = 1

    @property
    def peak(self) -> tuple[str, str, int]:
        """Stage, phase and bytes of the most in one process."""
        return max(((stage.name, *stage.peak) for stage in self.stages), key=lambda each: each[2])

    @property
    def on_device(self) -> int:
        """The most processes that share one device's memory: all on a CPU, one on a GPU."""
        return 1 if self.device.startswith("cuda") else self.processes

    @property
    def fits(self) -> bool:
        """Whether the device has as much."""
        return self.on_device * self.peak[2] <= self.memory

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
    if prompt_tokens is None and all(is_embedded(name) or name in NAMED or Path(name).exists() for name in names):
        try:
            return counted_lengths(recipe)
        except UserError:  # a folder with config.json alone
            pass
    return assumed_lengths(recipe, prompt_tokens)


def largest_pass(
    rows: Sequence[tuple[int, int]], batch: int, micro_tokens: int, limit: int = 0, *, processes: int = 1
) -> tuple[list[int], int, int]:
    """(lengths of the rows, answered tokens, passes) of the largest pass of a batch, cut as `micro_batches` does, the
    longest rows first; rows stand more often than they are there where the batch takes more.

    limit: of a row, where `rows` are only assumed: then a pass is as full as it may be. processes: that share a batch:
    the first, which has the longest rows.
    """
    if limit:
        batch = -(-batch // processes)
        ((prompt, total),) = rows
        tokens = min(max(micro_tokens, limit), batch * limit)
        count = max(tokens // total, 1)
        return _even(tokens, count), tokens - tokens * prompt // total, -(-batch * total // tokens)
    longest = sorted(rows, key=lambda row: -row[1])[:batch]
    longest += longest[-1:] * (batch - len(longest))
    longest = longest[::processes]
    passes, place = [], 0
    while place < len(longest):
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


def plan(recipe: Recipe, lengths: Lengths, memory: int, device: str, processes: int = 1) -> MemoryPlan:
    """What SFT, unless its model is given, and PPO take on a device (`cpu`, `cuda`, ...) of `memory` bytes, in each of
    several processes that a launcher starts.

    Raises UserError: a model that cannot be read, or whose passes cannot be followed; more processes than rows.
    """
    recipe = resolved(recipe)
    check_rows(processes, rollout__batch=recipe.rollout.batch, sft__batch=recipe.sft.batch)
    division = Division(processes, recipe.model.sharding == "full" and processes > 1)
    on_cpu = not device.startswith("cuda")
    roles = build_roles(recipe, on_cpu=on_cpu)
    heap = 0.0
    if on_cpu and ruled():
        mapped = recipe.model.activation_checkpointing or division.spread
        heap = MAPPED_HEAP if mapped else HEAP
    stages = [_ppo_stage(recipe, roles, lengths, division, memory, on_cpu, heap)]
    if roles.trained is not None:
        stages.insert(0, _sft_stage(recipe, roles, lengths, division, on_cpu, heap))
    policy = roles.learners.policy
    counts = {"weights": _numbers(roles.base), "trained": sum(weight.numel() for weight in parameters(policy))}
    return MemoryPlan(recipe, tuple(stages), memory, device, lengths, counts, processes)


def least_bytes(recipe: Recipe, base: LanguageModel, kinds: Sequence[str]) -> int:
    """What weights, gradients and moments alone take in this process, with a base that is loaded; 0 with adapters,
    which are small."""
    if recipe.model.adapters != "none":
        return 0
    ppo = "ppo" in kinds
    own_critic = recipe.ppo.advantage == "gae" and recipe.ppo.critic == "own"
    copies = 1 + 4 + 4 * own_critic if ppo else 4  # the SFT model; a trained one with a gradient and two moments
    numbers = sum(bytes_here(weight) // weight.element_size() for weight in base.parameters())
    return weight_bytes(base) + 4 * numbers * copies


def _numbers(model: torch.nn.Module) -> int:
    return sum(weight.numel() for name, weight in model.named_parameters() if ADAPTER not in name)


def _sft_stage(
    recipe: Recipe, roles: Roles, lengths: Lengths, division: Division, on_cpu: bool, heap: float
) -> StagePlan:
    config, model = recipe.sft, roles.trained
    assert model is not None
    rows, scored, passes = largest_pass(
        lengths.demonstrations, config.batch, config.micro_tokens, lengths.limits[1], processes=division.processes
    )
    standing = _standing(division, [roles.base], [model], on_cpu)
    held = _beside_gradients(division, lambda many: [_Pass(0, model, rows, scored, many)], [model], passes, on_cpu)
    phases = {"update": standing | _activations(held, heap)}
    if division.spread:
        phases = _start(roles, division, on_cpu) | phases | _export(division, model, standing)
    count = lengths.rows
    known = config.steps is not None or count is not None
    epoch = steps_per_epoch(count, config.batch) if count is not None else 0
    steps = (config.steps or config.epochs * epoch) if known else None
    each = [total for _, total in lengths.demonstrations]
    answered = sum(total - prompt for prompt, total in lengths.demonstrations)
    per_row = update_flops(model, torch.tensor(each), answered) / len(each)
    if config.steps:
        trained_rows = config.steps * division.rows(config.batch)
    else:
        trained_rows = config.epochs * sum(map(division.rows, _batches(count or 0, config.batch)))
    return StagePlan(
        "SFT",
        phases,
        round(per_row * trained_rows) if known else None,
        _checkpoint(model),
        _saved(model),
        steps,
        f"{sum(rows)} tokens",
    )


def _batches(count: int, batch: int) -> list[int]:
    """Rows of each step of a pass over so many."""
    return [min(batch, count - start) for start in range(0, count, batch)]


def _ppo_stage(
    recipe: Recipe, roles: Roles, lengths: Lengths, division: Division, memory: int, on_cpu: bool, heap: float
) -> StagePlan:
    config, new, learners = recipe.ppo, recipe.rollout.max_new_tokens, roles.learners
    policy, value = learners.policy, learners.value
    answered = [(prompt, prompt + new) for prompt in lengths.prompts]
    minibatch = -(-recipe.rollout.batch // config.minibatches)
    limit = lengths.limits[0] + new if lengths.limits[0] else 0
    rows, scored, passes = largest_pass(answered, minibatch, config.micro_tokens, limit, processes=division.processes)
    learning = [model for model in (policy, value) if model is not None]
    standing = _standing(division, [roles.base, roles.sft], learning, on_cpu)
    # Writing: as many rows at once as the memory takes, the longest prompts last.
    longest = lengths.longest_prompt
    gathered = {"gathered": division.gathered_bytes(policy)} if division.spread else {}
    held = 4 * division.trained_bytes(*learning) + division.weight_bytes(roles.sft, roles.base)
    fit = rows_that_fit(policy, longest + new, held=held + sum(gathered.values()), total=memory)
    written = min(fit, division.rows(recipe.rollout.batch))
    written = max(written, LEAST) if on_cpu else written
    most = sorted(lengths.prompts, reverse=True)[:: division.processes][:written]
    prompts = _even(sum(most) * written // len(most), written) if lengths.counted else [longest] * written
    writing = write_bytes(policy, prompts, longest + new - max(prompts), on_cpu=on_cpu)
    positions = KvCache(written, longest + new).positions
    cache = written * positions * cache_numbers(policy.config) * (2 if policy.precision == "bf16" else 4)
    rollout = standing | gathered | {"keys and values": cache, "activations": max(writing - cache, 0)}

    reading = read_bytes(roles.base, rows, scored)
    score = standing | {"activations": reading + 8 * scored * policy.config.hidden_size}
    if division.spread:
        score |= {"gathered": _gathered_to_score(division, roles)}

    def passing(many: bool) -> Iterator[_Pass]:
        """Of policy and critic in turn."""
        if value is None or value.shared:
            yield _Pass(0, value or policy, rows, scored, many)
        else:
            yield _Pass(0, policy, rows, scored, many)
            yield _Pass(division.gradient_bytes(policy), value, rows, scored, many)

    held_most = _beside_gradients(division, passing, learning, passes, on_cpu)
    update = standing | _activations(held_most, heap)
    mean = sum(lengths.prompts) / len(lengths.prompts)
    warmup = min(config.critic_warmup, config.steps)
    of_all, of_trained = (
        (torch.full((count,), round(mean) + new), count * new)
        for count in (
            division.rows(recipe.rollout.batch),
            sum(map(division.rows, _parts(recipe.rollout.batch, config.minibatches))),
        )
    )
    flops = {
        critic_only: rollout_flops(learners, of_all, of_trained, updates=(config.epochs, 1), critic_only=critic_only)
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


def _parts(count: int, parts: int) -> list[int]:
    """Rows of each minibatch, as `Tensor.tensor_split` cuts them."""
    return [count // parts + (place < count % parts) for place in range(parts)]


def _standing(division: Division, frozen: Sequence[LanguageModel], learning: Sequence[Any], on_cpu: bool) -> Parts:
    """What a stage holds throughout. With adapters, the roles share the weights below them."""
    gradients = division.gradient_bytes(*learning)
    weights = division.weight_bytes(*frozen, *learning)
    moments = 2 * division.trained_bytes(*learning)
    parts = {"weights": weights, "gradients": gradients, "optimizer": moments}
    return parts | _libraries(on_cpu)


def _libraries(on_cpu: bool) -> Parts:
    return {"libraries": LIBRARIES} if on_cpu else {}


def _start(roles: Roles, division: Division, on_cpu: bool) -> dict[str, Parts]:
    """Before weights are spread they are whole: of the base that is loaded, then of the fp32 copy that is trained."""
    loaded = division.gathered_bytes(roles.base)
    if roles.trained is None or isinstance(roles.trained, AdaptedModel):
        return {"start": {"gathered": loaded} | _libraries(on_cpu)}
    copied = division.gathered_bytes(roles.trained)
    return {"start": {"weights": division.weight_bytes(roles.base), "gathered": copied} | _libraries(on_cpu)}


def _export(division: Division, model: LanguageModel, standing: Parts) -> dict[str, Parts]:
    """The trained model is gathered to be written; adapters are whole."""
    if isinstance(model, AdaptedModel):
        return {}
    return {"export": standing | {"gathered": division.gathered_bytes(model)}}


def _gathered_to_score(division: Division, roles: Roles) -> int:
    """The most of what passes without gradients gather: of policy or critic, or two heads and the SFT model or base."""
    own = [division.groups(model) for model in (roles.learners.policy, roles.learners.value) if model is not None]
    pair = [division.groups(model) for model in (roles.sft, roles.base)]
    alone = max(groups.head + groups.forward for groups in own)
    return max(alone, sum(groups.head for groups in pair) + max(groups.forward for groups in pair))


@dataclass(frozen=True)
class _Pass:
    """A pass with gradients. before: bytes of gradients that are there before it; many: all are, since there are
    several passes."""

    before: int
    model: LanguageModel | ValueModel
    rows: Sequence[int]
    scored: int
    many: bool

    def held(self, division: Division) -> tuple[int, int]:
        """Bytes (activations, what is gathered) of the stretch that holds most."""
        peaks = train_peaks(self.model, self.rows, self.scored, gradients=self.many)
        return max(((held, division.gathered(self.model, name)) for name, held in peaks.items()), key=sum)


def _beside_gradients(
    division: Division,
    passing: Callable[[bool], Iterable[_Pass]],
    learning: Sequence[Any],
    passes: int,
    on_cpu: bool,
) -> tuple[int, int]:
    """The most bytes beside weights, gradients and moments (activations, what is gathered), of passes and of the
    optimizers' steps.

    Where a minibatch is one pass, gradients appear as activations go; those of spread weights come in parts, which are
    counted as there.
    """
    one = passes == 1 and not any(map(division.trains_spread, learning))
    whole = division.gradient_bytes(*learning) if one else 0
    found = []
    for each in passing(not one):
        activations, gathered = each.held(division)
        found.append((activations + (each.before if one else 0) - whole, gathered))
    most = max(found, key=sum)
    after = max(max(_stepping(division, model, on_cpu), division.adding_up(model)) for model in learning)
    return most if sum(most) >= after else (after, 0)


def _stepping(division: Division, model: Any, on_cpu: bool) -> int:
    """An optimizer's own, where it is none of torch's fused ones, which take nothing: two numbers for each of the
    largest weight; on a GPU one for each of all, which are stepped at once, unless they are spread."""
    one_by_one = on_cpu or division.trains_spread(model)
    return 2 * division.largest_bytes(model) if one_by_one else division.trained_bytes(model)


def _activations(held: tuple[int, int], heap: float) -> Parts:
    activations, gathered = held
    parts = {"activations": activations, "heap": round(heap * activations)}
    return parts | ({"gathered": gathered} if gathered else {})


def _checkpoint(*models: Any) -> int:
    """Weights, and two moments of what is trained."""
    return sum(_saved(model) for model in models) + 2 * Division().trained_bytes(*models)


def _saved(model: Trained) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.weights().values())


# ---- what to change


@dataclass(frozen=True)
class Change:
    """keys: of the recipe, as `--set` takes them. words: what it costs."""

    keys: Mapping[str, Any]
    words: str


def changes(recipe: Recipe, processes: int = 1) -> list[Change]:
    """What takes less memory than this recipe in so many processes, the cheapest in quality first."""
    model, ppo, rollout = recipe.model, recipe.ppo, recipe.rollout
    found = []
    if processes > 1 and model.sharding == "none":
        found.append(Change({"model.sharding": "full"}, "the same result; weights are gathered for each pass"))
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
    known = {
        " ".join(f"{key}={_word(value)}" for key, value in c.keys.items()): c
        for c in changes(planned.recipe, planned.processes)
    }
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
        if planned.on_device * least <= planned.memory:
            return Advice(peaks, known, tuple(taken), least)
    return Advice(peaks, known, None, least)


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _again(planned: MemoryPlan, keys: Mapping[str, Any]) -> MemoryPlan:
    recipe = with_overrides(planned.recipe, keys)
    return plan(recipe, planned.lengths, planned.memory, planned.device, planned.processes)
