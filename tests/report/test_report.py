"""Tables, plots, the page and the environment."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from pages import offline_page
from rich.console import Console as RichConsole

from srppo.environment import environment
from srppo.report.curves import training_curves
from srppo.report.figures import ArmFigures, interval_caption, problem_lines
from srppo.report.html import inline_plot
from srppo.report.plots import ARM_COLOURS, accuracy_plot, arm_colours
from srppo.report.run_page import Sample, write_report
from srppo.report.terminal import arms_table
from srppo.report.training import SeedRows
from srppo.statistics.intervals import Estimate, wilson

GROUPS = ("demonstrated", "prompted", "unseen")
HOSTILE = "<script>alert(1)</script><img src=http://x.test/a>\"'&[bold]"


def arm(name: str, right: int, **more: Any) -> ArmFigures:
    figures = {(g, d): wilson(right - 3 * i, 150) for i, g in enumerate(GROUPS) for d in ("greedy", "sampled")}
    return ArmFigures(
        name, figures, flops=1.23e12, seconds=8.4, kept_step=15, steps=20, mean_length=9.2, ended_share=0.97, **more
    )


ARMS = [
    arm("base", 6, nll=1.9),
    arm("SFT", 61, nll=0.753),
    arm("longer SFT, equal compute", 90),
    arm("longer SFT, best on dev", 88),
    arm("SRPPO, best on dev", 83),
    arm("SRPPO, last step", 60),
]
FAILED = ArmFigures("SRPPO", problem="diverged at step 7: KL to the SFT model is 130.1 nats a response")
NO_ITEMS = [ArmFigures("base", nll=2.3), ArmFigures("SFT", nll=1.9, flops=3e18, seconds=1e5), FAILED]
ODD = [
    ArmFigures(HOSTILE, {("items", "greedy"): Estimate(0.4, 0.3, 0.5, 12)}, seeds=3, note=HOSTILE),
    ArmFigures(
        "x" * 70,
        {(f"group {i} {'y' * 20}", "sampled"): Estimate(float("nan"), float("nan"), float("nan"), 0) for i in range(5)},
        flops=1e40,
        seconds=float("nan"),
        kept_step=10**9,
        steps=10**9,
        mean_length=1e12,
        ended_share=float("inf"),
        nll=-1e20,
        seeds=5,
    ),
]


def table_text(arms: list[ArmFigures], width: int = 80) -> str:
    out = io.StringIO()
    RichConsole(file=out, width=width, color_system=None).print(arms_table(arms))
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("arms", [ARMS, NO_ITEMS, ODD, [FAILED], [*ARMS[:2], FAILED], []])
def test_tables_keep_to_80_columns(arms: list[ArmFigures], width: int) -> None:
    assert max(map(len, table_text(arms, width).splitlines())) <= 80


def test_table_shows_every_figure() -> None:
    text = table_text(ARMS)
    lines = text.splitlines()
    sft = [line for line in lines if line.strip().startswith("SFT ")]
    assert sft[0].split() == ["SFT", "0.41", "[0.33,", "0.49]", "0.39", "[0.31,", "0.47]", "0.37", "[0.29,", "0.45]"]
    assert len(sft) == 3  # greedy, sampled, cost
    assert sft[2].split() == ["SFT", "1.23", "8", "15", "of", "20", "9.2", "97%", "0.753"]
    assert "in-domain" in text and "PPO prompts only" in text and "out-of-domain" in text
    assert "n = 150 items a group" in " ".join(text.split())
    assert "one training seed, so they say nothing of other seeds" in " ".join(text.split())


def test_failed_arm_and_no_items_are_said() -> None:
    text = " ".join(table_text(NO_ITEMS).split())
    assert "no result" in text and "SRPPO: diverged at step 7" in text and "held-out answer NLL only" in text
    assert "[0." not in text and "1.900" in text


def test_caption_claims_what_the_figures_support() -> None:
    several = [arm("SFT", 60, seeds=5), arm("SRPPO", 70, seeds=4)]
    assert "items and training seeds (4 to 5 seeds): t width" in interval_caption(several)
    assert "say nothing of other" not in interval_caption(several)
    assert "(1 to 5 seeds)" in interval_caption([*several, arm("x", 9)])
    assert "With one seed they say nothing of others" in interval_caption([*several, arm("x", 9)])
    assert "paired" in interval_caption(several) and "paired" not in interval_caption(several[:1])
    mixed = [ArmFigures("SFT", {("a", "greedy"): wilson(1, 10), ("b", "greedy"): wilson(1, 20)})]
    assert "n = 10 a, 20 b" in interval_caption(mixed) and "Sampled" not in interval_caption(mixed)


def test_a_problem_that_rows_share_is_said_once() -> None:
    rows = [ArmFigures("SRPPO, last step", problem="seed 3 diverged"), ArmFigures("SFT"), FAILED]
    rows.append(ArmFigures("SRPPO, best on dev", problem="seed 3 diverged"))
    assert problem_lines(rows)[0] == "SRPPO, last step; SRPPO, best on dev: seed 3 diverged"
    assert len(problem_lines(rows)) == 2


def rows(total: int, **columns: Any) -> list[dict[str, Any]]:
    out = []
    for step in range(total + 1):
        row: dict[str, Any] = {"step": step, "tflops": step / 1000}
        if step:
            row |= {key: value + step / 10 for key, value in columns.items()}
        if step % 2 == 0:
            row |= {f"dev/{g}": step / 10 for g in GROUPS} | {"dev/accuracy": 0.4, "dev/nll": 1.0}
        out.append(row)
    return out


PPO = rows(6, reward=1.0, kl_sft=0.0, kl_base=2.0, length=9.0, ended=0.3)


def texts(svg: Path) -> str:
    return " ".join("".join(e.itertext()) for e in ElementTree.parse(svg).iter() if e.tag.endswith("}text"))


def test_plots_are_written_with_their_words(tmp_path: Path) -> None:
    by_arm = {"longer SFT": SeedRows({0: rows(8, loss=1.0)}), "SRPPO": SeedRows({0: PPO}, kept=4)}
    png, svg = training_curves(by_arm, tmp_path / "a" / "curves")
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 10_000
    for words in ("reward", "KL", "to base", "length", "ended by EOS", "out-of-domain", "kept step", "SRPPO"):
        assert words in texts(svg)
    _, svg = accuracy_plot(ARMS, tmp_path / "accuracy")
    for words in ("in-domain", "greedy", "sampled", "SRPPO, last step"):
        assert words in texts(svg)


@pytest.mark.parametrize(
    "by_arm",
    [
        {"SFT": [{"step": 1, "loss": 1.0, "tflops": 1e-11, "dev/nll": 2.0}]},
        {"SRPPO": [{"step": 1, "tflops": 0.0, "reward": float("nan"), "kl_sft": None}]},
        {"SRPPO": PPO, "another $\\frac$": PPO},
        {
            "SRPPO": [
                {"step": 2, "tflops": 1.0, "reward": 1.0, **{f"dev/g{i}": 0.5 for i in range(9)}, "dev/accuracy": 0.5}
            ]
        },
    ],
)
def test_odd_rows_are_drawn(by_arm: dict[str, Any], tmp_path: Path) -> None:
    arms = {name: SeedRows({0: rows}) for name, rows in by_arm.items()}
    for more in ({}, {"broken": SeedRows(broken={3: next(iter(by_arm.values()))})}):
        assert all(path.exists() for path in training_curves(arms | more, tmp_path / "curves"))


def test_nothing_to_draw_writes_nothing(tmp_path: Path) -> None:
    assert training_curves({}, tmp_path / "a") == [] and accuracy_plot(NO_ITEMS, tmp_path / "b") == []
    nothing = {"SFT": SeedRows({0: [{"step": 1, "tflops": 0.0, "loss": 1.0}]})}
    assert training_curves(nothing, tmp_path / "a") == [] and not list(tmp_path.iterdir())
    assert accuracy_plot(ODD, tmp_path / "odd")


def test_arms_keep_their_colours() -> None:
    assert arm_colours(["SRPPO", "x"])["SRPPO"] == arm_colours(["base", "SRPPO"])["SRPPO"]
    assert len(set(arm_colours(["base", "SRPPO", "x", "y"]).values())) == 4
    names = ["base", "SFT", "longer SFT, equal compute", "longer SFT, best on dev", "SRPPO, last step"]
    colours = arm_colours([*names, "SRPPO, best on dev", "resampling", "best-of-n", "x"])
    assert colours["SRPPO, best on dev"] == ARM_COLOURS["SRPPO"] and len(set(colours.values())) == len(colours)


def test_page_is_self_contained_and_escapes_everything(tmp_path: Path) -> None:
    _, curves = training_curves({HOSTILE: SeedRows({0: PPO}), "SRPPO": SeedRows({0: PPO})}, tmp_path / "curves")
    _, dots = accuracy_plot([*ARMS, *ODD], tmp_path / "dots")
    hostile_arms = [*ODD, ArmFigures(HOSTILE, problem=HOSTILE)]
    path = write_report(
        tmp_path / "new" / "report.html",
        title=HOSTILE,
        arms=[*ARMS, *hostile_arms],
        results=inline_plot("dots", dots.read_text(), 1),
        parts=[(HOSTILE, inline_plot(HOSTILE, curves, 2)), ("empty", "")],
        samples=[
            Sample(HOSTILE, {HOSTILE: HOSTILE, "SFT": "", "lone \ud800": "\ud800"}, HOSTILE, HOSTILE, {HOSTILE: False})
        ],
        samples_caption=HOSTILE,
        recipe_toml=HOSTILE,
        environment={"packages": {"torch": HOSTILE}, HOSTILE: [1, None]},
        warnings=[HOSTILE],
        missing=[HOSTILE],
        notes=[HOSTILE],
    )
    page = offline_page(path)
    assert page.seen.count("svg") == 3, "a text, and a file with its form for phones"
    assert "".join(page.words).count("<script>alert(1)</script>") > 10


def test_page_of_a_run_without_anything(tmp_path: Path) -> None:
    text = write_report(tmp_path / "r.html", title="t", arms=[]).read_text()
    assert "eval.items" in text and "Samples" not in text and "Environment" not in text


def test_environment_is_json_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    facts = environment()
    text = json.dumps(facts)
    assert "hf_secret" not in text and facts["variables"]["OMP_NUM_THREADS"] == "2"
    assert facts["packages"]["torch"].startswith("2.") and facts["cores"] >= 1 and facts["cpu"]


def test_report_and_environment_import_no_torch_and_no_matplotlib() -> None:
    code = (
        "import sys\nfrom srppo import environment\n"
        "from srppo.report import figures, html, plots, run_page, terminal\nenvironment.environment()\n"
        "assert not {'torch', 'matplotlib', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
