"""Task names to lm-eval tasks: ours, the user's YAML, or lm-eval's; what can go wrong is said in one line.

IFEval and GSM8K are read from local files under lm-eval's own checkers. A task is known by checksums of all that makes
its questions and scores, by which results are found again, and told apart when they are compared.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

from srppo.config import canonical_json
from srppo.data.hub import offline_when_unreachable
from srppo.errors import DataError
from srppo.evaluation.harness.guards import Problems, restating
from srppo.evaluation.harness.ifeval import check_packages, is_ifeval
from srppo.evaluation.items import read_rows
from srppo.instructions.checkers import checkers_importable
from srppo.world.tasks import REPORTED

OURS = {suite: tuple(f"{suite}_{group}" for group in REPORTED) for suite in ("embedded", "embedded_long")}
"""The embedded world's suites: of short answers, and of long ones to the same questions."""
SUITES = {
    **OURS,
    "ifeval": ("ifeval",),
    "gsm8k": ("gsm8k",),
    "paper": ("ifeval", "gsm8k", "gpqa_main_zeroshot"),
}
"""`paper`: the tasks that the paper names; which variant of GPQA it used could not be found, so this choice is ours."""

SHORTCUTS = {
    "ifeval": "ifeval/ifeval.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "gpqa_main_zeroshot": "gpqa/zeroshot/gpqa_main_zeroshot.yaml",
}
"""lm-eval's own files of the tasks above: reading its list of all tasks takes 8 s."""

FOLDER = Path(__file__).parent / "suites"
_FILES = {"ifeval": "input_data.jsonl", "gsm8k": "test.jsonl"}
_COLUMNS = {"ifeval": {"prompt", "instruction_id_list", "kwargs"}, "gsm8k": {"question", "answer"}}
_ELSEWHERE = (
    *("dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset", "metadata"),
    *("training_split", "validation_split", "test_split", "num_fewshot", "generation_kwargs"),
)
"""Keys of a task's config that say where its items come from, or that a summary holds under a name of its own."""


@dataclass(frozen=True)
class HarnessTask:
    """A task as lm-eval built it. group: the group or suite it was asked for by. ifeval: checked by IFEval's code."""

    name: str
    group: str | None
    task: Any
    embedded: bool = False
    ifeval: bool = False


def wanted(tasks: Sequence[str], suite: str | None) -> list[tuple[str, str | None]]:
    """(task name, suite or None) of what was asked for, each once; the embedded suite where nothing was."""
    if suite is not None and suite not in SUITES:
        raise DataError(f"there is no suite {suite!r}; choose one of {', '.join(SUITES)}, or give --tasks")
    asked = [suite] if suite else [] if tasks else ["embedded"]
    found: dict[str, str | None] = {name: each for each in asked for name in SUITES[each]}
    for name in (part.strip() for each in tasks for part in each.split(",") if part.strip()):
        for member in OURS.get(name, (name,)):
            found.setdefault(member, name if name in OURS else None)
    return list(found.items())


def load_tasks(
    names: Sequence[tuple[str, str | None]],
    *,
    data: Path | None,
    include_path: Sequence[Path],
    score_rest: bool,
    say: Callable[[str], None],
    problems: Problems,
) -> list[HarnessTask]:
    """Every task with its data; what single tasks lack is added to `problems`. Raises DataError for a folder or file of
    the command that cannot be used, and for a task that is asked for twice."""
    for folder in include_path:
        if not folder.is_dir():
            raise DataError(f"--include-path {folder} is not a folder; give the folder that holds your YAML tasks")
    if data is not None and not data.exists():
        raise DataError(f"--data {data} does not exist; give IFEval's or GSM8K's jsonl file, or a folder of them")
    library = _Library(include_path, say)
    files = {name: _local_file(name, data) for name, _ in names if data is not None and not library.is_users(name)}
    if data is not None and not any(files.values()):
        raise DataError(
            f"--data {data} holds nothing for {', '.join(name for name, _ in names)}: it is read for ifeval "
            "(prompt, instruction_id_list, kwargs) and gsm8k (question, answer)"
        )
    found: dict[str, HarnessTask] = {}
    for name, suite in names:
        with problems.gathered():
            for task in library.load(name, suite, files.get(name), score_rest, problems):
                if task.name in found:
                    raise DataError(f"task {task.name} is asked for twice, alone and in a group; name it once")
                found[task.name] = task
    return list(found.values())


class _Library:
    """Ours and the user's tasks at once, lm-eval's own when a name asks for them."""

    def __init__(self, include_path: Sequence[Path], say: Callable[[str], None]) -> None:
        from lm_eval.tasks import TaskManager

        self.include_path, self.say = [str(path) for path in include_path], say
        self.users: Any = TaskManager(include_path=self.include_path, include_defaults=False)
        self.manager: Any = TaskManager(include_path=[str(FOLDER), *self.include_path], include_defaults=False)
        self.complete = False

    def is_users(self, name: str) -> bool:
        """Whether the user's own YAML defines it."""
        return name in self.users.task_index or name.endswith((".yaml", ".yml"))

    def load(
        self, name: str, suite: str | None, file: Path | None, score_rest: bool, problems: Problems
    ) -> list[HarnessTask]:
        """The task, or the tasks of a group or tag. What its checkers lack is gathered: its data may be missing too."""
        import datasets
        import huggingface_hub.constants

        spec, config = self._spec(name)
        checked = name == "ifeval" or is_ifeval(config)
        if checked:
            with problems.gathered():
                check_packages(score_rest)
        if config.get("dataset_path") in ("json", "csv", "parquet", "text"):
            _check_files(name, config)
        away = offline_when_unreachable(datasets.config, huggingface_hub.constants)
        with away, restating(name, config), checkers_importable():
            random.seed(0)  # process_docs may draw: the same items whatever else is asked for; `seeded` restores
            built = self.manager.load([_local_config(name, spec, file) if file else spec])
        member_of = {child: group for group, children in built.get("group_map", {}).items() for child in children}
        several, embedded = len(built["tasks"]) > 1, name in chain(*OURS.values()) and not self.is_users(name)
        for task in built["tasks"].values():
            _read_once(task)
        return [
            HarnessTask(each, suite or member_of.get(each) or (name if several else None), task, embedded, checked)
            for each, task in built["tasks"].items()
        ]

    def _spec(self, name: str) -> tuple[str, dict[str, Any]]:
        """(what the manager takes, the config as YAML has it with functions unresolved)."""
        import lm_eval.tasks
        from lm_eval.tasks._yaml_loader import load_yaml

        entry = self.manager.task_index.get(name)
        if entry is None and name in SHORTCUTS:
            path = Path(lm_eval.tasks.__file__).parent / SHORTCUTS[name]
            return str(path), load_yaml(path, resolve_func=False)
        if entry is None and Path(name).is_file():
            return name, _users_yaml(name, name)
        members = (entry.cfg or {}).get("task", []) if entry is not None else []
        known = self.manager.task_index
        outside = isinstance(members, list) and any(isinstance(m, str) and m not in known for m in members)
        if entry is None or outside:
            entry = self._complete(name)
        return name, dict(entry.cfg or {})

    def _complete(self, name: str) -> Any:
        """Look in lm-eval's own tasks. Raises DataError for a name that is nowhere."""
        from lm_eval.tasks import TaskManager

        if not self.complete:
            for path in (each for folder in self.include_path for each in sorted(Path(folder).rglob("*.yaml"))):
                # lm-eval passes over a user's YAML that does not parse without a word
                if path.stem == name or f"task: {name}\n" in path.read_text(errors="replace"):
                    _users_yaml(path, str(path))
            self.say(f"{name} is not one of our tasks: reading lm-eval's list, about 8 s")
            self.manager = TaskManager(include_path=[str(FOLDER), *self.include_path])
            self.complete = True
        entry = self.manager.task_index.get(name)
        if entry is None:
            near = difflib.get_close_matches(name, self.manager.all_tasks, n=3)
            where = f", nor in {', '.join(self.include_path)}" if self.include_path else "; own YAML: --include-path"
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise DataError(f"there is no task {name!r} in lm-eval or here{where}{hint}")
        return entry


def _users_yaml(path: Path | str, name: str) -> dict[str, Any]:
    """A user's YAML with functions unresolved. Raises DataError for what does not parse."""
    from lm_eval.tasks._yaml_loader import load_yaml

    with restating(name, {}):
        return dict(load_yaml(path, resolve_func=False))


def _read_once(task: Any) -> None:
    """Items as a list: lm-eval goes over them several times, a Dataset decodes a row anew each time, and what shuffles
    the choices of an item, as GPQA's process_docs, would shuffle them otherwise for the score than for the question.

    A Dataset is read column by column, 20 times faster than row by row.
    """
    method = "test_docs" if task.has_test_docs() else "validation_docs"
    data = getattr(task, method)()
    if type(data).__name__ == "Dataset":
        columns: dict[str, list[Any]] = data[:]
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    else:
        rows = list(data)
    setattr(task, method, lambda: rows)


def _check_files(name: str, config: Mapping[str, Any]) -> None:
    """Data files that a task names and that are not there; lm-eval would look from the working directory."""
    files = (config.get("dataset_kwargs") or {}).get("data_files") or ()
    listed = files.values() if isinstance(files, Mapping) else [files]
    for file in (file for each in listed for file in ([each] if isinstance(each, str) else each)):
        if "://" not in str(file) and not any(c in str(file) for c in "*?[") and not Path(file).is_file():
            raise DataError(
                f"task {name}: its data file {file} does not exist; a path in data_files counts from the working "
                f"directory ({Path.cwd()}): run from where it fits, or write the whole path"
            )


# ---- local files


def _local_file(task: str, data: Path) -> Path | None:
    """The file of `task` in what --data names: a file with its columns, or a folder; None where it is of another task.

    Raises DataError for a file that cannot be read.
    """
    if task not in _FILES:
        return None
    if data.is_dir():
        places = [data / _FILES[task], data / task / _FILES[task]]
        return next((place for place in places if place.is_file()), None)
    return data if _COLUMNS[task] <= read_rows(data, "--data")[0][1].keys() else None


def _local_config(task: str, spec: str, file: Path) -> dict[str, Any]:
    """lm-eval's config of `task` on the rows of a local file; few-shot examples from train.jsonl beside it."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config: dict[str, Any] = load_yaml(spec, resolve_func=True)
    files = {config["test_split"]: file}
    if task == "gsm8k":
        beside = file.with_name("train.jsonl")
        if beside.is_file() and beside != file:
            files["train"] = beside
        else:
            config |= {"training_split": None, "fewshot_split": None}
    splits = {name: [row for _, row in read_rows(each, "--data")] for name, each in files.items()}

    def load(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {name: Dataset.from_list(rows) for name, rows in splits.items()}

    return {**config, "custom_dataset": load}


# ---- checksums


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
    head = {"lm_eval": metadata.version("lm_eval"), "config": config, "skipped": sorted(skipped), "code": code}
    digest = hashlib.sha256(canonical_json(head).encode())
    for part in (docs, [(i.request_type, i.args) for i in instances]):
        for start in range(0, len(part), 256):  # many at once: an encoder a row costs more than its work
            digest.update(json.dumps(part[start : start + 256], default=str, sort_keys=True).encode() + b"\0")
    return digest.hexdigest()


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
