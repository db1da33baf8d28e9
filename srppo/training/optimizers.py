"""Optimizers by the names that a recipe knows: torch's, and bitsandbytes' where it is installed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from srppo.errors import ConfigError

EPS = 1e-5  # of Adam in PPO, as in summarize_from_feedback_details; 1e-8 makes the first steps of a zero head wild


class _Known(NamedTuple):
    """module: torch.optim or bitsandbytes.optim. eps: whether it takes Adam's. fused: whether torch has it in one pass
    over weight, gradient and moments."""

    module: str
    name: str
    eps: bool
    fused: bool = False


_KNOWN = {
    "adam": _Known("torch.optim", "Adam", True, True),
    "adamw": _Known("torch.optim", "AdamW", True, True),
    "adafactor": _Known("torch.optim", "Adafactor", False),
    "sgd": _Known("torch.optim", "SGD", False, True),
    "adam8bit": _Known("bitsandbytes.optim", "Adam8bit", True),
    "adamw8bit": _Known("bitsandbytes.optim", "AdamW8bit", True),
    "paged-adam8bit": _Known("bitsandbytes.optim", "PagedAdam8bit", True),
    "paged-adamw8bit": _Known("bitsandbytes.optim", "PagedAdamW8bit", True),
}


def check_optimizer(name: str) -> None:
    """Raises ConfigError where an optimizer is not installed."""
    _class(_KNOWN[name])


def make_optimizer(
    name: str, weights: Iterable[nn.Parameter], lr: float, *, weight_decay: float = 0.0, eps: float = 1e-8
) -> torch.optim.Optimizer:
    """An optimizer of a recipe's name. eps: where the optimizer has Adam's."""
    known, weights = _KNOWN[name], list(weights)
    settings: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay} | ({"eps": eps} if known.eps else {})
    if known.fused and {weight.device.type for weight in weights} <= {"cpu", "cuda", "meta"}:
        settings["fused"] = True
    made: torch.optim.Optimizer = _class(known)(weights, **settings)
    return made


def _class(known: _Known) -> Any:
    if known.module == "torch.optim":
        return getattr(torch.optim, known.name)
    try:
        import bitsandbytes.optim
    except Exception as error:  # it looks for CUDA libraries
        reason = " ".join(str(error).split())[:100]
        raise ConfigError(
            f"{known.name} comes from the package bitsandbytes, which cannot be imported ({reason}): pip install "
            "bitsandbytes, or take one of torch's: adam (in ppo), adamw (in sft), adafactor, sgd"
        ) from None
    return getattr(bitsandbytes.optim, known.name)
