"""What the harness costs: the embedded suite through it beside the same decoding without it, rounds interleaved."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

from transformers import PreTrainedTokenizerBase

from srppo.chat import encode_prompt, ensure_chat_template
from srppo.config import ModelConfig, load_recipe
from srppo.console import Console
from srppo.evaluate import answer_items, load_items
from srppo.harness.quiet import quiet
from srppo.harness.session import Options, Session
from srppo.harness.targets import find_targets
from srppo.harness.tasks import load_tasks, wanted
from srppo.models import LanguageModel, load_model, load_tokenizer
from srppo.rollout import generate
from srppo.settings import resolved
from srppo.types import Message, Prompt
from srppo.world.items import items
from srppo.world.tasks import GROUPS


def measure_overhead(spec: str, console: Console, *, rounds: int = 5) -> dict[str, Any]:
    """CPU seconds a round of all three, and by how much the harness takes longer than the other two (medians).

    model: `rollout.generate` on the suite's prompts as token ids and nothing else, the model's own time. plain:
    `evaluate.answer_items`, as in training: draw the items, encode, generate, decode, compare. harness: load the tasks,
    build and check the requests, generate, score with intervals, write the results. All three take the items of a group
    in one batch. What a process does once is done before: the model is loaded, everything imported, this machine
    described, and for the harness, which has them in its memory, the items are drawn (`drawing`: seconds for all of
    them, the least of the rounds).
    """
    model = load_model(spec, ModelConfig())
    ways = {"model": _model, "plain": _plain, "harness": _harness}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    drawing = min(_drawing() for _ in range(rounds))
    for number in range(rounds + 1):  # the first warms all up
        for name, way in ways.items():
            took = way(spec, model, console)
            if number:
                seconds[name].append(took)
    middle = {name: median(each) for name, each in seconds.items()}
    return {
        "spec": spec,
        "rounds": rounds,
        "seconds": seconds,
        "drawing": drawing,
        "over_model": middle["harness"] / middle["model"] - 1,
        "over_plain": middle["harness"] / middle["plain"] - 1,
    }


def _drawing() -> float:
    began = process_time()
    for group in GROUPS:
        items(group, "test")
    return process_time() - began


def _tokenizer(spec: str) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(spec, ModelConfig())
    ensure_chat_template(tokenizer)
    return tokenizer


def _model(spec: str, model: LanguageModel, console: Console) -> float:
    tokenizer, batches = _tokenizer(spec), []
    for group in GROUPS:
        prompts = [Prompt((Message("user", item.prompt),), "eval") for item in items(group, "test")]
        ids = [encode_prompt(tokenizer, prompt, system=None, max_prompt_tokens=512) for prompt in prompts]
        batches.append([each for each in ids if not isinstance(each, str)])
    began = process_time()
    for batch in batches:
        generate(
            model,
            batch,
            stop_ids=[int(tokenizer.eos_token_id)],
            pad_id=int(tokenizer.pad_token_id),
            max_new_tokens=16,
            seed=0,
            greedy=True,
        )
    return process_time() - began


def _plain(spec: str, model: LanguageModel, console: Console) -> float:
    tokenizer, recipe = _tokenizer(spec), resolved(load_recipe(None, []))
    began = process_time()
    answer_items(
        model, tokenizer, load_items(recipe, "test"), recipe, samples=None, stops=[int(tokenizer.eos_token_id)]
    )
    return process_time() - began


def _harness(spec: str, model: LanguageModel, console: Console) -> float:
    with tempfile.TemporaryDirectory() as folder:
        (target,) = find_targets(spec, Path(folder))
        began = process_time()
        with quiet():
            tasks = load_tasks(wanted([], "embedded"), data=None, include_path=[], score_rest=False, say=console.say)
            session = Session(Options(), None, "cpu", console)
            lm, prepared = session.prepare(replace(target, parent=Path(folder)), tasks)
            lm.load = lambda: model
            for each in prepared:
                session.evaluate(target, lm, each)
        return process_time() - began
