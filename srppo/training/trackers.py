"""TensorBoard and Weights & Biases, through accelerate's trackers. The truth stays in metrics.jsonl."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from srppo.errors import ConfigError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


class StageTracker:
    """One tracker of one stage. It starts at the first `log`, so a stage that fails before leaves no empty run.

    A resumed stage goes on in the same place: TensorBoard drops what it had from that step on, W&B keeps what it has.
    """

    def __init__(self, name: str, run_name: str, folder: Path, config: Mapping[str, Any]) -> None:
        self.name, self._run_name, self._folder, self._config = name, run_name, folder, dict(config)
        self._tracker: Any = None

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Numbers of one step."""
        if self._tracker is None:
            self._tracker = self._start(step or 0)
        self._tracker.log(values, step=step)

    def finish(self) -> None:
        """Flush and close; more than once is fine."""
        if self._tracker is not None:
            self._tracker.finish()
            self._tracker = None

    def _start(self, step: int) -> Any:
        from accelerate import PartialState
        from accelerate.tracking import TensorBoardTracker, WandBTracker

        PartialState()  # accelerate's loggers refuse to work without it
        if self.name == "tensorboard":
            tracker = TensorBoardTracker(self._run_name, self._folder / "tensorboard", purge_step=step)
            tracker.start()
            # As text: accelerate's own way (add_hparams) makes a further run for each start.
            recipe = json.dumps(self._config, indent=2, default=str)
            tracker.log({"recipe": f"```\n{recipe}\n```"}, step=step)
            return tracker
        place = hashlib.sha256(f"{self._folder.resolve()}/{self._run_name}".encode()).hexdigest()[:16]
        name = re.sub(r"\W+", "-", self._run_name)
        tracker = WandBTracker("srppo", name=name, id=place, resume="allow", dir=str(self._folder), config=self._config)
        tracker.start()
        return tracker


def trackers(names: Sequence[str], run_name: str, folder: Path, config: Mapping[str, Any]) -> tuple[StageTracker, ...]:
    """One tracker a name (`tensorboard`, `wandb`) for the stage `run_name` of the run in `folder`.

    TensorBoard writes to folder/tensorboard/run_name. Raises ConfigError for an unknown name or a missing package.
    """
    for name in names:
        if name not in PACKAGES:
            raise ConfigError(f"unknown tracker {name!r}; choose from {', '.join(sorted(PACKAGES))}")
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ConfigError(f"tracker {name!r} needs a package that is not installed: pip install 'srppo[{name}]'")
    return tuple(StageTracker(name, run_name, Path(folder), config) for name in dict.fromkeys(names))
