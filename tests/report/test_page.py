"""Pages are whole on their own, escape everything, and two runs' pages do not meet."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from pages import offline_page
from records import ARMS, HOSTILE, ODD

import srppo
from srppo.report.answers import ArmFigures
from srppo.report.history import SeedRows
from srppo.report.page import bullets, details, facts, page_folder, plot, section, text, write_page
from srppo.report.plots import accuracy_plot, training_curves
from srppo.report.run import accuracy_table, cost_table, differences_table, samples_html
from srppo.report.table import to_html


def test_page_is_self_contained_and_escapes_everything(tmp_path: Path) -> None:
    rows = [{"step": step, "tflops": step, "reward": 1.0, "kl_sft": 0.1, "dev/unseen": 0.5} for step in (1, 2)]
    curves = training_curves({HOSTILE: SeedRows({0: rows}), "SRPPO": SeedRows({0: rows})}, tmp_path / "curves")
    dots = accuracy_plot([*ARMS, *ODD], tmp_path / "dots")
    hostile_arms = [*ODD, ArmFigures(HOSTILE, problem=HOSTILE)]
    item = {"group": HOSTILE, "task": HOSTILE, "prompt": HOSTILE, "answer": HOSTILE, "correct": [False]}
    answers = {
        arm: {**item, "responses": [said]} for arm, said in ((HOSTILE, HOSTILE), ("SFT", ""), ("\ud800", "\ud800"))
    }
    arms = [*ARMS, *hostile_arms]
    parts = [
        text(HOSTILE),
        bullets(HOSTILE, [HOSTILE], "bad"),
        section(HOSTILE, to_html(accuracy_table(arms)) + to_html(cost_table(arms)) + plot("dots", dots)),
        section("empty", ""),
        to_html(differences_table(hostile_arms)),
        plot(HOSTILE, curves),
        plot("nothing", []),
        samples_html([answers]),
        details(HOSTILE, text(HOSTILE)),
        facts({"packages": {"torch": HOSTILE}, HOSTILE: [1, None]}),
    ]
    page = offline_page(write_page(tmp_path / "new" / "report.html", HOSTILE, parts))
    assert page.seen.count("svg") == 4, "two plots, each also for phones"
    assert "".join(page.words).count("<script>alert(1)</script>") > 10 and "empty" not in page.text


def test_a_run_without_anything_says_why(tmp_path: Path) -> None:
    parts = [to_html(accuracy_table([])), to_html(cost_table([])), samples_html([]), section("Environment", facts({}))]
    page = offline_page(write_page(tmp_path / "r.html", "t", parts))
    assert "eval.items" in page.text and "Samples" not in page.text and "Environment" not in page.text


def test_report_and_environment_import_no_torch_and_no_matplotlib() -> None:
    code = (
        "import sys\nfrom srppo import environment\n"
        "from srppo.report import page, plots, run, sweep, table\nenvironment.environment()\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_files_beside_the_code_are_in_the_wheel() -> None:
    """The page's CSS is one of them: a clone has it, an installation only where pyproject.toml names it."""
    package = Path(srppo.__file__).parent
    setup = tomllib.loads((package.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    shipped = {path for pattern in setup["package-data"]["srppo"] for path in package.glob(pattern)}
    kinds = (".css", ".cpp", ".yaml", ".json", ".safetensors")
    assert {path for path in package.rglob("*") if path.suffix in kinds} <= shipped
    assert package / "report" / "page.css" in shipped


@pytest.mark.parametrize(
    ("run", "sft", "seed", "name"),
    [
        (Path("elsewhere/mine"), "x", None, "mine"),
        (Path("runs/mine"), "x", 3, "mine-seed-3"),
        (None, "runs/newest/stages/0123/model", None, "newest"),
        (None, "hub/some-model", None, "hub-some-model"),
    ],
)
def test_pages_of_two_runs_do_not_meet(run: Path | None, sft: str, seed: int | None, name: str) -> None:
    assert page_folder("score", run, sft, seed) == Path("runs/score") / name
