"""One run in several processes, which share the work of each pass and know the same of everything else.

All processes go through the same code in step, with the same weights. Rows are divided where they are written, scored
and trained on, and what came out is put together again: tokens, log-probs and values of all rows, and the sum of the
gradients. So rewards, whitening, running deviation and metrics are of the whole batch in every process, by the code of
one process. The first process alone writes the record.

Without a launcher (torchrun, accelerate launch) there is one process, and nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from srppo.errors import ConfigError, OtherEnded, RunError, SrppoError
from srppo.models.memory import is_out_of_memory

T = TypeVar("T")
BUCKET = 1 << 24  # elements that are added up at once
TIMEOUT = timedelta(hours=2)  # for the slowest of the others: one may be asking a server, or writing a model


def start(device: str) -> str:
    """Join the processes of a launcher, where there is one; the device of this one."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        from accelerate import PartialState

        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # or a dead process shows somewhere later
        with others():
            state = PartialState(cpu=device == "cpu", timeout=TIMEOUT)
        return "cpu" if device == "cpu" else str(state.device)
    return device


def leave() -> None:
    """Out of the group, where this process goes on to other work."""
    if dist.is_initialized():
        from accelerate import PartialState

        dist.destroy_process_group()
        PartialState._reset_state()


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this process writes the record and speaks."""
    return rank() == 0


def shares(rows: Sequence[T]) -> list[Sequence[T]]:
    """Each process's part of rows in order of length: one of each group of `size()`, so that all have like work."""
    return [rows[first :: size()] for first in range(size())]


def share(rows: Sequence[T]) -> Sequence[T]:
    """This process's part of them."""
    return shares(rows)[rank()]


def check_rows(processes: int | None = None, /, **rows: int) -> None:
    """Raises ConfigError where there are more processes than rows to divide, by the key that says their number.

    processes: None: those of this run."""
    processes = size() if processes is None else processes
    for key, count in rows.items():
        if count < processes:
            raise ConfigError(
                f"{processes} processes have only {count} rows to share in a pass ({key.replace('__', '.')}); start "
                "fewer, or raise it"
            )


def add_up(tensor: Tensor) -> Tensor:
    """The sum over processes, in place."""
    if size() > 1:
        with others():
            if dist.get_backend() == "nccl" and tensor.device.type == "cpu":  # it knows GPUs alone
                there = tensor.cuda()
                dist.all_reduce(there)
                tensor.copy_(there)
            else:
                dist.all_reduce(tensor)
    return tensor


def add_up_numbers(numbers: dict[str, float]) -> dict[str, float]:
    """Sums over processes of figures that all have by the same names, or some not at all (which is 0)."""
    if size() == 1:
        return numbers
    names = sorted({name for each in gather(sorted(numbers)) for name in each})
    sums = add_up(torch.tensor([numbers.get(name, 0.0) for name in names], dtype=torch.float64))
    return dict(zip(names, sums.tolist(), strict=True))


def add_up_gradients(weights: Iterable[nn.Parameter]) -> None:
    """The sum of the gradients over processes, in place; one that a process lacks is 0 there. Those of weights that are
    spread over processes are sums already."""
    if size() == 1:
        return
    weights = [weight for weight in weights if not isinstance(weight, DTensor)]
    has = add_up(torch.tensor([0.0 if weight.grad is None else 1.0 for weight in weights]))
    for bucket in _buckets([weight for weight, count in zip(weights, has.tolist(), strict=True) if count]):
        grads = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in bucket]
        flat = add_up(torch.cat([grad.reshape(-1) for grad in grads]))
        for weight, summed in zip(bucket, flat.split([weight.numel() for weight in bucket]), strict=True):
            summed = summed.view_as(weight)
            weight.grad = summed.clone() if weight.grad is None else weight.grad.copy_(summed)


def _buckets(weights: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Weights of one type in groups of at most BUCKET elements, or one."""
    bucket: list[nn.Parameter] = []
    for weight in weights:
        full = sum(each.numel() for each in bucket) + weight.numel() > BUCKET
        if bucket and (full or weight.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(weight)
    if bucket:
        yield bucket


def gather(value: T) -> list[T]:
    """What each process has, in all of them."""
    if size() == 1:
        return [value]
    found: list[Any] = [None] * size()
    with others():
        dist.all_gather_object(found, value)
    return found


def from_first(work: Callable[[], T]) -> T:
    """What the first process finds, or raises, in all of them."""
    if size() == 1:
        return work()
    said: list[Any] = [None, None]
    if is_first():
        try:
            said[0] = work()
        except SrppoError as error:
            said[1] = error
    with others():
        dist.broadcast_object_list(said)
    if said[1] is not None:
        raise said[1]
    return said[0]  # type: ignore[no-any-return]


def agreed(wanted: bool) -> bool:
    """Whether any process wants to: all of them do then, at the same place."""
    return wanted if size() == 1 else bool(add_up(torch.tensor(float(wanted))))


def wait() -> None:
    """Until all processes are here."""
    if size() > 1:
        with others():
            dist.barrier()


def check_weights(weights: Iterable[Tensor]) -> None:
    """Raises RunError where the processes' weights are no longer the same. Of spread ones there is one copy."""
    if size() == 1:
        return
    own = [weight.detach() for weight in weights if not isinstance(weight, DTensor)]
    found = gather(float(sum(weight.double().abs().sum() for weight in own)))
    if max(found) != min(found):
        raise RunError(
            f"the processes have come apart: their weights add up to {', '.join(f'{x:.9g}' for x in found)}; please "
            "report it, and resume from the last checkpoint"
        )


@contextmanager
def others() -> Iterator[None]:
    """Raises OtherEnded, in one line, where another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise other_ended() from error


def is_end_of_other(error: Exception) -> bool:
    """Whether it is what torch raises, in the midst of anything, where another process is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def other_ended() -> OtherEnded:
    """In one line, what such an error means."""
    return OtherEnded(
        "another process of this run has ended, or does not answer; what it said is above; the same command goes on "
        "from what is saved"
    )
