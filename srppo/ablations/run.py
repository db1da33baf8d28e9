"""`srppo ablate` and `srppo worker`: open the record, say what is coming, run it; the report is the caller's."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

from srppo.ablations.estimate import Estimate, Pace, check_data, estimate
from srppo.ablations.ledger import Ledger, limits_of
from srppo.ablations.local import Execute
from srppo.ablations.options import build_sweep
from srppo.ablations.plan import Plan
from srppo.ablations.progress import LiveTable, Watch, counts
from srppo.ablations.spec import Sweep, label
from srppo.ablations.sweeps import Options
from srppo.config import CODE_EPOCH, canonical_json, decisive, is_embedded, with_overrides
from srppo.console import Console, duration
from srppo.environment import cpu_model, usable_cores
from srppo.errors import ConfigError, RecordError, RunError
from srppo.record.arms import is_sweep
from srppo.record.folder import check_place
from srppo.record.store import Run

ENGINES = ("local", "ray", "slurm")
TRIES = 3  # of a stage that fails
_OF_PACE = {each.name for each in fields(Pace)}  # one that other code has measured may hold other figures
SLACK, LEAST_TIMEOUT_S = 10, 600.0  # a stage hangs when it takes ten times as long as thought, and ten minutes


@dataclass(frozen=True)
class Launch:
    """How a sweep is run; none of it changes a result. processes: of each stage, on one machine, each with a device of
    its own."""

    engine: str = "local"
    slots: int | None = None
    timeout_s: float | None = None
    retry: bool = False
    device: str = "auto"
    processes: int = 1


def ablate_command(
    name: str, options: Options, out: Path | None, launch: Launch, console: Console, *, plan_only: bool = False
) -> Path | None:
    """Plan, say so, run. Returns the folder to report on; None where nothing was run. A plan alone is written to `out`,
    where one is given: what is committed before a run, and what the run is held to."""
    if launch.engine not in ENGINES:
        raise ConfigError(f"engine {launch.engine!r} is unknown; there are {', '.join(ENGINES)}")
    if launch.engine == "ray":
        import srppo.ablations.ray_engine  # noqa: F401  a missing Ray is said now, not after the trial
    sweep = build_sweep(name, options)
    plan = Plan(sweep)
    spec = sweep.as_spec()
    decides = canonical_json({**spec, "recipe": decisive(spec["recipe"])})
    folder = out or Path("runs") / f"{name}-{hashlib.sha256(decides.encode()).hexdigest()[:8]}"
    if out or not plan_only:
        _refuse_other(folder, sweep)
    slots, gpus, device = places(sweep, launch)
    here = f"{device}, {cpu_model()}"  # another machine has other paces
    paces = limits_of(folder)["paces"]
    known = {base: Pace(**pace) for base, pace in paces.get(here, {}).items() if pace.keys() == _OF_PACE}
    found = estimate(plan, device, console, known)
    for line in plan_lines(plan, found, folder, slots, launch.processes):
        console.say(line)
    if plan_only:
        if out:
            console.say(
                f"registered: {Run.open(out, spec).path / 'sweep.json'}; a run with another plan is refused there"
            )
        return None
    ledger = Ledger(Run.open(folder, spec), TRIES)
    timeout_s = launch.timeout_s or max(LEAST_TIMEOUT_S, SLACK * max(found.seconds.values()))
    measured = {here: {base: asdict(pace) for base, pace in found.paces.items()}}
    ledger.limit(timeout_s, sweep.recipe, paces | measured)
    if launch.retry:
        forgive(plan, ledger, console)
    if launch.engine == "slurm":
        from srppo.ablations.slurm import write_sbatch

        write_sbatch(
            plan,
            ledger,
            found,
            slots=slots,
            device=launch.device,
            processes=launch.processes,
            timeout_s=timeout_s,
            console=console,
        )
        return None
    if launch.engine == "ray":
        from srppo.ablations.execute import execute  # torch comes with this
        from srppo.ablations.ray_engine import run_ray

        run = _in_processes(partial(execute, device=device), launch.processes)
        run_ray(
            plan,
            ledger,
            run,
            slots=launch.slots,
            device=device,
            processes=launch.processes,
            timeout_s=timeout_s,
            console=console,
        )
    else:
        work(plan, ledger, launch, slots=slots, gpus=gpus, device=device, timeout_s=timeout_s, console=console)
    return folder


def _refuse_other(folder: Path, sweep: Sweep) -> None:
    """Raises RecordError for a folder of something else, or none that can be made, before anything is measured."""
    check_place(folder)
    if not folder.exists():
        return
    if (folder / "sweep.json").exists():
        found = Run.load(folder).spec.get("sweep", "no sweep but a single run")
        if found != sweep.name:
            raise RecordError(f"{folder} holds {found}, not {sweep.name}; give --out another folder")
    if any(folder.iterdir()):  # an empty one stays empty until the data are known to be good
        Run.open(folder, sweep.as_spec())


def raise_if_lost(plan: Plan, ledger: Ledger) -> None:
    """Raises RunError where stages failed or diverged, for the exit code: the report has said which and why."""
    found = counts(Watch(plan, ledger).states())
    if lost := found["failed"] + found["diverged"]:
        retry = "; --retry tries the failed ones again" if found["failed"] else ""
        raise RunError(f"{lost} of {len(plan.tasks)} stages failed or diverged{retry}")


def work_command(folder: Path, launch: Launch, console: Console) -> None:
    """Join the sweep in a folder. Raises RecordError where there is none."""
    plan, ledger = load_sweep(folder)
    slots, gpus, device = places(plan.sweep, launch)
    check_data([next(iter(plan.tasks.values()))])  # a wrong folder here must not fail every stage
    timeout_s = launch.timeout_s or ledger.limits["timeout_s"]
    work(plan, ledger, launch, slots=slots, gpus=gpus, device=device, timeout_s=timeout_s, console=console)
    raise_if_lost(plan, ledger)


def load_sweep(folder: Path) -> tuple[Plan, Ledger]:
    """A sweep's record. Raises RecordError for a folder that holds none, or one whose stages other code knows."""
    run = Run.load(folder)
    if not is_sweep(run.spec):
        raise RecordError(f"{folder} is the record of a single run, not of a sweep; `srppo report {folder}` reads it")
    if (epoch := run.spec.get("code_epoch")) != CODE_EPOCH:
        raise RecordError(
            f"{folder} was begun by code of epoch {epoch}, this is {CODE_EPOCH}: results would not match, and its "
            "stages have other ids; use the version of srppo that began it, which their env.json names"
        )
    ledger, sweep = Ledger(run, TRIES), Sweep.from_spec(run.spec)
    return Plan(replace(sweep, recipe=with_overrides(sweep.recipe, ledger.limits["settings"]))), ledger


def work(
    plan: Plan,
    ledger: Ledger,
    launch: Launch,
    *,
    slots: int,
    gpus: tuple[str, ...],
    device: str,
    timeout_s: float | None,
    console: Console,
) -> None:
    """Run what is left, here."""
    from srppo.ablations.execute import execute, make_ready  # torch comes with this
    from srppo.ablations.local import Worker, run_apart

    table = LiveTable(plan, Watch(plan, ledger), console, slots)
    worker = Worker(
        plan.tasks,
        ledger,
        _in_processes(partial(execute, device=device), launch.processes),
        before=make_ready,
        slots=slots,
        timeout_s=timeout_s,
        gpus=gpus,
        on_change=table,
        on_event=console.warn,
    )
    with table.shown():
        if any(state.status in ("waiting", "running") for state in table.watch.states().values()):
            run_apart(worker)
    console.say(table.summary())


def _in_processes(execute: Execute, processes: int) -> Execute:
    """How a stage is run, in one process or in several."""
    if processes == 1:
        return execute
    from srppo.ablations.execute import execute_together

    return partial(execute_together, execute=execute, processes=processes)


def forgive(plan: Plan, ledger: Ledger, console: Console) -> None:
    """Let what was given up be tried again. What diverged would diverge again."""
    for task in plan.tasks.values():
        if ledger.state(task).status == "failed":
            ledger.forgive(task)
            console.say(f"{task.name}: tried again")


def places(sweep: Sweep, launch: Launch) -> tuple[int, tuple[str, ...], str]:
    """(stages at once, the GPUs of each, device), without a CUDA context in this process."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", launch.device):
        raise ConfigError(f"device {launch.device!r} is unknown; give cpu, cuda, cuda:1, mps, or auto")
    embedded = all(is_embedded(sweep.recipe_of(cell, sweep.seeds[0]).model.base) for cell in sweep.cells())
    cores = usable_cores()
    on_cpu = launch.device == "cpu" or (launch.device == "auto" and embedded)
    gpus = () if on_cpu else visible_gpus()
    if ":" in launch.device:
        gpus = gpus[int(launch.device.partition(":")[2]) :][:1]
    if launch.device.startswith("cuda") and not gpus and launch.engine == "local":
        raise ConfigError(f"device {launch.device!r} cannot be used here: no GPU is visible; try --device cpu")
    each = launch.processes
    if gpus and len(gpus) < each and launch.engine == "local":
        raise ConfigError(f"{each} processes a stage want as many GPUs, and {len(gpus)} are visible; lower --processes")
    slots = launch.slots or (max(len(gpus) // each, 1) if gpus else max(cores // each, 1) if embedded else 1)
    # What torch and its kin read when they are imported; children inherit it.
    os.environ.setdefault("OMP_NUM_THREADS", str(1 if embedded else max(cores // (slots * each), 1)))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if launch.device.startswith("cuda") and not gpus:
        return slots, (), "cuda"  # of nodes elsewhere
    if gpus:
        groups = [",".join(gpus[i : i + each]) for i in range(0, len(gpus) - each + 1, each)] or [",".join(gpus)]
        return slots, tuple(groups[i % len(groups)] for i in range(slots)), "cuda"
    return slots, (), "mps" if launch.device == "mps" else "cpu"


def visible_gpus() -> tuple[str, ...]:
    """As CUDA_VISIBLE_DEVICES names them; counted through the driver's library, which leaves no context."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return tuple(named.split(",")[:count]) if named else tuple(map(str, range(count)))


def plan_lines(plan: Plan, found: Estimate, folder: Path, slots: int, processes: int = 1) -> list[str]:
    """What is about to happen, in a few lines. Each of a stage's processes is taken to do its share."""
    sweep, analysis = plan.sweep, plan.sweep.analysis
    values = {axis: [label(p.values[axis]) for p in sweep.points if axis in p.values] for axis in sweep.axes}
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(task.kind for task in plan.tasks.values()).items())
    alone = len(plan.measured_by)
    hours = sum(found.seconds.values()) / 3600
    return [
        f"sweep {sweep.name}: {sweep.question}",
        *(f"{axis}: {', '.join(dict.fromkeys(labels))}" for axis, labels in values.items()),
        f"arms: {', '.join(arm.name for arm in sweep.arms)}; seeds {sweep.seeds[0]} to {sweep.seeds[-1]}",
        *([f"bases: the seeds take turns with {', '.join(sweep.bases)}"] if sweep.bases else []),
        f"{len(sweep.points)} points x {len(sweep.arms)} arms x {len(sweep.seeds)} seeds = "
        f"{len(sweep.cells()) * len(sweep.seeds)} cells; {len(plan.tasks)} stages after sharing ({kinds}), "
        f"{alone} measured",
        f"estimated from a measured short step: {hours:.2f} core-hours, "
        f"{duration(hours * 3600 / (slots * processes))} with {slots} at once"
        + (f", each of {processes} processes" if processes > 1 else ""),
        f"fixed now: {analysis.group} items, {analysis.decoding}; {analysis.comparisons} paired differences, "
        f"{analysis.test} and t, {analysis.correction} at {analysis.alpha:g}, the same below {analysis.margin:g}; all "
        "else is exploratory",
        *found.lines,
        *(f"note: {note}" for note in sweep.notes),
        f"folder: {folder}",
    ]
