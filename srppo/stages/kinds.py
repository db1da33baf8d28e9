"""Which settings decide a stage's outcome: the part of a recipe that enters its id. No torch.

Data, items and models enter by their content, which the pipeline adds; so paths are left out here.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Any

from srppo.config import Recipe
from srppo.data.chat import template_text

SECTIONS = {
    "base": (),
    "given-sft": (),
    "sft": ("sft",),
    "longer-sft": ("sft",),
    "ppo": ("rollout", "reward", "ppo"),
}
"""Sections of the recipe that each kind of stage reads whole."""
_SCORE = ("kind", "length_norm", "token_clip", "clip", "at_limit", "limit_penalty")  # what a whole response is paid by
METHODS: dict[str, dict[str, tuple[str, ...]]] = {
    "extrapolated": {"methods": ("alphas",), "eval": ("samples", "metric", "limit")},
    "decoded": {"reward": ("kind", "token_clip", "anchor", "beta"), "eval": ("samples",)},
    "samples": {"reward": _SCORE, "methods": ("samples",), "eval": ()},
    "resampled": {"reward": ("anchor", "beta"), "eval": ("samples",)},
    "best-of-n": {"eval": ("samples",)},
}
"""The single keys that a kind of stage reads which trains nothing: what PPO is compared with beside longer SFT."""
_ADDED: dict[str, dict[str, Any]] = {
    "data": {"noise": "none", "noise_rate": 0.0, "overlap_share": None, "turns": "last"},
    "sft": {"steps": None},
    "rollout": {"per_prompt": 1},
    "ppo": {"advantage": "gae"},
}
"""Keys that came later, with the default under which they change nothing: there they stay out, so old ids hold."""
_CRITIC = ("value_lr", "value_clip", "gamma", "lam", "critic_warmup")  # keys of ppo that RLOO does not read
_PATHS = ("demonstrations", "prompts")
_ONLY_PPO = ("prompts_size", "overlap", "overlap_share")  # keys of data that SFT never sees


def stage_settings(recipe: Recipe, kind: str) -> dict[str, Any]:
    """Settings that decide the outcome of a stage of this kind, beside its parents and data."""
    dump = recipe.model_dump(mode="json")
    for section, defaults in _ADDED.items():
        dump[section] = {k: v for k, v in dump[section].items() if k not in defaults or v != defaults[k]}
    if not recipe.data.noise_rate:
        dump["data"].pop("noise", None)  # at rate 0 every kind is none
    if recipe.ppo.advantage == "rloo":
        dump["ppo"] = {k: v for k, v in dump["ppo"].items() if k not in _CRITIC}
    prompts = kind == "ppo"
    outside = _PATHS if prompts else (*_PATHS, *_ONLY_PPO)
    settings = {name: dump[name] for name in SECTIONS.get(kind, ())} | {
        "seed": dump["seed"],
        "precision": dump["model"]["precision"],
        "kernels": dump["model"]["kernels"],
        "data": {key: value for key, value in dump["data"].items() if key not in outside},
        "eval": {k: v for k, v in dump["eval"].items() if k not in ("every", "items")},
        "max_new_tokens": dump["rollout"]["max_new_tokens"],
    }
    if recipe.model.chat_template is not None:  # its content, wherever it lies
        settings["chat_template"] = sha256(template_text(recipe.model.chat_template).encode()).hexdigest()
    if recipe.model.template_kwargs:
        settings["template_kwargs"] = dump["model"]["template_kwargs"]
    for section, keys in METHODS.get(kind, {}).items():
        settings[section] = {key: dump[section][key] for key in keys}
    return settings | ({"every": recipe.eval.every} if prompts else {})
