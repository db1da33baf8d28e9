"""Every plot is written with its words, odd rows are drawn, and phones get a form of their own."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from records import ARMS, GROUPS, NO_ITEMS, ODD, ppo_rows

from srppo.report.history import SeedRows
from srppo.report.page import narrow_of, plot
from srppo.report.plots import ARM_COLOURS, accuracy_plot, arm_colours, reward_kl_plot, save_figure, training_curves


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


def test_reward_against_kl_needs_both(tmp_path: Path) -> None:
    assert reward_kl_plot(SeedRows({0: [{"step": 1, "reward": 1.0}]}), tmp_path / "a", "#d55e00") == []
    broken = SeedRows(broken={0: ppo_rows(0)})
    assert len(reward_kl_plot(broken, tmp_path / "a", "#d55e00")) == 2


def test_plots_have_a_form_for_phones(tmp_path: Path) -> None:
    def draw(figure: Any) -> None:
        for axis, title in zip(figure.subplots(1, 3, sharey=True), "abc", strict=True):
            axis.plot([0, 1], label="a line with a rather long name")
            axis.set_title(title)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower left")

    svg = save_figure(draw, tmp_path / "plot", height=3.0)[1]
    sizes = [path.read_text().partition('viewBox="0 0 ')[2].partition('"')[0].split() for path in (svg, narrow_of(svg))]
    (wide, low), (narrow, tall) = [list(map(float, size)) for size in sizes]
    assert narrow < 0.5 * wide and tall > 2.5 * low
    html = plot("A plot", [svg])
    assert html.count("<svg") == 2 and 'class="wide roomy"' in html and 'class="narrow"' in html
    narrow_of(svg).unlink()
    assert plot("A plot", [svg]).count("<svg") == 1
