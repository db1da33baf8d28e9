"""Models by role: loading with clear refusals, log-probs of responses, the critic, and counted operations.

Every model is loaded in fp32 (trained weights are fp32 masters; at 1e-6 Adam moves nothing in bf16), with dropout off.
Bodies may run under bf16 autocast; what heads give and everything after them stays in fp32, because log-probs taken
from 16-bit logits err by as much as the reward.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from srppo.config import ModelConfig, is_embedded
from srppo.data.hub import offline_when_unreachable
from srppo.errors import ModelError
from srppo.kernels import Impl, choose, linear_logprob, token_logprobs

LOGIT_TOLERANCE = 1e-3  # largest difference between our head and the model's own logits, per logit, in the load check


@dataclass(frozen=True)
class Head:
    """How a model turns hidden states into logits. `linear` False: only the model's own logits are right."""

    linear: bool
    logit_scale: float = 1.0
    softcap: float | None = None


class LanguageModel(nn.Module):
    """A causal LM with what the trainer needs of it: log-probs of responses under explicit positions and masks."""

    def __init__(self, model: PreTrainedModel, *, precision: str = "fp32", kernels: Impl = "auto") -> None:
        super().__init__()
        self.model: Any = model  # generate() and from_pretrained are typed too narrowly for mypy
        self.precision = precision
        self.kernels: Impl = kernels
        choose(kernels, model.device, next(model.parameters()))
        _switch_dropout_off(model)
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.head = _find_head(self)
        self._narrow: tuple[int, Tensor | None] | None = None

    def copy(self) -> LanguageModel:
        """The same model with weights of its own; at a fifth of the cost of loading it again."""
        other = copy.deepcopy(self)
        other._narrow = None  # known by the count of changes to a weight, which starts anew in a copy
        return other

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    def response_logprobs(
        self, tokens_BS: Tensor, attention_mask_BS: Tensor, response_width: int, *, temperature: float = 1.0
    ) -> Tensor:
        """Log-probs of the last `response_width` columns, BT fp32, nats; 0 where masked.

        Only counted response tokens go through the head. Differentiable in the weights.
        """
        mask_BT = attention_mask_BS[:, -response_width:]
        tokens_N = tokens_BS[:, -response_width:][mask_BT]
        if self.head.linear:
            output = self.model.get_output_embeddings()
            logprobs_N = linear_logprob(
                self.hidden_rows(tokens_BS, attention_mask_BS, response_width),
                output.weight,
                tokens_N,
                bias_V=output.bias,
                temperature=temperature,
                logit_scale=self.head.logit_scale,
                softcap=self.head.softcap,
                ignore_index=None,  # masked rows are gone already
                impl=self.kernels,
            )
        else:
            logits_NV = self.logit_rows(tokens_BS, attention_mask_BS, response_width)
            logprobs_N = token_logprobs(logits_NV, tokens_N, temperature=temperature)
        return unflatten(logprobs_N, mask_BT)

    @torch.no_grad()
    def frozen_head(self) -> tuple[Tensor, Tensor | None]:
        """(weight VD, bias V) to score with: where the body runs in bf16, the weight too if that rounds none of it.

        So it is with a checkpoint in bf16, and then products are of 16-bit matrices with fp32 sums: exact, and at the
        speed of AMX or of a GPU's matrix units. The copy is made anew after the weight has changed.
        """
        output = self.model.get_output_embeddings()
        if self.precision != "bf16":
            return output.weight, output.bias
        version = output.weight._version
        if self._narrow is None or self._narrow[0] != version:
            narrow_VD = output.weight.bfloat16()
            pairs = zip(narrow_VD.split(4096), output.weight.split(4096), strict=True)
            exact = all(torch.equal(narrow.float(), wide) for narrow, wide in pairs)
            self._narrow = version, narrow_VD if exact else None
        narrow_VD = self._narrow[1]
        return output.weight if narrow_VD is None else narrow_VD, output.bias

    def hidden_rows(self, tokens_BS: Tensor, attention_mask_BS: Tensor, response_width: int) -> Tensor:
        """Hidden states before each counted response token, ND."""
        hidden_BSD = self.hidden(tokens_BS, attention_mask_BS)
        return hidden_BSD[:, -response_width - 1 : -1][attention_mask_BS[:, -response_width:]]

    def logit_rows(self, tokens_BS: Tensor, attention_mask_BS: Tensor, response_width: int) -> Tensor:
        """The model's own logits there, NV; in fp32 throughout, since it would round them under autocast."""
        logits_BSV = self.model(**self._inputs(tokens_BS, attention_mask_BS), use_cache=False).logits
        return logits_BSV[:, -response_width - 1 : -1][attention_mask_BS[:, -response_width:]]

    def hidden(self, tokens_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
        """Last hidden states, BSD; bf16 under autocast."""
        return body_hidden(self.model.base_model, self._inputs(tokens_BS, attention_mask_BS), self.precision)

    def _inputs(self, tokens_BS: Tensor, attention_mask_BS: Tensor) -> dict[str, Tensor]:
        return model_inputs(tokens_BS, attention_mask_BS, self.takes_positions)


class ValueModel(nn.Module):
    """The critic: the SFT model's body, its own copy, under a linear head that starts at zero."""

    def __init__(self, start: LanguageModel) -> None:
        super().__init__()
        if not has_body(start.model):
            raise ModelError(
                f"{type(start.model).__name__} has no body under its head (its base_model_prefix names none), and "
                "PPO's critic is a copy of that; set ppo.advantage=rloo, which needs no critic, or use another model"
            )
        self.body = copy.deepcopy(start.model.base_model)
        self.precision, self.takes_positions = start.precision, start.takes_positions
        self.head = nn.Linear(start.model.get_output_embeddings().weight.shape[1], 1, device=start.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def response_values(self, tokens_BS: Tensor, attention_mask_BS: Tensor, response_width: int) -> Tensor:
        """Value of the state before each of the last `response_width` tokens, BT fp32, in scaled reward; 0 masked."""
        inputs = model_inputs(tokens_BS, attention_mask_BS, self.takes_positions)
        hidden_BTD = body_hidden(self.body, inputs, self.precision)[:, -response_width - 1 : -1]
        values_BT = self.head(hidden_BTD.float()).squeeze(-1)
        return values_BT.masked_fill(~attention_mask_BS[:, -response_width:], 0.0)


def has_body(model: Any) -> bool:
    """Whether the hidden states before the head can be had; `base_model` is the model itself where it is unknown."""
    return model.base_model is not model


def model_inputs(tokens_BS: Tensor, attention_mask_BS: Tensor, takes_positions: bool) -> dict[str, Tensor]:
    """Inputs with explicit positions: under left padding the first real token has position 0."""
    inputs = {"input_ids": tokens_BS, "attention_mask": attention_mask_BS.long()}
    if takes_positions:
        inputs["position_ids"] = (attention_mask_BS.long().cumsum(dim=1) - 1).clamp(min=0)
    return inputs


def body_hidden(body: nn.Module, inputs: dict[str, Tensor], precision: str) -> Tensor:
    """Last hidden states, BSD, with or without bf16 autocast."""
    with torch.autocast(inputs["input_ids"].device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        return body(**inputs, use_cache=False).last_hidden_state


def unflatten(x_N: Tensor, mask_BT: Tensor) -> Tensor:
    """Rows in the order of the mask back to their places, BT; 0 where masked."""
    return torch.zeros(mask_BT.shape, dtype=x_N.dtype, device=x_N.device).masked_scatter(mask_BT, x_N)


def _switch_dropout_off(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, rate in list(vars(module).items()):  # attention keeps its rate as a number
            if "dropout" in name and isinstance(rate, float):
                setattr(module, name, 0.0)
    for name in ("attention_dropout", "hidden_dropout", "dropout", "resid_pdrop", "attn_pdrop", "embd_pdrop"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    model.eval()


@torch.no_grad()
def _find_head(lm: LanguageModel) -> Head:
    """Read scale and softcap from the config and prove them: our logits must equal the model's on left-padded input."""
    config, model = lm.model.config, lm.model
    output = model.get_output_embeddings()
    if not isinstance(output, nn.Linear):
        return Head(linear=False)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(output.weight.shape[0], (2, 7), generator=generator).to(model.device)
    attention_mask_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
    attention_mask_BS[0, :3] = False
    inputs = model_inputs(tokens_BS, attention_mask_BS, lm.takes_positions)
    theirs_NV = model(**inputs, use_cache=False).logits[attention_mask_BS]
    alone_NV = model(input_ids=tokens_BS[:1, 3:], use_cache=False).logits[0]
    if (alone_NV - theirs_NV[: len(alone_NV)]).abs().max() > LOGIT_TOLERANCE:
        raise ModelError(
            f"{type(model).__name__} gives other logits under left padding; batched rollouts would be wrong with it. "
            "Use a model that honours attention_mask and position_ids"
        )
    hidden_ND = body_hidden(model.base_model, inputs, "fp32")[attention_mask_BS] if has_body(model) else None
    if hidden_ND is None or hidden_ND.shape[1] != output.weight.shape[1]:  # projected on its way to the head
        return Head(linear=False)
    ours_NV = (hidden_ND @ output.weight.T + (0 if output.bias is None else output.bias)) * scale
    if softcap is not None:
        ours_NV = softcap * torch.tanh(ours_NV / softcap)
    return Head(bool((ours_NV - theirs_NV).abs().max() <= LOGIT_TOLERANCE), scale, softcap)


def resolve(spec: str) -> str:
    """A model spec to what from_pretrained takes: `embedded:s` to its folder; folders and hub names as they are."""
    if is_embedded(spec):
        from srppo.world import base_path

        return str(base_path(spec.partition(":")[2] or "s"))
    if not Path(spec).exists() and (spec.count("/") != 1 or spec.startswith((".", "/", "~"))):
        raise ModelError(
            f"model {spec!r} is neither a folder here nor a hub name; give a folder with config.json, org/name, or "
            "embedded:xs|s|l"
        )
    return spec


hf_logging.disable_progress_bar()  # loading and saving print bars that would tear the live panel


@contextmanager
def _one_line(what: str, spec: str) -> Iterator[None]:
    """Restate what from_pretrained raises in one line. Without a route to the hub a name is looked up in the cache."""
    names_the_hub = "/" in spec and not Path(spec).exists()
    try:
        with offline_when_unreachable(constants) if names_the_hub else nullcontext():
            yield
    except Exception as error:  # safetensors and tokenizers have errors of their own, down to plain Exception
        text = " ".join(str(error).split())
        if "offline" in text.lower() or "couldn't connect" in text.lower() or "connection" in text.lower():
            advice = "the hub cannot be reached; give a local folder, or embedded:xs|s|l"
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


def load_model(spec: str, config: ModelConfig, *, device: str = "cpu") -> LanguageModel:
    """A causal LM from a folder, hub name or `embedded:size`, fp32, without dropout. Raises ModelError in one line."""
    path = resolve(spec)
    _refuse_pickle(spec, Path(path), config)
    with _one_line("model", spec):
        model: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=None if config.allow_pickle else True,
        )
    model.to(torch.device(device))
    return LanguageModel(model, precision=config.precision, kernels=config.kernels)


def load_tokenizer(spec: str, config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; padding goes left, and a missing pad token becomes EOS (masks never look at ids)."""
    path = resolve(spec)
    with _one_line("tokenizer of", spec):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"tokenizer of {spec!r} has neither a pad nor an EOS token; set one in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_same_vocabulary(base: PreTrainedModel, sft: PreTrainedModel) -> None:
    """The reward compares log-probs of the same token ids, so both models must have one vocabulary."""
    sizes = [model.get_output_embeddings().weight.shape[0] for model in (base, sft)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"the base has a vocabulary of {sizes[0]}, the SFT model of {sizes[1]}; log pi_sft - log pi_base needs the "
            "same tokens: use an SFT model trained from this base"
        )


def check_same_tokens(base: PreTrainedTokenizerBase, sft: PreTrainedTokenizerBase) -> None:
    """The same id must be the same token for both models; equal sizes do not make it so."""
    ours, theirs = base.get_vocab(), sft.get_vocab()
    if ours != theirs:
        differing = min(ours.items() ^ theirs.items(), key=lambda pair: (pair[1], pair[0]))
        raise ModelError(
            f"base and SFT model number their tokens differently ({len(ours)} and {len(theirs)} tokens, the first that "
            f"differs is {differing[0]!r}, id {differing[1]}); log pi_sft - log pi_base needs the same tokens: use "
            "an SFT model trained from this base"
        )


def fingerprint(spec: str, config: ModelConfig) -> str:
    """sha256 over config and weights of a local model, or over the hub commit: what a stage's id knows a model by."""
    path = Path(resolve(spec))
    if path.is_dir():
        patterns = ("*.safetensors", "*.bin", "*config.json", "tokenizer*.json", "chat_template.jinja")
        files = sorted({file for pattern in patterns for file in path.glob(pattern)})
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{file.name}\0".encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()
    with _one_line("model", spec):
        hub_config: Any = AutoConfig.from_pretrained(spec, trust_remote_code=config.trust_remote_code)
    return f"{spec}@{getattr(hub_config, '_commit_hash', None)}"


def context_length(model: LanguageModel) -> int:
    """Positions the model was made for."""
    return _positions(model.model.config)


def _positions(config: Any) -> int:
    return int(getattr(config, "max_position_embeddings", None) or 1 << 20)


def declared(spec: str) -> tuple[int, GenerationConfig]:
    """(context length, generation config) of a local model as its folder says, without its weights."""
    config = AutoConfig.from_pretrained(resolve(spec))
    try:
        return _positions(config), GenerationConfig.from_pretrained(resolve(spec))
    except OSError:  # there is no such file
        return _positions(config), GenerationConfig.from_model_config(config)


def import_model(spec: str) -> None:
    """Load the code of a local model, and what transformers builds once a process to read checkpoints: no weights."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    config = AutoConfig.from_pretrained(resolve(spec))
    MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    get_checkpoint_conversion_mapping(config.model_type)


def forward_flops(model: LanguageModel | ValueModel, lengths_B: Tensor, head_tokens: int) -> int:
    """Counted operations of one forward pass: 2 a weight and token, attention, and the head on `head_tokens` tokens.

    Counts real tokens, not padding, so that the figure repeats on every machine. A training step counts three times.
    """
    body = model.model.base_model if isinstance(model, LanguageModel) else model.body
    embeddings = {id(module.weight) for module in body.modules() if isinstance(module, nn.Embedding)}
    matrices = sum(weight.numel() for weight in body.parameters() if weight.dim() >= 2 and id(weight) not in embeddings)
    config: Any = body.config
    tokens = int(lengths_B.sum())
    pairs = int((lengths_B.double() * (lengths_B + 1) / 2).sum())
    attention = 4 * config.num_hidden_layers * config.hidden_size * pairs
    head = config.hidden_size * (config.vocab_size if isinstance(model, LanguageModel) else 1)
    return 2 * matrices * tokens + attention + 2 * head * head_tokens
