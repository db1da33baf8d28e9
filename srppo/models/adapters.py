"""One frozen backbone in several roles: LoRA adapters over it, made and stored as PEFT does.

The base is the backbone without an adapter; SFT model, policy and critic are adapters. Memory holds the weights once,
and what trains is small. One role is active at a time: each pass of a role begins by making it so.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig

from srppo.config import ModelConfig
from srppo.errors import ConfigError, ModelError
from srppo.models.backbone import PREFIX, Backbone, peft
from srppo.models.language_model import LanguageModel, plain
from srppo.models.narrow import widen

MORE_THAN_LORA = (
    *("modules_to_save", "bias", "lora_bias", "use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens"),
    *("arrow_config", "velora_config", "monteclora_config", "kasa_config", "trainable_token_indices"),
    *("target_parameters", "layer_replication"),
)
"""Settings of PEFT under which an adapter is more than B A alpha / rank beside a matrix."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class AdaptedModel(LanguageModel):
    """A role: the backbone of another model with an adapter of its own, which goes when the role does.

    settings: PEFT's LoraConfig.
    """

    def __init__(self, frozen: LanguageModel, settings: Any, seed: int = 0) -> None:
        super().__init__(frozen.model, like=frozen)
        if frozen.backbone is None:
            frozen.backbone = Backbone(frozen.model, frozen.source)
        self.backbone: Backbone = frozen.backbone
        self.shards = frozen.shards
        self.settings = settings
        self.adapter = self.backbone.add(settings, seed)
        weakref.finalize(self, self.backbone.remove, self.adapter).atexit = False

    def activate(self) -> None:
        self.backbone.switch(self.adapter)

    def weights(self) -> dict[str, Tensor]:
        return dict(self.backbone.weights(self.adapter))

    def _plain_layers(self) -> dict[str, Callable[[], nn.Module]]:
        found = super()._plain_layers()
        ours = {id(layer) for layer in self.backbone.layers}
        for name, layer in self.model.named_modules():
            if id(layer) in ours and isinstance(layer.get_base_layer(), nn.Linear):
                found[name] = partial(self._summed, layer)
        return found

    def _summed(self, layer: Any) -> nn.Module:
        base = layer.get_base_layer()
        weight = base.weight.to(torch.float32, copy=True)  # before what is let go again: the heap keeps its holes
        weight += layer.get_delta_weight(self.adapter)
        return plain(weight, base.bias)

    def copy(self) -> AdaptedModel:
        other = AdaptedModel(self, self.settings)
        other.set_weights(self.weights())
        return other

    def trunk(self) -> AdaptedModel:
        return self.copy()

    @torch.no_grad()
    def merged(self) -> LanguageModel:
        """A model of its own, in fp32, with the adapter added to its weights."""
        layers = {name: layer for name, layer in self.model.named_modules() if layer in set(self.backbone.layers)}
        added = {name: layer.get_delta_weight(self.adapter) for name, layer in layers.items()}
        if self.shards is not None:
            model = self.shards.whole_copy()
            for name, delta in added.items():
                model.get_submodule(name).weight.data += delta
            return self._own(model)
        other = copy.deepcopy(self.model)
        for name, delta in added.items():
            base = other.get_submodule(name).get_base_layer()
            base.weight.data = base.weight.data.float() + delta
            parent, _, child = name.rpartition(".")
            setattr(other.get_submodule(parent), child, base)
        widen(other)
        return LanguageModel(other, like=self)

    @torch.no_grad()
    def set_weights(self, saved: Mapping[str, Tensor]) -> None:
        """Copy an adapter's weights into this one's. Raises ModelError for one of other layers or sizes."""
        own = self.weights()
        ours, theirs = ({name: tuple(x.shape) for name, x in each.items()} for each in (own, saved))
        if ours != theirs:
            differing = min(name for name, _ in ours.items() ^ theirs.items())
            raise ModelError(
                f"the adapter does not fit: {differing.removeprefix(PREFIX)} is {theirs.get(differing, 'absent')} in "
                f"it and {ours.get(differing, 'absent')} here; use one that was trained with this base and these "
                "settings (model.lora_rank, model.lora_targets)"
            )
        for name, weight in own.items():
            weight.copy_(saved[name])

    def gathered_to_save(self) -> AbstractContextManager[None]:
        return nullcontext()  # adapters are whole in each process

    def save(self, folder: Path) -> None:
        """Write the adapter as PEFT does: `AutoPeftModelForCausalLM.from_pretrained` reads it, and vLLM."""
        settings = copy.deepcopy(self.settings)
        settings.base_model_name_or_path, settings.inference_mode = self.backbone.source, True
        settings.save_pretrained(str(folder))
        self.generation_config.save_pretrained(folder)
        weights = {name: weight.detach().contiguous() for name, weight in self.weights().items()}
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def lora_settings(config: ModelConfig) -> Any:
    """A recipe's adapters as PEFT has them. Dropout is off, as everywhere."""
    targets: Any = "all-linear" if config.lora_targets == ("all-linear",) else list(config.lora_targets)
    return peft().LoraConfig(
        task_type="CAUSAL_LM", r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=targets
    )


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter in PEFT's format."""
    return (folder / CONFIG).is_file()


def load_adapter(folder: Path, frozen: LanguageModel) -> AdaptedModel:
    """A role from a folder in PEFT's format, over a model that is its base. Raises ModelError in one line."""
    settings = adapter_settings(folder)
    try:
        saved = load_file(folder / WEIGHTS)
    except Exception as error:  # safetensors has errors of its own
        raise ModelError(f"the adapter {folder} cannot be read: {' '.join(str(error).split())[:200]}") from None
    role = AdaptedModel(frozen, settings)
    role.set_weights(saved)
    if (folder / "generation_config.json").is_file():
        role.generation_config = GenerationConfig.from_pretrained(folder)
    return role


def adapter_settings(folder: Path) -> Any:
    """PEFT's LoraConfig of a folder. Raises ModelError for what is none, or does more than LoRA."""
    try:
        settings = peft().PeftConfig.from_pretrained(str(folder))
    except ConfigError:
        raise
    except Exception as error:  # of json, and PEFT's own
        raise ModelError(f"the adapter {folder} cannot be read: {' '.join(str(error).split())[:200]}") from None
    kind = str(getattr(settings.peft_type, "value", settings.peft_type))
    more = [key for key in MORE_THAN_LORA if getattr(settings, key, None) not in (None, False, "none", [], {})]
    if kind != "LORA" or more:
        found = kind if kind != "LORA" else more[0]
        raise ModelError(
            f"the adapter {folder} is or has {found}; plain LoRA adapters are understood: merge it into its base, and "
            "give the folder of the merged model"
        )
    return settings
