"""Which settings decide a stage's outcome: the part of a recipe that enters its id. No torch.

Data, items and models enter by their content, which the pipeline adds; so paths are left out here.
"""

from __future__ import annotations

from typing import Any

from srppo.config import Recipe

SECTIONS = {
    "base": (),
    "given-sft": (),
    "sft": ("sft",),
    "longer-sft": ("sft",),
    "ppo": ("rollout", "reward", "ppo"),
}
"""Sections of the recipe that each kind of stage reads whole."""
_PATHS = ("demonstrations", "prompts")
_ONLY_PPO = ("prompts_size", "overlap")  # keys of data that SFT never sees


def stage_settings(recipe: Recipe, kind: str) -> dict[str, Any]:
    """Settings that decide the outcome of a stage of this kind, beside its parents and data."""
    dump = recipe.model_dump(mode="json")
    prompts = kind == "ppo"
    outside = _PATHS if prompts else (*_PATHS, *_ONLY_PPO)
    settings = {name: dump[name] for name in SECTIONS[kind]} | {
        "seed": dump["seed"],
        "precision": dump["model"]["precision"],
        "kernels": dump["model"]["kernels"],
        "data": {key: value for key, value in dump["data"].items() if key not in outside},
        "eval": {k: v for k, v in dump["eval"].items() if k not in ("every", "items")},
        "max_new_tokens": dump["rollout"]["max_new_tokens"],
    }
    return settings | ({"every": recipe.eval.every} if prompts else {})
