"""`srppo` commands as processes of their own, forked by one server after its imports.

Importing torch and transformers takes seconds; a forked child has its own exit code, stdout and stderr all the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(sys.executable).with_name("srppo")
PATIENCE_S = 120  # for a command on a busy machine
ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
}
SERVER = """
import json, os, signal, sys
import srppo.stages.run, srppo.report.run, srppo.environment, srppo.training.trackers, srppo.cli.app
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        os.close(0)
        os.chdir(job["cwd"])
        signal.alarm(job["patience"])
        sys.argv = ["srppo", *job["argv"]]
        code = 1
        try:
            exec(job["argv"][1], {}) if job["argv"][:1] == ["-c"] else srppo.cli.app.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    def error(self, code: int = 2) -> str:
        """Its one error line: the last of stderr, the only one, and no traceback."""
        lines = self.err.strip().splitlines()
        assert self.code == code, (self.code, self.err)
        assert "Traceback" not in self.err and "Retrying" not in self.err
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:], self.err
        assert code == 1 or self.out == ""  # a diverged run still gets its table
        return lines[-1]


class Cli:
    """Runs `srppo` commands in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.count = 0

    def __call__(self, *argv: object) -> Done:
        """`srppo ARGV`, or with `-c` and a program this instead."""
        self.count += 1
        out, err = self.folder / f"{self.count}.out", self.folder / f"{self.count}.err"
        job = {"argv": list(map(str, argv)), "out": str(out), "err": str(err), "cwd": str(self.folder)}
        assert self.server.stdin and self.server.stdout
        self.server.stdin.write(json.dumps({**job, "patience": PATIENCE_S}) + "\n")
        self.server.stdin.flush()
        code = int(self.server.stdout.readline())
        return Done(code, out.read_text(), err.read_text())

    def close(self) -> None:
        """End the server."""
        self.server.kill()  # what it holds is only memory: to take it down in order lasts seconds
        self.server.wait(PATIENCE_S)
