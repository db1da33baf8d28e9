"""The roofline of a run: operations a second against operations a byte, under the ceilings measured in the same run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srppo.bench.options import SHAPES
from srppo.bench.rows import Row
from srppo.report.style import INK, PAPER, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart also without red-green vision; markers repeat none beside each other.
COLOURS = ("#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#7f4f24", "#24292f", "#5c8f00", "#b03060")
MARKERS = ("s", "^", "v", "P", "X", "h", "<", ">", "p", "8")
OURS, FLOOR = "#d55e00", "#7f7f7f"
SPREAD = 1.06  # sideways, between the points of one case, which share their intensity


def roofline(rows: Sequence[Row], path: Path) -> list[Path]:
    """A panel for each shape and dtype. Writes `path` as .png and .svg; returns both, or nothing to draw."""
    measured = [row for row in rows if row.gflops is not None]
    if not measured:
        return []
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels: dict[tuple[str, str], list[Row]] = {}
    for row in measured:
        panels.setdefault((row.shape, row.dtype), []).append(row)
    columns = min(len(panels), 2)
    lines = math.ceil(len(panels) / columns)
    styles = _styles(measured)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.06)
        figure = Figure(figsize=(10.0, 1.8 + 3.3 * lines), layout=layout, facecolor=PAPER)
        FigureCanvasAgg(figure)
        axes = figure.subplots(lines, columns, squeeze=False)
        for axis in axes.flatten()[len(panels) :]:
            axis.set_visible(False)
        for axis, rows_of_panel in zip(axes.flatten(), panels.values(), strict=False):
            _panel(axis, rows_of_panel, styles)
        _words(figure, axes[0, 0], measured[0], styles)
        png, svg = path.with_suffix(".png"), path.with_suffix(".svg")
        figure.savefig(png, dpi=160)
        figure.savefig(svg, metadata={"Date": None})
    return [png, svg]


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """A marker and a colour for each rival in words: ours in one colour, floors grey dashes."""
    found: dict[str, dict[str, Any]] = {}
    others = 0
    for row in sorted(rows, key=lambda row: row.kind != "ours"):
        if row.words in found:
            continue
        if row.kind == "ours":
            style = {"marker": "*", "color": OURS, "ms": 13}
        elif row.kind == "ours, plain":
            style = {"marker": "D" if row.rival.endswith("twice") else "o", "color": OURS, "ms": 6, "mfc": PAPER}
        elif row.kind in ("floor", "bound"):
            style = {"marker": "_" if row.rival.endswith(("mm", "max")) else "|", "color": FLOOR, "ms": 11, "mew": 2.2}
        else:
            style = {"marker": MARKERS[others % len(MARKERS)], "color": COLOURS[others % len(COLOURS)], "ms": 6}
            others += 1
        found[row.words] = style
    return found


def _panel(axis: Axes, rows: Sequence[Row], styles: dict[str, dict[str, Any]]) -> None:
    """One shape and dtype; each N is a group of points."""
    first, order = rows[0], list(styles)
    for row in rows:
        sideways = SPREAD ** (order.index(row.words) - (len(order) - 1) / 2)
        style = {"ls": "", **styles[row.words], "zorder": 4 if row.kind == "ours" else 3}
        axis.plot(row.flops / row.bytes_moved * sideways, row.gflops or 0.0, **style)
    _roof(axis, rows, SPREAD ** (len(order) / 2 + 2))
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(round(2 * math.log2(row.flops / row.bytes_moved)), []).append(row)
    for points in groups.values():  # from logits every N has the same intensity
        place = (points[0].flops / points[0].bytes_moved, min(row.gflops or 0.0 for row in points))
        below: dict[str, Any] = {"xytext": (0, -8), "textcoords": "offset points", "ha": "center", "va": "top"}
        sizes = ", ".join(str(n) for n in dict.fromkeys(row.n for row in points))
        axis.annotate(f"N={sizes}", place, fontsize=9, **below)
    d = f"D={first.d} " if first.d else ""
    name = f"{first.shape}: " if first.shape in SHAPES else ""
    axis.set_title(f"{name}{d}V={first.v}, {first.dtype}")
    axis.set_xlabel("operations a byte that must move (one N: spread sideways)")


def _roof(axis: Axes, rows: Sequence[Row], room: float) -> None:
    """The two ceilings, and axes that hold them and all points."""
    gemm, copy = max(row.gemm_gflops for row in rows), rows[0].copy_gb_s
    intensities, rates = [row.flops / row.bytes_moved for row in rows], [row.gflops or 0.0 for row in rows]
    ridge = gemm / copy
    low, high = min(min(intensities) / room, ridge / 2), max(max(intensities) * room, ridge * 2)
    axis.plot([low, ridge, high], [low * copy, gemm, gemm], color=INK, lw=1.4, zorder=2)
    above: dict[str, Any] = {"xytext": (0, 4), "textcoords": "offset points", "ha": "right", "va": "bottom"}
    axis.annotate(f"GEMM {gemm:,.0f} GF/s, copy {copy:,.0f} GB/s", (high, gemm), fontsize=9, **above)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlim(low, high)
    axis.set_ylim(min(rates) / 1.7, max(*rates, gemm) * 1.5)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_major_formatter("{x:g}")
    few = max(*rates, gemm) / min(rates) < 12  # a decade or less: its ends alone would say little
    axis.yaxis.set_minor_formatter("{x:g}" if few else "")


def _words(figure: Figure, axis: Axes, first: Row, styles: dict[str, dict[str, Any]]) -> None:
    """Labels, the machine and the legend."""
    figure.supylabel("useful operations, GF/s", fontsize=10)
    threads = f", {first.threads} thread{'s' * (first.threads > 1)}" if first.device_kind == "cpu" else ""
    figure.suptitle(f"{first.op} on {first.device}{threads}", fontsize=10.5)
    handles = [axis.plot([], [], ls="", **{**style, "ms": min(style["ms"], 9)})[0] for style in styles.values()]
    figure.legend(handles, list(styles), loc="outside lower center", ncols=4, handlelength=1.4, fontsize=9)
