"""Plots of training over seeds: what PPO sees by step, development accuracy by compute, reward against KL."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srppo.report.figures import GROUP_WORDS
from srppo.report.plots import arm_colours, save_figure
from srppo.report.style import INK
from srppo.report.training import Line, SeedRows, is_number, over_seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PPO_PANELS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("reward, nats", (("reward", "-"),)),
    ("KL, nats (dotted: to base)", (("kl_sft", "-"), ("kl_base", ":"))),
    ("length, tokens", (("length", "-"),)),
    ("ended by EOS", (("ended", "-"),)),
)
MOST_GROUPS = 3  # development panels; beyond that one over all items
BAND = 0.22  # opacity
WIDE = 30  # a range of compute this wide is drawn on a logarithmic axis


def training_curves(arms: Mapping[str, SeedRows], path: Path) -> list[Path]:
    """Reward, KL to both models, length and EOS share of the PPO arms by step; development accuracy by operations.

    A ring marks the kept step of an arm with one seed. Writes `path` as .png and .svg; returns both, or nothing when
    there is nothing to draw.
    """
    ppo = {name: arm for name, arm in arms.items() if any("reward" in row for row in _all_rows(arm))}
    panels = _development_panels(arms)
    if not ppo and not panels:
        return []
    colours = arm_colours([*arms])

    def draw(figure: Figure) -> None:
        grid = figure.add_gridspec(bool(ppo) + bool(panels), 12)
        for i, (title, series) in enumerate(PPO_PANELS if ppo else ()):
            axis = figure.add_subplot(grid[0, 3 * i : 3 * i + 3])
            for name, arm in ppo.items():
                for key, style in series:
                    _draw(axis, arm, "step", key, style, colours[name], name if style == "-" else "_")
            axis.set_title(title)
            _ticks(axis, ppo)
            if title == "ended by EOS":
                axis.set_ylim(-0.03, 1.03)
        shared = None
        for i, (key, title) in enumerate(panels):
            span = min(12 // len(panels), 6 if ppo else 12)
            axis = figure.add_subplot(grid[-1, span * i : span * (i + 1)], sharey=None if key == "nll" else shared)
            shared = shared or axis
            _development(axis, key, arms, colours)
            axis.set_title(title)
        figure.legend(*_unique_handles(figure), loc="outside lower left", ncols=4, handlelength=1.6)

    return save_figure(draw, path, height=0.6 + 2.6 * (bool(ppo) + bool(panels)))


def _draw(axis: Axes, arm: SeedRows, x: str, y: str, style: str, colour: str, label: str, **more: Any) -> None:
    """Mean and band of the finished seeds, and each other seed as it is."""
    line = over_seeds(arm.done, x, y)
    if line is not None:
        dots = "o" if len(line.x) == 1 and "o" not in style else ""  # a line of one point cannot be seen
        axis.plot(line.x, line.mean, dots + style, color=colour, label=label, **{"lw": 1.8, "ms": 3.5, **more})
        if (line.high > line.low).any():
            axis.fill_between(line.x, line.low, line.high, color=colour, alpha=BAND, lw=0)
    for seed, rows in arm.broken.items():
        alone = over_seeds({seed: rows}, x, y)
        if alone is not None:
            axis.plot(alone.x, alone.mean, "--", color=colour, lw=0.9, label=label if line is None else "_")
            axis.plot(alone.x[-1:], alone.mean[-1:], "x", color=colour, ms=5, label="_")


def _all_rows(arm: SeedRows) -> list[Mapping[str, Any]]:
    return [row for rows in (*arm.done.values(), *arm.broken.values()) for row in rows]


def _ticks(axis: Axes, ppo: Mapping[str, SeedRows]) -> None:
    axis.set_xlabel("PPO step")
    steps = {row["step"] for arm in ppo.values() for row in _all_rows(arm) if "reward" in row}
    if len(steps) < 5:  # no room for fractions of a step
        axis.set_xticks(sorted(steps))
        axis.set_xlim(min(steps) - 0.5, max(steps) + 0.5)
    else:
        axis.locator_params(axis="x", integer=True, nbins=5)
    axis.locator_params(axis="y", nbins=5)


def _development_panels(arms: Mapping[str, SeedRows]) -> list[tuple[str, str]]:
    """(key, title) of each panel: accuracy by group, on all items where groups are many, or NLL."""
    keys = dict.fromkeys(
        key[4:] for arm in arms.values() for row in _all_rows(arm) for key in row if key.startswith("dev/")
    )
    groups = [g for g in dict.fromkeys((*GROUP_WORDS, *keys)) if g in keys and g not in ("accuracy", "nll")]
    if len(groups) > MOST_GROUPS:
        groups = ["accuracy"]
    panels = [(g, f"dev accuracy, {GROUP_WORDS.get(g, 'all items' if g == 'accuracy' else g)}") for g in groups]
    return panels or ([("nll", "held-out NLL, nats a token")] if "nll" in keys else [])


def _development(axis: Axes, key: str, arms: Mapping[str, SeedRows], colours: Mapping[str, str]) -> None:
    for name, arm in arms.items():
        points = max((len(rows) for rows in (*arm.done.values(), *arm.broken.values())), default=0)
        front = 2 + 1 / (1 + points)  # an arm that is another's beginning stays visible
        _draw(axis, arm, "tflops", f"dev/{key}", "o-", colours[name], name, zorder=front)
        for row in _all_rows(arm) if arm.kept is not None else ():
            if row["step"] == arm.kept and is_number(row.get(f"dev/{key}")):
                place = (row["tflops"], row[f"dev/{key}"])
                axis.plot(*place, "o", ms=10, mfc="none", mec=colours[name], mew=1.5, label="_")
    if any(arm.kept is not None for arm in arms.values()):
        axis.plot([], [], "o", ms=9, mfc="none", mec=INK, mew=1.5, label="kept step")
    axis.set_xlabel("training TFLOPs, counted")
    _compute_scale(axis, [row["tflops"] for arm in arms.values() for row in _all_rows(arm) if f"dev/{key}" in row])


def _compute_scale(axis: Axes, tflops: Sequence[float]) -> None:
    """Logarithmic where compute ranges widely, as PPO costs hundreds of times a short SFT; linear next to 0."""
    spent = [value for value in tflops if value > 0]
    if not spent or max(spent) < WIDE * min(spent):
        axis.locator_params(axis="x", nbins=5)
        return
    axis.set_xscale("symlog", linthresh=min(spent), linscale=0.5)
    powers = range(math.ceil(math.log10(min(spent))), math.floor(math.log10(max(spent))) + 1)
    axis.minorticks_off()
    axis.set_xticks([0.0, *(10.0**power for power in powers[:: -(len(powers) // 4 + 1)])])
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def reward_kl_plot(arm: SeedRows, path: Path, colour: str) -> list[Path]:
    """PPO's reward against its KL to SFT and to the base, a point a step: each seed thin, the mean of the finished
    ones thick, its last step marked. Returns the files, or nothing where no step has both."""
    pairs = [("kl_sft", "KL to SFT, nats"), ("kl_base", "KL to base, nats")]
    lines = {key: [over_seeds({seed: rows}, key, "reward") for seed, rows in arm.done.items()] for key, _ in pairs}
    broken = {key: [over_seeds({seed: rows}, key, "reward") for seed, rows in arm.broken.items()] for key, _ in pairs}
    if not any(line for group in (lines, broken) for many in group.values() for line in many):
        return []

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (key, title) in zip(axes, pairs, strict=True):
            several = len(lines[key]) > 1
            for line in filter(None, lines[key] if several else []):
                axis.plot(line.x, line.mean, "-", color=colour, lw=0.8, alpha=0.5, label="a seed")
            for line in filter(None, broken[key]):
                axis.plot(line.x, line.mean, "--", color=colour, lw=0.9, label="a seed, not finished or failed")
                axis.plot(line.x[-1:], line.mean[-1:], "x", color=colour, ms=5)
            _mean_path(axis, over_seeds(arm.done, key, "reward"), colour, "mean over seeds" if several else "the seed")
            axis.set_xlabel(title)
        axes[0].set_ylabel("reward, nats")
        figure.legend(*_unique_handles(figure), loc="outside lower left", ncols=4, handlelength=1.6)

    return save_figure(draw, path, height=4.0)


def _mean_path(axis: Axes, line: Line | None, colour: str, label: str) -> None:
    if line is not None:
        axis.plot(line.x, line.mean, "o-", color=colour, lw=2.0, ms=3.5, label=label, zorder=3)
        axis.plot(line.x[:1], line.mean[:1], "o", color=colour, mfc="none", ms=10, mew=1.5, label="first step")
        axis.plot(line.x[-1:], line.mean[-1:], "D", color=colour, ms=8, label="last step", zorder=3)


def _unique_handles(figure: Figure) -> tuple[list[Any], list[str]]:
    found: dict[str, Any] = {}
    for axis in reversed(figure.axes):  # development panels first: their handles have dots
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)
