"""Lines, bars, matrices, histograms and regions: what every figure here is made of."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from moe_jax.reporting.plots.style import (
    COLOURS,
    HATCHES,
    LONGEST_NAME,
    MARKS,
    NARROW,
    Legend,
    Number,
    Plot,
    Size,
    colour,
    fitted,
)

# How a matrix is coloured: map, limits, and what its bar says where.
SCALES: dict[str, dict[str, Any]] = {
    "share": {"cmap": "cividis", "vmin": 0},  # light is much
    "signed": {"cmap": "RdBu_r"},  # blue below 0, red above
    "ratio": {"cmap": "RdBu_r", "vmin": -2, "vmax": 2},  # of log2: blue less than even, red more
}
AREAS = [*COLOURS[:6], "#F0E442", "#999999"]  # all of Okabe and Ito's, on which black is read
RATIOS = {-2: "≤ ¼", -1: "½", 0: "1", 1: "2", 2: "≥ 4"}


@dataclasses.dataclass(frozen=True)
class Curve:
    """A line. look: "line", "points", "both" or "dashed". band: lower and upper end, [2, n], drawn as a shade."""

    x: Any
    y: Any
    label: str | None = None
    look: str = "line"
    colour: int | str = 0  # a number of COLOURS, or any colour of matplotlib
    band: Any = None
    width: Number = 1.4
    mark: int | None = None  # a number of MARKS; by default that of the curve's place


def lines(
    curves: Sequence[Curve],
    x: str,
    y: str,
    title: str = "",
    note: str = "",
    size: Size = NARROW,
    level: Number | None = None,  # a dashed line across, at this height
    **axes_settings: Any,  # xscale="log", ylim=(0, 1), ...
) -> Plot:
    """Curves over one another."""
    legend = Legend([fitted(curve.label) for curve in curves if curve.label], size[0])

    def draw(figure: Any) -> None:
        axes, named = figure.subplots(), []
        for number, curve in enumerate(curves):
            ink = curve.colour if isinstance(curve.colour, str) else colour(curve.colour)
            mark = MARKS[(number if curve.mark is None else curve.mark) % len(MARKS)]
            looks: dict[str, dict[str, Any]] = {
                "line": {},
                "points": {"ls": "", "marker": mark, "ms": 3.5},
                "both": {"marker": mark, "ms": 3.5},
                "dashed": {"ls": (0, (3, 2))},
            }
            (line,) = axes.plot(curve.x, curve.y, color=ink, lw=curve.width, **looks[curve.look])
            named += [line] if curve.label else []
            if curve.band is not None:
                axes.fill_between(curve.x, *curve.band, color=ink, alpha=0.18, lw=0)
        if level is not None:
            axes.axhline(level, color=axes.xaxis.label.get_color(), lw=0.9, ls=(0, (4, 3)))
        axes.set(xlabel=x, ylabel=y, **axes_settings)
        legend.draw(figure, named)

    return Plot(draw, title, note, (size[0], size[1] + legend.height))


def bars(
    names: Sequence[str],
    values: Mapping[str, Any],
    x: str,
    title: str = "",
    note: str = "",
    size: Size | None = None,
    spread: Mapping[str, Any] | None = None,  # ends of intervals
    write: str | None = None,  # how to write values beside their bars, "{:.2f}"
    level: Number | None = None,  # a dashed line
    stacked: bool = False,
    **axes_settings: Any,
) -> Plot:
    """Lying bars: a row for each name, in it a bar for each of `values`, or one bar of all, stacked."""
    rows = len(names) * (1 if stacked else len(values))
    size = size or (NARROW[0], max(2.2, 0.9 + 0.2 * rows))
    legend = Legend([fitted(name) for name in values] if len(values) > 1 else [], size[0])

    def draw(figure: Any) -> None:
        axes, places, named = figure.subplots(), np.arange(len(names)), []
        height, left = 0.8 if stacked else 0.8 / len(values), np.zeros(len(names))
        ink = axes.xaxis.label.get_color()
        for number, (label, value) in enumerate(values.items()):
            value = np.asarray(value, float)
            at = places if stacked else places + (number + 0.5) * height - 0.4
            look: dict[str, Any] = {"color": colour(number), "hatch": HATCHES[number % len(HATCHES)]}
            drawn = axes.barh(at, value, height * 0.92, left=left, edgecolor=ink, linewidth=0.3, **look)
            named.append(drawn)
            if stacked:
                left = left + np.nan_to_num(value)
            if write and (not stacked or number == len(values) - 1):
                shown = left if stacked else value
                axes.bar_label(drawn, ["" if np.isnan(v) else write.format(v) for v in shown], padding=3)
            if spread and label in spread:
                for place, ends in zip(at, np.asarray(spread[label]).T, strict=True):
                    axes.plot(ends, [place, place], color=ink, lw=1)
        axes.set_yticks(places, [fitted(name) for name in names])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        if write:
            axes.margins(x=0.14)
        if level is not None:
            axes.axvline(level, color=ink, lw=0.9, ls=(0, (4, 3)))
        axes.set(xlabel=x, **axes_settings)
        legend.draw(figure, named)

    return Plot(draw, title, note, (size[0], size[1] + legend.height))


def matrices(
    panels: Mapping[str, Float[np.ndarray, "_ _"]],
    x: str,
    y: str,
    label: str,
    scale: str = "share",
    title: str = "",
    note: str = "",
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    across: int = 3,
    size: Size | None = None,
    extent: tuple[Number, Number, Number, Number] | None = None,  # as in matplotlib's imshow
    limit: Number | None = None,  # the end of the scale; by default the largest value
    write: str | Callable[[float], str] | None = None,  # how to write every value into its field: "{:.2f}", a function
) -> Plot:
    """Heat maps that share a scale: "share" from 0, "signed" around 0, "ratio" around 1, in powers of two."""
    arrays = [np.asarray(panel, float) for panel in panels.values()]
    if scale == "ratio":
        shown = [np.log2(np.maximum(a, 1e-9)) for a in arrays]
    else:
        shown = arrays
    across = min(across, len(panels))
    down = -(-len(panels) // across)
    look = dict(SCALES[scale])
    if scale != "ratio":
        finite = np.concatenate([a[np.isfinite(a)] for a in shown] + [np.zeros(1)])
        look["vmax"] = limit or float(np.abs(finite).max()) or 1.0
        look["vmin"] = 0 if scale == "share" else -look["vmax"]
    tall = max(min(0.16 * max(len(a) for a in arrays) + 0.9, 4.2), 1.7)

    def draw(figure: Any) -> None:
        grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
        image = None
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, name, array, values in zip(grid.flat, panels, shown, arrays, strict=False):
            axes.grid(False)
            image = axes.imshow(array, aspect="auto", interpolation="nearest", extent=extent, **look)
            if name:
                axes.set_title(fitted(name))
            for axis, words, room in ((axes.xaxis, columns, LONGEST_NAME // 2), (axes.yaxis, rows, LONGEST_NAME)):
                if words is not None:
                    axis.set_ticks(range(len(words)), [fitted(word, room) for word in words])
                elif extent is None or axis is axes.yaxis:
                    axis.get_major_locator().set_params(integer=True)
            if columns is not None and max(map(len, columns), default=0) > 3:
                axes.tick_params(axis="x", rotation=40)
            for (i, j), value in np.ndenumerate(values) if write else ():
                dark = scale == "share" and array[i, j] < 0.6 * look["vmax"]
                dark |= scale != "share" and abs(array[i, j]) > 0.6 * look["vmax"]
                words = write(value) if callable(write) else f"{write}".format(value)
                axes.text(j, i, words, ha="center", va="center", fontsize=7.5, color="w" if dark else "k")
        figure.supxlabel(x, fontsize=9.5)
        figure.supylabel(y, fontsize=9.5)
        bar = figure.colorbar(image, ax=grid, label=label, pad=0.01)
        bar.outline.set_visible(False)
        if scale == "ratio":
            bar.set_ticks(list(RATIOS), labels=list(RATIOS.values()))

    return Plot(draw, title, note, size or (min(1.6 + 3.4 * across, 11.4), 0.5 + tall * down))


def histogram(
    values: Mapping[str, Any],
    x: str,
    title: str = "",
    note: str = "",
    bins: int = 40,
    size: Size = NARROW,
) -> Plot:
    """Draws histograms as outlines over one another; each adds up to 1."""
    legend = Legend([fitted(name) for name in values] if len(values) > 1 else [], size[0])

    def draw(figure: Any) -> None:
        axes, named = figure.subplots(), []
        finite = {name: np.asarray(v, float)[np.isfinite(v)] for name, v in values.items()}
        every = np.concatenate([*finite.values(), np.zeros(0)])
        edges = np.histogram_bin_edges(every, bins) if every.size else np.linspace(0, 1, bins + 1)
        for number, own in enumerate(finite.values()):
            share = np.histogram(own, edges)[0] / max(own.size, 1)
            named.append(axes.stairs(share, edges, color=colour(number), lw=1.4))
            axes.stairs(share, edges, color=colour(number), alpha=0.12, fill=True)
        axes.set(xlabel=x, ylabel="share")
        legend.draw(figure, named)

    return Plot(draw, title, note, (size[0], size[1] + legend.height))


def regions(
    panels: Mapping[str, Int[np.ndarray, "_ _"]],
    extent: tuple[Number, Number, Number, Number],  # left, right, bottom, top
    points: Float[np.ndarray, "_ 2"] | None = None,
    across: int = 4,
    title: str = "",
    note: str = "",
) -> Plot:
    """Numbers on a plane, each written in its region (row 0 is at the bottom), blank below 0; circles on points."""
    across = min(across, len(panels))
    down = -(-len(panels) // across)

    def draw(figure: Any) -> None:
        from matplotlib.colors import ListedColormap

        grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (name, array) in zip(grid.flat, panels.items(), strict=False):
            axes.grid(False)
            look = {"cmap": ListedColormap(AREAS), "vmin": -0.5, "vmax": len(AREAS) - 0.5, "interpolation": "nearest"}
            axes.imshow(np.where(array < 0, np.nan, array % len(AREAS)), extent=extent, origin="lower", **look)
            for number in np.unique(array[array >= 0]):
                row, column = inside(array == number)
                x = extent[0] + (column + 0.5) / array.shape[1] * (extent[1] - extent[0])
                y = extent[2] + (row + 0.5) / array.shape[0] * (extent[3] - extent[2])
                axes.text(x, y, str(number), ha="center", va="center", fontsize=8, color="black")
            if points is not None:
                axes.scatter(*points.T, s=120, facecolors="none", edgecolors="black", linewidths=1)
            axes.set_title(fitted(name))

    return Plot(draw, title, note, (11.4, 0.4 + 2.9 * down))


def inside(area: Bool[np.ndarray, "_ _"]) -> tuple[int, int]:
    """A field (row, column) of an area, far from its edge: one of the last that are left if edges are peeled."""
    while area.any():
        left, padded = area, np.pad(area, 1)
        area = area & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    rows, columns = np.nonzero(left)
    return int(rows[len(rows) // 2]), int(columns[len(rows) // 2])
