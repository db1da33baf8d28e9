"""`srppo ablate`: open the record, say what is coming, run it, and leave the report to the caller."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from srppo.ablations.ledger import Ledger
from srppo.ablations.plan import Plan
from srppo.ablations.spec import Sweep
from srppo.console import Console
from srppo.store import Run

TRIES = 3


def prepare_process(threads: int) -> None:
    """Set what torch and its kin read when they are imported; call it before. Children inherit it."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a CUDA context would not survive a fork


def run_local(
    sweep: Sweep,
    folder: Path,
    *,
    slots: int,
    device: str,
    timeout_s: float | None,
    console: Console,
    tries: int = TRIES,
    on_change: Callable[[], None] = lambda: None,
) -> Run:
    """Run a sweep here until nothing is left to do. The same call goes on where an earlier one stopped."""
    from srppo.ablations.execute import execute
    from srppo.ablations.local import Worker

    run = Run.open(folder, sweep.as_spec())
    ledger = Ledger(run, tries)
    Worker(
        Plan(sweep).tasks,
        ledger,
        partial(execute, device=device),
        slots=slots,
        timeout_s=timeout_s,
        on_change=on_change,
        on_event=console.warn,
    ).run()
    return run
