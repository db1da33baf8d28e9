"""What `srppo eval` costs on the embedded suite, beside the model alone and beside a plain loop; rounds interleaved.

    model      `rollout.generate` on the very batches of token ids that the harness decodes: padding, forward passes,
               the next token, greedy or drawn. No text. This is the model's own time.
               Sampled, transformers draws, which is dearer than the harness's own way: the share added may then be
               below 0 and hides what stands beside the decoding (`spans`); greedy compares like with like.
    plain      `evaluate.answer_items`, as in training: template, encode, generate, decode, compare
    harness    what `srppo eval` does: load the tasks, build and check the requests, look up the key, generate, score
               with intervals, write the results

Loading weights and tokenizer is in none of them, nor is what a process does once: importing, drawing the items,
describing this machine. All three take the items of a group in one batch.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

import srppo.evaluation.harness.model
import srppo.evaluation.harness.session
from srppo.bench.spans import Spans
from srppo.config import ModelConfig, load_recipe, resolved
from srppo.console import Console
from srppo.data.chat import ensure_chat_template, stop_ids
from srppo.evaluation.development import answer_items
from srppo.evaluation.harness.checks import EvalOptions
from srppo.evaluation.harness.decode import Decoding
from srppo.evaluation.harness.guards import Problems, quiet
from srppo.evaluation.harness.model import HarnessModel
from srppo.evaluation.harness.session import Evaluator
from srppo.evaluation.harness.targets import find_targets
from srppo.evaluation.harness.tasks import load_tasks, wanted
from srppo.evaluation.items import load_items
from srppo.models.language_model import LanguageModel
from srppo.models.loading import load_model, load_tokenizer
from srppo.training.rollout import generate

SECONDS, FEWEST = 8.0, 3
WAYS = ("model", "plain", "harness")
LM_EVAL = ("requests", "scoring")  # spans that are lm-eval's own code
SPANS = ("tasks", "template", "encoding", "requests", "decoding", "texts", "scoring", "figures", "record", "rest")


@dataclass(frozen=True)
class Overhead:
    """One model and decoding. cpu_s, wall_s: seconds of each way, a round each; spans: CPU seconds of the harness's
    parts, a round each (rounds of their own). batches: rows of each. steps: forward passes of each way. answers: what
    each way wrote, by its items' order; the model alone writes token ids, compared by nobody but through its steps.
    """

    spec: str
    sampled: bool
    cpu_s: Mapping[str, Sequence[float]]
    wall_s: Mapping[str, Sequence[float]]
    spans: Mapping[str, Sequence[float]]
    batches: Sequence[int]
    steps: Mapping[str, int]
    answers: Mapping[str, Sequence[str]]

    def over(self, way: str, *, wall: bool = False) -> list[float]:
        """The share that the harness takes longer than `way`, round by round."""
        seconds = self.wall_s if wall else self.cpu_s
        return [a / b - 1 for a, b in zip(seconds["harness"], seconds[way], strict=True)]


@dataclass
class _Bench:
    """A loaded model and what the ways share. batches: (prompts, how) as the harness decoded them last."""

    spec: str
    sampled: bool
    model: LanguageModel
    tokenizer: PreTrainedTokenizerBase
    stops: list[int]
    folder: Path
    batches: list[tuple[Sequence[Sequence[int]], Decoding]] = field(default_factory=list)

    def alone(self) -> list[str]:
        for prompts, how in self.batches:
            generate(
                self.model,
                prompts,
                stop_ids=self.stops,
                pad_id=int(self.tokenizer.pad_token_id),
                max_new_tokens=how.max_new_tokens,
                seed=0,
                temperature=how.temperature,
            )
        return []

    def plain(self) -> list[str]:
        recipe = resolved(load_recipe(None, []))
        found = answer_items(
            self.model,
            self.tokenizer,
            load_items(recipe, "test"),
            recipe,
            samples=1 if self.sampled else None,
            stops=self.stops,
        )
        return [verdict.responses[0] for verdict in found]

    def harness(self) -> list[str]:
        with tempfile.TemporaryDirectory(dir=self.folder) as folder, quiet():
            console = Console(plain=True, quiet=True)
            (target,) = find_targets(self.spec, Path(folder))
            problems, say = Problems(), console.say
            asked = wanted([], "embedded")
            tasks = load_tasks(asked, data=None, include_path=[], score_rest=False, say=say, problems=problems)
            session = Evaluator(EvalOptions(samples=1 if self.sampled else None), None, "cpu", console)
            lm, prepared = session.prepare(replace(target, parent=Path(folder)), tasks, problems)
            lm.load = lambda: self.model
            for each in prepared:
                session.evaluate(target, lm, each)
            return [str(row["response"]) for _, rows in session.written.values() for row in rows]


def measure_overhead(spec: str, *, sampled: bool, rounds: int | None = None) -> Overhead:
    """Time the three ways in turns, after a round that warms up, then the parts of the harness in half as many rounds.

    rounds None: as many as take SECONDS of CPU time, at least FEWEST. On the CPU, with torch's number of threads.
    """
    tokenizer = load_tokenizer(spec, ModelConfig())
    ensure_chat_template(tokenizer)
    model = load_model(spec, ModelConfig(), device="cpu")
    stops = stop_ids(tokenizer, model.model.generation_config)
    with tempfile.TemporaryDirectory() as folder, _loaded(tokenizer):
        bench = _Bench(spec, sampled, model, tokenizer, stops, Path(folder))
        ways = dict(zip(WAYS, (bench.alone, bench.plain, bench.harness), strict=True))
        steps, answers = {}, {}
        with _recorded(bench.batches), _counted(model) as count:
            answers["harness"], steps["harness"] = bench.harness(), count()
        for name in ("model", "plain"):
            with _counted(model) as count:
                answers[name], steps[name] = ways[name](), count()
        cpu_s: dict[str, list[float]] = {name: [] for name in WAYS}
        wall_s: dict[str, list[float]] = {name: [] for name in WAYS}
        turn = 0
        while turn < (rounds or FEWEST) or (rounds is None and sum(map(sum, cpu_s.values())) < SECONDS):
            for name in (*WAYS[turn % 3 :], *WAYS[: turn % 3]):
                cpu, wall = time.process_time(), time.perf_counter()
                ways[name]()
                cpu_s[name].append(time.process_time() - cpu)
                wall_s[name].append(time.perf_counter() - wall)
            turn += 1
        spans = [_parts(bench.harness) for _ in range(max(turn // 2, 1))]
    by_name = {name: [each[name] for each in spans] for name in SPANS}
    return Overhead(spec, sampled, cpu_s, wall_s, by_name, [len(p) for p, _ in bench.batches], steps, answers)


def _parts(harness: Callable[[], Any]) -> dict[str, float]:
    """CPU seconds of each span in one round."""
    from lm_eval import evaluator
    from lm_eval.api.task import Task

    spans = Spans(time.process_time)
    try:
        spans.wrap(sys.modules[__name__], "load_tasks", "tasks")
        spans.wrap(HarnessModel, "apply_chat_template", "template")
        spans.wrap(HarnessModel, "encode_all", "encoding")
        spans.wrap(Task, "build_all_requests", "requests")
        spans.wrap(srppo.evaluation.harness.model, "decode", "decoding")
        spans.wrap(HarnessModel, "generate_until", "texts")
        spans.wrap(evaluator, "evaluate", "scoring")
        for name in ("rows_of", "figures"):
            spans.wrap(srppo.evaluation.harness.session, name, "figures")
        for name in ("fingerprint", "write_result"):
            spans.wrap(srppo.evaluation.harness.session, name, "record")
        with spans.span("rest"):
            harness()
    finally:
        spans.unwrap()
    return {name: spans.seconds[name] for name in SPANS}


@contextmanager
def _loaded(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Within, the session finds its tokenizer loaded already."""
    session = srppo.evaluation.harness.session
    vars(session)["load_tokenizer"] = lambda *_: tokenizer
    try:
        yield
    finally:
        vars(session)["load_tokenizer"] = load_tokenizer


@contextmanager
def _recorded(batches: list[tuple[Sequence[Sequence[int]], Decoding]]) -> Iterator[None]:
    """Within, every batch that the harness decodes is noted."""
    module = srppo.evaluation.harness.model
    plain = module.decode

    def decode(
        model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], seeds: Any, how: Decoding, **options: Any
    ) -> Any:
        batches.append((prompts, how))
        return plain(model, tokenizer, prompts, seeds, how, **options)

    vars(module)["decode"] = decode
    try:
        yield
    finally:
        vars(module)["decode"] = plain


@contextmanager
def _counted(model: LanguageModel) -> Iterator[Callable[[], int]]:
    """Counts the forward passes within."""
    calls: list[int] = []
    hook = model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        yield lambda: len(calls)
    finally:
        hook.remove()
