"""The SLURM engine: an array of workers that share the record. SLURM keeps them alive; the record keeps them apart."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from srppo.ablations.estimate import Estimate
from srppo.ablations.ledger import Ledger
from srppo.ablations.plan import Plan, Task
from srppo.ablations.progress import Watch, counts
from srppo.config import is_embedded
from srppo.console import Console
from srppo.errors import ConfigError, RunError
from srppo.record.files import storing, write_atomic

# The time limit: twice the estimate, in steps of ten minutes; a day is what most sites grant.
SLACK, STEP_MIN, MOST_MIN = 2, 10, 24 * 60

SCRIPT = """#!/bin/bash
# Workers of the srppo sweep in this folder; any number may run, at any time. Submit again when the time was too short:
# finished stages are kept, and others go on from their last checkpoint.
#SBATCH --job-name={job}
#SBATCH --array=1-{workers}
#SBATCH --ntasks=1
#SBATCH --cpus-per-task={cores}
#SBATCH --time={limit}
#SBATCH --output={log}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
{gpu}#SBATCH --gres=gpu:{processes}
# Your site may want more; take one # away:
##SBATCH --partition=NAME
##SBATCH --account=NAME
##SBATCH --mem=8G
cd -- {cwd} || exit 1
export OMP_WAIT_POLICY=passive
exec {command}
"""


def write_sbatch(
    plan: Plan,
    ledger: Ledger,
    found: Estimate,
    *,
    slots: int,
    device: str,
    processes: int = 1,
    timeout_s: float | None,
    console: Console,
) -> None:
    """Write RUN/sbatch.sh, an array of at most `slots` workers of one stage each, and submit it where sbatch is.

    device: as given to the command; what "auto" means is decided on the node. timeout_s: of one stage. Raises
    ConfigError for a folder that no script can name, StorageError, and RunError when sbatch refuses.
    """
    states = Watch(plan, ledger).states()
    left = [task for key, task in plan.tasks.items() if states[key].status in ("waiting", "running")]
    report = f"srppo report {shlex.quote(str(ledger.run.path))}"
    if not left:
        status = ", ".join(f"{count} {name}" for name, count in counts(states).items())
        console.say(f"nothing is left to run ({status}); {report}")
        return
    folder = ledger.run.path.absolute()
    script = folder / "sbatch.sh"
    workers = min(slots, len(left))
    text = sbatch_script(
        folder, left, found.seconds, workers=workers, device=device, processes=processes, timeout_s=timeout_s
    )
    with storing(script):
        (folder / "slurm").mkdir(exist_ok=True)
        write_atomic(script, text)
    console.say(
        f"wrote {script}: {workers} workers, at most {_limit(left, found.seconds, workers)} each; logs in slurm/"
    )
    if shutil.which("sbatch"):
        done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
        if done.returncode:
            why = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise RunError(f"sbatch refused {script}: {why}; change the script's #SBATCH lines and submit it by hand")
        job = done.stdout.strip().partition(";")[0]
        console.say(f"submitted as job {job}; watch it with `squeue -j {job}`, read it with `{report}`")
    else:
        where = "there is no sbatch here: on the cluster, with this folder on a disk that its nodes share,"
        console.say(f"{where} run `sbatch {shlex.quote(str(script))}`; read it with `{report}`")


def sbatch_script(
    folder: Path,
    left: list[Task],
    seconds: Mapping[str, float],
    *,
    workers: int,
    device: str,
    processes: int = 1,
    timeout_s: float | None,
) -> str:
    """The script for a sweep's absolute folder. seconds: what each task takes, by key."""
    cwd = os.getcwd()
    if any(ord(letter) < 32 for letter in f"{folder}{cwd}"):
        raise ConfigError(f"a line break or tab in {str(folder)!r} or {cwd!r} fits into no script; rename the folder")
    embedded = all(is_embedded(task.recipe.model.base) for task in left)
    gpu = device.startswith("cuda") or (device == "auto" and not embedded)
    command = [sys.executable, "-m", "srppo", "worker", str(folder), "--plain", "--slots", "1", "--device", device]
    command += ["--timeout", f"{timeout_s:.0f}"] if timeout_s else []
    command += ["--processes", str(processes)] if processes > 1 else []
    # Read alike by the shell and by sbatch, whose own quotes differ from the shell's; % is sbatch's.
    logs = re.sub(r"([^\w@%+=:,./-])", r"\\\1", str(folder / "slurm").replace("%", "%%"))
    return SCRIPT.format(
        job=re.sub(r"[^A-Za-z0-9._-]", "_", f"srppo-{folder.name}"),
        workers=workers,
        cores=processes * (1 if embedded else 4),
        processes=processes,
        limit=_limit(left, seconds, workers),
        log=f"{logs}/%A-%a.txt",
        gpu="" if gpu else "#",
        cwd=shlex.quote(cwd),
        command=shlex.join(command),
    )


def _limit(left: list[Task], seconds: Mapping[str, float], workers: int) -> str:
    """HH:MM:SS: twice the time of a fair share, or of the longest chain of stages, whichever is longer."""
    ends: dict[str, float] = {}
    for task in left:  # a plan's order: needs come first
        ends[task.key] = seconds[task.key] + max((ends.get(need, 0.0) for need in task.needs), default=0.0)
    share = sum(seconds[task.key] for task in left) / workers
    minutes = SLACK * max(share, max(ends.values())) / 60
    rounded = min(math.ceil(minutes / STEP_MIN) * STEP_MIN, MOST_MIN)
    return f"{rounded // 60:02d}:{rounded % 60:02d}:00"
