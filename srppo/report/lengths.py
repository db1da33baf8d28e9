"""How long the sampled test answers of each arm are, and how many ran into the limit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from srppo.report.answers import SHARE, ArmRow, cells, interval
from srppo.report.plots import arm_colours, save_figure
from srppo.report.style import INK
from srppo.statistics.intervals import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_BINS = 40
COLUMNS = 3
HEAD = ("arm", "mean", "10%", "median", "90%", "reached the limit")


@dataclass(frozen=True)
class Lengths:
    """Lengths of one arm's sampled answers over all seeds: how many answers have so many tokens, EOS included.

    ended: by EOS; cut: by the limit. cut_share: of all answers, with its 95% interval over items and seeds.
    """

    name: str
    ended: Counter[int]
    cut: Counter[int]
    cut_share: Estimate


def lengths_of(rows: Sequence[ArmRow]) -> list[Lengths]:
    """Of every row that has sampled answers."""
    found = []
    for row in rows:
        by_seed = row.answers["sampled"]
        ended: Counter[int] = Counter()
        cut: Counter[int] = Counter()
        for verdict in (each for verdicts in by_seed.values() for each in verdicts):
            for tokens, whole in zip(verdict["tokens"], verdict["ended"], strict=True):
                (ended if whole else cut)[tokens] += 1
        if by_seed:
            shares = cells(by_seed, lambda _: "all", lambda verdict: 1 - sum(verdict["ended"]) / len(verdict["ended"]))
            found.append(Lengths(row.name, ended, cut, interval(shares["all"], SHARE)))
    return found


def length_table(lengths: Sequence[Lengths]) -> list[list[str]]:
    """A row an arm under HEAD: mean and quantiles in tokens, the share that was cut."""
    rows = []
    for each in lengths:
        tokens = np.array(sorted((each.ended + each.cut).elements()))
        quantiles = np.quantile(tokens, (0.1, 0.5, 0.9), method="inverted_cdf")
        share = f"{each.cut_share.mean:.2%} [{each.cut_share.low:.2%}, {each.cut_share.high:.2%}]"
        rows.append([each.name, f"{tokens.mean():.2f}", *(f"{value:.0f}" for value in quantiles), share])
    return rows


def length_plot(lengths: Sequence[Lengths], path: Path) -> list[Path]:
    """A histogram an arm, as shares of its answers: ended in the arm's colour, those cut by the limit on top, in ink.

    Returns the files, or nothing where there is nothing to draw.
    """
    if not lengths:
        return []
    longest = max(max(each.ended + each.cut) for each in lengths)
    width = math.ceil(longest / MOST_BINS)
    edges = np.arange(0.5, longest + width + 0.5, width)
    colours = arm_colours([each.name for each in lengths])
    columns = min(COLUMNS, len(lengths))

    def draw(figure: Figure) -> None:
        axes = figure.subplots(math.ceil(len(lengths) / columns), columns, sharex=True, sharey=True, squeeze=False)
        for axis in axes.flatten()[len(lengths) :]:
            axis.set_visible(False)
        for axis, each in zip(axes.flatten(), lengths, strict=False):
            _bars(axis, each, edges, colours[each.name])
        axes[0, 0].set_ylim(0, 1.08 * axes[0, 0].get_ylim()[1])
        axes[0, 0].plot([], [], "s", color=INK, label="cut by the limit")
        figure.supxlabel("tokens of a sampled answer, EOS included", fontsize=10)
        figure.supylabel("share of the arm's answers", fontsize=10)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left")

    return save_figure(draw, path, height=0.9 + 1.9 * math.ceil(len(lengths) / columns))


def _bars(axis: Axes, each: Lengths, edges: np.ndarray, colour: str) -> None:
    total = (each.ended + each.cut).total()
    bottom = np.zeros(len(edges) - 1)
    for counts, fill in ((each.ended, colour), (each.cut, INK)):
        if counts:
            shares = np.histogram(list(counts), edges, weights=list(counts.values()))[0] / total
            axis.bar(edges[:-1], shares, width=np.diff(edges) * 0.9, bottom=bottom, color=fill, align="edge")
            bottom = bottom + shares
    axis.set_title(each.name)
    cut = f"{each.cut_share.mean:.2%} cut"
    axis.annotate(cut, (1, 1), xycoords="axes fraction", ha="right", va="top", fontsize=9, color=INK)
    axis.grid(axis="x", visible=False)
    axis.set_axisbelow(True)
    axis.locator_params(axis="x", integer=True, nbins=8)
