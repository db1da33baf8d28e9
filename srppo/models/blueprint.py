"""Models from their configuration alone. Their weights lie on torch's meta device: sizes and precisions, no memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM

from srppo.config import ModelConfig
from srppo.errors import ModelError
from srppo.kernels import Impl
from srppo.models import packed
from srppo.models.adapters import AdaptedModel, adapter_settings, is_adapter
from srppo.models.fused import fuse
from srppo.models.language_model import Head, LanguageModel
from srppo.models.loading import architecture, resolve
from srppo.models.narrow import keep_narrow

META = torch.device("meta")


@dataclass(frozen=True)
class _Assumed:
    """What loading finds out by running a model: here it is taken to be as with most."""

    precision: str
    source: str
    vocab_size: int
    generation_config: Any
    kernels: Impl = "auto"
    takes_positions: bool = True
    head: Head = field(default_factory=lambda: Head(linear=True))
    packs: bool = True
    recomputes: bool = False


def blueprint(spec: str, config: ModelConfig, *, on_cpu: bool = True) -> LanguageModel:
    """What `load_model` gives, without weights: of a hub model config.json alone is fetched.

    Taken to have a linear head, rows that can be packed, and weights in the precision that its configuration names
    (fp32 where it names none). on_cpu: where compiled code stands between its products. Raises ModelError in one line.
    """
    path = resolve(spec)
    if is_adapter(Path(path)):
        settings = adapter_settings(Path(path))
        return over(blueprint(str(settings.base_model_name_or_path), config, on_cpu=on_cpu), settings)
    said = architecture(spec, config)
    try:
        with META:
            model: Any = AutoModelForCausalLM.from_config(
                said, dtype=said.dtype or torch.float32, trust_remote_code=config.trust_remote_code
            )
        model.set_attn_implementation(packed.NAME)
    except (ValueError, TypeError, RuntimeError, AttributeError, KeyError, ImportError) as error:
        raise ModelError(f"model {spec!r} cannot be planned: {' '.join(str(error).split())[:200]}") from None
    model.eval()
    keep_narrow(model)
    if on_cpu:
        fuse(model)
    rows = model.get_output_embeddings().weight.shape[0]
    assumed = _Assumed(config.scoring or config.precision, path, rows, model.generation_config)
    return LanguageModel(model, like=cast(LanguageModel, assumed))


def over(frozen: LanguageModel, settings: Any) -> AdaptedModel:
    """A role over a model without weights. settings: PEFT's LoraConfig."""
    with META:
        return AdaptedModel(frozen, settings)
