"""What a recipe leaves open or probably did not mean, settled before anything is loaded."""

from __future__ import annotations

import re

import torch

from srppo.config import Recipe, with_overrides
from srppo.errors import ConfigError

EMBEDDED_SIZE = 32


def resolved(recipe: Recipe) -> Recipe:
    """Embedded demonstrations come with embedded prompts, and are so many that SFT stays unfinished, unless said."""
    if recipe.data.demonstrations != ("embedded",):
        return recipe
    size, prompts = recipe.data.size or EMBEDDED_SIZE, recipe.data.prompts or ("embedded",)
    return with_overrides(recipe, {"data.size": size, "data.prompts": prompts})


def recipe_warnings(recipe: Recipe) -> list[str]:
    """Settings that are allowed and probably not meant."""
    reward, warnings = recipe.reward, []
    if reward.kl == "k3":
        warnings.append(
            "reward.kl = k3 in the loss is biased and ends elsewhere than the KL-regularised optimum; use k1 or k2"
        )
    if reward.anchor == "base" and reward.kind == "ratio" and reward.beta >= 1:
        warnings.append(
            f"with reward.anchor = base and beta = {reward.beta:g} the optimum is no sharper than the SFT model: "
            "nothing can be gained; use anchor = sft, or beta below 1"
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


def pick_device(name: str) -> str:
    """`auto` to cuda where there is one, else cpu; other names as they are. ConfigError where it cannot be used."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ConfigError(f"device {name!r} is unknown; give cpu, cuda, cuda:1, mps, or auto")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {name!r} cannot be used here: {str(error).splitlines()[0]}; try --device cpu"
        ) from None
    return name
