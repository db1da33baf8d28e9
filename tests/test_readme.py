"""README.md and docs/: what they tell a reader to run runs, and what they name exists."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import typer.main
from records import new_run, train
from test_layers import LAYERS

from srppo.ablations.sweeps import SWEEPS
from srppo.cli.app import app
from srppo.config import Recipe, all_keys

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
LINKED = {**PAGES, **{name: (ROOT / name).read_text() for name in ("CONTRIBUTING.md", "LOG.md")}}
PATIENCE_S = 3600  # for a command on a busy machine: the demo took 16 minutes where 14 processes shared two cores
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FROM, END = re.compile(r"^<!-- from: (.*) -->$", re.MULTILINE), "<!-- end -->"
CLI: Any = typer.main.get_command(app)


def folder_of(page: str) -> Path:
    return ROOT if page in ("README.md", "CONTRIBUTING.md", "LOG.md") else ROOT / "docs"


def lines_of(code: str) -> list[str]:
    """The lines of a shell block, continued ones joined."""
    return [line for line in code.replace("\\\n", " ").splitlines() if line.strip()]


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return FENCED.sub("", text)


def spans(text: str) -> list[str]:
    """What stands in single backticks, a span over two lines joined."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]


def commands_of(text: str) -> list[str]:
    """Every `srppo ...` of a page, from its blocks, its spans and its marked figures."""
    shell = [line for language, code in FENCED.findall(text) if language in ("sh", "text") for line in lines_of(code)]
    return [each for each in (*shell, *spans(text), *FROM.findall(text)) if each.startswith("srppo ")]


# ---- what runs


def run(arguments: list[str], folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stderr[-2000:]}"
    return done.stdout


def check(command: str, output: str, folder: Path) -> None:
    """What a command of a page must have said and left."""
    words = shlex.split(command)
    if words[1] in ("train", "sft"):
        out = folder / words[words.index("--out") + 1]
        assert (out / "report" / "index.html").exists() and "report:" in output
        assert list(out.glob("stages/*/model/model.safetensors")) and "0." in output
    if words[1] == "compare":
        assert "SRPPO minus SFT" in output
    if words[1:3] == ["bench", "kernel"]:
        assert (folder / "runs" / "bench-kernel" / "kernel.jsonl").exists() and "GEMMs" in output


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if re.search("^```(sh|python)$", text, re.M)])
def test_what_a_page_tells_to_run_runs(page: str, tmp_path: Path) -> None:
    """Its `sh` and `python` blocks, in order and in one folder; blocks of other kinds are not run."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for language, code in FENCED.findall(PAGES[page]):
        if language == "python":
            output = run([sys.executable, "-c", code], tmp_path)
            assert "print" not in code or output.strip()
        for line in lines_of(code) if language == "sh" else ():
            words = shlex.split(line, comments=True)
            if words[0] == "srppo":
                check(shlex.join(words), run(words, tmp_path), tmp_path)


def test_the_two_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in PAGES["README.md"] and re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_demo_ends_with_the_table(tmp_path: Path) -> None:
    """The demo itself, as `make demo` runs it."""
    output = run(["srppo", "demo", "--plain", "--out", "demo"], tmp_path)
    text = " ".join(output.split())
    for arm in ("base", "SFT", "longer SFT", "SRPPO"):
        assert arm in output
    assert "in-domain" in text and "out-of-domain" in text and "n = 192 demonstrated, 192 prompted, 480 unseen" in text
    assert "greedy" in text and "sampled" in text and "95% intervals" in text
    assert "one training seed" in text
    assert max(len(line) for line in output.splitlines() if "/" not in line) <= 80


# ---- what exists


def subcommands(command: Any) -> dict[str, Any]:
    return getattr(command, "commands", {})


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_option_exists(page: str) -> None:
    for line in commands_of(PAGES[page]):
        words, command = shlex.split(line, comments=True)[1:], CLI
        while words and subcommands(command) and not words[0].startswith("-"):
            assert words[0] in subcommands(command), f"{page}: there is no command `{line}`"
            command, words = subcommands(command)[words[0]], words[1:]
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        for word in words:
            assert not word.startswith("--") or word in known | {"--help"}, f"{page}: no option {word} in `{line}`"
        if command.name == "ablate" and words:
            assert words[0] in (*SWEEPS, "NAME"), f"{page}: there is no sweep `{line}`"


def test_every_sweep_is_named_where_people_look() -> None:
    """The help spells their names out, since what knows them takes a second to import."""
    (name,) = (parameter for parameter in subcommands(CLI)["ablate"].params if parameter.name == "name")
    for sweep in SWEEPS:
        assert re.search(rf"\b{sweep}\b", name.help), f"the help of `srppo ablate` does not name {sweep}"
        assert f"srppo ablate {sweep} " in PAGES["sweeps.md"]


@pytest.mark.parametrize("page", PAGES)
def test_every_key_of_a_recipe_exists(page: str) -> None:
    sections = "|".join(name for name in Recipe.model_fields if name != "seed")
    named = {each for span in spans(PAGES[page]) for each in re.findall(rf"^(?:{sections})\.[a-z_]+", span)}
    named |= set(re.findall(rf"--(?:set|axis) ((?:{sections})\.[a-z_]+)", PAGES[page]))
    unknown = named - set(all_keys())
    assert not unknown, f"{page} names keys that no recipe has: {', '.join(sorted(unknown))}"


def slug(heading: str) -> str:
    """The anchor that a heading is given on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", LINKED)
def test_every_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(LINKED[page])):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (folder_of(page) / name).resolve() if name else folder_of(page) / page
        assert path.exists(), f"{page}: {target} is not there"
        assert path.is_relative_to(ROOT), f"{page}: {target} is outside of the repository"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", prose(path.read_text()), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page}: {target} has no such heading"


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page: str) -> None:
    inside = r"(?:srppo|tests|tools|results|recipes|docs)/[\w./-]*\w/?"
    for span in spans(PAGES[page]):
        for path in re.findall(rf"(?<![\w/.~]){inside}", span):
            assert (ROOT / path).exists(), f"{page}: {path} is not there"


def rows_below(heading: str) -> list[list[str]]:
    """The cells of the table in a section of architecture.md."""
    section = PAGES["architecture.md"].partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")][2:]


def test_the_rooms_are_those_of_the_layers() -> None:
    """In their order, which is that of imports."""
    assert [room.strip("`/").replace("the root", "root") for room, _ in rows_below("The rooms")] == LAYERS


def test_the_file_to_open_holds_what_is_named() -> None:
    rows = rows_below("Which file to open")
    assert len(rows) >= 7
    for what, opened, there in rows:
        spelled = [each for each in re.findall("`([^`]+)`", there) if re.fullmatch(r"\w+", each)]
        assert spelled, what
        text = (ROOT / opened.strip("`")).read_text()
        for name in spelled:
            assert re.search(rf"^(def|class) {name}\b|^{name}\b.* = ", text, re.MULTILINE), f"{opened} has no {name}"


def test_code_cites_pages_that_exist() -> None:
    for path in (*ROOT.glob("srppo/**/*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("recipes/*.toml")):
        for page in re.findall(r"\bdocs/\w+\.md", path.read_text()):
            assert (ROOT / page).exists(), f"{path.relative_to(ROOT)} cites {page}, which is not there"


# ---- figures


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_figures_names_its_command(page: str) -> None:
    text = PAGES[page]
    blocks = [part.partition(END) for part in FROM.split(text)[2::2]]
    assert all(end for _, end, _ in blocks), f"{page}: a block of figures does not end"
    for command, (block, _, _) in zip(FROM.findall(text), blocks, strict=True):
        assert f"\nCommand: `{command}`.\n" in block, f"{page}: the block of {command} does not say so"
    outside = "".join([FROM.split(text)[0], *(after for _, _, after in blocks)])
    assert "![" not in outside, f"{page}: a picture stands in no block, so nothing says what made it"


def tables_of(block: str) -> list[tuple[list[str], list[list[str]]]]:
    """(header, rows) of each table in a block."""
    found: list[tuple[list[str], list[list[str]]]] = []
    for part in block.split("\n\n"):
        lines = [re.split(r" *\| *", line)[1:-1] for line in part.splitlines() if line.startswith("|")]
        if lines:
            found.append((lines[0], lines[2:]))
    return found


@pytest.mark.parametrize(("page", "cells"), [("README.md", 8 * 3), ("sweeps.md", 12 * 4 * 2)])
def test_the_demos_tables_are_those_of_its_rows(page: str, cells: int) -> None:
    """The means; intervals come from every answer, which the repository does not hold."""
    found: dict[tuple[str, ...], dict[int, float]] = defaultdict(dict)
    rows = [json.loads(line) for line in (ROOT / "results" / "demo-10-seeds.jsonl").read_text().splitlines()]
    names = {"last": ("last step",), "kept": ("best on dev", "last step")}  # one row where the last step was kept
    for row in sorted(rows, key=lambda row: row["which"]):  # kept, then last, where that is another step
        for which in names[row["which"]]:
            for name in (row["arm"], f"{row['arm']}, {which}"):
                found[name, row["group"], row["decoding"]][row["seed"]] = row["accuracy"]
    block, checked = PAGES[page].partition("<!-- from: srppo demo --seeds 10 -->")[2].partition(END)[0], 0
    for (corner, *heads), lines in tables_of(block):
        for name, *means in lines:
            for head, cell in zip(heads, means, strict=True):
                group, decoding = re.search(r"\((\w+)\)(?:, (\w+))?", head).groups()  # type: ignore[union-attr]
                if " minus " not in name:
                    seeds = found[name, group, decoding or corner.strip()]
                    assert len(seeds) == 10 and cell.split()[0] == f"{mean(seeds.values()):.2f}", (name, head)
                    checked += 1
    assert checked == cells


@pytest.mark.parametrize("tool", sorted(path.stem for path in (ROOT / "tools").glob("*.py")))
def test_the_tools_that_write_figures_can_be_loaded(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They live on names of other rooms, and run only when there are new figures."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    importlib.import_module(tool)


def test_a_tool_replaces_its_own_block_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    blocks = importlib.import_module("blocks")
    monkeypatch.setattr(blocks, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    empty = "before\n<!-- from: srppo a -->\n<!-- end -->\n<!-- from: srppo a --b -->\nold\n<!-- end -->\nafter\n"
    page.write_text(empty)
    for figures in ("new \\1", "newer"):
        blocks.write_block("page.md", "srppo a", figures)
        block = f"<!-- from: srppo a -->\n{figures}\n\nCommand: `srppo a`.\n<!-- end -->"
        assert page.read_text() == empty.replace("<!-- from: srppo a -->\n<!-- end -->", block)
    with pytest.raises(AssertionError, match="0 blocks"):
        blocks.write_block("page.md", "srppo c", "lost")


@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
def test_a_run_fills_the_blocks_of_its_command(
    seeds: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one seed the terminal; of several the tables and the run's own plots."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    blocks, pictures = map(importlib.import_module, ("blocks", "pictures"))
    for module in (blocks, pictures):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    run, docs = new_run(tmp_path / "run", seeds), tmp_path / "docs"
    for seed in seeds:
        train(run, seed)
    for folder in (docs, run.path / "report"):
        folder.mkdir()
    for name in ("accuracy.png", "curves.png"):
        (run.path / "report" / name).write_text(name)
    for page in (tmp_path / "README.md", docs / "sweeps.md"):
        page.write_text("<!-- from: srppo demo -->\n<!-- end -->\n")
    pictures.main(run.path, "srppo demo")
    readme, sweeps = ((tmp_path / name).read_text() for name in ("README.md", "docs/sweeps.md"))
    if len(seeds) == 1:
        assert "(terminal.svg)" in sweeps and "|" not in readme + sweeps
        assert "SRPPO" in (docs / "terminal.svg").read_text()
    else:
        assert all(f"| {each} |" in sweeps for each in ("greedy", "sampled", "*SRPPO minus SFT*"))
        assert "(unseen), sampled |" in readme and "| *SRPPO minus SFT* |" in readme and "last step" not in readme
        assert "3 training seeds" in readme and {path.name for path in docs.glob("*.png")} == {
            "accuracy.png",
            "curves.png",
        }


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 150
