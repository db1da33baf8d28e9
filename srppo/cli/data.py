"""The command that shows what training will see of the data, before it starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from srppo.cli.options import Debug, Keys, Sets


def data(
    source: Annotated[
        str | None, Argument(help="A recipe, or a file, folder or hub set of rows. Without: the embedded recipe.")
    ] = None,
    model: Annotated[str | None, Option(metavar="MODEL", help="Whose tokenizer to use. (default: the base's)")] = None,
    sets: Sets = None,
    keys: Keys = False,
    rows: Annotated[int, Option(min=0, help="Demonstrations shown with each token.")] = 3,
    debug: Debug = False,
) -> None:
    """What training will see of the data. Rows used and left out, lengths, cuts, repeats, overlap, trained tokens."""
    from rich.text import Text

    from srppo.config import load_recipe
    from srppo.console import Console
    from srppo.data.report import ROW_KEY, length_lines, row_lines
    from srppo.data.types import EncodedDemonstration
    from srppo.errors import DataError

    console = Console()
    recipe_file = source is None or source.endswith(".toml")
    given = ["sft.lr=1e-5"]  # a model of one's own needs it; nothing here reads it
    if not recipe_file:
        given += [f"data.demonstrations={source!r}", f"data.prompts={source!r}", "data.held_out=0"]
    if model:
        given += [f"model.base={model!r}", "model.sft=none"]
    recipe = load_recipe(Path(source) if source and recipe_file else None, [*given, *(sets or [])], ppo=False)
    from srppo.models.loading import prepare_alone  # torch comes with this

    try:
        found, tokenizer = prepare_alone(recipe)
    except DataError as error:
        try:
            found, tokenizer = prepare_alone(recipe, only_prompts=not recipe_file)
        except DataError:
            raise error from None

    encoding = sys.stdout.encoding or "utf-8"

    def show(line: str, style: str = "") -> None:
        console.print(Text(line.encode(encoding, "replace").decode(encoding), style))

    for line in (*found.report.lines(), "", *length_lines(found.demonstrations, found.prompts)):
        show(line, "yellow" if line.startswith("warning:") else "")
    shown = list(zip(found.demonstrations, found.sources, strict=True)) or [
        (EncodedDemonstration(ids, len(ids)), place)
        for ids, place in zip(found.prompts, found.prompt_sources, strict=True)
    ]
    for row, place in shown[:rows]:
        show("")
        for line, trained in row_lines(row, place, tokenizer, console.width):
            show(line, "bold green" if trained else "")
    if rows:
        show(f"\n{ROW_KEY}", "dim")


def instructions(
    source: Annotated[
        list[str], Argument(help="Files, folders or hub sets with Alpaca's columns: instruction, input, output.")
    ],
    out: Annotated[Path, Option(metavar="DIR", help="Folder for the rows and their manifest.")] = Path("instructions"),
    demonstrations: Annotated[int, Option(min=1, help="Demonstrations to make.")] = 1024,
    prompts: Annotated[
        int | None, Option(min=1, help="Prompts for PPO. (default: of all questions that are left)")
    ] = None,
    seed: Annotated[int, Option(help="Of which question serves for what, and how it is worded.")] = 0,
    beside: Annotated[
        Path | None, Option(metavar="FILE", help="IFEval's prompts (JSONL), to measure how far ours repeat them.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Rows of instructions that a program can check. Demonstrations, prompts and test items, of answers you have."""
    from srppo.console import Console
    from srppo.data.instructed import account, build, chance, check_folder, overlap_with, prompts_of, write

    console = Console()
    check_folder(out)
    asked = None if beside is None else prompts_of(beside)
    built = build(source, demonstrations=demonstrations, prompts=prompts, seed=seed)
    overlap = None if asked is None else overlap_with(built, asked)
    rates = chance(built)
    write(built, out, source, seed, rates, overlap)
    for line in account(built, rates, overlap):
        console.say(line)
    console.say(f"folder: {out}")
