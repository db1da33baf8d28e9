"""The part of a checkpoint that processes write together, each its own part: weights that are spread over them, and
what optimizers keep of these. By torch.distributed.checkpoint, which any number of processes reads, spread or not.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from srppo.models.sharding import part_of
from srppo.record.files import storing
from srppo.training import parallel

SHARDS = "shards"  # the folder within a checkpoint
IN_SHARDS = "in shards"  # stands in an optimizer's state where a tensor was


def save_shards(folder: Path, weights: Mapping[str, Tensor], optimizers: Mapping[str, Optimizer]) -> None:
    """Write this process's part of weights and moments, by name, into a checkpoint's folder. All processes must."""
    moments = {name: each for key, optimizer in optimizers.items() for name, each in _moments(key, optimizer).items()}
    with storing(folder), parallel.others(), _failure_of_one():
        dcp.save({**weights, **moments}, checkpoint_id=folder / SHARDS)


def load_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read tensors, by name, in place: whole ones, or this process's parts."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process reads alone, as it should
        dcp.load(dict(tensors), checkpoint_id=folder / SHARDS)


def without_shards(optimizer: Optimizer) -> dict[str, Any]:
    """The state of an optimizer as it is, but for what `save_shards` writes."""
    state = optimizer.state_dict()
    kept = {
        i: {key: IN_SHARDS if isinstance(value, DTensor) else value for key, value in each.items()}
        for i, each in state["state"].items()
    }
    return {**state, "state": kept}


def load_optimizer(optimizer: Optimizer, state: dict[str, Any], folder: Path, name: str) -> None:
    """Restore a state that was saved whole, or without what is in shards, for weights that are whole here or spread."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    missing = {}
    for i, each in state["state"].items():
        for key, value in each.items():
            if isinstance(value, str) and value == IN_SHARDS:
                each[key] = missing[f"{name}-optimizer.{i}.{key}"] = torch.zeros_like(weights[i].detach())
            elif isinstance(value, Tensor) and value.shape == weights[i].shape:
                each[key] = part_of(value, weights[i].detach())
    if missing:
        load_shards(folder, missing)
    optimizer.load_state_dict(state)


def _moments(name: str, optimizer: Optimizer) -> dict[str, Tensor]:
    states = optimizer.state_dict()["state"]
    found = {f"{name}-optimizer.{i}.{key}": value for i, each in states.items() for key, value in each.items()}
    return {key: value for key, value in found.items() if isinstance(value, DTensor)}


@contextmanager
def _failure_of_one() -> Iterator[None]:
    """Raises what failed in a process, where torch says in all of them that it did, by what is no Exception."""
    try:
        yield
    except dcp.CheckpointException as error:
        failure, _ = next(iter(error.failures.values()))
        raise failure from None
