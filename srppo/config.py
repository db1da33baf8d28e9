"""The recipe: every option of a run, its default, and what it does. All defaults are ours, none is the paper's.

A recipe is TOML with the sections below; `--set section.key=value` overrides it. What decides the outcome is here and
enters the stage's identity; device, folders, logging and timeouts do not (they are arguments of the commands).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
import textwrap
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from srppo.errors import ConfigError
from srppo.reward_kinds import COHERENT, REWARD_KINDS, described

CODE_EPOCH = 6  # raised when the same config would train to another result; part of every stage's id


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _word_none(cls, values: Any) -> Any:
        """On a command line `none` means None; a key that has the choice `none` means that."""
        if not isinstance(values, Mapping):
            return values
        choices = {key: get_args(field.annotation) for key, field in cls.model_fields.items()}
        return {k: "none" if v is None and "none" in choices.get(k, ()) else v for k, v in values.items()}


_TEMPLATE_OWN = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")


class ModelConfig(_Section):
    base: str = Field(
        "embedded:xs",
        description="base model: a folder, a hub name, a GGUF file, smollm2-135m-instruct (of a package), or "
        "embedded:xs|s|l (right answers shorter than talk) or "
        "embedded:long-xs (longer); xs-1, xs-2, long-xs-1 and long-xs-2 are further pretrainings",
    )
    sft: str | None = Field(None, description="an SFT model to start PPO from; none: train one")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast in the bodies; heads stay fp32")
    scoring: Literal["fp32", "bf16"] | None = Field(
        None, description="precision of the bodies of base and SFT model, where they are frozen; none: as precision"
    )
    kernels: Literal["auto", "triton", "torch", "reference"] = Field(
        "auto",
        description="log-prob kernels; auto: triton on a GPU, else torch; reference: slow, plain, the definition",
    )
    adapters: Literal["none", "lora"] = Field(
        "none",
        description="lora: base, SFT model, policy and critic share one copy of the base's weights, frozen in the "
        "checkpoint's own precision, and LoRA adapters over it are trained (needs srppo[peft]); none: all weights",
    )
    lora_rank: int = Field(16, ge=1, description="rank of the adapters")
    lora_alpha: float = Field(32.0, gt=0, description="what they add is multiplied by lora_alpha / lora_rank")
    lora_targets: tuple[str, ...] = Field(
        ("all-linear",),
        min_length=1,
        description="layers that get one, by the ends of their names; all-linear: every linear layer but the head",
    )
    activation_checkpointing: bool = Field(
        False,
        description="work out activations again in the backward pass: less memory, a third more work, on a CPU more",
    )
    sharding: Literal["none", "full"] = Field(
        "none",
        description="full: each process of a run holds a part of all weights, gradients and optimizer states (FSDP2); "
        "one process holds all of them in either case",
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with a hub model")
    allow_pickle: bool = Field(False, description="load weights that are not safetensors")
    chat_template: str | None = Field(None, description="file with a chat template to use; none: the tokenizer's own")
    template_kwargs: dict[str, Any] = Field(
        {}, description="variables of every rendering by the chat template, such as enable_thinking = false"
    )

    @field_validator("lora_targets", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("template_kwargs")
    @classmethod
    def _names(cls, value: dict[str, Any]) -> dict[str, Any]:
        if wrong := [key for key in value if not key.isidentifier() or key in _TEMPLATE_OWN]:
            raise ValueError(f"{', '.join(wrong)} cannot be set: give names of the template's own variables")
        return value


class DataConfig(_Section):
    demonstrations: tuple[str, ...] = Field(
        ("embedded",),
        description="files, folders or hub sets with answers; embedded: in the style of an embedded model.base, else "
        "short; or embedded:short, embedded:long",
    )
    prompts: tuple[str, ...] = Field(
        (),
        description="files, folders, hub sets, embedded:GROUP of tasks (embedded: of demonstrated and prompted); "
        "answers in them are not read; none: embedded, with embedded data",
    )
    size: int | None = Field(
        None,
        ge=1,
        description="demonstrations used: a prefix of one permutation a seed; none: all, of the embedded ones 96",
    )
    prompts_size: int | None = Field(None, ge=1, description="prompts used, likewise; none: all")
    held_out: float = Field(0.05, ge=0, lt=1, description="share of demonstrations kept out of SFT for answer NLL")
    noise: Literal[
        "none",
        "derangement",
        "derangement-across",
        "token-corruption",
        "truncation",
        "wrong-task",
        "near-miss",
        "base-answers",
    ] = Field(
        "none",
        description="wrong answers in demonstrations: of another row of the task | of another task's | words of others "
        "| cut | as another task would have it | one small edit | what the base says",
    )
    noise_rate: float = Field(0.0, ge=0, le=1, description="share of the demonstrations used that get one; nested")
    noise_dev: bool = Field(
        False, description="development items get it too: what chooses a step is no cleaner than what is trained on"
    )
    overlap: Literal["any", "minimum"] = Field("any", description="minimum: drop prompts that resemble SFT prompts")
    overlap_share: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of prompts that are the demonstrations' own, the others unlike them; none: as they come",
    )
    turns: Literal["last", "all"] = Field(
        "last", description="answers of a conversation that are trained: the last one, or all that follow a user's turn"
    )
    max_prompt_tokens: int = Field(512, ge=1, description="longer prompts are reported and left out")
    max_tokens: int = Field(1024, ge=2, description="prompt and answer; longer answers are cut and counted")
    system: str | None = Field(None, description="system message put before each prompt")

    @field_validator("demonstrations", "prompts", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if self.noise == "none" and self.noise_rate:
            raise ValueError(
                f"noise_rate is {self.noise_rate:g} but noise is none; set data.noise to a kind, or rate 0"
            )
        if self.overlap == "minimum" and self.overlap_share:
            raise ValueError(
                f"overlap = minimum wants no prompt of a demonstration, overlap_share = {self.overlap_share:g} wants "
                "some; leave one of them out"
            )
        return self


_OPTIMIZER = "torch's, or those with 8bit moments of bitsandbytes, where it is installed"
_MICRO = "tokens of a pass: prompts and answers in order of length; changes memory and rounding, not the loss"


class SftConfig(_Section):
    epochs: int = Field(1, ge=1, description="passes over the demonstrations")
    steps: int | None = Field(
        None, ge=1, description="optimizer steps instead of epochs, whatever the number of demonstrations; none: epochs"
    )
    batch: int = Field(8, ge=1, description="demonstrations an optimizer step")
    optimizer: Literal["adamw", "adafactor", "sgd", "adamw8bit", "paged-adamw8bit"] = Field(
        "adamw", description=_OPTIMIZER
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="after the warm-up")
    warmup: float = Field(0.1, ge=0, le=1, description="share of steps with rising learning rate")
    weight_decay: float = Field(0.0, ge=0, description="weight decay, as the optimizer has it")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping")
    micro_tokens: int = Field(4096, ge=1, description=_MICRO)


class RolloutConfig(_Section):
    batch: int = Field(96, ge=2, description="responses sampled a PPO step")
    per_prompt: int = Field(1, ge=1, description="of which to each prompt; must divide the batch, and RLOO needs 2")
    max_new_tokens: int = Field(48, ge=1, description="length limit of a response, EOS included")
    temperature: float = Field(1.0, gt=0, description="sampling temperature; rewards are always taken at 1")
    server: str | None = Field(
        None,
        description="a server that samples, with the OpenAI completions API and token ids, such as vllm serve: "
        "http://localhost:8000/v1; none: here",
    )
    server_timeout_s: float = Field(600.0, gt=0, description="seconds that the server has for one response")
    importance_cap: float = Field(
        2.0,
        ge=1,
        description="a server's tokens count by policy's over server's probability, at most so much; read with a "
        "server alone",
    )

    @field_validator("server")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"https?://[^/\s]+(/[^\s]*)?/v1/?", value):
            raise ValueError(f"{value!r} is no address of this API; give it whole, such as http://localhost:8000/v1")
        return value


class RewardConfig(_Section):
    kind: str = Field(COHERENT, description=described(REWARD_KINDS))
    placement: Literal["eos", "token"] = Field("eos", description="the sum at the last token, or each term at its own")
    length_norm: bool = Field(False, description="divide by the response's length in tokens")
    token_clip: float | None = Field(None, gt=0, description="clip each token's term to +-this, nats")
    clip: float | None = Field(None, gt=0, description="clip the sum to +-this, nats")
    at_limit: Literal["keep", "zero", "drop"] = Field(
        "keep",
        description="rollouts without EOS at the length limit: reward kept, set to the mean of the others (0 where "
        "center is none), or left out of the loss",
    )
    limit_penalty: float = Field(0.0, ge=0, description="subtracted from the reward of those rollouts, nats")
    center: Literal["none", "batch", "critic"] = Field(
        "batch",
        description="batch: the mean return of the other rollouts is taken off (of the same prompt, where it has "
        "others) | critic: the critic starts at the first mean | none: the mean makes ending pay. RLOO is centred",
    )
    scale: bool = Field(True, description="divide reward - beta KL by its running standard deviation")
    anchor: Literal["sft", "base"] = Field("sft", description="the model the KL penalty pulls towards")
    beta: float = Field(1.0, ge=0, description="weight of the KL penalty; useful values are of order 1")
    kl: Literal["k1", "k2", "k3"] = Field(
        "k1", description="k1 in the reward; k2 (of the response) or k3 (of each token, biased) in the loss"
    )

    @field_validator("kind")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in REWARD_KINDS:
            raise ValueError(f"the kinds of reward are {', '.join(REWARD_KINDS)}")
        return value


class PpoConfig(_Section):
    steps: int = Field(20, ge=1, description="rollout batches")
    advantage: Literal["gae", "rloo"] = Field(
        "gae", description="gae: a critic; rloo: none, but the mean of the other responses to the prompt"
    )
    critic: Literal["own", "shared"] = Field(
        "own",
        description="own: the critic has weights of its own, an adapter where the policy is one | shared: a head on "
        "the policy's trunk, which both train",
    )
    value_coef: float = Field(0.1, gt=0, description="weight of the critic's loss in a shared trunk")
    epochs: int = Field(2, ge=1, description="passes over each batch")
    minibatches: int = Field(2, ge=1, description="optimizer steps a pass")
    optimizer: Literal["adam", "adafactor", "sgd", "adam8bit", "paged-adam8bit"] = Field(
        "adam", description=f"of policy, critic and distillation: {_OPTIMIZER}"
    )
    lr: float = Field(3e-4, gt=0, description="policy learning rate")
    value_lr: float = Field(5e-4, gt=0, description="critic learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="of both learning rates")
    warmup: float = Field(0.0, ge=0, le=1, description="share of steps with rising learning rate")
    gamma: float = Field(1.0, gt=0, le=1, description="discount; RLOO has none")
    lam: float = Field(0.95, ge=0, le=1, description="GAE lambda")
    lam_length: float | None = Field(
        None, gt=0, description="lambda by length instead: 1 - 1/(this x tokens of the response); none: lam"
    )
    critic_lam: float | None = Field(
        None, ge=0, le=1, description="lambda of the critic's targets; none: the policy's own"
    )
    clip: float = Field(0.2, gt=0, description="policy ratio clip")
    value_clip: float | None = Field(0.2, gt=0, description="value clip, in units of the scaled reward")
    whiten: bool = Field(True, description="advantages to mean 0 and deviation 1 over the batch")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping, policy and critic each")
    critic_warmup: int = Field(0, ge=0, description="first steps that train the critic only; RLOO has none")
    target_kl: float | None = Field(
        None, gt=0, description="stop a step's passes once KL(old, new) a token exceeds this"
    )
    max_kl: float = Field(100.0, gt=0, description="KL to the SFT model, nats a response, beyond which a run diverged")
    micro_tokens: int = Field(4096, ge=1, description=_MICRO)
    checkpoint_every: int = Field(10, ge=1, description="steps between checkpoints")

    @field_validator("value_clip", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return None if value == "none" else value  # TOML has no word for it, and the default is a number


class DistilConfig(_Section):
    """On-policy distillation; optimizer, max_grad_norm, max_kl and what changes no result are those of `ppo`."""

    steps: int = Field(20, ge=1, description="rollout batches of on-policy distillation, an optimizer step each")
    lr: float = Field(1e-3, gt=0, description="its learning rate at the start, which falls linearly")


class MethodsConfig(_Section):
    """What PPO is compared with beside longer SFT; read by those stages alone."""

    alphas: tuple[float, ...] = Field(
        (0.25, 0.5, 1.0, 2.0, 4.0),
        min_length=1,
        description="weight extrapolation sft + alpha (sft - base), below 0 back towards the base: development items "
        "choose one of these",
    )
    samples: int = Field(96, ge=2, description="samples of the SFT model an item, for votes, resampling and best-of-n")
    self_prompts: int = Field(256, ge=1, description="self-training: so many of PPO's prompts, in PPO's order")
    self_samples: int = Field(
        16, ge=2, description="answers of the SFT model to each, of which the majority's or the best is trained on"
    )
    self_epochs: int = Field(4, ge=1, description="passes over those; development items choose one of them")

    @field_validator("alphas", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int | float) else value

    @field_validator("alphas")
    @classmethod
    def _distinct(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(value)) < len(value) or min(value) <= -1 or 0 in value:
            raise ValueError("alphas are distinct, above -1 (the base) and not 0 (the SFT model itself)")
        return value


class EvalConfig(_Section):
    items: str | None = Field(
        None,
        description="jsonl of prompt, answer (or IFEval's instruction_id_list and kwargs), group, split (dev|test); "
        "none: embedded items with embedded data",
    )
    every: int = Field(5, ge=0, description="PPO steps between measurements of development items; 0: at the end only")
    keep: Literal["best", "last"] = Field("best", description="which measured step is kept, in every arm")
    metric: Literal["accuracy", "nll"] = Field("accuracy", description="greedy exact match, or held-out answer NLL")
    samples: int = Field(2, ge=1, description="samples an item at temperature 1, in final figures")
    limit: int | None = Field(None, ge=1, description="development items and held-out rows used during training")
    curve: tuple[int, ...] = Field(
        (),
        description="PPO steps after which test items are answered too, with the KL to the SFT model on those answers: "
        "points of a curve over KL, which choose nothing",
    )

    @field_validator("curve", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) else value

    @field_validator("curve")
    @classmethod
    def _rising(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted({step for step in value if step > 0}):
            raise ValueError("steps are above 0 and rise, for example [5, 10, 20]")
        return value


class Recipe(_Section):
    """Everything that decides the outcome of a run."""

    seed: int = Field(0, ge=0, description="root of every random choice")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    sft: SftConfig = SftConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    ppo: PpoConfig = PpoConfig()
    distil: DistilConfig = DistilConfig()
    methods: MethodsConfig = MethodsConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.ppo.minibatches > self.rollout.batch:
            raise ValueError(
                f"ppo.minibatches ({self.ppo.minibatches}) exceeds rollout.batch ({self.rollout.batch}); "
                "a minibatch needs at least one rollout"
            )
        if self.rollout.batch % self.rollout.per_prompt:
            raise ValueError(
                f"rollout.per_prompt ({self.rollout.per_prompt}) does not divide rollout.batch ({self.rollout.batch}); "
                "each prompt of a step gets as many responses"
            )
        if self.data.noise_dev and self.eval.metric == "nll":
            raise ValueError(
                "data.noise_dev changes development items, and eval.metric = nll chooses by held-out answers, which "
                "stay as they are; leave one of them out"
            )
        if self.eval.curve and self.eval.curve[-1] > self.ppo.steps:
            raise ValueError(
                f"eval.curve names step {self.eval.curve[-1]}, and PPO ends at ppo.steps ({self.ppo.steps}); leave out "
                "what comes later"
            )
        if self.ppo.advantage == "rloo":
            self._fits_rloo()
        if self.model.sharding == "full" and self.model.adapters == "none":
            self._fits_sharding()
        if self.data.max_prompt_tokens >= self.data.max_tokens:
            raise ValueError(
                f"data.max_prompt_tokens ({self.data.max_prompt_tokens}) must be below data.max_tokens "
                f"({self.data.max_tokens}), or no answer fits"
            )
        return self

    def _fits_sharding(self) -> None:
        for section in ("sft", "ppo"):
            if (name := getattr(self, section).optimizer) not in ("adam", "adamw", "sgd"):
                raise ValueError(
                    f"{section}.optimizer = {name} keeps what cannot be divided over processes: with "
                    "model.sharding = full take adamw (in sft), adam (in ppo) or sgd, or train adapters "
                    "(model.adapters = lora)"
                )

    def _fits_rloo(self) -> None:
        if self.rollout.per_prompt < 2:
            raise ValueError(
                "ppo.advantage = rloo compares the responses to one prompt: set rollout.per_prompt to 2 or more "
                f"(found {self.rollout.per_prompt}), for example 4"
            )
        if self.ppo.gamma != 1 or self.ppo.critic_warmup:
            raise ValueError(
                "ppo.advantage = rloo takes the response as one action and has no critic: leave ppo.gamma at 1 and "
                f"ppo.critic_warmup at 0 (found {self.ppo.gamma:g} and {self.ppo.critic_warmup})"
            )


def all_keys() -> list[str]:
    """Every option as `section.key`, in recipe order."""
    keys = []
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, _Section):
            keys += [f"{name}.{key}" for key in section.model_fields]
        else:
            keys.append(name)
    return keys


def key_lines(width: int = 80) -> Iterator[str]:
    """Each key with its default, and indented below it its choices, where they are few, and what it does."""
    for name in all_keys():
        *sections, key = name.split(".")
        fields = Recipe.model_fields
        for section in sections:
            fields = type(fields[section].default).model_fields
        field = fields[key]
        yield f"{name} = {'none' if field.default is None else json.dumps(field.default)}"
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        for text in filter(None, (" | ".join(choices), field.description)):
            yield from (f"    {line}" for line in textwrap.wrap(text, width - 4, break_on_hyphens=False))


def load_recipe(path: Path | None, overrides: Iterable[str] = (), *, ppo: bool = True) -> Recipe:
    """A recipe from a TOML file (None: the embedded default) and `section.key=value` overrides, validated.

    `ppo` False: the recipe is for SFT alone. Relative paths are taken from the working directory, as everywhere else.
    Raises ConfigError in one line: unknown keys with the nearest match, wrong values with what is allowed.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"recipe {path} does not exist; give a TOML file, or none for the embedded default"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"recipe {path} cannot be read: {error}") from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"recipe {path} is not valid TOML: {error}") from None
    _refuse_unknown(_flatten(tree), where=str(path))
    for override in overrides:
        key, value = parse_override(override)
        _assign(tree, key, value)
    recipe = build_recipe(tree)
    _require_explicit(recipe, tree, ppo)
    return recipe


def _require_explicit(recipe: Recipe, tree: Mapping[str, Any], ppo: bool) -> None:
    """The default data and learning rates suit embedded models of 1M parameters; for others they must be said."""
    if is_embedded(recipe.model.base):
        return
    needed = ["data.demonstrations"]
    needed += ["sft.lr"] if recipe.model.sft is None else []
    needed += ["ppo.lr", "ppo.value_lr"] if ppo else []
    missing = [key for key in needed if key.split(".")[1] not in tree.get(key.split(".")[0], {})]
    if missing:
        raise ConfigError(
            f"model.base is {recipe.model.base!r} but {', '.join(missing)} not set; the defaults suit the embedded "
            "models only. Common for 1-8B models: sft.lr = 1e-5, ppo.lr = 1e-6, ppo.value_lr = 5e-6"
        )


def is_embedded(spec: str) -> bool:
    """Whether a model spec names one of the embedded bases: `embedded` or `embedded:size`."""
    return spec == "embedded" or spec.startswith("embedded:")


GONE = ("micro_batch",)  # rows of a pass, before passes went by tokens


def build_recipe(tree: Mapping[str, Any]) -> Recipe:
    """Validate a nested mapping; ConfigError in one line for the first problem. Of records, keys that are gone and
    decided nothing are passed over; in a file or on a command line they are unknown."""
    known = {
        name: {key: value for key, value in section.items() if key not in GONE}
        if isinstance(section, Mapping)
        else section
        for name, section in tree.items()
    }
    try:
        return Recipe.model_validate(known)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        found = "" if isinstance(problem.get("input"), Mapping) or not key else f", found {problem['input']!r}"
        message = problem["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{key + ': ' if key else ''}{message}{found}") from None


def with_overrides(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """A copy with `section.key` -> value replaced, validated again."""
    tree = recipe.model_dump(mode="json")
    _refuse_unknown(overrides, where="overrides")
    for key, value in overrides.items():
        _assign(tree, key, value)
    return build_recipe(tree)


def parse_override(text: str, option: str = "--set") -> tuple[str, Any]:
    """`a.b=value` to (key, value); the value is read as TOML, or taken as a plain string when it is none.

    `option`: where it was given, for errors. Raises ConfigError for an unknown key or no value.
    """
    key, separator, raw = text.partition("=")
    key, raw = key.strip(), raw.strip()
    if not separator or not key:
        raise ConfigError(f"{option} {text!r} is not of the form section.key=value, for example {option} ppo.lr=1e-5")
    _refuse_unknown([key], where=option)
    return key, parse_value(raw)


def parse_value(raw: str) -> Any:
    """A TOML value, `none` for None, or the text itself."""
    if raw.lower() in ("none", "null"):
        return None
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return raw


def to_toml(recipe: Recipe) -> str:
    """The recipe, every option spelled out; None, which TOML lacks, is left out, or "none" where a default is set."""
    lines: list[str] = []
    for name, section in recipe.model_dump(mode="json").items():
        if isinstance(section, dict):
            defaults = Recipe.model_fields[name].default
            unset = {key for key, value in section.items() if value is None and getattr(defaults, key) is None}
            lines += ["", f"[{name}]"]
            lines += [f"{key} = {_toml_value(value)}" for key, value in section.items() if key not in unset]
        else:
            lines.append(f"{name} = {_toml_value(section)}")
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml_value(key)} = {_toml_value(each)}" for key, each in value.items()) + " }"
    # JSON is TOML but for tables, None, escaped surrogates and a bare DEL.
    return json.dumps("none" if value is None else value, ensure_ascii=False).replace("\x7f", "\\u007f")


def canonical_json(value: Any) -> str:
    """One text for equal values: sorted keys, no spaces; the input of every hash."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


FREE: Mapping[str, Mapping[str, Any]] = {
    "model": {"activation_checkpointing": False, "sharding": "none"},
    "sft": {"micro_tokens": 4096},
    "rollout": {"server": "server", "server_timeout_s": 600.0},
    "ppo": {"micro_tokens": 4096, "checkpoint_every": 10},
}
"""Keys that change memory, rounding and what a stop costs, and never what a run is: wherever recipes are compared or
hashed they stand at these values (one that is none stays so), so that another micro-batch finds the finished stages and
goes on with the others."""


ADDED: Mapping[str, Mapping[str, Any]] = {
    "model": {"sharding": "none"},
    "sft": {"optimizer": "adamw"},
    "rollout": {"server": None, "server_timeout_s": 600.0, "importance_cap": 2.0},
    "ppo": {"optimizer": "adam"},
}
"""Keys that came after this epoch's first runs, with the default under which they change nothing: there they are left
out wherever recipes are compared or hashed, so ids, folders and registered plans of before hold."""


def decisive(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's tree with the keys of FREE at one value each, without those of ADDED at their defaults: equal for
    recipes that stand for one run."""
    found: dict[str, Any] = {}
    for name, section in tree.items():
        if not isinstance(section, Mapping):
            found[name] = section
            continue
        free = {k: value for k, value in FREE.get(name, {}).items() if section.get(k) is not None}
        added = ADDED.get(name, {})
        found[name] = {k: v for k, v in {**section, **free}.items() if k not in added or v != added[k]}
    return found


def free_settings(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says to the keys of FREE, by `section.key`."""
    return {f"{name}.{key}": getattr(getattr(recipe, name), key) for name, keys in FREE.items() for key in keys}


def recipe_id(recipe: Recipe) -> str:
    """Eight hex digits that name a recipe in folder names."""
    return hashlib.sha256(canonical_json(decisive(recipe.model_dump(mode="json"))).encode()).hexdigest()[:8]


def derive_seed(root: int, purpose: str, index: int = 0) -> int:
    """A seed in [0, 2^63) for one purpose; independent of the arm, so that arms are paired."""
    digest = hashlib.sha256(f"{root}/{purpose}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and (value or not prefix):
            if prefix == "" and key not in Recipe.model_fields:
                keys.append(key)
            else:
                keys += _flatten(value, f"{prefix}{key}.")
        else:
            keys.append(prefix + key)
    return keys


def _refuse_unknown(keys: Iterable[str], where: str) -> None:
    known = all_keys()
    sections = [name for name in Recipe.model_fields if name != "seed"]
    for key in keys:
        if key not in known and key not in sections and not key.startswith("model.template_kwargs."):
            near = difflib.get_close_matches(key, known + sections, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else "`srppo train --keys` lists all"
            raise ConfigError(f"unknown key {key!r} in {where}; {hint}")
        if key in sections:
            first = next(each for each in known if each.startswith(f"{key}."))
            raise ConfigError(f"{key!r} in {where} is a section, not a value; set one of its keys, e.g. {first}")


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[name] = value


EMBEDDED_SIZE = 96


def resolved(recipe: Recipe) -> Recipe:
    """Embedded demonstrations have the style of an embedded base. Unless said, embedded prompts come with them, and
    they are so many that SFT stays unfinished."""
    style, data = world_style(recipe), recipe.data
    if style == "long":
        given = tuple("embedded:long" if name == "embedded" else name for name in data.demonstrations)
        recipe = with_overrides(recipe, {"data.demonstrations": given})
    if style is None:
        return recipe
    size, prompts = data.size or EMBEDDED_SIZE, data.prompts or ("embedded",)
    return with_overrides(recipe, {"data.size": size, "data.prompts": prompts})


def world_style(recipe: Recipe) -> Literal["short", "long"] | None:
    """The style of the embedded demonstrations and items; None where the demonstrations are not these alone."""
    demonstrations = recipe.data.demonstrations
    if len(demonstrations) > 1 or not is_embedded(demonstrations[0]):
        return None
    decides = recipe.model.base if demonstrations == ("embedded",) else demonstrations[0]
    return "long" if decides.startswith("embedded:long") else "short"


FAINT = 0.05  # share of a terminal reward below which a token's advantage says nothing


def recipe_warnings(recipe: Recipe) -> list[str]:
    """Settings that are allowed and probably not meant."""
    reward, warnings = recipe.reward, []
    if reward.kl == "k3":
        warnings.append(
            "reward.kl = k3 in the loss is biased and ends elsewhere than the KL-regularised optimum; use k1 or k2"
        )
    if reward.anchor == "base" and reward.kind == COHERENT and reward.beta >= 1:
        warnings.append(
            f"with reward.anchor = base and beta = {reward.beta:g} the optimum is no sharper than the SFT model: "
            "nothing can be gained; use anchor = sft, or beta below 1"
        )
    ppo, limit = recipe.ppo, recipe.rollout.max_new_tokens
    if ppo.advantage == "gae" and reward.placement == "eos" and ppo.lam_length is None and 0 < ppo.lam * ppo.gamma < 1:
        reach = math.log(FAINT) / math.log(ppo.lam * ppo.gamma)
        if reach < limit / 2:
            warnings.append(
                f"with ppo.lam = {ppo.lam:g} a reward at the end reaches {reach:.0f} tokens back, of up to {limit}: "
                f"those before get less than {FAINT:.0%} of it while the critic knows nothing; set ppo.lam = 1, "
                "reward.placement = token, or ppo.advantage = rloo"
            )
    if reward.beta == 0:
        warnings.append(
            "reward.beta = 0 leaves the policy without an anchor; expect it to drift off the base's support"
        )
    if recipe.model.sft is not None and recipe.data.noise_rate:
        warnings.append(
            f"data.noise = {recipe.data.noise} changes what SFT learns, and model.sft = {recipe.model.sft} has learnt "
            "already: the noise reaches nothing here"
        )
    return warnings
