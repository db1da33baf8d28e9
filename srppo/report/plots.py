"""Plots with matplotlib, drawn without a display: training curves, and accuracy with intervals. PNG and SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srppo.report.figures import GROUP_WORDS, ArmFigures, decodings_of, groups_of
from srppo.style import INK, PAPER, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart also without red-green vision.
ARM_COLOURS = {
    "base": "#7f7f7f",
    "SFT": "#56b4e9",
    "longer SFT (equal compute)": "#0072b2",
    "longer SFT (best on dev)": "#009e73",
    "SRPPO": "#d55e00",
    "SRPPO (last step)": "#e69f00",
}
OTHER_COLOURS = ("#cc79a7", "#0072b2", "#009e73", "#e69f00", "#56b4e9", "#d55e00", "#7f7f7f")
WIDTH_INCHES = 10.0
Rows = Sequence[Mapping[str, Any]]


def training_curves(
    rows_by_arm: Mapping[str, Rows],
    path: Path,
    *,
    flops_before: Mapping[str, float] | None = None,
    kept_steps: Mapping[str, int] | None = None,
) -> list[Path]:
    """Reward, KL to both models, length and EOS share of the PPO arms by step; development accuracy of all by FLOPs.

    rows_by_arm: metric rows of each arm. flops_before: operations an arm spent before its first row (its SFT), so that
    arms share an axis. kept_steps: marked by a ring. Writes `path` as .png and .svg; returns both, or nothing when
    there is nothing to draw.
    """
    ppo = {arm: [r for r in rows if "reward" in r] for arm, rows in rows_by_arm.items()}
    ppo = {arm: rows for arm, rows in ppo.items() if rows}
    panels = _development_panels(rows_by_arm)
    colours = arm_colours([*rows_by_arm])

    def draw(figure: Figure) -> None:
        grid = figure.add_gridspec(bool(ppo) + bool(panels), 12)
        if ppo:
            axes = [figure.add_subplot(grid[0, 3 * i : 3 * i + 3]) for i in range(4)]
            _ppo_row(axes, ppo, colours)
        shared = None
        for i, (key, title) in enumerate(panels):
            span = min(12 // len(panels), 6 if ppo else 12)
            axis = figure.add_subplot(grid[-1, span * i : span * (i + 1)], sharey=None if key == "nll" else shared)
            shared = shared or axis
            _development(axis, key, rows_by_arm, colours, flops_before or {}, kept_steps or {})
            axis.set_title(title)
        figure.legend(*_unique_handles(figure), loc="outside lower center", ncols=4, handlelength=1.6)

    rows = bool(ppo) + bool(panels)
    return save_figure(draw, path, height=0.6 + 2.6 * rows) if rows else []


def accuracy_plot(arms: Sequence[ArmFigures], path: Path) -> list[Path]:
    """A dot with its 95% interval for each arm, group and decoding. Returns the files, or nothing to show."""
    shown, groups, decodings = [arm for arm in arms if arm.figures], groups_of(arms), decodings_of(arms)
    if not shown:
        return []
    colours = arm_colours([arm.name for arm in shown])
    columns = min(len(groups), 3)
    rows = math.ceil(len(groups) / columns)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for axis in axes[len(groups) :]:
            axis.set_visible(False)
        for place, group in enumerate(groups):
            _dots(axes[place], shown, group, decodings, colours)
            axes[place].tick_params(labelbottom=place + columns >= len(groups))
        axes[0].set_yticks(range(len(shown)), [_short(arm.name) for arm in shown])
        axes[0].set_ylim(len(shown) - 0.5, -0.5)
        axes[0].set_xlim(left=min(-0.02, axes[0].get_xlim()[0]))
        figure.supxlabel("accuracy on test items, 95% interval", fontsize=10)
        handles = [axes[0].plot([], [], _marker(d), color=INK, mfc=_fill(d, INK))[0] for d in decodings]
        figure.legend(handles, decodings, loc="outside upper right", ncols=2)

    return save_figure(draw, path, height=1.1 + rows * (0.5 + 0.42 * len(shown)))


def arm_colours(names: Sequence[str]) -> dict[str, str]:
    """A fixed colour for each known arm; the others take turns."""
    free = [c for c in OTHER_COLOURS if c not in {ARM_COLOURS.get(n) for n in names}] or list(OTHER_COLOURS)
    unknown = [name for name in names if name not in ARM_COLOURS]
    return {name: ARM_COLOURS.get(name) or free[unknown.index(name) % len(free)] for name in names}


def _ppo_row(axes: Sequence[Axes], ppo: Mapping[str, Rows], colours: Mapping[str, str]) -> None:
    panels: list[tuple[str, list[tuple[str, str, str]]]] = [
        ("reward, nats", [("reward", "-", "")]),
        ("KL, nats", [("kl_sft", "-", " to SFT"), ("kl_base", ":", " to base")]),
        ("length, tokens", [("length", "-", "")]),
        ("ended by EOS", [("ended", "-", "")]),
    ]
    for axis, (title, series) in zip(axes, panels, strict=True):
        for arm, rows in ppo.items():
            for key, line, words in series:
                points = [(r["step"], r[key]) for r in rows if _is_number(r.get(key))]
                if not points:
                    continue
                marker = "o" if len(points) == 1 else ""
                style: dict[str, Any] = {"color": colours[arm], "label": "_" if words else arm, "lw": 1.8, "ms": 3.5}
                axis.plot(*zip(*points, strict=True), marker + line, **style)
                if words and len(ppo) == 1:
                    axis.annotate(
                        words.strip(), points[-1], xytext=(0, 4), textcoords="offset points", ha="right", fontsize=9
                    )
        axis.set_title(title)
        axis.set_xlabel("PPO step")
        steps = {row["step"] for rows in ppo.values() for row in rows}
        if len(steps) < 5:  # no room for fractions of a step
            axis.set_xticks(sorted(steps))
            axis.set_xlim(min(steps) - 0.5, max(steps) + 0.5)
        else:
            axis.locator_params(axis="x", integer=True, nbins=5)
        axis.locator_params(axis="y", nbins=5)
    axes[3].set_ylim(-0.03, 1.03)
    if len(ppo) > 1:
        axes[1].set_title("KL, nats (dotted: to base)")


def _development_panels(rows_by_arm: Mapping[str, Rows]) -> list[tuple[str, str]]:
    keys = dict.fromkeys(
        key[4:] for rows in rows_by_arm.values() for row in rows for key in row if key.startswith("dev/")
    )
    groups = [g for g in (*GROUP_WORDS, *keys) if g in keys and g not in ("accuracy", "nll")]
    groups = list(dict.fromkeys(groups))
    if len(groups) > 3:
        groups = ["accuracy"]
    panels = [(g, f"dev accuracy, {GROUP_WORDS.get(g, 'all items' if g == 'accuracy' else g)}") for g in groups]
    return panels or ([("nll", "held-out NLL, nats a token")] if "nll" in keys else [])


def _development(
    axis: Axes,
    key: str,
    rows_by_arm: Mapping[str, Rows],
    colours: Mapping[str, str],
    flops_before: Mapping[str, float],
    kept_steps: Mapping[str, int],
) -> None:
    for arm, rows in rows_by_arm.items():
        measured = [r for r in rows if _is_number(r.get(f"dev/{key}"))]
        if not measured:
            continue
        x = [(flops_before.get(arm, 0.0) + r.get("flops", 0)) / 1e12 for r in measured]
        y = [r[f"dev/{key}"] for r in measured]
        front = 2 + 1 / (1 + len(measured))  # an arm that is another's beginning stays visible
        axis.plot(x, y, "o-", color=colours[arm], label=arm, lw=1.8, ms=3.5, zorder=front)
        for place, row in enumerate(measured):
            if row["step"] == kept_steps.get(arm, -1):
                axis.plot(x[place], y[place], "o", ms=10, mfc="none", mec=colours[arm], mew=1.5, label="_")
    if any(arm in kept_steps for arm in rows_by_arm):
        axis.plot([], [], "o", ms=9, mfc="none", mec=INK, mew=1.5, label="kept step")
    axis.set_xlabel("training TFLOPs, counted")
    axis.locator_params(axis="x", nbins=5)


def _dots(
    axis: Axes, arms: Sequence[ArmFigures], group: str, decodings: Sequence[str], colours: Mapping[str, str]
) -> None:
    for place, decoding in enumerate(decodings):
        shift = (place - (len(decodings) - 1) / 2) * 0.3
        for row, arm in enumerate(arms):
            estimate = arm.figures.get((group, decoding))
            if estimate is None or not _is_number(estimate.mean):
                continue
            whiskers = [[max(estimate.mean - estimate.low, 0.0)], [max(estimate.high - estimate.mean, 0.0)]]
            colour = colours[arm.name]
            axis.errorbar(
                estimate.mean,
                row + shift,
                xerr=whiskers,
                fmt=_marker(decoding),
                color=colour,
                mfc=_fill(decoding, colour),
            )
    axis.set_title(GROUP_WORDS.get(group, group))
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0)


def _marker(decoding: str) -> str:
    return "D" if decoding == "sampled" else "o"


def _fill(decoding: str, colour: str) -> str:
    return PAPER if decoding == "sampled" else colour


def _short(name: str) -> str:
    return name.replace(" (", "\n(") if len(name) > 18 else name


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _unique_handles(figure: Figure) -> tuple[list[Any], list[str]]:
    found: dict[str, Any] = {}
    for axis in reversed(figure.axes):  # development panels first: their handles have dots
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def save_figure(draw: Callable[[Figure], None], path: Path, *, height: float) -> list[Path]:
    """Draw and write `path` as .png and .svg, in the common style; `height` in inches. Returns both."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(WIDTH_INCHES, height), layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.06), facecolor=PAPER
        )
        FigureCanvasAgg(figure)
        draw(figure)
        png, svg = path.with_suffix(".png"), path.with_suffix(".svg")
        figure.savefig(png, dpi=160)
        figure.savefig(svg, metadata={"Date": None})
    return [png, svg]
