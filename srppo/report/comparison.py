"""`srppo compare`: which results the paths name, and the comparison in the terminal, as Markdown, CSV and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.text import Text

from srppo.console import Console
from srppo.errors import DataError, UserError
from srppo.evaluation.comparison import Aggregate, ComparisonResult, Difference, bounds, compare, number, p_text, signed
from srppo.evaluation.results import NOT_SCORED, SAMPLES, TaskResult, read_results
from srppo.record.arms import problem_of
from srppo.record.files import storing, write_atomic
from srppo.record.folder import check_place
from srppo.record.json import plain
from srppo.record.store import Run
from srppo.report.table import (
    VERDICT_MARKS,
    Column,
    Row,
    Table,
    paragraph,
    plain_markdown,
    records,
    to_csv,
    to_markdown,
)
from srppo.report.words import joined, span, verdict_words
from srppo.stages.arms import arm_names, stages_by_arm
from srppo.statistics.intervals import Estimate
from srppo.statistics.tests import seeds_needed

NAMED, ID_LENGTH = 3, 12  # items named in a line, and characters of an item's id there
COLUMNS = (
    *("kind", "decoding", "task", "group", "metric", "baseline", "model", "baseline_mean", "model_mean"),
    *("difference", "low", "high", "confidence", "these_tasks_low", "these_tasks_high", "p", "p_holm", "p_same"),
    *("p_same_holm", "margin", "comparisons", "test", "detectable", "verdict", "items", "clusters", "unit", "seeds"),
    *("left_out", "sentence"),
)


def compare_command(
    paths: Sequence[Path],
    *,
    task: Sequence[str] = (),
    metric: str | None = None,
    decoding: str | None = None,
    alpha: float = 0.05,
    margin: float | None = None,
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
    chosen = select(arms, task, decoding)
    found = compare(chosen, alpha=alpha, margin=margin)
    notes += unscored(chosen)
    print_comparison(found, notes, console)
    for path in files:
        with storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, WRITERS[path.suffix](found, notes))
        console.print(f"written: {path}")


def arms_of(paths: Sequence[Path], metric: str | None = None) -> tuple[dict[str, list[TaskResult]], list[str]]:
    """The models to compare, the baseline first, and what a reader should know of the choice.

    One path: all its models, a run's SFT or else the first being the baseline, and the base of a run left out where
    there are others. Several: one model each; a run without :ARM stands for SRPPO, or for the last arm it has. Raises
    DataError for a name it does not have.
    """
    if len({str(path) for path in paths}) < len(paths):
        raise DataError("the same path is given twice; a model compared with itself shows nothing")
    notes: list[str] = []
    chosen: list[tuple[Path, str, list[TaskResult]]] = []
    for argument in paths:
        path, arm = _split(argument)
        models = _by_model(read_results(path, metric, stages_by_arm))
        is_run = (path / "sweep.json").exists()
        for name, stages in stages_by_arm(Run.load(path)).items() if is_run else ():
            problems = (problem_of(stage, stage.result()) for stage in stages)
            notes += [f"{path}, {name}, left out: {problem}" for problem in problems if problem]
        if len(paths) == 1 and arm is None:
            if is_run and "base" in models and "SFT" in models and len(models) > 2:
                del models["base"]  # what nobody asks would still count in the correction
                notes.append(f"the base is left out of the family; {path}:SFT {path}:base compares it")
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
    forms = [name for _, name, _ in chosen], [f"{path.name}:{name}" for path, name, _ in chosen]
    names = next((names for names in forms if len(set(names)) == len(names)), [f"{p}:{name}" for p, name, _ in chosen])
    return dict(zip(names, (results for _, _, results in chosen), strict=True))


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


# ---- what a comparison says


def print_comparison(found: ComparisonResult, notes: Sequence[str], console: Console) -> None:
    """A table and sentences for each decoding and model, then what the columns mean; at most 80 columns."""
    for decoding, model in dict.fromkeys((each.decoding, each.model) for each in found.differences):
        rows = [each for each in found.differences if (each.decoding, each.model) == (decoding, model)]
        whole = [each for each in found.aggregates if (each.decoding, each.model) == (decoding, model)]
        console.print(differences_table(f"{decoding}: {model} minus {found.baseline}", found.baseline, rows, whole))
        for each in rows:
            console.print(paragraph(each.sentence, VERDICT_MARKS[each.verdict]))
        for line in dict.fromkeys(line for each in rows for line in remarks(each)):
            console.print(paragraph(line, "dim"))
        console.print(Text(""))
    for line in (*captions(found), *notes, *found.notes):
        console.print(paragraph(line, "dim"))


def differences_table(title: str, baseline: str, rows: Sequence[Difference], whole: Sequence[Aggregate] = ()) -> Table:
    """A row a task and model, then one an average over tasks; files name the model and the verdict in columns too."""
    heads = [Column("task", ""), Column("model", only="page"), Column(baseline, "baseline"), Column("model's", "model")]
    heads += [Column("difference"), Column("these tasks", only="page"), Column("p"), Column("Holm"), Column("detects")]
    heads.append(Column("verdict", only="page"))
    made: list[Row | str] = []
    for each in rows:
        figures = [number(each.baseline_mean), number(each.model_mean), signed(each.difference)]
        p_values = (each.p_same, each.p_same_holm) if each.verdict == "same" else (each.p, each.p_holm)
        tests = [bounds(each.these_tasks), *map(p_text, p_values), number(each.detectable), each.verdict]
        made.append(Row([each.task, each.model, *figures, *tests], VERDICT_MARKS[each.verdict]))
    for one in whole:
        means = [number(one.iqm.baseline.mean), number(one.iqm.model.mean), signed(one.iqm.difference)]
        made.append(Row([average(one), one.model, *means, "-", "", "", "", ""]))
    return Table.of(title, heads, made).telling()


def average(one: Aggregate) -> str:
    """`IQM, 3 tasks`; with fewer than four values nothing is cut, and it is a mean."""
    return f"{'IQM' if len(one.tasks) * one.seeds > 3 else 'mean'}, {len(one.tasks)} tasks"


def aggregate_sentence(one: Aggregate) -> str:
    """Both models' interquartile means and their difference, with intervals."""
    over = f"{len(one.tasks)} tasks" + (f" and {one.seeds} seeds" if one.seeds > 1 else "")
    arms = f"{one.model} {_unsigned(one.iqm.model)}, {one.baseline} {_unsigned(one.iqm.baseline)}"
    return f"{average(one)} ({one.decoding}), over {over}: {arms}, difference {signed(one.iqm.difference)}."


def _unsigned(estimate: Estimate) -> str:
    return f"{number(estimate.mean)} [{number(estimate.low)}, {number(estimate.high)}]"


def remarks(found: Difference) -> list[str]:
    """What could not be paired, counted, the first few named; and how seeds were paired. `unscored` says the rest."""
    lines = [f"{found.task}: {note}" for note in found.notes]
    for reason, items in found.left_out.items():
        if not reason.startswith("not scored"):
            ids = [item if len(item) <= ID_LENGTH else f"{item[:ID_LENGTH]}..." for item in items[:NAMED]]
            named = "; ".join([*ids, *(["..."] if len(items) > NAMED else [])])
            lines.append(f"{found.task}: {span([len(items)], 'item')} left out, {reason} ({named})")
    return lines


def unscored(arms: Mapping[str, Sequence[TaskResult]]) -> list[str]:
    """Items without a score and so in no difference: counted once a task and reason, with a file that lists them."""
    found: dict[tuple[str, str], dict[str, TaskResult]] = {}
    for name, results in arms.items():
        for result in results:
            for reason in dict.fromkeys(result.not_scored.values()):
                found.setdefault((f"{result.task} ({result.decoding})", reason), {}).setdefault(name, result)
    lines = []
    for (task, reason), by_arm in found.items():
        counts = [sum(why == reason for why in result.not_scored.values()) for result in by_arm.values()]
        said = f"{task}: {span(counts, 'item')} left out, not scored in {', '.join(by_arm)}: {reason}"
        path = next(iter(by_arm.values())).path
        listed = path.with_name(f"{path.name}{NOT_SCORED}")
        lines.append(f"{said} (listed in {listed if listed.exists() else path / SAMPLES})")
    return lines


def captions(found: ComparisonResult) -> list[str]:
    """What the columns are, and what few seeds cannot show."""
    several = [len(each.seeds) for each in found.differences if len(each.seeds) > 1]
    units = dict.fromkeys(each.unit if each.clusters else "items" for each in found.differences)
    over = f"{joined([*units])}{' and seeds' if several else ''}"
    tests = ", ".join(dict.fromkeys(each.test for each in found.differences))
    comparisons = max(each.comparisons for each in found.differences)
    lines = [
        f"Paired on items{' and seeds' if several else ''}. "
        + verdict_words(tests, over, comparisons, "of a decoding", found.alpha)
    ]
    for one, needed in ((1, seeds_needed(found.alpha)), (comparisons, seeds_needed(found.alpha, comparisons))):
        if several and min(several) < needed:
            asked = f"p <= {found.alpha:g}" + (f" by Holm over {one} comparisons" if one > 1 else "")
            lines.append(f"Too few seeds ({min(several)}): the exact sign-flip test needs {needed} to reach {asked}.")
            break
    return lines


# ---- files


def as_markdown(found: ComparisonResult, notes: Sequence[str] = ()) -> str:
    """A table for each decoding, the sentences, and what the columns mean."""
    parts = [f"# {', '.join(found.models)} against {found.baseline}\n"]
    for decoding in dict.fromkeys(each.decoding for each in found.differences):
        rows = [each for each in found.differences if each.decoding == decoding]
        whole = [each for each in found.aggregates if each.decoding == decoding]
        sentences = [*(each.sentence for each in rows), *map(aggregate_sentence, whole)]
        parts += [f"## {decoding}\n", to_markdown(differences_table(decoding, found.baseline, rows, whole))]
        parts.append("".join(f"- {plain_markdown(line)}\n" for line in sentences))
    said = [*captions(found), *(line for each in found.differences for line in remarks(each)), *found.notes, *notes]
    return "\n".join([*parts, *(f"{plain_markdown(line)}\n" for line in dict.fromkeys(said))])


def as_csv(found: ComparisonResult, notes: Sequence[str] = ()) -> str:
    """A row a difference (kind difference) and a row an aggregate (kind iqm), no number rounded; left_out counts
    items."""
    rows: list[dict[str, Any]] = []
    for each in found.differences:
        counts: dict[str, Any] = {"items": each.difference.n, "seeds": len(each.seeds)}
        if each.these_tasks is not None:
            counts |= {"these_tasks_low": each.these_tasks.low, "these_tasks_high": each.these_tasks.high}
        counts["left_out"] = len({item for items in each.left_out.values() for item in items})
        rows.append(asdict(each) | {"kind": "difference", **each.difference._asdict(), **counts})
    for one in found.aggregates:
        means = {"baseline_mean": one.iqm.baseline.mean, "model_mean": one.iqm.model.mean}
        row = asdict(one) | {"kind": "iqm", **one.iqm.difference._asdict(), **means}
        rows.append(row | {"task": "+".join(one.tasks), "sentence": aggregate_sentence(one)})
    for row in rows:
        row["difference"] = row["mean"]  # of the estimate
    return to_csv(records({name: row.get(name) for name in COLUMNS} for row in rows))


def as_json(found: ComparisonResult, notes: Sequence[str] = ()) -> str:
    """Everything, items left out by name included; numbers that are not finite are strings, as in the record."""
    content = {"schema_version": 1, **_fields(found), "notes": [*found.notes, *notes]}
    return json.dumps(plain(content), indent=1, ensure_ascii=False) + "\n"


def _fields(value: Any) -> Any:
    """Dataclasses and named tuples as mappings."""
    if hasattr(value, "_asdict"):
        return {key: _fields(each) for key, each in value._asdict().items()}
    if hasattr(value, "__dataclass_fields__"):
        return {key: _fields(getattr(value, key)) for key in value.__dataclass_fields__}
    return [_fields(each) for each in value] if isinstance(value, list | tuple) else value


WRITERS = {".md": as_markdown, ".csv": as_csv, ".json": as_json}
