"""A causal language model with what the trainer needs of it: log-probs of responses, from a head that is checked.

Weights are fp32, dropout is off. The body may run under bf16 autocast; what the head gives and everything after it
stays in fp32, because log-probs taken from 16-bit logits err by as much as the reward.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from srppo.errors import ModelError
from srppo.kernels import Impl, choose, linear_logprob, token_logprobs
from srppo.models import packed
from srppo.models.backbone import Backbone
from srppo.models.fused import fuse
from srppo.models.heap import give_back, large_mapped, map_large
from srppo.models.narrow import NarrowLinear, widen
from srppo.models.packed import Packing
from srppo.models.sharding import Shards, spread, whole

LOGIT_TOLERANCE = 2.0**-13
"""Largest difference between two ways to the same logits in the load check, as a share of the largest logit. It lies
between the formats: 2,048 roundings of fp32 (2^-24 each), more than sums in another order need, and a quarter of one of
fp16 (2^-11), so that a head that rounds to 16 bits is noticed, whatever the size of its logits."""


@dataclass(frozen=True)
class Head:
    """How a model turns hidden states into logits. `linear` False: only the model's own logits are right."""

    linear: bool
    logit_scale: float = 1.0
    softcap: float | None = None


class LanguageModel(nn.Module):
    """A causal LM with what the trainer needs of it: log-probs of responses under explicit positions and masks.

    vocab_size: ids that the tokenizer can make. A head may have more rows (padding, for speed); those are neither
    sampled nor in any softmax. None: as many as the head has rows. source: where the weights came from. like: another
    model of this architecture, whose settings and head are taken over; None: the head is looked for and proved.
    """

    head: Head
    packs: bool  # rows of many lengths go through it as one, without padding
    backbone: Backbone | None = None  # where adapters were put into the weights: then roles take turns
    recomputes = False  # activations are worked out again in the backward pass
    shards: Shards | None = None  # where the weights are spread over processes

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        precision: str = "fp32",
        kernels: Impl = "auto",
        vocab_size: int | None = None,
        source: str = "",
        like: LanguageModel | None = None,
    ) -> None:
        super().__init__()
        self.model: Any = model  # generate() and from_pretrained are typed too narrowly for mypy
        self._narrow: tuple[int, Tensor | None] | None = None
        if like is not None:
            for name in ("precision", "source", "generation_config", "kernels", "takes_positions", "vocab_size"):
                setattr(self, name, getattr(like, name))
            self.head, self.packs, self.recomputes = like.head, like.packs, like.recomputes
            return
        self.precision, self.source = precision, source
        self.generation_config: Any = model.generation_config  # what it says of its stop tokens; ours decides the rest
        self.kernels: Impl = kernels
        choose(kernels, model.device, next(model.parameters()))
        _switch_dropout_off(model)
        fuse(model)
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        rows = model.get_output_embeddings().weight.shape[0]
        self.vocab_size = rows if vocab_size is None else min(vocab_size, rows)
        self.head = _find_head(self)
        self.packs = find_packing(model, self.takes_positions)

    @property
    def decoder(self) -> Any:
        """The layers that text passes through, without the head."""
        return self.model.base_model.get_decoder()

    def activate(self) -> None:
        """Make the backbone this role's, where several roles share one: each pass begins with it."""
        if self.backbone is not None:
            self.backbone.switch(None)

    def recompute_activations(self) -> None:
        """Keep of each layer its input alone, and work out the rest again in the backward pass: a third more work. On a
        CPU the heap, too, is told to keep nothing, or it would hold in holes what the layers do not.

        Raises ModelError for a model that transformers cannot do it with.
        """
        backbone = self.backbone

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            """While a layer is worked out again, the role that it was worked out for has its turn."""
            return nullcontext(), nullcontext() if backbone is None else backbone.as_now()

        bare = [] if self.shards is None else [self.shards.plain]  # of which a trunk is made
        try:
            for model in (self.model, *bare):
                model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
        except ValueError as error:
            raise ModelError(
                f"{type(self.model).__name__} cannot recompute activations ({error}); leave out "
                "model.activation_checkpointing"
            ) from None
        if self.device.type == "cpu":
            map_large()
        self.recomputes = True

    @contextmanager
    def merged_layers(self) -> Iterator[None]:
        """Within, plain fp32 layers stand for those that widen their weights or add an adapter in each pass: writing
        goes through all of them for every token. Only where the sum would be taken in fp32 anyway, on a CPU, and where
        time comes before memory: activations are not recomputed.

        They are as large as the model in fp32, so they neither come on top of what training has freed, nor stay in the
        heap beside what it takes next.
        """
        wanted = self.device.type == "cpu" and self.precision == "fp32" and not self.recomputes
        makers = self._plain_layers() if wanted else {}
        if not makers:
            yield
            return
        give_back()
        before = {name: self.model.get_submodule(name) for name in makers}
        with large_mapped():
            _put(self.model, {name: make() for name, make in makers.items()})
        try:
            yield
        finally:
            _put(self.model, before)
            give_back()

    def _plain_layers(self) -> dict[str, Callable[[], nn.Module]]:
        """What makes each, by the names of the layers for which they stand."""
        return {
            name: partial(_widened, layer)
            for name, layer in self.model.named_modules()
            if isinstance(layer, NarrowLinear) and not name.endswith(".base_layer")
        }

    def weights(self) -> dict[str, Tensor]:
        """What training changes, by name: parameters and buffers, tied ones once."""
        return own_tensors(self.model)

    def shard(self) -> None:
        """Spread the weights over the processes of the run: this one keeps its part. So do copies and trunks.

        On a CPU the heap, too, is told to keep nothing: what is gathered and let go would stay in its holes."""
        if self.device.type == "cpu":
            map_large()
        self.shards = Shards(self.model)

    def gathered(self) -> AbstractContextManager[None]:
        """Within, the weights are whole in each process, which writing needs. All processes must enter."""
        return nullcontext() if self.shards is None else self.shards.gathered()

    def gathered_to_save(self) -> AbstractContextManager[None]:
        """Within, one process alone may `save`. All processes must enter."""
        return self.gathered()

    def save(self, folder: Path) -> None:
        """Write weights, configuration and generation config into a folder for `from_pretrained`."""
        self.model.generation_config = self.generation_config
        self.model.save_pretrained(folder, state_dict=None if self.shards is None else self.shards.tensors())

    def copy(self) -> LanguageModel:
        """The same model with fp32 weights of its own, to be trained; at a fifth of the cost of loading it again."""
        if self.shards is not None:
            return self._own(self.shards.whole_copy())
        other = copy.deepcopy(self)
        widen(other.model)
        other._narrow = None  # known by the count of changes to a weight, which starts anew in a copy
        return other

    def _own(self, model: Any) -> LanguageModel:
        """Another model of transformers under these settings, whose weights are trained, and spread as these are."""
        widen(model)
        other = LanguageModel(model, like=self)
        if self.shards is not None:
            other.shard()
        return other

    def trunk(self) -> Trunk:
        """The body with weights of its own, to be trained under another head."""
        return Body(self)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def config(self) -> Any:
        """The configuration of the text part, which a model of text and images nests in its own."""
        return self.model.config.get_text_config()

    def response_logprobs(
        self,
        tokens_BS: Tensor,
        attention_mask_BS: Tensor,
        response_width: int,
        *,
        temperature: float = 1.0,
        hidden_ND: Tensor | None = None,
    ) -> Tensor:
        """Log-probs of the last `response_width` columns, BT fp32, nats; 0 where masked.

        Only counted response tokens go through the head. Differentiable in the weights. hidden_ND: what `hidden_rows`
        gave, where it is known; of no use to a head that is not linear.
        """
        mask_BT = attention_mask_BS[:, -response_width:]
        tokens_N = tokens_BS[:, -response_width:][mask_BT]
        if self.head.linear:
            weight_VD, bias_V = self.head_rows()
            if hidden_ND is None:
                hidden_ND = self.hidden_rows(tokens_BS, attention_mask_BS, response_width)
            logprobs_N = linear_logprob(
                hidden_ND,
                weight_VD,
                tokens_N,
                bias_V=bias_V,
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

    def head_rows(self) -> tuple[Tensor, Tensor | None]:
        """(weight VD, bias V) of the first `vocab_size` rows: views, or the tensors themselves where that is all."""
        output = self.model.get_output_embeddings()
        weight_VD, bias_V = whole(output.weight), None if output.bias is None else whole(output.bias)
        if self.vocab_size == len(weight_VD):
            return weight_VD, bias_V
        return weight_VD[: self.vocab_size], None if bias_V is None else bias_V[: self.vocab_size]

    @torch.no_grad()
    def frozen_head(self) -> tuple[Tensor, Tensor | None]:
        """(weight VD, bias V) to score with: where the body runs in bf16, the weight too if that rounds none of it.

        So it is with a checkpoint in bf16, and then products are of 16-bit matrices with fp32 sums: exact, and at the
        speed of a GPU's or CPU's bf16 instructions. The copy is made anew after the weight has changed.
        """
        weight_VD, bias_V = self.head_rows()
        if self.precision != "bf16":
            return weight_VD, bias_V
        known, version = self._narrow, weight_VD._version  # which views share
        if known is None or known[0] != version:
            narrow_VD = weight_VD.bfloat16()
            pairs = zip(narrow_VD.split(4096), weight_VD.split(4096), strict=True)
            exact = all(torch.equal(narrow.float(), wide) for narrow, wide in pairs)
            known = version, narrow_VD if exact else None
            if self.shards is None:  # or the whole of what is spread would stay
                self._narrow = known
        return weight_VD if known[1] is None else known[1], bias_V

    def hidden_rows(self, tokens_BS: Tensor, attention_mask_BS: Tensor, response_width: int) -> Tensor:
        """Hidden states before each counted response token, ND; bf16 under autocast."""
        self.activate()
        return hidden_rows(self, self.model.base_model, tokens_BS, attention_mask_BS, response_width)

    def logit_rows(self, tokens_BS: Tensor, attention_mask_BS: Tensor, response_width: int) -> Tensor:
        """The model's own logits there, NV; in fp32 throughout, since it would round them under autocast."""
        self.activate()
        if not len(tokens_BS):
            return self._logits(*_one_token(tokens_BS))[0, :0, : self.vocab_size]
        logits_BSV = self._logits(tokens_BS, attention_mask_BS)
        return logits_BSV[:, -response_width - 1 : -1, : self.vocab_size][attention_mask_BS[:, -response_width:]]

    def _logits(self, tokens_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
        inputs = model_inputs(tokens_BS, attention_mask_BS, self.takes_positions)
        weights = {} if self.shards is None else self.shards.head_of_body()
        said: Any = functional_call(self.model, weights, (), {**inputs, "use_cache": False}, tie_weights=False)
        logits_BSV: Tensor = said.logits
        return logits_BSV


def _widened(layer: nn.Linear) -> nn.Linear:
    return plain(layer.weight.float(), layer.bias)


def plain(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of given weights."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _put(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


class Trunk(Protocol):
    """What gives hidden states, with weights that are trained."""

    @property
    def decoder(self) -> Any: ...

    def hidden_rows(self, tokens_BS: Tensor, attention_mask_BS: Tensor, response_width: int) -> Tensor: ...

    def weights(self) -> dict[str, Tensor]: ...


class Body(nn.Module):
    """A copy of a model's body, without its head."""

    def __init__(self, start: LanguageModel) -> None:
        super().__init__()
        shards = start.shards
        self.model = copy.deepcopy(start.model.base_model) if shards is None else shards.whole_copy().base_model
        widen(self.model)
        if shards is not None:
            spread(self.model)
        self.precision, self.takes_positions, self.packs = start.precision, start.takes_positions, start.packs
        self.recomputes = start.recomputes

    @property
    def decoder(self) -> Any:
        """The layers that text passes through."""
        return self.model.get_decoder()

    def hidden_rows(self, tokens_BS: Tensor, attention_mask_BS: Tensor, response_width: int) -> Tensor:
        """Hidden states before each counted response token, ND; bf16 under autocast."""
        return hidden_rows(self, self.model, tokens_BS, attention_mask_BS, response_width)

    def weights(self) -> dict[str, Tensor]:
        """What training changes, by name."""
        return own_tensors(self.model)


def has_body(model: Any) -> bool:
    """Whether the hidden states before the head can be had; `base_model` is the model itself where it is unknown."""
    return model.base_model is not model


def model_inputs(tokens_BS: Tensor, attention_mask_BS: Tensor, takes_positions: bool) -> dict[str, Tensor]:
    """Inputs with explicit positions: under left padding the first real token has position 0."""
    inputs = {"input_ids": tokens_BS, "attention_mask": attention_mask_BS.long()}
    if takes_positions:
        inputs["position_ids"] = (attention_mask_BS.long().cumsum(dim=1) - 1).clamp(min=0)
    return inputs


def hidden_rows(
    how: LanguageModel | Body, body: nn.Module, tokens_BS: Tensor, attention_mask_BS: Tensor, response_width: int
) -> Tensor:
    """Hidden states before each counted response token, ND: of packed rows where the model takes them.

    Without rows the body still runs, on one token, and none of what it says is asked for: where weights are spread
    over processes, other processes have rows and need this one's part."""
    mask_BT = attention_mask_BS[:, -response_width:]
    if how.recomputes:  # which transformers does in training mode alone; dropout is off in any
        body.train(torch.is_grad_enabled())
    if not len(tokens_BS):
        inputs = model_inputs(*_one_token(tokens_BS), how.takes_positions)
        return body_hidden(body, inputs, how.precision)[0, :0]
    if how.packs:
        packing = Packing.of(tokens_BS, attention_mask_BS)
        hidden_ND = body_hidden(body, packing.inputs(), how.precision)[0]
        return hidden_ND[packing.place_BS[:, -response_width - 1 : -1][mask_BT]]
    inputs = model_inputs(tokens_BS, attention_mask_BS, how.takes_positions)
    return body_hidden(body, inputs, how.precision)[:, -response_width - 1 : -1][mask_BT]


def _one_token(tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
    """A row of one token, and its mask."""
    return tokens_BS.new_zeros((1, 1)), tokens_BS.new_ones((1, 1), dtype=torch.bool)


def body_hidden(body: nn.Module, inputs: dict[str, Tensor], precision: str) -> Tensor:
    """Last hidden states, BSD, with or without bf16 autocast."""
    with torch.autocast(inputs["input_ids"].device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        return body(**inputs, use_cache=False).last_hidden_state


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied weights once."""
    tensors = module.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(tensors.items())}
    return {name: tensor for name, tensor in tensors.items() if first[id(tensor)] == name}


@torch.no_grad()
def find_packing(model: Any, takes_positions: bool) -> bool:
    """Whether a body gives for packed rows what it gives for padded ones; then its attention is ours from now on.

    One that mixes neighbours by other means than attention would mix rows: the trial could be too small to show it.
    """
    mixes = any(isinstance(module, nn.Conv1d) for module in model.modules())
    if mixes or not (has_body(model) and takes_positions):
        return False
    if model.config._attn_implementation not in ("sdpa", packed.NAME):
        return False
    before, body = model.config._attn_implementation, model.base_model
    tokens_BS = torch.randint(
        model.get_input_embeddings().weight.shape[0], (3, 9), generator=torch.Generator().manual_seed(0)
    )
    mask_BS = torch.arange(9) >= torch.tensor([3, 0, 3])[:, None]
    tokens_BS, mask_BS = tokens_BS.to(model.device), mask_BS.to(model.device)
    wide_BSD = body_hidden(body, model_inputs(tokens_BS, mask_BS, takes_positions), "fp32")
    try:
        model.set_attn_implementation(packed.NAME)
        packing = Packing.of(tokens_BS, mask_BS)
        found_ND = body_hidden(body, packing.inputs(), "fp32")[0]
        wide_ND = wide_BSD[mask_BS]
        gap = (found_ND[packing.place_BS[mask_BS]] - wide_ND).abs().max()
        same = bool(gap <= LOGIT_TOLERANCE * wide_ND.abs().max())
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):  # of a model that was not made for it
        same = False
    if not same:
        model.set_attn_implementation(before)
    return same


def unflatten(x_N: Tensor, mask_BT: Tensor) -> Tensor:
    """Rows in the order of the mask back to their places, BT; 0 where masked."""
    return torch.zeros(mask_BT.shape, dtype=x_N.dtype, device=x_N.device).masked_scatter(mask_BT, x_N)


def _switch_dropout_off(model: PreTrainedModel) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, rate in list(vars(module).items()):  # attention keeps its rate as a number
            if "dropout" in name and isinstance(rate, float):
                setattr(module, name, 0.0)
    config = model.config.get_text_config()
    for name in ("attention_dropout", "hidden_dropout", "dropout", "resid_pdrop", "attn_pdrop", "embd_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    model.eval()


@torch.no_grad()
def _find_head(lm: LanguageModel) -> Head:
    """Read scale and softcap from the config and prove them: our logits must equal the model's on left-padded input."""
    config, model = lm.config, lm.model
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
    tolerance = LOGIT_TOLERANCE * theirs_NV.abs().max()
    if (alone_NV - theirs_NV[: len(alone_NV)]).abs().max() > tolerance:
        raise ModelError(
            f"{type(model).__name__} gives other logits under left padding; batched rollouts would be wrong with it. "
            "Use a model that honours attention_mask and position_ids"
        )
    hidden_ND = body_hidden(model.base_model, inputs, "fp32")[attention_mask_BS] if has_body(model) else None
    if hidden_ND is None or hidden_ND.shape[1] != output.weight.shape[1]:  # projected on its way to the head
        return Head(linear=False)
    ours_NV = (hidden_ND @ output.weight.to(hidden_ND.dtype).T + (0 if output.bias is None else output.bias)) * scale
    if softcap is not None:
        ours_NV = softcap * torch.tanh(ours_NV / softcap)
    return Head(bool((ours_NV - theirs_NV).abs().max() <= tolerance), scale, softcap)
