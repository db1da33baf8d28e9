"""The memory of a pass, found without running it: torch's fake tensors go through the model's own code, and what each
operation allocates and lets go is added up.

So it holds for any architecture, with adapters, recomputed activations and autocast, and knows no formula of any. A
stack of equal layers is followed with two and with three of them: the most that each stretch of a pass holds (forward,
head, the backward pass of the last layer, of the first) is a constant and so much a layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from srppo.errors import ModelError
from srppo.kernels.cpu import CHUNK
from srppo.models.generation import KvCache, Prefill
from srppo.models.language_model import LanguageModel, body_hidden
from srppo.models.packed import Rows, Segments
from srppo.models.value_model import ValueModel

FOLLOWED = (2, 3)  # layers

Mark = Callable[[str], None]
"""Begins a stretch of a pass."""


def read_bytes(role: LanguageModel, lengths: Sequence[int], scored: int) -> int:
    """The most that one pass without gradients holds beside the weights: rows of `lengths` tokens, `scored` of which go
    through the head."""
    return max(_extrapolated(role, lambda _: _read(role, lengths, scored)).values())


def write_bytes(role: LanguageModel, lengths: Sequence[int], max_new_tokens: int, *, on_cpu: bool) -> int:
    """The most that is held, beside the weights, while answers to prompts of these lengths are written: layers that
    stand for narrow or adapted ones (on a CPU), keys and values, the pass over the prompts, and what the next tokens
    are drawn from."""
    cache = KvCache(len(lengths), max(lengths) + max_new_tokens)
    prefill = Prefill(lengths, range(len(lengths)), cache, torch.device("cpu"))
    return max(_extrapolated(role, lambda mark: _write(role, prefill, cache, len(lengths), mark, on_cpu)).values())


def train_bytes(
    role: LanguageModel | ValueModel, lengths: Sequence[int], scored: int, *, gradients: bool, policy: bool = True
) -> int:
    """The most that forward and backward of one pass hold beside the weights, from log-probs or values of `scored`
    tokens.

    gradients: those of earlier passes are there, and counted elsewhere; else they appear here. A critic on the policy's
    trunk: both heads in one pass; policy False: the policy stands still.
    """
    return max(train_peaks(role, lengths, scored, gradients=gradients, policy=policy).values())


def train_peaks(
    role: LanguageModel | ValueModel, lengths: Sequence[int], scored: int, *, gradients: bool, policy: bool = True
) -> dict[str, int]:
    """The same by stretch: "" the forward pass, `head` up to the end of the last layer's backward pass, `layer N` that
    of the layer, of which `layer 0` ends with the embeddings."""
    return _extrapolated(role, lambda mark: _train(role, lengths, scored, policy, mark), gradients=gradients)


# ---- what is followed


def _inputs(rows: Rows, tokens: int) -> dict[str, Any]:
    ids = torch.zeros((1, tokens), dtype=torch.int64)
    return {"input_ids": ids, "position_ids": ids, "attention_mask": torch.zeros((1, 1, 1, 1)), "segments": rows}


def _hidden(trunk: Any, lengths: Sequence[int], scored: int, grad: bool) -> Tensor:
    """As `hidden_rows`: the states before the scored tokens."""
    body = trunk.model.base_model if isinstance(trunk, LanguageModel) else trunk.model
    if trunk.recomputes:
        body.train(grad)
    inputs = _inputs(Segments(tuple(lengths)), sum(lengths))
    hidden_ND = body_hidden(body, inputs, trunk.precision)[0]
    return hidden_ND[torch.zeros(scored, dtype=torch.int64)]


def _read(role: LanguageModel, lengths: Sequence[int], scored: int) -> None:
    with torch.no_grad():
        _hidden(role, lengths, scored, grad=False)


def _train(role: LanguageModel | ValueModel, lengths: Sequence[int], scored: int, policy: bool, mark: Mark) -> None:
    trunk: Any = role if isinstance(role, LanguageModel) else role.trunk
    hidden_ND = _hidden(trunk, lengths, scored, grad=True)
    mark("head")
    total: Any = 0.0
    if policy and isinstance(trunk, LanguageModel):
        weight_VD, _ = trunk.head_rows()
        total = total + _HeadCost.apply(hidden_ND, weight_VD).sum()
    if isinstance(role, ValueModel):
        total = total + role.head(hidden_ND.float()).sum()
    total.backward()


def _write(role: LanguageModel, prefill: Prefill, cache: KvCache, rows: int, mark: Mark, on_cpu: bool) -> None:
    """As `generate_packed` does up to the first tokens: later ones take less."""
    cache.by_layer = {}
    half, plain = role.precision == "bf16", role.merged_layers() if on_cpu else nullcontext()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=half), plain:
        mark("prompts")
        tokens = len(prefill.rows_N)
        last_BD = body_hidden(role.model.base_model, _inputs(prefill, tokens), role.precision)[0][:rows].clone()
        mark("draw")
        with torch.autocast("cpu", enabled=False):
            weight_VD = role.head_rows()[0]
            logits_BV = F.linear(last_BD.float(), weight_VD.float())
        scores_BV = logits_BV.float() / 2.0
        scores_BV.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)


class _HeadCost(torch.autograd.Function):
    """What `linear_logprob` allocates: no logits, but chunks of them in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD)
        return hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden_ND, weight_VD = ctx.saved_tensors
        wide_ND, weight_CD = hidden_ND.float(), weight_VD[:CHUNK].float()
        d_hidden_ND = torch.zeros_like(wide_ND)
        d_weight_VD = torch.empty_like(weight_VD) if ctx.needs_input_grad[1] else None
        d_weight_CD = torch.zeros_like(weight_CD)
        d_raw_NC = wide_ND[:CHUNK] @ weight_CD.T
        d_hidden_ND[:CHUNK].addmm_(d_raw_NC, weight_CD)
        if d_weight_VD is not None:
            d_weight_CD.addmm_(d_raw_NC.T, wide_ND[:CHUNK])
        return d_hidden_ND.to(hidden_ND.dtype), d_weight_VD


# ---- how


class _Follower(TorchDispatchMode):
    """Bytes of the storages that operations make and that are still reachable; `peaks`: the most at once, by
    stretch."""

    def __init__(self, there: Sequence[Tensor]) -> None:
        super().__init__()
        self.now, self.stretch, self.peaks = 0, "", {"": 0}
        self._live = {tensor.untyped_storage()._cdata: None for tensor in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in tree_iter(out):
            if isinstance(each, Tensor) and each.device.type != "meta":
                self._note(each)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            return
        self._live[key] = weakref.ref(storage, lambda _: self._gone(key, size))  # type: ignore[assignment]
        self.now += size
        self.peaks[self.stretch] = max(self.peaks[self.stretch], self.now)

    def _gone(self, key: int, size: int) -> None:
        if self._live.pop(key, None) is not None:
            self.now -= size

    def mark(self, stretch: str) -> None:
        """Begin a stretch, once."""
        if stretch not in self.peaks:
            self.stretch, self.peaks[stretch] = stretch, self.now


def _extrapolated(
    role: LanguageModel | ValueModel, run: Callable[[Mark], None], *, gradients: bool = False
) -> dict[str, int]:
    """The most bytes at once, of each stretch that a pass has whatever the number of layers."""
    stack = _stack(role)
    if stack is None or len(stack.layers) <= max(FOLLOWED):
        return _followed(role, run, None, gradients)
    fewer, more = (_followed(role, run, count, gradients) for count in FOLLOWED)
    steps = len(stack.layers) - FOLLOWED[0]
    return {name: fewer[name] + (more[name] - fewer[name]) * steps for name in fewer if name in more}


class _Stack(NamedTuple):
    """A model's layers, and where they stand."""

    parent: nn.Module
    name: str
    layers: nn.ModuleList


def _stack(role: LanguageModel | ValueModel) -> _Stack | None:
    """None where there are several lists, or none, that could be the layers."""
    body = (role if isinstance(role, LanguageModel) else role.trunk).decoder
    wanted = body.config.get_text_config().num_hidden_layers
    found = [
        _Stack(module, name, child)
        for module in body.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == wanted
    ]
    return found[0] if len(found) == 1 else None


def _followed(
    role: LanguageModel | ValueModel, run: Callable[[Mark], None], count: int | None, gradients: bool
) -> dict[str, int]:
    """Peaks of the stretches of a run with the first `count` layers, None: with all."""
    stack = _stack(role)
    trunk = role if isinstance(role, LanguageModel) else role.trunk
    if isinstance(trunk, LanguageModel):
        trunk.activate()  # now: it decides which weights have gradients, and those that stand in for them have the same
    before = [(module, dict(module._parameters), dict(module._buffers)) for module in role.modules()]
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            if stack:
                setattr(stack.parent, stack.name, stack.layers[:count])
            follower = _Follower(_put_fakes(role, gradients))
            with _marks([*stack.layers[:count]] if stack else [], follower), follower:
                run(follower.mark)
        except Exception as error:  # of a model whose passes hang on values
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
            name = type(role if isinstance(role, ValueModel) else role.model).__name__
            raise ModelError(f"the passes of {name} cannot be planned ({reason})") from error
        finally:
            if stack:
                setattr(stack.parent, stack.name, stack.layers)
            for module, parameters, buffers in before:
                module._parameters.update(parameters)
                module._buffers.update(buffers)
    return follower.peaks


def _put_fakes(role: nn.Module, gradients: bool) -> list[Tensor]:
    """Put fake tensors in the place of weights that lie nowhere, tied ones once; those and, if wanted, their
    gradients."""
    made: dict[int, Tensor] = {}
    there: list[Tensor] = []
    for module in role.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in list(store.items()):
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                        if gradients and tensor.requires_grad:
                            fake.grad = torch.empty(tensor.shape, dtype=tensor.dtype)
                            there.append(fake.grad)
                    made[id(tensor)] = fake
                    there.append(fake)
                store[name] = made[id(tensor)]  # type: ignore[assignment]
    return there


@contextmanager
def _marks(layers: Sequence[nn.Module], follower: _Follower) -> Iterator[None]:
    """Within, a stretch of the backward pass begins with each layer but the last: `layer 0` is the one that ends it."""

    def before(place: int, layer: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.requires_grad:  # and its gradient is the last thing that the layer above it gives
            hidden.register_hook(lambda grad: follower.mark(f"layer {place - 1}"))

    pairs = list(enumerate(layers))[1:]
    handles = [layer.register_forward_pre_hook(partial(before, place), with_kwargs=True) for place, layer in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
