"""Where a page goes that no option names a folder for: below runs/, by what it is of, so that none takes another's."""

from __future__ import annotations

import re
from pathlib import Path

RUNS = Path("runs")


def page_folder(kind: str, run: Path | None, sft: str, seed: int | None) -> Path:
    """runs/KIND/NAME. NAME: the run's (also where its SFT model lies in it), with the training seed that was asked for;
    of two models given by name the SFT model's."""
    place = Path(sft)
    if run is None and place.parent.parent.name == "stages":
        run = place.parents[2]
    name = run.resolve().name if run is not None else re.sub(r"[^\w.-]+", "-", sft.strip("/")).strip("-.")
    return RUNS / kind / (name if seed is None else f"{name}-seed-{seed}")
