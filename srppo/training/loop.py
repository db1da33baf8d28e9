"""What every trained stage shares: resume, log, measure, keep one step, checkpoint, stop. Knows nothing of losses.

A stage is a sequence of steps 1..total. Every random choice is a function of (root seed, purpose, step), so the state
of a run is its weights, optimizers and counters: a resumed run repeats the uninterrupted one bit for bit on one CPU.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from srppo.console import Console
from srppo.errors import Diverged, Interrupted
from srppo.models.language_model import LanguageModel
from srppo.models.memory import bytes_here
from srppo.models.sharding import is_spread, part_of, whole
from srppo.record.store import Attempt, Stage
from srppo.training import parallel
from srppo.training.shards import SHARDS, load_optimizer, load_shards, save_shards, without_shards

Row = dict[str, Any]


class Tracker(Protocol):
    """What accelerate's trackers (TensorBoard, W&B) offer."""

    def log(self, values: dict[str, Any], step: int | None = None) -> Any: ...

    def finish(self) -> None: ...


class Trained(Protocol):
    """What training changes."""

    def weights(self) -> dict[str, Tensor]:
        """Its tensors by name: what a checkpoint holds. The parameters among them are trained."""


def parameters(model: Trained) -> list[nn.Parameter]:
    """What an optimizer steps."""
    return [weight for weight in model.weights().values() if isinstance(weight, nn.Parameter)]


def trained_bytes(*models: Trained | None) -> int:
    """Of memory, that training holds: weights, gradients and two moments."""
    weights = {id(weight): weight for model in models if model is not None for weight in parameters(model)}
    return 4 * sum(map(bytes_here, weights.values()))


class TrainState:
    """Everything a checkpoint holds, by name: models (safetensors, what training changes of them); optimizers, counters
    and `others` that have a state_dict as they have (trainer.pt). None: left out.

    Of weights that are spread over processes each writes its part, and of what their optimizers keep (`shards`). Either
    form is read by any number of processes, with weights spread or not.
    """

    def __init__(
        self,
        models: Mapping[str, Trained | None],
        optimizers: Mapping[str, Optimizer | None],
        counters: dict[str, Any],
        **others: Any,
    ) -> None:
        self.models = {name: model for name, model in models.items() if model is not None}
        self.optimizers = {name: optimizer for name, optimizer in optimizers.items() if optimizer is not None}
        self.counters, self.others = counters, others

    @property
    def is_spread(self) -> bool:
        """Whether weights are spread over processes."""
        return any(is_spread(model.weights().values()) for model in self.models.values())

    def save(self, folder: Path) -> None:
        """Write into an empty folder. Where weights are spread the other processes `join_save` meanwhile."""
        if self.is_spread:
            self._save_shards(folder)
            optimizers = {name: without_shards(optimizer) for name, optimizer in self.optimizers.items()}
        else:
            for name, model in self.models.items():
                tensors = {key: weight.detach().contiguous() for key, weight in model.weights().items()}
                save_file(tensors, folder / f"{name}.safetensors")
            optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        counters = {**self.counters, **{name: other.state_dict() for name, other in self.others.items()}}
        # The random state is saved although nothing here draws from it: a model with sampling in its forward would.
        state = {"optimizers": optimizers, "counters": counters, "torch_rng": torch.get_rng_state()}
        torch.save(state, folder / "trainer.pt")

    def join_save(self) -> None:
        """Write this process's part where the first one has its own, if there are parts."""
        if self.is_spread:
            self._save_shards()

    def _save_shards(self, folder: Path | None = None) -> None:
        """folder: the first process's, which it tells the others."""
        place = parallel.from_first(lambda: folder)
        assert place is not None
        each = [named_weights(model, name) for name, model in self.models.items()]
        save_shards(place, {name: weight for weights in each for name, weight in weights.items()}, self.optimizers)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, in place."""
        for name, model in self.models.items():
            load_weights(model, folder, name)
        state = torch.load(folder / "trainer.pt", weights_only=True, map_location="cpu")
        for name, optimizer in self.optimizers.items():
            load_optimizer(optimizer, state["optimizers"][name], folder, name)
        for name, other in self.others.items():
            other.load_state_dict(state["counters"].pop(name))
        self.counters.update(state["counters"])
        torch.set_rng_state(state["torch_rng"])


def load_weights(model: Trained, folder: Path, name: str = "policy") -> None:
    """Copy the weights that a checkpoint has under a name into a model of the same architecture."""
    if (folder / SHARDS).is_dir():
        load_shards(folder, named_weights(model, name))
        return
    saved = load_file(folder / f"{name}.safetensors")
    for key, tensor in model.weights().items():
        tensor.data.copy_(part_of(saved[key], tensor.data))


def named_weights(model: Trained, name: str) -> dict[str, Tensor]:
    """A model's weights as a checkpoint in parts knows them."""
    return {f"{name}.{key}": weight.detach() for key, weight in model.weights().items()}


def lr_factor(schedule: str, warmup: float, step: int, total: int) -> float:
    """Share of the peak learning rate at step 1..total: linear warm-up over the first share, then the schedule."""
    ramp = math.ceil(warmup * total)
    if step <= ramp:
        return step / ramp
    if schedule == "constant":
        return 1.0
    done = (step - ramp - 1) / max(total - ramp, 1)
    return 1.0 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(model: Trained, max_norm: float, step: int) -> float:
    """Clip the global gradient norm and return it as it was; Diverged when it is not finite."""
    norm = float(whole(nn.utils.clip_grad_norm_(parameters(model), max_norm)))
    if not math.isfinite(norm):
        raise Diverged(
            f"step {step}: the gradient norm is {norm}; lower the learning rate, or clip the reward's tokens"
        )
    return norm


class Measure(Protocol):
    """What looks at a model on development items during training."""

    def measure(self, model: LanguageModel) -> tuple[Row, float | None]:
        """(figures to log, the score by which the best step is kept; None where nothing ranks).

        `selection_flops` among the figures: what this measurement took.
        """


@dataclass(frozen=True)
class Workbench:
    """Where one attempt at a stage writes, and what it is watched through."""

    stage: Stage
    attempt: Attempt
    tokenizer: PreTrainedTokenizerBase
    console: Console
    name: str
    trackers: tuple[Tracker, ...] = ()


@dataclass
class Session:
    """One attempt at a stage: drives its steps through the record on disk.

    total: steps. measure_at: which are measured beside the last; measure_start: whether the start is. keep:
    `eval.keep`.
    """

    bench: Workbench
    state: TrainState
    total: int
    measure_at: Callable[[int], bool]
    measure: Callable[[], tuple[Row, float | None]]
    keep: str
    checkpoint_every: int
    measure_start: bool = True

    def __post_init__(self) -> None:
        self.state.counters = {"kept_step": 0, "kept_score": -math.inf, "selection_flops": 0, **self.state.counters}

    def steps(self) -> Iterator[int]:
        """The steps that remain after the newest whole checkpoint; step 0, the start, is only measured."""
        found = parallel.from_first(lambda: self.bench.attempt.resume(on_torn=self._torn))
        if found:
            self.state.load(found[1])
            self.bench.console.say(f"{self.bench.name}: resumed from step {found[0]}")
        start = found[0] if found else 0
        self.bench.attempt.log_event("training", start=start, total=self.total)  # how far it is, for whoever watches
        with self.bench.console.stage(self.bench.name, self.total) as self.view, stop_on_signal() as stopped:
            if not found and self.measure_start:
                row, self.state.counters["start_score"] = self._measured()
                self._log({"step": 0, **row})
            for step in range(start + 1, self.total + 1):
                yield step
                if parallel.agreed(stopped.is_set()):
                    if step < self.total:  # the last one has been saved
                        self.checkpoint(step)
                    raise Interrupted(
                        f"stopped at step {step} of {self.total}; the state is saved: run the same command to go on"
                    )

    def end_step(self, step: int, row: Row, timing: Mapping[str, float]) -> None:
        """Log a step; measure, and keep it if it is the best so far (ties go to the earlier); checkpoint when due."""
        for name, number in row.items():
            if isinstance(number, float) and not math.isfinite(number):
                raise Diverged(f"step {step}: {name} is {number}; lower the learning rate, or clip the reward's tokens")
        counters, improved = self.state.counters, False
        if step == self.total or self.measure_at(step):
            measured, score = self._measured()
            row = {**row, **measured}
            if self.keep == "last" or score is None:
                counters["kept_step"], counters["kept_score"] = step, -math.inf if score is None else score
            elif score > counters["kept_score"]:
                counters["kept_step"], counters["kept_score"], improved = step, score, True
        self._log({"step": step, **row, "timing": dict(timing)})
        if improved or step % self.checkpoint_every == 0 or step == self.total:
            self.checkpoint(step)

    @property
    def harm(self) -> str | None:
        """What to say where every step that was measured is worse on development items than the start, which is never
        the one that is kept: an arm stands for its training."""
        start, kept = self.state.counters.get("start_score"), self.state.counters["kept_score"]
        if start is None or not math.isfinite(kept) or kept >= start:
            return None
        which = f"step {self.state.counters['kept_step']}, which is kept"
        return f"training did harm: development score {kept:.3g} at {which}, {start:.3g} before the first step"

    def checkpoint(self, step: int) -> None:
        """Write the whole state; the two newest and the kept step stay on disk."""
        for model in self.state.models.values():
            parallel.check_weights(model.weights().values())
        self.bench.attempt.save_checkpoint(step, self.state.save, keep={self.state.counters["kept_step"]})
        if not parallel.is_first():
            self.state.join_save()
        parallel.wait()

    def _measured(self) -> tuple[Row, float | None]:
        """A measurement; all that were made are counted, as training is."""
        row, score = parallel.gather(self.measure())[0]  # the first's: bits decide which step is kept
        self.state.counters["selection_flops"] += row.get("selection_flops", 0)
        return {**row, "selection_flops": self.state.counters["selection_flops"]}, score

    def _log(self, row: Row) -> None:
        self.bench.attempt.log_metrics(row)
        self.view.update(row)
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        for tracker in self.bench.trackers:
            tracker.log(numbers, step=row["step"])

    def _torn(self, path: Path, reason: str) -> None:
        self.bench.console.warn(f"checkpoint {path.name} is damaged ({reason}); an older whole one is used")


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM ask for a stop at the end of the step; a second one interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def ask(signum: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stopwatch:
    """Seconds between calls, by name; time is reported beside the metrics and never enters them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the time since the last lap under `name`."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
