"""Task names to lm-eval tasks: ours, the user's YAML, or lm-eval's; what can go wrong is said in one line."""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srppo.data.hub import offline_when_unreachable
from srppo.errors import DataError
from srppo.evaluation.harness import ifeval
from srppo.evaluation.harness.problems import Problems, together
from srppo.evaluation.harness.restate import restate, restating
from srppo.evaluation.harness.shipped import FOLDER, SHORTCUTS, SUITES, local_config, local_file


@dataclass(frozen=True)
class Loaded:
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
    for name in (part.strip() for each in tasks for part in each.split(",")):
        for member in SUITES[name] if name == "embedded" else (name,):
            if member:
                found.setdefault(member, name if name == "embedded" else None)
    return list(found.items())


def load_tasks(
    names: Sequence[tuple[str, str | None]],
    *,
    data: Path | None,
    include_path: Sequence[Path],
    score_rest: bool,
    say: Callable[[str], None],
    problems: Problems | None = None,
) -> list[Loaded]:
    """Every task with its data. Raises DataError, in one line, for all that cannot be had, or adds it to `problems`."""
    for folder in include_path:
        if not folder.is_dir():
            raise DataError(f"--include-path {folder} is not a folder; give the folder that holds your YAML tasks")
    if data is not None and not data.exists():
        raise DataError(f"--data {data} does not exist; give IFEval's or GSM8K's jsonl file, or a folder of them")
    library = _Library(include_path, say)
    files = {name: local_file(name, data) for name, _ in names if data is not None and not library.is_users(name)}
    if data is not None and not any(files.values()):
        raise DataError(
            f"--data {data} holds nothing for {', '.join(name for name, _ in names)}: it is read for ifeval "
            "(prompt, instruction_id_list, kwargs) and gsm8k (question, answer)"
        )
    found: list[Loaded] = []
    with together(problems) as met:
        for name, suite in names:
            with met.gathered():
                found += library.load(name, suite, files.get(name), score_rest, met)
    repeated = [each.name for i, each in enumerate(found) if each.name in {other.name for other in found[:i]}]
    if repeated:
        raise DataError(f"task {repeated[0]} is asked for twice, alone and in a group; name it once")
    return found


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
    ) -> list[Loaded]:
        """The task, or the tasks of a group or tag. What its checkers lack is gathered: its data may be missing too."""
        spec, config = self._spec(name)
        checked = name == "ifeval" or ifeval.is_ifeval(config)
        if checked:
            with problems.gathered():
                _check_ifeval(score_rest)
        if (path := config.get("dataset_path")) in ("json", "csv", "parquet", "text"):
            _check_files(name, path, config)
        import datasets
        import huggingface_hub.constants

        away = offline_when_unreachable(datasets.config, huggingface_hub.constants)
        with away, restating(name, config), ifeval.checkers_importable():
            random.seed(0)  # process_docs may draw: the same items whatever else is asked for; `quiet` restores
            built = self.manager.load([self._local(spec, name, file) if file else spec])
        member_of = {child: group for group, children in built.get("group_map", {}).items() for child in children}
        names = list(built["tasks"])
        for task in built["tasks"].values():
            _read_once(task)
        return [
            Loaded(
                each,
                suite or member_of.get(each) or (name if len(names) > 1 else None),
                built["tasks"][each],
                embedded=name in SUITES["embedded"] and not self.is_users(name),
                ifeval=checked,
            )
            for each in names
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
            try:
                return name, load_yaml(name, resolve_func=False)
            except Exception as error:  # the user's YAML, by lm-eval's loader: anything
                raise DataError(restate(name, error, {})) from error
        outside = [m for m in (entry.cfg or {}).get("task", []) if isinstance(m, str)] if _is_group(entry) else []
        if entry is None or any(member not in self.manager.task_index for member in outside):
            entry = self._complete(name)
        return name, dict(entry.cfg or {})

    def _complete(self, name: str) -> Any:
        """Look in lm-eval's own tasks. Raises DataError for a name that is nowhere."""
        from lm_eval.tasks import TaskManager

        if not self.complete:
            self._report_broken(name)
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

    def _report_broken(self, name: str) -> None:
        """A user's YAML of that name which does not parse: lm-eval passes over such files without a word."""
        from lm_eval.tasks._yaml_loader import load_yaml

        for folder in self.include_path:
            for path in sorted(Path(folder).rglob("*.yaml")):
                if path.stem == name or f"task: {name}\n" in path.read_text(errors="replace"):
                    try:
                        load_yaml(path, resolve_func=False)
                    except Exception as error:  # likewise
                        raise DataError(restate(str(path), error, {})) from error

    def _local(self, spec: str, name: str, file: Path) -> dict[str, Any]:
        from lm_eval.tasks._yaml_loader import load_yaml

        return local_config(name, load_yaml(spec, resolve_func=True), file)


def _read_once(task: Any) -> None:
    """Items as a list: lm-eval goes over them several times, a Dataset decodes a row anew each time, and what shuffles
    the choices of an item, as GPQA's process_docs, would shuffle them otherwise for the score than for the question.
    """
    method = "test_docs" if task.has_test_docs() else "validation_docs"
    rows = _rows_of(getattr(task, method)())
    setattr(task, method, lambda: rows)


def _rows_of(data: Any) -> list[Any]:
    """Rows of a Dataset, read column by column (20 times faster than row by row), or of any other sequence."""
    if type(data).__name__ != "Dataset":
        return list(data)
    columns: dict[str, list[Any]] = data[:]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _is_group(entry: Any) -> bool:
    return entry is not None and isinstance((entry.cfg or {}).get("task"), list)


def _check_ifeval(score_rest: bool) -> None:
    absent = ifeval.missing()
    if "nltk" in absent or (absent and not score_rest):
        ways = "; ".join(dict.fromkeys(ifeval.INSTALL[name] for name in absent))
        rest = "" if "nltk" in absent else "; or pass --score-rest to score the other prompts and list these"
        raise DataError(f"IFEval's checkers need {', '.join(absent)}, not found here: {ways}{rest}")


def _check_files(name: str, kind: str, config: Mapping[str, Any]) -> None:
    """Data files that a task names and that are not there; lm-eval would look from the working directory."""
    files = (config.get("dataset_kwargs") or {}).get("data_files") or ()
    listed = files.values() if isinstance(files, Mapping) else [files]
    for each in listed:
        for file in [each] if isinstance(each, str) else each:
            if "://" not in str(file) and not any(c in str(file) for c in "*?[") and not Path(file).is_file():
                raise DataError(
                    f"task {name}: its data file {file} does not exist; a path in data_files counts from the working "
                    f"directory ({Path.cwd()}): run from where it fits, or write the whole path"
                )
