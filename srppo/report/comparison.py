"""`srppo compare`: which results the paths name, and the comparison as a table, Markdown, CSV and JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.constrain import Constrain
from rich.text import Text

from srppo.console import Console
from srppo.errors import DataError, UserError
from srppo.evaluation.comparison import compare
from srppo.evaluation.results import TaskResult, read_results
from srppo.record.arms import problem_of
from srppo.record.files import storing, write_atomic
from srppo.record.folder import check_place
from srppo.record.store import Run
from srppo.report.comparison_files import to_csv, to_json, to_markdown
from srppo.report.comparison_table import WIDTH, comparison_table
from srppo.stages.arms import arm_names, stages_by_arm

WRITERS = {".md": to_markdown, ".csv": to_csv, ".json": to_json}


def compare_command(
    paths: Sequence[Path],
    *,
    task: Sequence[str] = (),
    metric: str | None = None,
    decoding: str | None = None,
    alpha: float = 0.05,
    out: Path | None = None,
    console: Console,
) -> None:
    """Compare the later paths with the first, or the arms of one run with its SFT; print it, and write it to `out`.

    A path is a run, RUN:ARM, a result folder, or a folder of results (FOLDER:MODEL). out: a .md, .csv or .json file,
    or a folder that gets all three. Raises DataError or RecordError in one line, before anything is written.
    """
    files = [out] if out and out.suffix in WRITERS else [out / f"comparison{end}" for end in WRITERS] if out else []
    if out and out.suffix and out.suffix not in WRITERS:
        raise UserError(f"--out {out}: it ends in {', '.join(WRITERS)}, or is a folder that gets all three")
    for path in files:
        check_place(path.parent)
        if path.is_dir():
            raise UserError(f"--out {path} is a folder; give a file's name, or a folder without such an ending")
    arms, notes = arms_of(paths, metric)
    found = compare(select(arms, task, decoding), alpha=alpha)
    console.print(comparison_table(found))
    for note in (*notes, *found.notes):
        console.print(Constrain(Text(note, "dim"), WIDTH))
    for path in files:
        with storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, WRITERS[path.suffix](found, notes))
        console.print(f"written: {path}")


def arms_of(paths: Sequence[Path], metric: str | None = None) -> tuple[dict[str, list[TaskResult]], list[str]]:
    """The models to compare, the baseline first, and what a reader should know of the choice.

    One path: all its models, a run's SFT or else the first being the baseline. Several: one model each; a run without
    :ARM stands for SRPPO, or for the last arm it has. Raises DataError for a name it does not have.
    """
    if len({str(path) for path in paths}) < len(paths):
        raise DataError("the same path is given twice; a model compared with itself shows nothing")
    notes: list[str] = []
    chosen: list[tuple[Path, str, list[TaskResult]]] = []
    for argument in paths:
        path, arm = _split(argument)
        models = _by_model(read_results(path, metric, stages_by_arm))
        is_run = (path / "sweep.json").exists()
        if is_run:
            notes += _problems(path)
        if len(paths) == 1 and arm is None:
            return {name: models[name] for name in sorted(models, key=lambda name: name != "SFT")}, notes
        if arm is None and len(models) > 1 and not is_run:
            raise DataError(f"{path} holds the models {_list(models)}; choose one: {path}:NAME")
        if arm is None and len(models) > 1:
            notes.append(f"{path} stands for its arm {list(models)[-1]}; {path}:ARM chooses another of {_list(models)}")
        name = list(models)[-1] if arm is None else _named(arm, models, path)
        chosen.append((path, name, models[name]))
    return _labelled(chosen), notes


def _split(argument: Path) -> tuple[Path, str | None]:
    """RUN:ARM as a path and a name; a path that exists is a path."""
    before, colon, after = str(argument).rpartition(":")
    if Path(argument).exists() or not colon or not Path(before).exists():
        return Path(argument), None
    return Path(before), after


def _by_model(results: Iterable[TaskResult]) -> dict[str, list[TaskResult]]:
    found: dict[str, list[TaskResult]] = {}
    for result in results:
        found.setdefault(result.model, []).append(result)
    order = arm_names()
    return {name: found[name] for name in sorted(found, key=lambda n: order.index(n) if n in order else len(order))}


def _named(arm: str, models: Mapping[str, object], path: Path) -> str:
    """The model of that name, or the only one that contains it, whatever the case."""
    exact = [name for name in models if name.casefold() == arm.casefold()]
    found = exact or [name for name in models if arm.casefold() in name.casefold()]
    if len(found) != 1:
        raise DataError(f"{path} has {'no' if not found else 'more than one'} {arm!r}; it has: {_list(models)}")
    return found[0]


def _labelled(chosen: Sequence[tuple[Path, str, list[TaskResult]]]) -> dict[str, list[TaskResult]]:
    """Names as short as they tell the models apart: the model's, else with its folder's, else with the whole path."""
    names = [name for _, name, _ in chosen]
    if len(set(names)) < len(names):
        names = [f"{path.name}:{name}" for path, name, _ in chosen]
    if len(set(names)) < len(names):
        names = [f"{path}:{name}" for path, name, _ in chosen]
    return dict(zip(names, (results for _, _, results in chosen), strict=True))


def _problems(path: Path) -> list[str]:
    """Seeds and arms of a run that are left out since they failed, diverged or are not finished."""
    return [
        f"{path}, {arm}, left out: {problem}"
        for arm, stages in stages_by_arm(Run.load(path)).items()
        for stage in stages
        if (problem := problem_of(stage, stage.result()))
    ]


def select(
    arms: Mapping[str, Sequence[TaskResult]], tasks: Sequence[str], decoding: str | None
) -> dict[str, list[TaskResult]]:
    """Only the tasks (by name or group) and the decoding asked for. Raises DataError for what there is not."""
    everything = [result for results in arms.values() for result in results]
    known = {result.task for result in everything} | {result.group for result in everything if result.group}
    if unknown := [task for task in tasks if task not in known]:
        raise DataError(f"no result on {_list(unknown)}; there are: {_list(sorted(known))}")
    decodings = sorted({result.decoding for result in everything})
    if decoding is not None and decoding not in decodings:
        raise DataError(f"no result with decoding {decoding!r}; there are: {_list(decodings)}")
    return {
        name: [
            result
            for result in results
            if (not tasks or result.task in tasks or result.group in tasks) and decoding in (None, result.decoding)
        ]
        for name, results in arms.items()
    }


def _list(names: Iterable[str]) -> str:
    return "; ".join(names)  # arms have commas in their names
