"""Plots with matplotlib, drawn without a display: accuracy with intervals, by group and by task. PNG and SVG."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srppo.report.figures import GROUP_WORDS, ArmFigures, decodings_of, groups_of
from srppo.report.style import GRID, INK, PAPER, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from srppo.statistics.intervals import Estimate

# Okabe and Ito's colours, told apart also without red-green vision.
ARM_COLOURS = {
    "base": "#7f7f7f",
    "SFT": "#56b4e9",
    "longer SFT": "#0072b2",
    "longer SFT, equal compute": "#0072b2",
    "longer SFT, equal compute, last step": "#cc79a7",
    "longer SFT, best on dev": "#009e73",
    "SRPPO": "#d55e00",
    "SRPPO, last step": "#e69f00",
}
BEST = ", best on dev"  # an arm's row at its kept step has the arm's colour
OTHER_COLOURS = (
    "#cc79a7",
    "#44aa99",
    "#999933",
    "#ab6857",
    "#0072b2",
    "#009e73",
    "#e69f00",
    "#56b4e9",
    "#d55e00",
    "#7f7f7f",
)
WIDTH_INCHES, NARROW_INCHES = 10.0, 4.6
MOST_TASKS = 24  # drawn in a group; the table holds all
TaskFigures = Mapping[str, Mapping[tuple[str, str, str], "Estimate"]]


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
        figure.legend(handles, decodings, loc="outside upper left", ncols=2)

    return save_figure(draw, path, height=1.1 + rows * (0.5 + 0.42 * len(shown)))


def task_plot(by_row: TaskFigures, decoding: str, path: Path) -> list[Path]:
    """Accuracy of every row on each task with its 95% interval, a panel a group.

    by_row: by the row's name, estimates by (group, task, decoding). Of a group's tasks the first MOST_TASKS are drawn.
    Returns the files, or nothing where the decoding has no figures.
    """
    rows = [name for name, figures in by_row.items() if any(key[2] == decoding for key in figures)]
    tasks: dict[str, list[str]] = {}
    for group, task in dict.fromkeys(key[:2] for name in rows for key in by_row[name] if key[2] == decoding):
        tasks.setdefault(group, []).append(task)
    if not rows:
        return []
    colours = arm_colours(rows)
    columns = min(len(tasks), 3)
    lines = math.ceil(len(tasks) / columns)
    most = min(max(map(len, tasks.values())), MOST_TASKS)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(lines, columns, sharex=True, squeeze=False).flatten()
        for axis in axes[len(tasks) :]:
            axis.set_visible(False)
        for axis, (group, names) in zip(axes, tasks.items(), strict=False):
            _task_dots(axis, by_row, [(group, task, decoding) for task in names[:MOST_TASKS]], colours)
            axis.set_title(GROUP_WORDS.get(group, group))
            axis.set_ylim(most - 0.5, -0.5)
        figure.supxlabel(f"accuracy, {decoding}, 95% interval", fontsize=10)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, handlelength=1.2)

    return save_figure(draw, path, height=1.3 + lines * (0.4 + most * (0.14 + 0.13 * len(rows))))


def _task_dots(
    axis: Axes, by_row: TaskFigures, keys: Sequence[tuple[str, str, str]], colours: Mapping[str, str]
) -> None:
    """A line a task, in it a dot with whiskers a row; tasks are parted by thin lines."""
    for place, (name, colour) in enumerate(colours.items()):
        shift = (place + 0.5) / len(colours) * 0.8 - 0.4
        known = [(i, by_row[name][key]) for i, key in enumerate(keys) if key in by_row[name]]
        dots = [(estimate.mean, i + shift) for i, estimate in known]
        whiskers = [_whiskers(estimate) for _, estimate in known]
        if dots:
            x, y = zip(*dots, strict=True)
            error = list(zip(*whiskers, strict=True))
            axis.errorbar(x, y, xerr=error, fmt="o", ms=3.5, elinewidth=1, color=colour, label=name)
    axis.set_yticks(range(len(keys)), [task for _, task, _ in keys])
    axis.grid(axis="y", visible=False)
    for i in range(1, len(keys)):
        axis.axhline(i - 0.5, color=GRID, lw=0.6)
    axis.tick_params(axis="y", length=0)
    axis.set_xlim(-0.02, 1.02)


def _whiskers(estimate: Estimate) -> tuple[float, float]:
    return max(estimate.mean - estimate.low, 0.0), max(estimate.high - estimate.mean, 0.0)


def arm_colours(names: Sequence[str]) -> dict[str, str]:
    """A fixed colour for each known arm; the others take turns."""
    known = {name: ARM_COLOURS.get(name) or ARM_COLOURS.get(name.removesuffix(BEST)) for name in names}
    free = [colour for colour in OTHER_COLOURS if colour not in known.values()] or list(OTHER_COLOURS)
    unknown = [name for name in names if known[name] is None]
    return {name: known[name] or free[unknown.index(name) % len(free)] for name in names}


def _dots(
    axis: Axes, arms: Sequence[ArmFigures], group: str, decodings: Sequence[str], colours: Mapping[str, str]
) -> None:
    for place, decoding in enumerate(decodings):
        shift = (place - (len(decodings) - 1) / 2) * 0.3
        for row, arm in enumerate(arms):
            estimate = arm.figures.get((group, decoding))
            if estimate is None or not math.isfinite(estimate.mean):
                continue
            whiskers = [[length] for length in _whiskers(estimate)]
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


def save_figure(draw: Callable[[Figure], None], path: Path, *, height: float) -> list[Path]:
    """Draw and write `path` as .png and .svg, in the common style; `height` in inches. Returns both.

    Beside them `path`-narrow.svg, for phones: the same panels one below the other (`html.inline_plot` takes both).
    """
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = _figure(draw, WIDTH_INCHES, height)
        png, svg = path.with_suffix(".png"), path.with_suffix(".svg")
        figure.savefig(png, dpi=160)
        figure.savefig(svg, metadata={"Date": None})
        narrow = _figure(draw, NARROW_INCHES, height)
        _stack(narrow, height)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="constrained_layout not applied")
            try:
                narrow.savefig(narrow_of(svg), metadata={"Date": None})
            except UserWarning:  # names too long for it: phones get the wide one
                narrow_of(svg).unlink(missing_ok=True)
    return [png, svg]


def narrow_of(svg: Path) -> Path:
    """Where the plot for phones lies."""
    return svg.with_name(f"{svg.stem}-narrow.svg")


def _figure(draw: Callable[[Figure], None], width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.06)
    figure = Figure(figsize=(width, height), layout=layout, facecolor=PAPER)
    FigureCanvasAgg(figure)
    draw(figure)
    return figure


def _stack(figure: Figure, height: float) -> None:
    """Panels one below the other, each about as tall as it was, with ticks and names of its own; legends above, in one
    column."""
    shown = [axis for axis in figure.axes if axis.get_visible()]
    rows = {spec.rowspan.start for axis in shown if (spec := axis.get_subplotspec())}
    grid = figure.add_gridspec(len(shown), 1)
    for place, axis in enumerate(shown):
        axis.set_subplotspec(grid[place])
        axis.tick_params(labelleft=True, labelbottom=True)
        if not axis.get_ylabel() and axis.get_shared_y_axes().joined(axis, shown[0]):
            axis.set_ylabel(shown[0].get_ylabel())
    for axis in figure.axes:
        if not axis.get_visible():
            axis.remove()
    drawn = {label: line for axis in shown for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    entries = 0
    for legend in list(figure.legends):
        labels = [text.get_text() for text in legend.get_texts()]
        handles: list[Any] = [drawn.get(name) or own for name, own in zip(labels, legend.legend_handles, strict=True)]
        legend.remove()
        figure.legend(handles, labels, loc="outside upper left", handlelength=1.6)
        entries += len(labels)
    figure.set_size_inches(NARROW_INCHES, len(shown) * (height / len(rows) + 0.2) + 0.2 * entries)
