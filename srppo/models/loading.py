"""Models and tokenizers from a folder, the hub or the embedded world, with refusals of one line.

What is loaded is frozen, in the checkpoint's own precision where that saves enough (`narrow`); what trains is a copy of
it in fp32, since at 1e-6 Adam moves nothing in bf16, or adapters over it.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from safetensors import SafetensorError, safe_open
from torch.nn.functional import linear
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from srppo.config import ModelConfig, Recipe, is_embedded, resolved, with_overrides
from srppo.data.chat import stop_ids, use_template
from srppo.data.hub import offline_when_unreachable
from srppo.data.prepare import PreparedData, asks_base, prepare
from srppo.errors import ConfigError, ModelError
from srppo.models.adapters import AdaptedModel, adapter_settings, is_adapter, load_adapter, lora_settings
from srppo.models.gguf import NAMED, dequantized, gguf_file, identity
from srppo.models.language_model import LanguageModel
from srppo.models.narrow import keep_narrow
from srppo.record.files import checksum


def resolve(spec: str) -> str:
    """A model spec to what from_pretrained takes: `embedded:xs`, GGUF files and names of packaged ones to a folder;
    folders and hub names as they are."""
    if is_embedded(spec):
        from srppo.world import base_path

        return str(base_path(spec.partition(":")[2] or "xs"))
    if file := gguf_file(spec):
        with no_bars():
            return str(dequantized(file))
    if not Path(spec).exists() and (spec.count("/") != 1 or spec.startswith((".", "/", "~"))):
        raise ModelError(
            f"model {spec!r} is neither a folder here nor a hub name; give a folder with config.json, a GGUF file, "
            f"org/name, embedded:xs|s|l|long-xs, or {', '.join(NAMED)}"
        )
    return spec


def configured(spec: str) -> str:
    """What holds a model's configuration: the folder or hub name, of a LoRA adapter its base. Raises ModelError."""
    path = resolve(spec)
    return resolve(str(adapter_settings(Path(path)).base_model_name_or_path)) if is_adapter(Path(path)) else path


@contextmanager
def no_bars() -> Iterator[None]:
    """Within, loading and saving draw no bars, which would tear the live panel; then all is as it was."""
    shown, hub_hidden = hf_logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    with warnings.catch_warnings(action="ignore"):  # of a variable that decides instead (HF_HUB_DISABLE_PROGRESS_BARS)
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        with warnings.catch_warnings(action="ignore"):
            if shown:
                hf_logging.enable_progress_bar()
            if hub_hidden:
                disable_progress_bars()


@contextmanager
def _one_line(what: str, spec: str) -> Iterator[None]:
    """Restate what from_pretrained raises in one line. Without a route to the hub a name is looked up in the cache."""
    names_the_hub = "/" in spec and not Path(spec).exists()
    try:
        with no_bars(), offline_when_unreachable(constants) if names_the_hub else nullcontext():
            yield
    except Exception as error:  # safetensors and tokenizers have errors of their own, down to plain Exception
        text = " ".join(str(error).split())
        if "offline" in text.lower() or "couldn't connect" in text.lower() or "connection" in text.lower():
            advice = "the hub cannot be reached; give a local folder, or embedded:xs|s|l|long-xs"
        elif "safetensors" in text and "not" in text.lower():
            advice = "weights that are not safetensors are refused; convert them, or set model.allow_pickle=true"
        elif "trust_remote_code" in text:
            advice = "it needs Python code from its repository; read it, then set model.trust_remote_code=true"
        else:
            advice = text[:300]
        raise ModelError(f"{what} {spec!r} cannot be loaded: {advice}") from error


def _refuse_pickle(spec: str, folder: Path, config: ModelConfig) -> None:
    """A folder without safetensors is named for what it holds; a hub model is refused by from_pretrained."""
    if config.allow_pickle or not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"model {spec!r} has weights that are not safetensors ({pickled[0]}), which may run any code when loaded: "
            "refused; convert them, or set model.allow_pickle=true if you trust them"
        )
    raise ModelError(f"model {spec!r} has no weights (*.safetensors); give the folder that save_pretrained wrote")


def check_weights(spec: str, config: ModelConfig) -> None:
    """Whether a local model's safetensors are all there and whole, from their headers and sizes, without loading any.

    Raises ModelError in one line. A model of the hub is checked as it is downloaded.
    """
    folder = Path(resolve(spec))
    _refuse_pickle(spec, folder, config)
    for index in folder.glob("*.safetensors.index.json"):
        try:
            named = set(json.loads(index.read_bytes())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ModelError(
                f"model {spec!r} is damaged: {index.name} cannot be read ({error}); copy it again"
            ) from None
        if absent := sorted(name for name in named if not (folder / name).is_file()):
            raise ModelError(f"model {spec!r} is not whole: {', '.join(absent)} is missing; copy it again")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ModelError(f"model {spec!r} is damaged: {file.name}: {error}; copy it again") from None
    if (under := configured(spec)) != str(folder):
        check_weights(under, config)


def load_model(spec: str, config: ModelConfig, *, device: str = "cpu", vocab_size: int | None = None) -> LanguageModel:
    """A frozen causal LM from a folder, hub name or `embedded:size`, without dropout; of a folder with a LoRA adapter
    its base with that. Raises ModelError in one line.

    vocab_size: of its tokenizer, where anything is to be sampled or scored (see LanguageModel).
    """
    path = resolve(spec)
    if is_adapter(Path(path)):
        base = str(adapter_settings(Path(path)).base_model_name_or_path)
        return load_adapter(Path(path), load_model(base, config, device=device, vocab_size=vocab_size))
    _refuse_pickle(spec, Path(path), config)
    with _one_line("model", spec):
        model: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype="auto",
            trust_remote_code=config.trust_remote_code,
            use_safetensors=None if config.allow_pickle else True,
        )
    model.to(torch.device(device))
    keep_narrow(model)
    precision = config.scoring or config.precision
    made = LanguageModel(model, precision=precision, kernels=config.kernels, vocab_size=vocab_size, source=path)
    if config.sharding == "full" and dist.is_initialized() and dist.get_world_size() > 1:
        made.shard()
    return made


def load_over(spec: str, base: LanguageModel, config: ModelConfig, *, vocab_size: int | None = None) -> LanguageModel:
    """A model that was made from a base: where it is an adapter of it, a role over the base's own weights.

    Raises ModelError for an adapter of another base.
    """
    path = Path(resolve(spec))
    if not is_adapter(path):
        return load_model(spec, config, device=str(base.device), vocab_size=vocab_size)
    named = str(adapter_settings(path).base_model_name_or_path)
    if named != base.source and (
        not Path(named).is_dir() or fingerprint(named, config) != fingerprint(base.source, config)
    ):
        raise ModelError(
            f"the adapter {spec!r} was trained over {named!r}, and model.base is {base.source!r}: give that base, or "
            "an adapter of this one"
        )
    return load_adapter(path, base)


def to_train(start: LanguageModel, config: ModelConfig, seed: int = 0) -> LanguageModel:
    """What begins as `start` and is trained: a copy of all its weights in fp32, or an adapter over it.

    A role is continued by a role. With model.adapters = "none" it is merged into a copy first.
    """
    trained: LanguageModel
    if config.adapters == "lora":
        trained = start.copy() if isinstance(start, AdaptedModel) else AdaptedModel(start, lora_settings(config), seed)
    else:
        trained = start.merged() if isinstance(start, AdaptedModel) else start.copy()
    trained.precision = config.precision
    if config.activation_checkpointing:
        trained.recompute_activations()
    return trained


def load_tokenizer(spec: str, config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with the chat template that the recipe gives its own models.

    Padding goes left, and a missing pad token becomes EOS (masks never look at ids).
    """
    path = resolve(spec)
    with _one_line("tokenizer of", spec):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    if spec in (config.base, config.sft):  # what a run exports has its template already
        use_template(tokenizer, config.chat_template, config.template_kwargs)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"tokenizer of {spec!r} has neither a pad nor an EOS token; set one in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def fingerprint(spec: str, config: ModelConfig) -> str:
    """sha256 over config and weights of a local model, that of a GGUF file, or the hub commit: what a stage's id knows
    a model by."""
    if file := gguf_file(spec):
        return identity(file)
    path = Path(resolve(spec))
    if path.is_dir():
        under = configured(spec)
        patterns = ("*.safetensors", "*.bin", "*config.json", "tokenizer*.json", "chat_template.jinja")
        digest = hashlib.sha256()
        for file in sorted({file for pattern in patterns for file in path.glob(pattern)}):
            digest.update(f"{file.name}\0".encode())
            digest.update(bytes.fromhex(checksum(file)))  # which is known: the seeds of a run share models
        if under != str(path):  # an adapter is nothing without its base
            digest.update(fingerprint(under, config).encode())
        return digest.hexdigest()
    with _one_line("model", spec):
        hub_config: Any = AutoConfig.from_pretrained(spec, trust_remote_code=config.trust_remote_code)
    return f"{spec}@{getattr(hub_config, '_commit_hash', None)}"


def context_length(model: LanguageModel) -> int:
    """Positions the model was made for; 2^20 where its configuration names none (ALiBi, recurrence)."""
    return _positions(model.config)


def _positions(config: Any) -> int:
    named = (getattr(config, key, None) for key in ("max_position_embeddings", "max_seq_len"))
    return int(next(filter(None, named), 1 << 20))


def architecture(spec: str, config: ModelConfig) -> Any:
    """A model's configuration: of its files, config.json alone is read or fetched. Raises ModelError."""
    with _one_line("model", spec):
        return AutoConfig.from_pretrained(configured(spec), trust_remote_code=config.trust_remote_code)


def declared(spec: str, config: ModelConfig) -> tuple[int, GenerationConfig]:
    """(context length, generation config) as a model itself says, without its weights. Raises ModelError."""
    said = architecture(spec, config)
    try:
        return _positions(said.get_text_config()), GenerationConfig.from_pretrained(resolve(spec))
    except OSError:  # there is no such file
        return _positions(said.get_text_config()), GenerationConfig.from_model_config(said)


def prepare_alone(recipe: Recipe, *, only_prompts: bool = False) -> tuple[PreparedData, PreTrainedTokenizerBase]:
    """A recipe's data and the tokenizer that they are encoded with, as training will see them, without any weights.

    Without noise that the base would have to be asked for. Raises UserError for what cannot be used.
    """
    recipe = resolved(recipe)
    config, starts = recipe.model, recipe.model.sft or recipe.model.base
    if asks_base(recipe.data):
        recipe = with_overrides(recipe, {"data.noise": "none", "data.noise_rate": 0.0})
    tokenizer = load_tokenizer(starts, config)
    data = prepare(
        recipe.data,
        tokenizer,
        recipe.seed,
        declared(config.base, config)[0],
        max_new_tokens=recipe.rollout.max_new_tokens,
        stop=stop_ids(tokenizer, declared(starts, config)[1]),
        only_prompts=only_prompts,
    )
    return data, tokenizer


def import_model(spec: str) -> None:
    """Load the code of a local model, and what transformers builds once a process to read checkpoints: no weights."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    config = AutoConfig.from_pretrained(configured(spec))
    MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    get_checkpoint_conversion_mapping(config.model_type)


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


@cache  # of a process
def bf16_slowdown(device: str) -> float:
    """Time of a linear layer in bf16 over the same in fp32, on this device: about 10 on a CPU that has no instructions
    for it (and gradients more), below 1 where there are."""
    threads, seconds = torch.get_num_threads(), {}
    torch.set_num_threads(1)  # more would wait for each other where others want the cores
    for dtype in (torch.float32, torch.bfloat16):
        x_MD, weight_ND = (torch.ones(rows, 512, device=device, dtype=dtype) for rows in (128, 1024))
        tries = []
        for _ in range(6):  # the first one also makes it ready
            start = perf_counter()
            linear(x_MD, weight_ND)[0, 0].item()  # waits for the device
            tries.append(perf_counter() - start)
        seconds[dtype] = min(tries)
    torch.set_num_threads(threads)
    return seconds[torch.bfloat16] / seconds[torch.float32]
