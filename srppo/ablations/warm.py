"""What the stages of a sweep would each load and prepare anew, made once in their worker, before it forks them.

Only what needs no tensors and starts no threads: a fork must find neither. So weights are the stages' own, and so are
sets on the hub, parquet files, large files and models with code of their own. A stage that finds nothing here, or
something that its real model contradicts, prepares it itself, and it is the stage that says what is wrong with it.
"""

from __future__ import annotations

import os
from collections.abc import Hashable
from contextlib import suppress
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from srppo.ablations.plan import Task
from srppo.config import ModelConfig, Recipe, resolved, with_overrides
from srppo.data.chat import stop_ids
from srppo.data.memo import Memo, stamps
from srppo.data.prepare import asks_base, ensure_chat_template, prepare
from srppo.data.sources import files_of
from srppo.environment import commit_of_source, package_versions
from srppo.evaluation.items import load_items
from srppo.kernels.native import compiler_version
from srppo.models.language_model import declared, import_model, load_tokenizer, resolve

MOST_BYTES = 1 << 24  # of data files: larger ones would keep the worker from its stages for long


class Warm:
    """Tokenizers and data of the `seeds` seeds that ran last. `before` is for the worker, the rest for its stages."""

    def __init__(self, seeds: int) -> None:
        self.memo = Memo(seeds)
        self._tokenizers: dict[Hashable, PreTrainedTokenizerBase] = {}

    def before(self, task: Task) -> None:
        """Make ready for a task that is about to be forked. Never raises."""
        if os.environ.get("TOKENIZERS_PARALLELISM") != "false":
            return  # encoding would start threads
        for make in (self._facts, self._model, self._data):
            with suppress(Exception):
                make(resolved(task.recipe))

    def tokenizer(self, spec: str, config: ModelConfig) -> PreTrainedTokenizerBase:
        """As `models.load_tokenizer`; the same one while the model's folder stays as it is."""
        folder = Path(resolve(spec))
        if config.trust_remote_code or not folder.is_dir():
            return load_tokenizer(spec, config)
        key = stamps(sorted(path for path in folder.iterdir() if path.is_file()))
        if key not in self._tokenizers:
            self._tokenizers[key] = load_tokenizer(spec, config)
        return self._tokenizers[key]

    def _facts(self, recipe: Recipe) -> None:
        package_versions()
        commit_of_source()
        compiler_version()
        for split in ("dev", "test"):
            if recipe.eval.items is None:
                load_items(recipe, split)

    def _model(self, recipe: Recipe) -> None:
        if _is_plain(recipe.model.base, recipe.model):
            import_model(recipe.model.base)

    def _data(self, recipe: Recipe) -> None:
        config, sft = recipe.model, recipe.model.sft or recipe.model.base
        if not all(_is_plain(spec, config) for spec in (config.base, sft)) or not _is_small(recipe):
            return
        tokenizer = self.tokenizer(sft, config)
        given = ensure_chat_template(tokenizer)
        try:
            if asks_base(recipe.data):
                recipe = with_overrides(recipe, {"data.noise": "none", "data.noise_rate": 0.0})
            prepare(
                recipe.data,
                tokenizer,
                recipe.seed,
                declared(config.base)[0],
                max_new_tokens=recipe.rollout.max_new_tokens,
                stop=stop_ids(tokenizer, declared(sft)[1]),
                memo=self.memo,
            )
        finally:
            if given:
                tokenizer.chat_template = None  # the stage gives it, and says so


def _is_plain(spec: str, config: ModelConfig) -> bool:
    """Whether a model is a folder here, without code of its own."""
    return not config.trust_remote_code and Path(resolve(spec)).is_dir()


def _is_small(recipe: Recipe) -> bool:
    """Whether the data are the embedded world's, or files of text that are soon read."""
    files = [files_of(source) for source in (*recipe.data.demonstrations, *recipe.data.prompts)]
    known = [file for each in files if each is not None for file in each]
    text = all(".parquet" not in file.suffixes for file in known)
    return None not in files and text and sum(file.stat().st_size for file in known) <= MOST_BYTES
