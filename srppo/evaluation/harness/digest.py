"""What a task is, as checksums: by them results are found again, and told apart when they are compared."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from srppo.config import canonical_json

_ELSEWHERE = (
    *("dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset", "metadata"),
    *("training_split", "validation_split", "test_split", "num_fewshot", "generation_kwargs"),
)
"""Keys of a task's config that say where its items come from, or that a summary holds under a name of its own."""


def config_of(task: Any) -> dict[str, Any]:
    """The task's whole config, functions by their source."""
    config = task.dump_config()
    (config.get("metadata") or {}).pop("config_source", None)  # a path of this machine
    return dict(json.loads(json.dumps(config, default=_source, sort_keys=True)))


def content_of(config: Mapping[str, Any], code: list[str], shots: int) -> str:
    """sha256 of how a task asks and scores: of its config without where items come from, which `item` tells apart."""
    elsewhere = (*_ELSEWHERE, *(() if shots else ("fewshot_config", "fewshot_split")))
    own = {key: value for key, value in config.items() if key not in elsewhere}
    return hashlib.sha256(canonical_json({"config": own, "code": code}).encode()).hexdigest()


def digest_of(
    config: Mapping[str, Any], code: list[str], instances: list[Any], skipped: Mapping[int, str], docs: list[Any]
) -> str:
    """sha256 of lm-eval's version, the task's whole config with its functions, its items and its requests."""
    head = {"lm_eval": _lm_eval(), "config": config, "skipped": sorted(skipped), "code": code}
    digest = hashlib.sha256(canonical_json(head).encode())
    for part in (docs, [(i.request_type, i.args) for i in instances]):
        for start in range(0, len(part), 256):  # many at once: an encoder a row costs more than its work
            digest.update(json.dumps(part[start : start + 256], default=str, sort_keys=True).encode() + b"\0")
    return digest.hexdigest()


@cache
def _lm_eval() -> str:
    """Its version, read from its metadata once a process."""
    return metadata.version("lm_eval")


def code_of(task: Any) -> list[str]:
    """sha256 of the Python files beside each function that the task uses; lm-eval's own are known by its version."""
    config = vars(task.config)
    filters = [part.get("function") for each in config.get("filter_list") or () for part in each.get("filter", ())]
    metrics = [value for each in config.get("metric_list") or () for value in each.values()]
    names = [inspect.getsourcefile(f) for f in (*config.values(), *filters, *metrics) if inspect.isroutine(f)]
    folders = {Path(name).parent for name in names if name and "lm_eval" not in Path(name).parts}
    files = sorted({file for folder in folders for file in folder.glob("*.py")})
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def _source(value: Any) -> str:
    """A function by its source, anything else by its class: never by an address."""
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):
        return type(value).__name__ if " at 0x" in repr(value) else repr(value)
