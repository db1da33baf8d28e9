"""A command line to the options of a sweep, and these to the sweep; mistakes in one line, before anything is loaded."""

from __future__ import annotations

import difflib
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from srppo.ablations.plan import Plan
from srppo.ablations.spec import Analysis, Arm, Cell, Sweep
from srppo.ablations.sweeps import ARMS, SWEEPS, Options
from srppo.config import Recipe, is_embedded, parse_override, parse_value, with_overrides
from srppo.errors import ConfigError
from srppo.evaluation.items import load_items
from srppo.evaluation.results import DECODINGS


def read_options(
    name: str,
    recipe: Recipe,
    *,
    seeds: int | None = None,
    sizes: str | None = None,
    rates: str | None = None,
    axes: Sequence[str] = (),
    arms: str | None = None,
    primary: str | None = None,
    quick: bool = False,
    margin: float = Analysis.margin,
    bases: str | None = None,
) -> Options:
    """Check and translate. Raises ConfigError for an unknown sweep, an axis it lacks, or values that are none."""
    if name not in SWEEPS:
        raise ConfigError(f"unknown sweep {name!r}{_nearest(name, SWEEPS)}; there are: {', '.join(SWEEPS)}")
    short = {"data.size": sizes, "data.noise_rate": rates}
    found: dict[str, tuple[Any, ...]] = {}
    own = SWEEPS[name][1]
    for text in (*(f"{key}={values}" for key, values in short.items() if values is not None), *axes):
        key, values = read_axis(text)
        if name != "grid" and key not in own:
            has = f"its axes are {', '.join(own)}" if own else "it has no axis to change"
            raise ConfigError(f"{key} is no axis of {name}: {has}; `srppo ablate grid --axis {key}=...` takes any key")
        if key in found:
            raise ConfigError(f"the axis {key} is given twice; give all its values at once")
        found[key] = values
    others = [str(base) for base in found.get("model.base", ()) if not is_embedded(str(base))]
    if others and is_embedded(recipe.model.base):
        raise ConfigError(
            f"model.base = {others[0]} needs data and learning rates of its own, the recipe's are the embedded "
            "world's: give a recipe with one of these models as model.base"
        )
    if recipe.model.sft is not None and name in ("data-size", "data-prompts", "noise", "model-scale"):
        raise ConfigError(f"{name} trains SFT anew at every point, but model.sft is given; leave it out")
    turns = tuple(each.strip() for each in (bases or "").split(",") if each.strip())
    if turns:
        if name == "model-scale" or "model.base" in found or recipe.model.sft is not None:
            raise ConfigError("--bases gives each seed a base in turn, but the base, or its SFT model, is set already")
        recipe = with_overrides(recipe, {"model.base": turns[0]})
    decoding = "sampled" if name == "kl" else "greedy"  # the closed form is a distribution
    return Options(recipe, _primary(primary, recipe, decoding), seeds, found, quick, _arms(name, arms), margin, turns)


def _arms(name: str, text: str | None) -> tuple[Arm, ...]:
    """`SFT,longer SFT,SRPPO` to arms in this order; none for the default."""
    if text is None:
        return ()
    if name not in ("grid", "method"):
        raise ConfigError(f"the arms of {name} are fixed; `srppo ablate grid --arms ...` takes any")
    found = _names(text)
    for each in found:
        if each not in ARMS:
            raise ConfigError(f"unknown arm {each!r}{_nearest(each, ARMS)}; there are: {', '.join(ARMS)}")
    if not found:
        raise ConfigError(f"--arms is empty; there are: {', '.join(ARMS)}")
    return tuple(ARMS[each] for each in found)


def _names(text: str) -> list[str]:
    """Parts between commas, but a comma within an arm's own name parts nothing."""
    whole = {name: name.replace(",", "\0") for name in ARMS if "," in name}
    for name, kept in whole.items():
        text = text.replace(name, kept)
    return [each.strip().replace("\0", ",") for each in text.split(",") if each.strip()]


def _nearest(name: str, known: Iterable[str]) -> str:
    """`, did you mean 'SRPPO'?`; "" where nothing is near."""
    lowered = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), lowered, n=1)
    return f", did you mean {lowered[near[0]]!r}?" if near else ""


def read_axis(text: str) -> tuple[str, tuple[Any, ...]]:
    """`section.key=v1,v2` to (key, values). A comma within brackets or quotes belongs to the value."""
    key, _, raw = text.partition("=")
    parse_override(f"{key}=0", option="--axis")  # its key, or an error that names the nearest
    try:
        values = tomllib.loads(f"values = [{raw}]")["values"]
    except tomllib.TOMLDecodeError:
        values = [_value(part.strip()) for part in raw.split(",") if part.strip()]
    key = key.strip()
    if key == "seed":
        raise ConfigError("seed is no axis: every point has the same seeds; give their number with --seeds")
    if not values:
        raise ConfigError(f"the axis {key} is empty; give values, for example --axis {key}=1,2")
    if twice := [value for i, value in enumerate(values) if value in values[:i]]:
        raise ConfigError(f"the axis {key} has {twice[0]!r} twice; give each value once")
    return key, tuple(values)


def _value(raw: str) -> Any:
    """As TOML, or the number that it is anyway (`.5`), or text."""
    try:
        return parse_value(raw) if not isinstance(parse_value(raw), str) else float(raw)
    except ValueError:
        return raw


def build_sweep(name: str, options: Options) -> Sweep:
    """The sweep, with every cell's recipe validated. Raises ConfigError for a value that a key does not take, and in a
    grid for two points that would train and measure the very same stages."""
    sweep = SWEEPS[name][0](options)
    for cell in sweep.cells():
        sweep.recipe_of(cell, sweep.seeds[0])
    if name != "grid":
        return sweep
    measured = Plan(replace(sweep, seeds=sweep.seeds[:1])).measured_by
    by_keys: dict[tuple[str, ...], str] = {}
    for point in sweep.points:
        keys = tuple(measured[Cell(point.name, arm.name), sweep.seeds[0]] for arm in sweep.arms)
        if (other := by_keys.setdefault(keys, point.name)) != point.name:
            raise ConfigError(
                f"the points {other!r} and {point.name!r} are the same to "
                f"{', '.join(arm.name for arm in sweep.arms)}: an axis changes nothing that they read; leave it out"
            )
    return sweep


def _primary(text: str | None, recipe: Recipe, default: str) -> tuple[str, str]:
    """(group, decoding) of the primary metric: given as GROUP/DECODING, else out-of-domain, or the only group."""
    groups = list(test_items(recipe))
    group, _, decoding = (text or "").partition("/")
    group = group or ("unseen" if "unseen" in groups else groups[0] if len(groups) == 1 else "")
    decoding = decoding or default
    if not group:
        several = ", ".join(groups)
        raise ConfigError(f"several groups of items ({several}): say which decides, --primary {groups[0]}/greedy")
    if group not in groups:
        raise ConfigError(f"--primary {group!r} is no group of the items; there are: {', '.join(groups)}")
    if decoding not in DECODINGS:
        raise ConfigError(f"--primary {decoding!r} is no decoding; give {' or '.join(DECODINGS)}")
    return group, decoding


def test_items(recipe: Recipe) -> dict[str, int]:
    """Test items by group. Raises ConfigError where there are none: a sweep compares accuracy."""
    found = Counter(item.group for item in load_items(recipe, "test"))
    if not found:
        raise ConfigError("a sweep compares accuracy on items: set eval.items to a jsonl of prompt, answer and group")
    return dict(found)
