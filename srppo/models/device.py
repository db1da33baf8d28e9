"""Where models run."""

from __future__ import annotations

import re

import torch

from srppo.errors import ConfigError


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
