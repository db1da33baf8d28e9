"""What MODEL names: a folder, a hub name, `embedded:xs`, or a run, of which every arm and seed is evaluated."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from srppo.config import ModelConfig, build_recipe, is_embedded
from srppo.errors import RecordError
from srppo.record.arms import ArmsOf, is_sweep, one_run, problem_of, stages_by_kind
from srppo.record.store import Run

RUNS = Path("runs")
FALLBACK = "embedded:xs"


@dataclass(frozen=True)
class Target:
    """One set of weights. label: how tables name it. seed: its training seed. ours: it takes our chat template.
    system: the system message it was trained with.
    """

    label: str
    spec: str
    seed: int | None
    parent: Path
    config: ModelConfig
    ours: bool
    system: str | None = None

    @property
    def title(self) -> str:
        """Label and seed."""
        return self.label if self.seed is None else f"{self.label}, seed {self.seed}"


def newest_run(runs: Path = RUNS) -> Path | None:
    """The run whose record was last written to, sweeps aside; None where there is none."""
    found = [path.parent for path in runs.glob("*/sweep.json")] if runs.is_dir() else []

    def last_written(run: Path) -> float:
        return max(path.stat().st_mtime for path in (run / "sweep.json", *run.glob("stages/*/result.json")))

    return max((run for run in found if not is_sweep(Run.load(run).spec)), key=last_written, default=None)


def find_targets(
    model: str | None, out: Path | None, say: Callable[[str], object] = str, arms: ArmsOf = stages_by_kind
) -> list[Target]:
    """The models to evaluate and where each one's results go; `say` is told which of a run's arms are left out, and
    why. arms: what the arms of a run are. Raises RecordError for a run without a model, and for a sweep.
    """
    spec = model or str(newest_run() or FALLBACK)
    if (Path(spec) / "sweep.json").is_file():
        return _of_run(Path(spec), out, say, arms)
    ours = is_embedded(spec)
    name = re.sub(r"[^\w.-]+", "-", spec.strip("/")).strip("-.")
    return [Target(spec, spec, None, out or RUNS / "eval" / name, ModelConfig(), ours)]


def _of_run(folder: Path, out: Path | None, say: Callable[[str], object], arms: ArmsOf) -> list[Target]:
    run = one_run(folder)
    recipe = build_recipe({**run.spec["recipe"], "seed": run.spec["seeds"][0]})
    given = {"base": recipe.model.base, "given-sft": recipe.model.sft}
    found: dict[Path, Target] = {}
    left_out = []
    for arm, stages in arms(run).items():
        for stage in stages:
            own = str(stage.path / "model") if (stage.path / "model").is_dir() else None
            spec = own or given.get(stage.identity["kind"])  # None for an arm that is made at decoding
            if problem := problem_of(stage, stage.result()):
                left_out.append(f"{arm}: {problem}")
            elif spec is None:
                left_out.append(f"{arm}: it has no model of its own, only answers of the run's own tests")
            if problem or spec is None or stage.path in found:
                continue
            seed = int(stage.identity["config"]["seed"])
            slug = re.sub(r"\W+", "-", arm)
            parent = out / f"{slug}-seed-{seed}" if out else stage.path / "eval"
            found[stage.path] = Target(arm, spec, seed, parent, recipe.model, ours=True, system=recipe.data.system)
    for line in dict.fromkeys(left_out):
        say(f"not evaluated, {line}")
    if not found:
        raise RecordError(f"{folder} has no finished arm with a model yet; finish the run: srppo train --out {folder}")
    return list(found.values())
