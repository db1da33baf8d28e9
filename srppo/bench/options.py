"""What `srppo bench kernel` measures: operations, shapes, presets and the checked options. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Final

from srppo.errors import ConfigError

DIFF, LOGITS_DIFF, BACKWARD = "linear_logprob_diff", "logprob_diff", "linear_logprob+backward"
OPS: Final = (DIFF, LOGITS_DIFF)
OUT = Path("runs/bench-kernel/kernel.jsonl")
BYTES_OF: Final = {"bfloat16": 2, "float16": 2, "float32": 4}
DTYPE_ALIASES: Final = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
DEVICES: Final = ("auto", "cpu", "cuda")
SHAPES: Final = {  # hidden size D, vocabulary V of the model's head
    "qwen2.5-0.5b": (896, 151936),
    "llama-3.2-1b": (2048, 128256),
    "mistral-7b": (4096, 32000),
    "llama-3-8b": (4096, 128256),
    "qwen2.5-7b": (3584, 152064),
    "ragged": (1000, 50257),
    "reduced-16k": (896, 16000),  # no model's own: small enough for a CPU in under a minute
    "reduced-32k": (1024, 32000),
    "reduced-128k": (1024, 128256),
}


@dataclass(frozen=True)
class Preset:
    """Cases and patience: at most `rounds` rounds, fewer (at least 3) once a case has taken `seconds`."""

    n: tuple[int, ...]
    shapes: tuple[str, ...]
    dtypes: tuple[str, ...]
    rounds: int
    seconds: float


PRESETS: Final = {
    "quick": Preset((256,), ("reduced-16k",), ("bfloat16", "float32"), 7, 6.0),
    "cpu": Preset((1024,), ("reduced-32k", "reduced-128k", "ragged"), ("bfloat16", "float32"), 9, 150.0),
    "full": Preset(
        (512, 2048, 8192),
        ("qwen2.5-0.5b", "llama-3.2-1b", "mistral-7b", "llama-3-8b", "qwen2.5-7b", "ragged"),
        ("bfloat16",),
        25,
        30.0,
    ),
}


@dataclass(frozen=True)
class Case:
    """One operation at one shape. d is 0 where the operation starts from logits."""

    op: str
    shape: str
    n: int
    d: int
    v: int
    dtype: str

    @property
    def models(self) -> int:
        return 1 if self.op == BACKWARD else 2

    @property
    def flops(self) -> int:
        """Useful operations: of the products alone, each once; from logits 4 a logit (maximum, subtract, exp, add)."""
        if self.op == LOGITS_DIFF:
            return 2 * 4 * self.n * self.v
        return (6 if self.op == BACKWARD else 4) * self.n * self.v * self.d

    @property
    def floor_flops(self) -> int:
        """Operations of the bare products: under backward the logits twice, since keeping them costs N x V memory."""
        return self.flops * 4 // 3 if self.op == BACKWARD else self.flops

    @property
    def input_bytes(self) -> int:
        rows = self.n if self.op == LOGITS_DIFF else self.n + self.v
        return self.models * rows * (self.d or self.v) * BYTES_OF[self.dtype] + 8 * self.n

    @property
    def bytes_moved(self) -> int:
        """The least that any implementation reads and writes: inputs once, the result, and gradients once."""
        gradients = (self.n + self.v) * self.d * BYTES_OF[self.dtype] if self.op == BACKWARD else 0
        return self.input_bytes + gradients + 4 * self.n

    def __str__(self) -> str:
        name = f"{self.shape}: " if self.shape in SHAPES else ""
        d = f"D={self.d} " if self.d else ""
        return f"{name}N={self.n} {d}V={self.v} {self.dtype}"


@dataclass(frozen=True)
class KernelBench:
    """Options of `srppo bench kernel`; an empty tuple or None leaves the choice to the preset.

    preset    quick (a CPU in under a minute, reduced shapes), cpu, full (a GPU)
    op        linear_logprob_diff (from hidden states and heads) or logprob_diff (from logits)
    backward  measure linear_logprob forward and backward instead: one model, gradients of hidden states and head
    n         tokens in a batch; shapes: names of SHAPES or DxV, such as 4096x32000; dtypes of the inputs
    rivals    ids of rivals.RIVALS to run; the bare GEMMs, the denominator, always run
    threads   CPU threads; rounds: repetitions of each rival, whatever the time
    out       FILE.jsonl, appended to; FILE.csv, FILE.png and FILE.svg are written beside it

    Raises ConfigError, one line, for a value that is not allowed.
    """

    preset: str = "quick"
    op: str = DIFF
    backward: bool = False
    n: tuple[int, ...] = ()
    shapes: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()
    threads: int | None = None
    device: str = "auto"
    rounds: int | None = None
    seed: int = 0
    out: Path = OUT

    def __post_init__(self) -> None:
        _one_of("preset", self.preset, PRESETS)
        _one_of("op", self.op, OPS)
        _one_of("device", self.device, DEVICES)
        if self.backward and self.op != DIFF:
            raise ConfigError(
                f"backward is measured for linear_logprob, not for op {self.op!r}; leave out one of the two"
            )
        for name, values in (("n", self.n), ("threads", (self.threads,)), ("rounds", (self.rounds,))):
            for value in values:
                if value is not None and value < 1:
                    raise ConfigError(f"{name} is {value}; it must be at least 1")
        for dtype in self.dtypes:
            _one_of("dtype", DTYPE_ALIASES.get(dtype, dtype), (*BYTES_OF, *DTYPE_ALIASES))
        for shape in self.shapes:
            sizes_of(shape)
        if self.out.suffix != ".jsonl":
            raise ConfigError(f"out is {str(self.out)!r}; it must be a file that ends in .jsonl")

    @property
    def cases(self) -> list[Case]:
        preset = PRESETS[self.preset]
        op = BACKWARD if self.backward else self.op
        found = []
        for shape, dtype, n in product(self.shapes or preset.shapes, self.dtypes or preset.dtypes, self.n or preset.n):
            d, v = sizes_of(shape)
            found.append(Case(op, shape, n, 0 if op == LOGITS_DIFF else d, v, DTYPE_ALIASES.get(dtype, dtype)))
        return list(dict.fromkeys(found))

    @property
    def max_rounds(self) -> int:
        return self.rounds or PRESETS[self.preset].rounds

    @property
    def seconds(self) -> float:
        """Timed seconds of a case after which no further round begins; rounds that were asked for are all run."""
        return float("inf") if self.rounds else PRESETS[self.preset].seconds


def sizes_of(shape: str) -> tuple[int, int]:
    """(D, V) of a known shape or of DxV. Raises ConfigError."""
    if shape in SHAPES:
        return SHAPES[shape]
    written = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape)
    if not written:
        raise ConfigError(f"shape is {shape!r}; allowed: DxV, such as 4096x32000, or {', '.join(SHAPES)}")
    return int(written[1]), int(written[2])


def _one_of(name: str, value: str, allowed: Sequence[str] | dict[str, Preset]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
