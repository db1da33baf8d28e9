"""The sweeps we ship, each a question: functions from options to a `Sweep`. Their defaults are the embedded world's."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from srppo.ablations.plan import task_key
from srppo.ablations.spec import (
    MOST_COMPARISONS,
    Ablation,
    Analysis,
    Arm,
    Comparison,
    Curves,
    Sweep,
    every,
    grid,
    label,
)
from srppo.config import EMBEDDED_SIZE, Recipe, is_embedded, with_overrides, world_style
from srppo.errors import ConfigError
from srppo.reward_kinds import COHERENT, REWARD_KINDS
from srppo.stages.kinds import EQUAL, KINDS, in_order, longer
from srppo.statistics.tests import EXACT_FLIPS
from srppo.world import base_path

LONGER = Arm("longer SFT", "chosen-sft")
_BY_KIND = {
    kind.name: LONGER if kind.name == LONGER.kind else Arm(kind.label, kind.name)
    for kind in KINDS.values()
    if kind.label and kind.name != "given-sft" and not kind.share  # the first stands for `sft` where a model is named
}
EQUAL_COMPUTE = Arm(EQUAL, longer(1))
BASE, SFT, SHUFFLED, SRPPO = (_BY_KIND[name] for name in ("base", "sft", "shuffled", "ppo"))
FROM_CHOSEN, FROM_EQUAL, DECODED = (_BY_KIND[name] for name in ("ppo-chosen", "ppo-equal", "decoded"))
SHARPENING = Arm("sharpening", "ppo", {"reward.kind": "sft"})
BY_LENGTH = Arm("by length", "ppo", {"reward.kind": "by-length"})
BEYOND_LENGTH = Arm("beyond length", "ppo", {"reward.kind": "beyond-length"})
ONLY_ASKED_FOR = (EQUAL_COMPUTE, SHARPENING, BY_LENGTH, BEYOND_LENGTH, FROM_EQUAL)
"""Arms that no sweep has unless --arms names them: cheaper than what the sweeps `method` and `reward` ask instead, or,
those of length, made after these were run."""
OPTIMUM = Arm("optimum (forecast)", "resampled")
COMMON = (SFT, LONGER, SHUFFLED, SRPPO)
"""Arms of every sweep: a gain over SFT alone says neither that more SFT would not do it, nor that the reward did."""
DECAY = 1.0
PASSES = 16
"""SFT with weight decay and SFT by held-out loss: the decay, and how many times the recipe's own SFT they last."""
NOT_TUNED = "no setting was tuned for any point: what holds at the default may be too much or too little elsewhere"


@dataclass(frozen=True)
class Options:
    """What a command line may change; empty means the sweep's own default.

    primary: (group of items, decoding) of the primary metric. axes: values by recipe key. arms: of a grid. margin: of
    the analysis. bases: that the seeds take turns with.
    """

    recipe: Recipe
    primary: tuple[str, str] = ("unseen", "greedy")
    seeds: int | None = None
    axes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    quick: bool = False
    arms: tuple[Arm, ...] = ()
    margin: float = Analysis.margin
    bases: tuple[str, ...] = ()

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
        arms: Sequence[Arm] = COMMON,
        family: Sequence[Comparison] | None = None,
        *,
        axes: Sequence[str] | None = None,
        trend: str | None = None,
        scale: str = "linear",
        curves: Curves | None = None,
        notes: Sequence[str] = (),
    ) -> Sweep:
        """A sweep of this recipe, its seeds and its primary metric.

        family: SRPPO minus every other arm; without SRPPO every arm minus SFT, or minus the first; arms whose
        comparisons would be too many are left out of it. axes: all that the points have values on. Without three points
        there is no trend.
        """
        if family is None:
            family, left = _family(points, [arm.name for arm in arms])
            more = f"outside the plan's tests, which would be more than {MOST_COMPARISONS}: {', '.join(left)}"
            notes = [*notes, *([more] if left else [])]
        if self.recipe.model.sft is not None and (longer := [arm.name for arm in arms if _from_shares(arm)]):
            # What a given SFT model took is not known, so nothing can be trained at equal compute.
            arms = [arm for arm in arms if not _from_shares(arm)]
            family = [each for each in family if not {each.model.arm, each.baseline.arm} & set(longer)]
            who = f"{', '.join(longer)} {'is' if len(longer) == 1 else 'are'}"
            notes = [*notes, f"{who} left out: what the given model.sft took to train is not known"]
        without = {arm.name for arm in arms if self.primary[1] not in KINDS[arm.kind].decodings}
        if without:
            family = [each for each in family if not {each.model.arm, each.baseline.arm} & without]
            notes = [*notes, f"no {self.primary[1]} answers, so not tested: {', '.join(sorted(without))}"]
        arms, shared = _sharing(self.recipe, points, arms)
        notes = [*notes, *shared]
        if trend is not None and not all(_fits(point.values.get(trend), scale) for point in points):
            notes = [*notes, f"no slope along {trend}: its values are not all numbers that a slope can take"]
            trend = None
        test = f"{'exact ' if len(self.seed_list) <= EXACT_FLIPS else ''}sign-flip over seeds"
        analysis = Analysis(
            *self.primary, tuple(dict.fromkeys(family)), trend, scale, test, margin=self.margin, curves=curves
        )
        lie_on = tuple(dict.fromkeys(key for point in points for key in point.values) if axes is None else axes)
        shape = (name, question, self.recipe, lie_on, tuple(points), tuple(arms), self.seed_list, analysis)
        return Sweep(*shape, tuple(notes), self.bases)


def data_size(options: Options) -> Sweep:
    """Nested prefixes of the demonstrations; the same epochs at every size, and the same steps."""
    recipe = options.recipe
    if not options.embedded and not (options.axes and (recipe.sft.steps or recipe.data.size)):
        raise ConfigError(
            "data-size on your own data needs --sizes, and sft.steps or data.size for what `the same steps` are; the "
            "defaults are the embedded world's"
        )
    sizes = options.values("data.size", (4, 16, 64, 256), quick=(8, 32, 128))
    steps = recipe.sft.steps or max(
        1, round(recipe.sft.epochs * (recipe.data.size or EMBEDDED_SIZE) / recipe.sft.batch)
    )
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
        trend="demonstrations",
        scale="log2",
        notes=(f"same steps: {steps} SFT steps at every size; same epochs: {recipe.sft.epochs}", NOT_TUNED),
    )


TIMES = (1, 10, 100)


def data_prompts(options: Options) -> Sweep:
    """Demonstrations x as many, ten and a hundred times as many prompts; no more prompts than PPO draws."""
    recipe = options.recipe
    if not options.embedded and "data.size" not in options.axes:
        raise ConfigError("data-prompts on your own data needs --sizes; the defaults are the embedded world's")
    sizes = options.values("data.size", (32, 256, 1792), quick=(32, 256))  # the world has 1,888 to train on
    drawn = recipe.ppo.steps * recipe.rollout.batch // recipe.rollout.per_prompt
    points, notes = list[Ablation](), list[str]()
    for size in sizes:
        for count in dict.fromkeys(min(size * times, drawn) for times in TIMES):
            keys = {"data.size": size, "data.prompts_size": count}
            points.append(Ablation(f"{size} + {count} prompts", keys, {"demonstrations": size, "prompts": count}))
        if cut := " and ".join(f"{times}x" for times in TIMES if size * times > drawn):
            notes.append(
                f"{size} demonstrations, {cut}: PPO draws {drawn} prompts in all, so this is the point with so many"
            )
    return options.sweep(
        "data-prompts",
        "What are more prompts without answers worth, beside more demonstrations?",
        points,
        family=every(points, SRPPO.name, SFT.name, LONGER.name, SHUFFLED.name),
        trend="prompts",
        scale="log2",
        notes=(*notes, NOT_TUNED),
    )


def noise(options: Options) -> Sweep:
    """Kinds of noise in the demonstrations' answers at nested rates; rate 0 is one point for all kinds.

    Exchanged answers, what the base says, and two systematic kinds: what another task would answer, one small slip.
    """
    systematic = ("wrong-task", "near-miss") if options.embedded else ("near-miss",)
    kinds = options.values("data.noise", ("derangement", "base-answers", *systematic), quick=("derangement",))
    rates = options.values("data.noise_rate", (0.0, 0.3, 0.7))
    devs = options.values("data.noise_dev", (True,))
    points = []
    for kind, rate, dev in itertools.product(kinds, rates, devs):
        keys = {"data.noise": kind if rate else "none", "data.noise_rate": rate, "data.noise_dev": dev}
        name = f"{label(kind)} {label(rate)}" + ("" if len(devs) == 1 else f", {'noisy' if dev else 'clean'} dev")
        values = {"rate": rate, "kind": kind} | ({"noisy_dev": dev} if len(devs) > 1 else {})
        points.append(Ablation(name, keys, values))
    tested = [point for point in points if point.values["rate"] or point.values["kind"] == kinds[0]]
    ends = [point for point in tested if point.values["rate"] in (min(rates), max(rates))]
    dev_note = "development items are as noisy as the demonstrations: no step or length is chosen by clean answers"
    return options.sweep(
        "noise",
        "Does SRPPO beat SFT, and longer SFT, when answers in the demonstrations are wrong?",
        points,
        (SFT, LONGER, DECODED, SHUFFLED, SRPPO),
        [*every(tested, SRPPO.name, SFT.name, LONGER.name), *every(ends, SRPPO.name, SHUFFLED.name)],
        trend="rate",
        notes=(
            "rate 0 is the same for every kind: it is run and tested once",
            *((dev_note,) if devs == (True,) else ()),
            NOT_TUNED,
        ),
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
        (BASE, *COMMON),
        every(points, SRPPO.name, SFT.name, LONGER.name, SHUFFLED.name),
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


def rewards(kinds: Sequence[str], *, variants: bool = True) -> tuple[Arm, ...]:
    """An arm for each of these kinds of reward, and with `variants` for each way to put the coherent one."""
    by_kind = {REWARD_KINDS[name].label: {"reward.kind": name} for name in kinds}
    changes = {**by_kind, **(_VARIANTS if variants else {})}
    return tuple(Arm(name, "ppo", {**COHERENT_PLAIN, **changed}) for name, changed in changes.items())


def reward(options: Options) -> Sweep:
    """Every reward as a curve over KL to the SFT model, made by weights of the penalty and steps of training."""
    shown = [name for name, kind in REWARD_KINDS.items() if kind.swept]
    kinds = options.values("reward.kind", shown, quick=(COHERENT, "brevity", "shuffled"))
    if unknown := [str(name) for name in kinds if name not in REWARD_KINDS]:
        raise ConfigError(f"reward.kind = {unknown[0]}: the kinds of reward are {', '.join(REWARD_KINDS)}")
    betas = options.values("reward.beta", (0.25, 0.5, 1.0, 2.0), quick=(0.25, 1.0))
    steps = options.recipe.ppo.steps
    curve = sorted({max(steps // part, 1) for part in (1, 2, 4)})
    fixed = {"eval.curve": curve, "eval.every": 0, "ppo.target_kl": None}
    points = [Ablation(f"beta {label(beta)}", {"reward.beta": beta, **fixed}, {"beta": beta}) for beta in betas]
    coherent, *others = rewards([COHERENT, *(name for name in kinds if name != COHERENT)], variants=not options.quick)
    if not others:
        raise ConfigError("the sweep reward compares kinds of reward: give two or more, for example ratio,brevity")
    return options.sweep(
        "reward",
        "At equal distance from the SFT model, is the coherent reward better than rewards that know less?",
        points,
        (SFT, LONGER, coherent, *others),
        (),
        curves=Curves(SFT.name, coherent.name, tuple(arm.name for arm in others)),
        notes=(
            "distance: KL to the SFT model on the sampled answers to test items, after "
            f"{', '.join(map(str, curve))} PPO steps at each beta; no step is chosen",
            "clipped: each token's term to +-1 nat; no reward had its learning rate tuned for itself",
        ),
    )


_PLAIN: Mapping[str, Any] = {"reward.center": "none", "ppo.advantage": "gae"}
_NO_CLIP = 100.0  # of ppo.clip: no ratio comes near, so clipping under random rewards can be told from the mean's pull
_WARM_UP = 5  # steps of critic_warmup, beside those that train the policy


def length(options: Options) -> Sweep:
    """Estimators of the advantage under the coherent and under a shuffled reward: which change the answers' length?"""
    steps = options.recipe.ppo.steps
    warm = {"ppo.critic_warmup": _WARM_UP, "ppo.steps": steps + _WARM_UP}
    estimators: dict[str, dict[str, Any]] = {
        "as it comes": {},
        "mean taken off": {"reward.center": "batch"},
        "mean taken off, unclipped": {"reward.center": "batch", "ppo.clip": _NO_CLIP},
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
            "what the question asks: sampled_tokens and sampled_ended of answers to test items, beside SFT's",
        ),
    )


def kl(options: Options) -> Sweep:
    """Anchor and weight of the KL penalty; steps as a third axis where asked for."""
    anchors = options.values("reward.anchor", ("sft", "base"), quick=("sft",))
    betas = options.values("reward.beta", (0.25, 0.5, 1.0, 2.0), quick=(0.25, 1.0, 4.0))
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
        (SFT, LONGER, OPTIMUM, SHUFFLED, SRPPO),
        _family(points, [arm.name for arm in COMMON])[0],
        trend="beta",
        scale="log2",
        notes=(
            f"{OPTIMUM.name}: the closed form, resampled from methods.samples samples of the SFT model: sampled "
            "answers alone; where ess is below 10 it says little",
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
    widest = [point for point in points if point.values["domain"] == domains[-1]]
    return options.sweep(
        "prompts",
        "With how many PPO prompts, of which domain, does SRPPO beat SFT?",
        points,
        family=[*every(points, SRPPO.name, SFT.name, LONGER.name), *every(widest, SRPPO.name, SHUFFLED.name)],
        trend="prompts",
        scale="log2",
    )


ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        *(arm for arm in _BY_KIND.values() if arm not in (SHUFFLED, SRPPO, FROM_CHOSEN, FROM_EQUAL)),
        EQUAL_COMPUTE,
        SHARPENING,
        BY_LENGTH,
        BEYOND_LENGTH,
        Arm("RLOO", "ppo", {"ppo.advantage": "rloo", "rollout.per_prompt": 4}),
        SHUFFLED,
        SRPPO,
        FROM_CHOSEN,
        FROM_EQUAL,
    )
}
"""Every way to use the same two models, as a grid or `method` may name them; SRPPO as the recipe has it."""


def method(options: Options) -> Sweep:
    """Every way to use the same two models, and the controls that know no reward: is PPO worth it?"""
    points, gae = [Ablation("all", {})], {"ppo.advantage": "gae"}
    question = "Is PPO worth it, beside cheaper ways to the same optimum, and ways without a reward?"
    if options.arms:
        return options.sweep("method", question, points, options.arms)
    arms = [arm for arm in ARMS.values() if arm not in (BASE, *ONLY_ASKED_FOR)]
    arms[1:1] = sft_variants(options.recipe)
    arms = [replace(arm, overrides=gae) if arm in (SRPPO, SHUFFLED, FROM_CHOSEN) else arm for arm in arms]
    others = [arm.name for arm in arms if arm.name not in (SRPPO.name, FROM_CHOSEN.name)]
    rewardless = [LONGER, SHUFFLED, *(_BY_KIND[name] for name in ("vote", "self-distilled", "rejection-ft"))]
    family = [
        *every(points, SRPPO.name, *others),
        *every(points, FROM_CHOSEN.name, LONGER.name),
        *(each for arm in rewardless for each in every(points, arm.name, SFT.name)),
    ]
    return options.sweep(
        "method",
        question,
        points,
        arms,
        family,
        notes=(
            "votes, decode-time extrapolation, resampling and best-of-n pay at every answer instead of in training",
            f"SFT with weight decay and SFT by held-out loss: {PASSES} times the passes of SFT, of which development "
            "items keep the best, or the loss on held-out demonstrations",
            f"{FROM_CHOSEN.name}: its start, its anchor and its reward's first part are the longer SFT that "
            "development items chose",
        ),
    )


def sft_variants(recipe: Recipe) -> list[Arm]:
    """SFT for PASSES times as long: with weight decay, and stopped by the loss on held-out demonstrations."""
    steps, epochs = recipe.sft.steps, recipe.sft.epochs
    longer: dict[str, Any] = {"sft.steps": PASSES * steps} if steps else {"sft.epochs": PASSES * epochs}
    found = [Arm("SFT with weight decay", "sft", {**longer, "sft.weight_decay": DECAY})]
    if recipe.data.held_out:
        found.append(Arm("SFT by held-out loss", "sft", {**longer, "eval.metric": "nll"}))
    return [] if recipe.model.sft else found


SPAN = 8  # times the least, from which a slope is one per doubling


def any_grid(options: Options) -> Sweep:
    """Every combination of the axes given."""
    if not options.axes:
        raise ConfigError("grid needs axes; give --axis section.key=v1,v2, for example --axis ppo.lr=3e-5,1e-4")
    points = grid(**options.axes)
    ordered = [name for name in points[0].values if all(_is_number(point.values[name]) for point in points)]
    values = [float(point.values[ordered[0]]) for point in points] if ordered else []
    wide = bool(values) and 0 < SPAN * min(values) <= max(values)
    return options.sweep(
        "grid",
        "What do " + " and ".join(options.axes) + " change?",
        points,
        options.arms or COMMON,
        trend=ordered[0] if ordered else None,
        scale="log2" if wide else "linear",
    )


def _family(points: Sequence[Ablation], arms: Sequence[str]) -> tuple[list[Comparison], list[str]]:
    """(SRPPO, else each arm, minus the others at every point, what had to be left out), whole arms while they fit."""
    hub = next((name for name in (SRPPO.name, SFT.name) if name in arms), arms[0])
    family, left = list[Comparison](), list[str]()
    for other in (name for name in arms if name != hub):
        model, baseline = (hub, other) if hub == SRPPO.name else (other, hub)
        more = every(points, model, baseline)
        if not family or len(family) + len(more) <= MOST_COMPARISONS:
            family += more
        else:
            left.append(f"{model} minus {baseline}")
    return family, left


def _from_shares(arm: Arm) -> bool:
    """Whether it takes SFT at shares of the compute of SFT and PPO together."""
    return any(KINDS[kind].share for kind in in_order([arm.kind]))


def _sharing(recipe: Recipe, points: Sequence[Ablation], arms: Sequence[Arm]) -> tuple[list[Arm], list[str]]:
    """(arms, what to say): where all points have one SFT model, longer SFT is trained once for all of them, with the
    compute of the point at which PPO samples most: elsewhere it differs by lengths of answers alone, or is less."""
    recipes = [with_overrides(recipe, point.overrides) for point in points]
    if len(points) == 1 or LONGER not in arms or len({task_key("sft", each) for each in recipes}) > 1:
        return list(arms), []
    rollouts = [each.ppo.steps * each.rollout.batch for each in recipes]
    dearest = points[rollouts.index(max(rollouts))]
    note = f"{LONGER.name} is the same at every point: lengths are shares of the compute at {dearest.name}"
    return [replace(arm, overrides=dearest.overrides) if arm == LONGER else arm for arm in arms], [note]


def _fits(value: Any, scale: str) -> bool:
    return _is_number(value) and (scale != "log2" or value > 0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


SWEEPS: Mapping[str, tuple[Callable[[Options], Sweep], tuple[str, ...]]] = {
    "data-size": (data_size, ("data.size",)),
    "data-prompts": (data_prompts, ("data.size",)),
    "noise": (noise, ("data.noise", "data.noise_rate", "data.noise_dev")),
    "model-scale": (model_scale, ("model.base",)),
    "reward": (reward, ("reward.kind", "reward.beta")),
    "length": (length, ()),
    "kl": (kl, ("reward.anchor", "reward.beta", "ppo.steps")),
    "overlap": (overlap, ("data.overlap_share",)),
    "prompts": (prompts, ("data.prompts_size", "data.prompts")),
    "method": (method, ()),
    "grid": (any_grid, ()),
}
"""Each sweep's function, and the recipe keys of its axes (grid takes any)."""
