"""A model's weights, frozen, with the LoRA adapters that were put into it: PEFT's layers, one role active at a time."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from srppo.errors import ConfigError
from srppo.models.lora import one_operation

PREFIX = "base_model.model."  # of the names in PEFT's files
UNKNOWN = ""  # what is active after PEFT has put in or taken out an adapter: whatever is asked for next is switched to


def peft() -> Any:
    """The package. Raises ConfigError where it is not installed."""
    try:
        import peft
    except ImportError:
        raise ConfigError(
            "model.adapters = lora needs the package peft: pip install 'srppo[peft]', or leave out model.adapters"
        ) from None
    return peft


class Backbone:
    """A model with the adapters that were put into it, of which one or none is active. Its own weights are frozen."""

    def __init__(self, model: Any, source: str) -> None:
        self.model, self.source = model, source
        self.layers: list[Any] = []
        self._active: str | None = None
        self._made = 0
        model.requires_grad_(False)

    def add(self, settings: Any, seed: int) -> str:
        """Put in an adapter that changes nothing yet (B is zero); its name. settings: PEFT's LoraConfig."""
        name = f"adapter{self._made}"
        self._made += 1
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        settings = copy.deepcopy(settings)
        settings.lora_dropout = 0.0  # as everywhere; its layers would come in training mode
        if settings.target_modules == "all-linear":
            settings.target_modules = self.linear_names()
        # PEFT draws A from the global state, and warns of what is meant
        with torch.random.fork_rng(devices), warnings.catch_warnings(action="ignore"):
            torch.manual_seed(seed)
            try:
                peft().inject_adapter_in_model(settings, self.model, name)
            except ValueError as error:
                raise ConfigError(
                    f"no adapter fits {type(self.model).__name__} with model.lora_targets = "
                    f"{settings.target_modules!r}: {' '.join(str(error).split())[:200]}"
                ) from None
        del self.model.peft_config  # type: ignore[union-attr]  # PEFT's notes: roles know their settings themselves
        tuner = peft().tuners.tuners_utils.BaseTunerLayer
        self.layers = [module for module in self.model.modules() if isinstance(module, tuner)]
        for layer in self.layers:
            own: Any = type(layer)
            if own is peft().tuners.lora.Linear:
                layer.__class__ = one_operation(own)
        for weight in self.weights(name).values():
            weight.data = weight.data.float()  # PEFT makes them in the backbone's precision; they are trained
        self._active = UNKNOWN
        return name

    def remove(self, name: str) -> None:
        """Take an adapter out, and free its memory."""
        with warnings.catch_warnings(action="ignore"):
            for layer in self.layers:
                layer.delete_adapter(name)
        self._active = UNKNOWN

    def linear_names(self) -> list[str]:
        """Ends of the names of all linear layers but the head. Experts that are one weight for all are none of them."""
        kinds, head = (nn.Linear, Conv1D), self.model.get_output_embeddings()
        names = {
            name for name, module in self.model.named_modules() if isinstance(module, kinds) and module is not head
        }
        within = {name.rpartition(".base_layer")[0] or name for name in names if ".lora_" not in name}
        return sorted({name.rpartition(".")[2] for name in within})

    def switch(self, name: str | None) -> None:
        """Make one adapter active, or none: then the weights are the backbone's own, to the bit."""
        if name == self._active or not self.layers:
            return
        for layer in self.layers:
            layer.enable_adapters(name is not None)
            if name is not None:
                layer.set_adapter(name)
        for key, weight in self.model.named_parameters():
            if ".lora_" in key:  # PEFT froze all but the active: a role's gradient may still be on its way
                weight.requires_grad_(True)
        self._active = name

    @contextmanager
    def _active_again(self, name: str | None) -> Iterator[None]:
        before = self._active
        self.switch(name)
        try:
            yield
        finally:
            self.switch(before)

    def as_now(self) -> AbstractContextManager[None]:
        """A context in which the role that is active now is active again, whichever is by then."""
        return self._active_again(self._active)

    def weights(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's weights by the names that PEFT's files have."""
        own = f".{name}."
        return {
            PREFIX + full.replace(own, "."): weight
            for full, weight in self.model.named_parameters()
            if own in full and ".lora_" in full
        }
