"""The sweeps we ship, each a question: functions from options to a `Sweep`. Their defaults are the embedded world's."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from srppo.ablations.spec import Ablation, Analysis, Arm, Comparison, Sweep, every, grid, label
from srppo.config import Recipe, is_embedded, world_style
from srppo.errors import ConfigError
from srppo.reward_kinds import COHERENT, REWARD_KINDS
from srppo.stages.kinds import KINDS
from srppo.statistics.tests import EXACT_FLIPS
from srppo.world import base_path

_BY_KIND = {
    kind.name: Arm(kind.label, kind.name, shares=kind.shares)
    for kind in KINDS.values()
    if kind.label and kind.name != "given-sft"  # stands for `sft` where the recipe names a model
}
BASE, SFT, LONGER, SRPPO = (_BY_KIND[name] for name in ("base", "sft", "longer-sft", "ppo"))
SHUFFLED = Arm("shuffled", "ppo", {"reward.kind": "shuffled"})
OPTIMUM = Arm("optimum (forecast)", "resampled")
NOT_TUNED = "no setting was tuned for any point: what holds at the default may be too much or too little elsewhere"


@dataclass(frozen=True)
class Options:
    """What a command line may change; empty means the sweep's own default.

    primary: (group of items, decoding) of the primary metric. axes: values by recipe key. arms: of a grid. margin: of
    the analysis.
    """

    recipe: Recipe
    primary: tuple[str, str] = ("unseen", "greedy")
    seeds: int | None = None
    axes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    quick: bool = False
    arms: tuple[Arm, ...] = ()
    margin: float = Analysis.margin

    @property
    def embedded(self) -> bool:
        """Whether the data are the embedded world's, for which the default axes are made."""
        return world_style(self.recipe) is not None

    @property
    def seed_list(self) -> tuple[int, ...]:
        """Consecutive from the recipe's own; 10 unless said, 3 for a quick look."""
        count = self.seeds or (3 if self.quick else 10)
        return tuple(range(self.recipe.seed, self.recipe.seed + count))

    def values(self, key: str, default: Sequence[Any], quick: Sequence[Any] | None = None) -> tuple[Any, ...]:
        """The values of an axis."""
        return self.axes.get(key) or tuple(quick if self.quick and quick is not None else default)

    def sweep(
        self,
        name: str,
        question: str,
        points: Sequence[Ablation],
        arms: Sequence[Arm] = (SFT, SRPPO),
        family: Sequence[Comparison] | None = None,
        *,
        axes: Sequence[str] | None = None,
        trend: str | None = None,
        scale: str = "linear",
        notes: Sequence[str] = (),
    ) -> Sweep:
        """A sweep of this recipe, its seeds and its primary metric.

        family: SRPPO minus every other arm; without SRPPO every arm minus SFT, or minus the first. axes: all that the
        points have values on. Without three points there is no trend.
        """
        if family is None:
            names = [arm.name for arm in arms]
            base = next((name for name in ("SRPPO", "SFT") if name in names), names[0])
            others = [name for name in names if name != base]
            lone = [each for name in others for each in every(points, name, base)]
            family = every(points, base, *others) if base == "SRPPO" else lone
        if self.recipe.model.sft is not None and (longer := [arm.name for arm in arms if arm.shares]):
            # What a given SFT model took is not known, so nothing can be trained at equal compute.
            arms = [arm for arm in arms if not arm.shares]
            family = [each for each in family if not {each.model.arm, each.baseline.arm} & set(longer)]
            notes = [*notes, f"{longer[0]} is left out: what the given model.sft took to train is not known"]
        if trend is not None and not all(_fits(point.values.get(trend), scale) for point in points):
            notes = [*notes, f"no slope along {trend}: its values are not all numbers that a slope can take"]
            trend = None
        test = f"{'exact ' if len(self.seed_list) <= EXACT_FLIPS else ''}sign-flip over seeds"
        analysis = Analysis(*self.primary, tuple(dict.fromkeys(family)), trend, scale, test, margin=self.margin)
        lie_on = tuple(dict.fromkeys(key for point in points for key in point.values) if axes is None else axes)
        return Sweep(
            name, question, self.recipe, lie_on, tuple(points), tuple(arms), self.seed_list, analysis, tuple(notes)
        )


def data_size(options: Options) -> Sweep:
    """Nested prefixes of the demonstrations; the same epochs at every size, and the same steps."""
    recipe = options.recipe
    if not options.embedded and not (options.axes and (recipe.sft.steps or recipe.data.size)):
        raise ConfigError(
            "data-size on your own data needs --sizes, and sft.steps or data.size for what `the same steps` are; the "
            "defaults are the embedded world's"
        )
    sizes = options.values("data.size", (4, 16, 64, 256), quick=(8, 32, 128))
    steps = recipe.sft.steps or max(1, round(recipe.sft.epochs * (recipe.data.size or 32) / recipe.sft.batch))
    budgets: dict[str, dict[str, Any]] = {"steps": {"sft.steps": steps}}
    if not options.quick:
        budgets["epochs"] = {"sft.steps": None}
    points = [
        Ablation(f"{label(size)}, same {budget}", {"data.size": size, **keys}, {"demonstrations": size, "same": budget})
        for budget, keys in budgets.items()
        for size in sizes
    ]
    return options.sweep(
        "data-size",
        "With how many demonstrations does SRPPO beat SFT, and longer SFT?",
        points,
        (SFT, SRPPO) if options.quick else (SFT, LONGER, SRPPO),
        trend="demonstrations",
        scale="log2",
        notes=(f"same steps: {steps} SFT steps at every size; same epochs: {recipe.sft.epochs}", NOT_TUNED),
    )


def noise(options: Options) -> Sweep:
    """Kinds of noise in the demonstrations' answers at nested rates; rate 0 is one point for all kinds."""
    kinds = options.values("data.noise", ("derangement", "token-corruption", "base-answers"), quick=("derangement",))
    rates = options.values("data.noise_rate", (0.0, 0.2, 0.4, 0.7), quick=(0.0, 0.3, 0.7))
    points = []
    for kind, rate in itertools.product(kinds, rates):
        keys = {"data.noise": kind if rate else "none", "data.noise_rate": rate}
        points.append(Ablation(f"{label(kind)} {label(rate)}", keys, {"rate": rate, "kind": kind}))
    tested = [point for point in points if point.values["rate"] or point.values["kind"] == kinds[0]]
    return options.sweep(
        "noise",
        "Does SRPPO beat SFT when answers in the demonstrations are wrong?",
        points,
        family=every(tested, "SRPPO", "SFT"),
        trend="rate",
        notes=("rate 0 is the same for every kind: it is run and tested once", NOT_TUNED),
    )


def model_scale(options: Options) -> Sweep:
    """A family of models with one tokenizer."""
    if not options.embedded and "model.base" not in options.axes:
        raise ConfigError("model-scale on your own data needs --axis model.base=A,B: models with one tokenizer")
    shipped = ("embedded:xs", "embedded:s", "embedded:l")
    bases = options.values("model.base", shipped, quick=shipped[:2])
    counts = [parameter_count(str(base)) for base in bases]
    known = None not in counts and len(set(counts)) == len(counts)
    points = [
        Ablation(str(base), {"model.base": base}, {"base": base} | ({"parameters": count} if known else {}))
        for base, count in zip(bases, counts, strict=True)
    ]
    unknown = "no slope along the number of parameters: it is known of local folders with safetensors, each another"
    return options.sweep(
        "model-scale",
        "At which model sizes does SRPPO beat SFT?",
        points,
        (BASE, SFT, SRPPO),
        every(points, "SRPPO", "SFT"),
        axes=("base",),
        trend="parameters" if known else None,
        scale="log2",
        notes=("learning rates are the same at every size: not tuned per scale", *(() if known else (unknown,))),
    )


def parameter_count(base: str) -> int | None:
    """Parameters of an embedded base or of a local folder, tied ones once; None for a hub name or without safetensors.

    The header of a safetensors file is 8 bytes of its length, little-endian, and JSON of each tensor's shape.
    """
    folder = base_path(base.partition(":")[2] or "xs") if is_embedded(base) else Path(base).expanduser()
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with open(path, "rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            shapes |= {name: tuple(each["shape"]) for name, each in header.items() if name != "__metadata__"}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # what is wrong with the model is said when it is loaded
    return sum(map(math.prod, shapes.values())) or None


COHERENT_PLAIN: Mapping[str, Any] = {
    "reward.kind": COHERENT,
    "reward.placement": "eos",
    "reward.length_norm": False,
    "reward.token_clip": None,
    "reward.clip": None,
}
_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "token-placed": {"reward.placement": "token"},
    "length-normalised": {"reward.length_norm": True},
    "clipped": {"reward.token_clip": 1.0},
}


def rewards(*, variants: bool = True) -> tuple[Arm, ...]:
    """An arm for each kind of reward, the coherent one first, and with `variants` for each way to put that one."""
    kinds = {kind.label: {"reward.kind": name} for name, kind in REWARD_KINDS.items()}
    changes = {**kinds, **(_VARIANTS if variants else {})}
    return tuple(Arm(name, "ppo", {**COHERENT_PLAIN, **changed}) for name, changed in changes.items())


def reward(options: Options) -> Sweep:
    """The coherent reward against its parts and variants, under one KL penalty."""
    points = [Ablation("all", {}, {})]
    arms = (SFT, *rewards(variants=not options.quick))
    _, coherent, *others = (arm.name for arm in arms)
    return options.sweep(
        "reward",
        "What does the coherent reward contribute, beside its parts and its variants?",
        points,
        arms,
        [
            *every(points, coherent, SFT.name, *others),
            *(each for name in others for each in every(points, name, SFT.name)),
        ],
        notes=("clipped: each token's term to +-1 nat", "no reward had its learning rate or beta tuned for itself"),
    )


_PLAIN: Mapping[str, Any] = {"reward.center": "none", "ppo.advantage": "gae"}
_WARM_UP = 5  # steps of critic_warmup, beside those that train the policy


def length(options: Options) -> Sweep:
    """Estimators of the advantage under the coherent and under a shuffled reward: which change the answers' length?"""
    steps = options.recipe.ppo.steps
    warm = {"ppo.critic_warmup": _WARM_UP, "ppo.steps": steps + _WARM_UP}
    estimators: dict[str, dict[str, Any]] = {
        "as it comes": {},
        "mean taken off": {"reward.center": "batch"},
        "critic from the mean": {"reward.center": "critic"},
        "critic warmed up": warm,
        "critic's lambda 1": {"ppo.critic_lam": 1.0},
        "warmed up, critic's lambda 1": {**warm, "ppo.critic_lam": 1.0},
        "lambda 1": {"ppo.lam": 1.0},
        "lambda by length": {"ppo.lam_length": 0.5, "ppo.critic_lam": 1.0},
        "leave-one-out": {"ppo.advantage": "rloo", "rollout.per_prompt": 4},
    }
    if options.quick:
        estimators = dict(itertools.islice(estimators.items(), 2))
    points = [Ablation(name, {**_PLAIN, "eval.keep": "last", **keys}, {}) for name, keys in estimators.items()]
    return options.sweep(
        "length",
        "Does PPO change the answers' length under a reward that knows nothing?",
        points,
        (SFT, SRPPO, SHUFFLED),
        every(points, SRPPO.name, SHUFFLED.name),
        notes=(
            f"critic warmed up: {_WARM_UP} steps that train the critic alone, then as many as elsewhere",
            "what the question asks stands in the figures length and ended of each arm, first and last step",
        ),
    )


def kl(options: Options) -> Sweep:
    """Anchor and weight of the KL penalty; steps as a third axis where asked for."""
    anchors = options.values("reward.anchor", ("sft", "base"), quick=("sft",))
    betas = options.values("reward.beta", (0.125, 0.25, 0.5, 1.0), quick=(0.125, 0.5, 2.0))
    steps = options.values("ppo.steps", (options.recipe.ppo.steps,))
    several = len(steps) > 1
    points = []
    for anchor, count, beta in itertools.product(anchors, steps, betas):
        name = f"anchor {anchor}, beta {label(beta)}" + (f", {count} steps" if several else "")
        keys = {"reward.anchor": anchor, "reward.beta": beta, "ppo.steps": count}
        points.append(Ablation(name, keys, {"beta": beta, "anchor": anchor} | ({"steps": count} if several else {})))
    return options.sweep(
        "kl",
        "At which anchors and weights of the KL penalty does SRPPO beat SFT?",
        points,
        (SFT, OPTIMUM, SRPPO),
        every(points, "SRPPO", "SFT"),
        trend="beta",
        scale="log2",
        notes=(
            f"{OPTIMUM.name}: the closed form, resampled from methods.samples samples of the SFT model; where ess is "
            "below 10 it says little",
        ),
    )


def overlap(options: Options) -> Sweep:
    """The share of PPO prompts that are prompts of SFT demonstrations."""
    shares = options.values("data.overlap_share", (0.0, 0.25, 0.5, 0.75, 1.0), quick=(0.0, 0.5, 1.0))
    points = [Ablation(f"share {label(share)}", {"data.overlap_share": share}, {"share": share}) for share in shares]
    return options.sweep(
        "overlap",
        "Does SRPPO beat SFT whatever share of its prompts SFT has seen?",
        points,
        trend="share",
        notes=(
            "as the share grows there are fewer distinct prompts (at 1 only the demonstrations' own, repeated), of the "
            "demonstrations' tasks alone: the three cannot be told apart here",
        ),
    )


def prompts(options: Options) -> Sweep:
    """Number and domain of the PPO prompts."""
    counts = options.values("data.prompts_size", (16, 128, 1024), quick=(16, 128, 1024))
    if not options.embedded and not {"data.prompts_size", "data.prompts"} <= options.axes.keys():
        raise ConfigError("prompts on your own data needs --axis data.prompts_size=... and --axis data.prompts=...")
    all_domains = ("embedded:demonstrated", "embedded:prompted", "embedded")
    domains = options.values("data.prompts", all_domains, quick=("embedded",))
    points = []
    for domain, count in itertools.product(domains, counts):
        keys = {"data.prompts": domain, "data.prompts_size": count}
        points.append(Ablation(f"{label(count)} of {label(domain)}", keys, {"prompts": count, "domain": domain}))
    return options.sweep(
        "prompts",
        "With how many PPO prompts, of which domain, does SRPPO beat SFT?",
        points,
        trend="prompts",
        scale="log2",
    )


ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        *(arm for arm in _BY_KIND.values() if arm != SRPPO),
        Arm("RLOO", "ppo", {"ppo.advantage": "rloo", "rollout.per_prompt": 4}),
        SRPPO,
    )
}
"""Every way to use the same two models, as a grid may name them; SRPPO as the recipe has it."""


def method(options: Options) -> Sweep:
    """Every way to use the same two models: is PPO worth it?"""
    points = [Ablation("all", {})]
    arms = [arm for arm in ARMS.values() if arm not in (BASE, SRPPO)]
    arms.append(Arm(SRPPO.name, "ppo", {"ppo.advantage": "gae"}))
    others = [arm.name for arm in arms if arm.name != "SRPPO"]
    family = [*every(points, "SRPPO", *others)]
    family += [each for name in others if name != "SFT" for each in every(points, name, "SFT")]
    return options.sweep(
        "method",
        "Is PPO worth it, beside cheaper ways to the same optimum?",
        points,
        arms,
        family,
        notes=("decode-time extrapolation, resampling and best-of-n pay at every answer instead of in training",),
    )


def any_grid(options: Options) -> Sweep:
    """Every combination of the axes given."""
    if not options.axes:
        raise ConfigError("grid needs axes; give --axis section.key=v1,v2, for example --axis ppo.lr=3e-5,1e-4")
    points = grid(**options.axes)
    ordered = [name for name in points[0].values if all(_is_number(point.values[name]) for point in points)]
    return options.sweep(
        "grid",
        "What do " + " and ".join(options.axes) + " change?",
        points,
        options.arms or (SFT, SRPPO),
        trend=ordered[0] if ordered else None,
    )


def _fits(value: Any, scale: str) -> bool:
    return _is_number(value) and (scale != "log2" or value > 0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


SWEEPS: Mapping[str, tuple[Callable[[Options], Sweep], tuple[str, ...]]] = {
    "data-size": (data_size, ("data.size",)),
    "noise": (noise, ("data.noise", "data.noise_rate")),
    "model-scale": (model_scale, ("model.base",)),
    "reward": (reward, ()),
    "length": (length, ()),
    "kl": (kl, ("reward.anchor", "reward.beta", "ppo.steps")),
    "overlap": (overlap, ("data.overlap_share",)),
    "prompts": (prompts, ("data.prompts_size", "data.prompts")),
    "method": (method, ()),
    "grid": (any_grid, ()),
}
"""Each sweep's function, and the recipe keys of its axes (grid takes any)."""
