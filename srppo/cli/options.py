"""Options and arguments that several commands have, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option


def _note_debug(context: typer.Context, wanted: bool) -> bool:
    """Tell `main`, whichever command was asked, that a traceback is wanted."""
    context.ensure_object(dict)["debug"] = wanted
    return wanted


def _say_keys(wanted: bool) -> None:
    """Print the keys of a recipe, and exit."""
    if wanted:
        from srppo.config import key_lines

        typer.echo("Keys of a recipe with their defaults, for a file or --set. none: leave it out.\n")
        typer.echo("\n".join(key_lines()))
        raise typer.Exit


Debug = Annotated[bool, Option("--debug", help="Show tracebacks.", callback=_note_debug)]
Device = Annotated[str, Option(help="cpu, cuda, cuda:1, mps, or auto.")]
Plain = Annotated[bool, Option("--plain", help="Plain lines instead of what is redrawn in place.")]

# ---- what trains

Recipe = Annotated[Path | None, Argument(help="TOML recipe; without one the embedded world is used.")]
Sets = Annotated[
    list[str] | None, Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. --set ppo.lr=1e-5 (repeatable).")
]
Keys = Annotated[
    bool,
    Option("--keys", help="List every key, its default and what it does, and exit.", callback=_say_keys, is_eager=True),
]
RunFolder = Annotated[
    Path | None, Option("--out", metavar="DIR", help="Folder of the record. (default: runs/<name>-<id>)")
]

# ---- what measures

Run = Annotated[Path | None, Argument(help="A run folder; without one the newest under runs/.")]
Out = Annotated[Path | None, Option("--out", metavar="DIR", help="Folder for what is written.")]
SftModel = Annotated[str | None, Option("--sft", metavar="MODEL", help="An SFT model, with --base.")]
BaseModel = Annotated[str | None, Option("--base", metavar="MODEL", help="Its base, with --sft.")]
TrainingSeed = Annotated[int | None, Option("--seed", help="Training seed of the run. (default: the first)")]
Limit = Annotated[int | None, Option(min=1, help="At most so many items a task or prompts.")]
