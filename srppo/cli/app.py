"""The command line: a command parses its words, imports what it needs, calls one function, and prints.

Each command is a function of one of the modules beside this one; here they are named, and what they raise is told.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer import Option

import srppo
from srppo.cli import bench, data, measure, plan, sweep, train
from srppo.errors import Diverged, Interrupted, OtherEnded, RunError, SrppoError

UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # of click, of which some versions of Typer carry a copy

app = typer.Typer(
    name="srppo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # tables of options leave no room for what they do in 80 columns
    context_settings={"help_option_names": ["-h", "--help"]},
)
benches = typer.Typer(help="Benchmarks, beside the rivals.", no_args_is_help=True, rich_markup_mode=None)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"srppo {srppo.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, Option("--version", callback=_say_version, is_eager=True, help="Say the version and exit.")
    ] = False,
) -> None:
    """Self-Rewarding PPO (arXiv 2510.21090): alignment from demonstrations only."""


def env() -> None:
    """Facts about this machine and installation, for a bug report."""
    import srppo.kernels.native  # noqa: F401  with it, the facts say how the kernels are built
    from srppo.environment import environment

    for key, value in environment().items():
        if isinstance(value, dict):
            typer.echo(f"{key}:")
            for name, each in value.items():
                typer.echo(f"  {name}: {each}")
        else:
            typer.echo(f"{key}: {value}")


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": train.demo,
    "sft": train.sft,
    "train": train.train,
    "plan": plan.plan,
    "export": train.export,
    "data": data.data,
    "instructions": data.instructions,
    "env": env,
    "eval": measure.evaluate,
    "compare": measure.compare,
    "score": measure.score,
    "forecast": measure.forecast,
    "explain": measure.explain,
    "report": measure.report,
    "ablate": sweep.ablate,
    "worker": sweep.worker,
}
for name, function in COMMANDS.items():
    app.command(name)(function)
app.add_typer(benches, name="bench")
benches.command("kernel")(bench.kernel)
benches.command("step")(bench.step)
benches.command("compile")(bench.compile_report)


def main() -> None:
    """Entry point: every expected error in one line, whoever finds it; a traceback only with --debug."""
    wanted = {"debug": False}
    # Spinning threads cost 10x where two processes share the cores; read by OpenMP when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        code = app(standalone_mode=False, prog_name="srppo", obj=wanted) or 0  # an exit comes back as its code
        if code == 130 and not train.PROCESS:  # Ctrl-C outside of the training loop, as Typer reports it
            typer.echo(train.INTERRUPTED, err=True)
    except SrppoError as error:
        if wanted["debug"]:
            raise
        if not train.PROCESS or (isinstance(error, RunError) and not isinstance(error, Diverged | Interrupted)):
            typer.echo(f"error: {f'process {train.PROCESS}: ' if train.PROCESS else ''}{error}", err=True)
        if train.PROCESS and not isinstance(error, OtherEnded):
            train.let_the_first_speak()
        code = error.exit_code
    except UsageError as error:
        say_usage(error)
        code = 2
    sys.exit(code)


def say_usage(error: Any) -> None:
    """What is wrong with the words of a command in one line, with the nearest option; without any words, the help."""
    text, context = " ".join(error.format_message().split()), error.ctx
    if context is not None and error.message == context.get_help():
        return typer.echo(error.message)
    if near := getattr(error, "possibilities", None):
        text = f"{error.message}; did you mean {near[0]}?"
    elif context is not None and not text.endswith("?"):
        text = f"{text.rstrip('.')}; see `{context.command_path} --help`"
    typer.echo(f"error: {text}", err=True)
