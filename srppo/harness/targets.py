"""What MODEL names: a folder, a hub name, `embedded:s`, or a run, of which every arm and seed is evaluated."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from srppo.arms import stages_by_arm
from srppo.config import ModelConfig, build_recipe, is_embedded
from srppo.errors import RecordError
from srppo.store import Run

RUNS = Path("runs")
FALLBACK = "embedded:s"


@dataclass(frozen=True)
class Target:
    """One set of weights. label: how tables name it. seed: its training seed. ours: it takes our chat template."""

    label: str
    spec: str
    seed: int | None
    parent: Path
    config: ModelConfig
    ours: bool

    @property
    def title(self) -> str:
        """Label and seed."""
        return self.label if self.seed is None else f"{self.label}, seed {self.seed}"


def newest_run(runs: Path = RUNS) -> Path | None:
    """The run whose record was last written to; None where there is none."""
    found = [path.parent for path in runs.glob("*/sweep.json")] if runs.is_dir() else []
    return max(found, key=_last_written, default=None)


def _last_written(run: Path) -> float:
    return max(path.stat().st_mtime for path in (run / "sweep.json", *run.glob("stages/*/result.json")))


def find_targets(model: str | None, out: Path | None) -> list[Target]:
    """The models to evaluate and where each one's results go. Raises RecordError for a run without a model."""
    spec = model or str(newest_run() or FALLBACK)
    if (Path(spec) / "sweep.json").is_file():
        return _of_run(Path(spec), out)
    ours = is_embedded(spec)
    name = re.sub(r"[^\w.-]+", "-", spec.strip("/")).strip("-.")
    return [Target(spec, spec, None, out or RUNS / "eval" / name, ModelConfig(), ours)]


def _of_run(folder: Path, out: Path | None) -> list[Target]:
    run = Run.load(folder)
    recipe = build_recipe({**run.spec["recipe"], "seed": run.spec["seeds"][0]})
    found: dict[Path, Target] = {}
    for arm, stages in stages_by_arm(run).items():
        for stage in stages:
            own = stage.path / "model"
            spec = str(own) if own.is_dir() else recipe.model.base if arm == "base" else None
            if not stage.done or spec is None or stage.path in found:
                continue
            seed = int(stage.identity["config"]["seed"])
            slug = re.sub(r"\W+", "-", arm)
            parent = out / f"{slug}-seed-{seed}" if out else stage.path / "eval"
            found[stage.path] = Target(arm, spec, seed, parent, recipe.model, ours=True)
    if not found:
        raise RecordError(f"{folder} has no finished arm with a model yet; finish the run: srppo train --out {folder}")
    return list(found.values())
