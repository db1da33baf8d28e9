"""Weights spread over the processes of a run, by FSDP2: each holds a part of every weight, of its gradient and of what
its optimizer keeps. A layer's weights are gathered for its own pass, and gradients are added up, not averaged.

A pass gathers, so all processes must make the same passes in the same order. Where that cannot be, as in writing, where
every process has as many passes as its answers have tokens, weights are gathered before and let go after: `gathered`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, of which this process may hold a part. Its gradient is added up over processes."""
    return tensor.full_tensor(grad_placements=[Partial()]) if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of a tensor that this process has of another; the tensor itself where that one is whole."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def is_spread(tensors: Iterable[Tensor]) -> bool:
    """Whether this process holds a part of any of them."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def spread(module: nn.Module) -> None:
    """Leave each process its part of a module's weights; layers, which are what lists of modules hold, are gathered one
    by one, the rest together."""
    mesh = _mesh(next(module.parameters()).device.type, dist.group.WORLD)
    for each in (*layers_of(module), module):
        sharded = fully_shard(each, mesh=mesh, reshard_after_forward=True)
        sharded.set_gradient_divide_factor(1.0)  # losses are divided by counts of the whole batch already
        sharded.set_force_sum_reduction_for_comms(True)


def layers_of(module: nn.Module) -> list[nn.Module]:
    """What is gathered one by one: what the outermost lists of modules hold."""
    inner: list[nn.Module] = []
    for each in module.modules():
        if isinstance(each, nn.ModuleList) and not any(each in layer.modules() for layer in inner):
            inner += each
    return inner


@lru_cache(maxsize=1)
def _mesh(device: str, group: Any) -> DeviceMesh:
    """All processes of a group that is the default one, which may be another after this one has been left."""
    return init_device_mesh(device, (dist.get_world_size(),))


class Shards:
    """A model of transformers whose weights are spread, and what it takes to have them whole again.

    The body and a head of its own are spread one beside the other, since training calls the body alone. LoRA adapters
    that are put in later stay whole in each process.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        bare = {id(x): nn.Parameter(torch.empty_like(x, device="meta"), x.requires_grad) for x in model.parameters()}
        self.plain: Any = copy.deepcopy(model, bare)  # as it was, without weights: FSDP2's modules cannot be copied
        self._is_whole = False
        body, head = model.base_model, model.get_output_embeddings()
        self._tied = body is not model and head.weight is model.get_input_embeddings().weight
        spread(body)
        if body is not model and not self._tied:
            spread(head)
        self._tie()

    def _tie(self) -> None:
        """A tied weight is the body's: its head has what the body has now, a part or the whole."""
        if self._tied:
            self.model.get_output_embeddings().weight = self.model.get_input_embeddings().weight

    def head_of_body(self) -> dict[str, Tensor]:
        """The head's weight by name, where it is the body's: that has let it go when the model's own head runs."""
        if not self._tied or self._is_whole:
            return {}
        head = self.model.get_output_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is head)
        return {f"{name}.weight": whole(head.weight)}

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within, each process holds all weights, and no pass waits for another process. All processes must enter."""
        if self._is_whole:
            yield
            return
        modules = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        self._is_whole = True
        self._tie()
        try:
            yield
        finally:
            for module in modules:
                module.set_reshard_after_forward(True, recurse=False)
                module.reshard()
            self._is_whole = False
            self._tie()

    def tensors(self) -> dict[str, Tensor]:
        """What a file of the model holds, by name; whole within `gathered`."""
        own = {**dict(self.model.named_parameters(remove_duplicate=False)), **dict(self.model.named_buffers())}
        return {name: own[name].detach() for name in self.plain.state_dict()}

    @torch.no_grad()
    def whole_copy(self) -> Any:
        """The model as it was, with whole fp32 weights of its own, and without adapters. All processes must ask."""
        found = {name.replace(".base_layer.", "."): weight for name, weight in self.model.named_parameters()}
        filled = {
            id(slot): nn.Parameter(whole(found[name]).to(torch.float32, copy=True))
            for name, slot in self.plain.named_parameters()
        }
        return copy.deepcopy(self.plain, filled)
