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
from srppo.config import ModelConfig, Recipe, canonical_json, resolved
from srppo.environment import commit_of_source, package_versions
from srppo.evaluation.development import load_items
from srppo.kernels.native import compiler_version
from srppo.models.language_model import import_model, load_tokenizer, resolve


class Warm:
    """Tokenizers, by their files. `before` is for the worker, the rest for its stages."""

    def __init__(self, seeds: int) -> None:
        self._tokenizers: dict[Hashable, PreTrainedTokenizerBase] = {}

    def before(self, task: Task) -> None:
        """Make ready for a task that is about to be forked. Never raises."""
        if os.environ.get("TOKENIZERS_PARALLELISM") != "false":
            return  # encoding would start threads
        for make in (self._facts, self._model):
            with suppress(Exception):
                make(resolved(task.recipe))

    def tokenizer(self, spec: str, config: ModelConfig) -> PreTrainedTokenizerBase:
        """As `models.load_tokenizer`; the same one while the model's folder stays as it is."""
        folder = Path(resolve(spec))
        if config.trust_remote_code or not folder.is_dir():
            return load_tokenizer(spec, config)
        files = sorted(path for path in folder.iterdir() if path.is_file())
        files += [Path(config.chat_template)] if config.chat_template else []
        found = [(path, path.stat()) for path in files]
        stamps = tuple((str(p), s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p, s in found)
        key = (stamps, spec in (config.base, config.sft), canonical_json(config.template_kwargs))
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
        if _is_plain(recipe.model.sft or recipe.model.base, recipe.model):
            self.tokenizer(recipe.model.sft or recipe.model.base, recipe.model)


def _is_plain(spec: str, config: ModelConfig) -> bool:
    """Whether a model is a folder here, without code of its own."""
    return not config.trust_remote_code and Path(resolve(spec)).is_dir()
