"""What a stage is: the one registry that plan, execution, identity, arms, sweeps and reports read. No torch.

A new method is one entry in KINDS and the function that its `run` names (docs/architecture.md). What enters a stage's
id is here too: data, items and models enter by their content, which the run adds, so paths are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from hashlib import sha256
from pkgutil import resolve_name
from typing import Any

from srppo.config import Recipe, decisive, is_embedded, with_overrides
from srppo.data.chat import template_text
from srppo.errors import ConfigError

SHARES = (1.0, 1 / 4, 1 / 16, 1 / 64, 1 / 256)
"""Of the compute of SFT and PPO together, that longer SFT is trained for: the whole is "equal compute"; of all of them
development items pick "best on dev". Geometric, because the best number of epochs on few demonstrations is far below
what PPO's compute would pay for, and may be no longer than SFT itself; a step along the longest run is no substitute,
since its learning rate would still be near the peak."""
EQUAL, CHOSEN = "longer SFT, equal compute", "longer SFT, best on dev"
DECODINGS = ("greedy", "sampled")
SCORE = ("kind", "length_norm", "token_clip", "clip", "at_limit", "limit_penalty")
"""Keys of the reward that decide what a whole response is paid by itself."""

OBJECTIVE = ("kind", "token_clip", "anchor", "beta")
"""Keys of the reward that decide the optimum a token at a time."""
SHARED = ("optimizer", "max_grad_norm", "max_kl")
"""Keys of PPO by which on-policy distillation is trained too."""


@dataclass(frozen=True)
class Kind:
    """One kind of stage.

    run: `module:function`, imported when the stage runs; it takes (PreparedRun, Workbench, stages by the kinds that had
    to be done before) and returns the figures to commit. parents: those kinds. reads: sections and `section.key`s of
    the recipe that enter the id. label: its arm in tables and sweeps, None where it is none. check: `module:function`
    that raises ConfigError for a reward (RewardConfig) that the kind cannot use. files: folders of the result.
    share: it starts from the base anew and trains for this share of its parents' compute. keys: of the recipe, that it
    sets for itself. decodings: under which its answers to test items are known.
    """

    name: str
    run: str
    reads: tuple[str, ...]
    parents: tuple[str, ...] = ()
    label: str | None = None
    check: str | None = None
    files: tuple[str, ...] = ()
    needs_prompts: bool = False
    needs_items: bool = False
    share: float | None = None
    keys: Mapping[str, Any] = field(default_factory=dict)
    decodings: tuple[str, ...] = DECODINGS

    def function(self) -> Callable[..., dict[str, Any]]:
        """What runs it."""
        return resolve_name(self.run)  # type: ignore[no-any-return]

    def recipe(self, recipe: Recipe) -> Recipe:
        """A run's recipe as this kind reads it."""
        return with_overrides(recipe, self.keys) if self.keys else recipe


def longer(share: float) -> str:
    """The kind of longer SFT that trains for a share of the compute: `longer-sft-1`, `longer-sft-1/4`."""
    return f"longer-sft-{Fraction(share)}"


_RUN, _POLICY, _EXTRA, _CHOOSE = (f"srppo.stages.{name}" for name in ("run", "policy", "extrapolation", "resampling"))
_SELF = "srppo.stages.self_training"
_PPO = ("rollout", "reward", "ppo", "eval")
_SELF_READS = (
    *(f"sft.{key}" for key in ("batch", "optimizer", "lr", "schedule", "warmup", "weight_decay", "max_grad_norm")),
    "methods.self_epochs",
    "eval",
)
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("base", f"{_RUN}:untrained_stage", ("eval",), label="base"),
        Kind("sft", f"{_RUN}:sft_stage", ("sft", "eval"), label="SFT", files=("model",)),
        Kind("given-sft", f"{_RUN}:untrained_stage", ("eval",), label="SFT"),
        *(
            Kind(
                longer(share),
                f"{_RUN}:sft_stage",
                ("sft", "eval"),
                parents=("sft", "ppo"),
                label=EQUAL if share == 1 else None,
                files=("model",),
                share=share,
            )
            for share in SHARES
        ),
        Kind(
            "chosen-sft",
            f"{_RUN}:chosen_sft_stage",
            ("eval.samples",),
            parents=tuple(map(longer, SHARES)),
            label=CHOSEN,
            files=("model",),
        ),
        Kind(
            "extrapolated",
            f"{_EXTRA}:extrapolated_stage",
            ("methods.alphas", "eval.samples", "eval.metric", "eval.limit"),
            parents=("sft",),
            label="weight extrapolation",
            files=("model",),
        ),
        Kind(
            "decoded",
            f"{_EXTRA}:decoded_stage",
            (*(f"reward.{key}" for key in OBJECTIVE), "eval.samples"),
            parents=("sft",),
            label="decode-time extrapolation",
            check=f"{_EXTRA}:check_decodable",
            needs_items=True,
        ),
        Kind(
            "samples",
            f"{_CHOOSE}:samples_stage",
            (*(f"reward.{key}" for key in SCORE), "methods.samples"),
            parents=("sft",),
            check=f"{_CHOOSE}:check_ranks",
            files=("samples",),
            needs_items=True,
        ),
        Kind(
            "vote",
            f"{_CHOOSE}:vote_stage",
            (),
            parents=("samples",),
            label="majority vote",
            needs_items=True,
            decodings=("greedy",),
        ),
        Kind(
            "weighted-vote",
            f"{_CHOOSE}:weighted_vote_stage",
            ("reward.anchor", "reward.beta"),
            parents=("samples",),
            label="weighted vote",
            check=f"{_CHOOSE}:check_resamples",
            needs_items=True,
            decodings=("greedy",),
        ),
        Kind(
            "resampled",
            f"{_CHOOSE}:resampled_stage",
            ("reward.anchor", "reward.beta", "eval.samples"),
            parents=("samples",),
            label="resampling",
            check=f"{_CHOOSE}:check_resamples",
            needs_items=True,
            decodings=("sampled",),
        ),
        Kind("best-of-n", f"{_CHOOSE}:best_of_n_stage", ("eval.samples",), ("samples",), "best-of-n", needs_items=True),
        Kind(
            "distil",
            f"{_POLICY}:distil_stage",
            ("rollout", *(f"reward.{key}" for key in OBJECTIVE), "distil", *(f"ppo.{key}" for key in SHARED), "eval"),
            parents=("sft",),
            label="on-policy distillation",
            check=f"{_EXTRA}:check_decodable",
            files=("model",),
            needs_prompts=True,
        ),
        Kind(
            "prompt-samples",
            f"{_SELF}:prompt_samples_stage",
            ("methods.self_prompts", "methods.self_samples"),
            parents=("sft",),
            files=("samples",),
            needs_prompts=True,
        ),
        Kind(
            "self-distilled",
            f"{_SELF}:self_distilled_stage",
            _SELF_READS,
            parents=("prompt-samples",),
            label="self-distilled",
            files=("model",),
            needs_prompts=True,
        ),
        Kind(
            "rejection-ft",
            f"{_SELF}:rejection_ft_stage",
            (*(f"reward.{key}" for key in SCORE), *_SELF_READS),
            parents=("prompt-samples",),
            label="rejection FT",
            check=f"{_CHOOSE}:check_ranks",
            files=("model",),
            needs_prompts=True,
        ),
        *(
            Kind(
                name,
                f"{_POLICY}:ppo_stage",
                _PPO,
                parents=(start,),
                label=label,
                files=("model",),
                needs_prompts=True,
                keys=keys,
            )
            for name, start, label, keys in (
                ("brevity", "sft", "brevity", {"reward.kind": "brevity"}),
                ("shuffled", "sft", "shuffled", {"reward.kind": "shuffled"}),
                ("ppo", "sft", "SRPPO", {}),
                ("ppo-chosen", "chosen-sft", "SRPPO from chosen SFT", {}),
                ("ppo-equal", longer(1), "SRPPO from equal-compute SFT", {}),
            )
        ),
    )
}
"""Every kind by name, in the order of tables; who needs `sft` is served by `given-sft` where the recipe names one."""
STARTS = frozenset(KINDS[name].parents[0] for name in ("ppo", "ppo-chosen", "ppo-equal"))
"""SFT models that PPO may start from."""


def kind_of(name: str, recipe: Recipe) -> Kind:
    """The kind that stands for `name` under a recipe: an SFT model that is given is only measured."""
    return KINDS["given-sft" if name == "sft" and recipe.model.sft is not None else name]


def in_order(names: Iterable[str]) -> list[str]:
    """These kinds and all that they need, parents first, each once."""
    found: dict[str, None] = {}
    for name in names:
        found |= dict.fromkeys([*in_order(KINDS[name].parents), name])
    return list(found)


_LIKE_SFT = ("sft", "1e-5 is common for 1-8B models")
_RATES = {"distil": ("distil", "ten times ppo.lr is a start"), "self-distilled": _LIKE_SFT, "rejection-ft": _LIKE_SFT}
"""Kinds whose learning rate a recipe need not have said by then, its section, and what to say where it has not."""


def check(names: Iterable[str], recipe: Recipe) -> None:
    """Raises ConfigError for a recipe under which one of these kinds, or of those that they need, has no meaning."""
    for name in in_order(names):
        kind = KINDS[name]
        if kind.share and recipe.model.sft is not None:
            raise ConfigError(
                "--baselines compares with SFT at the compute of SFT and PPO together, and what the given model.sft "
                "took is not known; leave out --baselines, or leave out model.sft so that it is trained here"
            )
        if name in _RATES and not is_embedded(recipe.model.base):
            section, hint = _RATES[name]
            if getattr(recipe, section).lr == getattr(Recipe(), section).lr:
                raise ConfigError(
                    f"model.base is {recipe.model.base!r} but {section}.lr is not set, by which {kind.label} is "
                    f"trained; its default suits the embedded models only; {hint}"
                )
        if kind.check:
            resolve_name(kind.check)(kind.recipe(recipe).reward)


# ---- identity

_ELSEWHERE = {  # paths, and what PPO alone reads
    "data": ("demonstrations", "prompts"),
    "eval": ("every", "items", "curve"),
}
_CRITIC = (
    "critic",
    "value_coef",
    "value_lr",
    "value_clip",
    "gamma",
    "lam",
    "lam_length",
    "critic_lam",
    "critic_warmup",
)  # keys of ppo that RLOO does not read
_ONLY_PPO = ("prompts_size", "overlap", "overlap_share")  # keys of data that SFT never sees


def stage_settings(recipe: Recipe, name: str) -> dict[str, Any]:
    """Settings that decide the outcome of a stage of this kind, beside its parents and data."""
    kind = KINDS[name]
    recipe = kind.recipe(recipe)
    dump = decisive(recipe.model_dump(mode="json"))
    for section, keys in _ELSEWHERE.items():
        dump[section] = {k: v for k, v in dump[section].items() if k not in keys}
    if not recipe.data.noise_rate:
        dump["data"] = {k: v for k, v in dump["data"].items() if k not in ("noise", "noise_dev")}  # there is none
    if recipe.rollout.server is None or name == "distil":  # whose samples are constants
        dump["rollout"].pop("importance_cap", None)
    if recipe.ppo.critic == "own":
        dump["ppo"].pop("value_coef", None)
    if recipe.ppo.advantage == "rloo":
        dump["ppo"] = {k: v for k, v in dump["ppo"].items() if k not in _CRITIC}
        if recipe.reward.at_limit != "zero":
            dump["reward"].pop("center", None)
    settings = {
        "seed": dump["seed"],
        "precision": dump["model"]["precision"],
        "kernels": dump["model"]["kernels"],
        "data": {k: v for k, v in dump["data"].items() if kind.needs_prompts or k not in _ONLY_PPO},
        "eval": {},
        "max_new_tokens": dump["rollout"]["max_new_tokens"],
    }
    if recipe.model.scoring is not None:
        settings["scoring"] = recipe.model.scoring
    if recipe.model.adapters != "none":
        settings["adapters"] = {k: v for k, v in dump["model"].items() if k == "adapters" or k.startswith("lora_")}
    if recipe.model.chat_template is not None:  # by its content, wherever it lies
        settings["chat_template"] = sha256(template_text(recipe.model.chat_template).encode()).hexdigest()
    if recipe.model.template_kwargs:
        settings["template_kwargs"] = dump["model"]["template_kwargs"]
    for read in kind.reads:
        section, _, key = read.partition(".")
        read_here = {key: dump[section][key]} if key in dump[section] else {}
        settings[section] = {**settings.get(section, {}), **read_here} if key else dump[section]
    if "ppo" in kind.reads:
        settings |= {"every": recipe.eval.every} | ({"curve": [*recipe.eval.curve]} if recipe.eval.curve else {})
    return settings
