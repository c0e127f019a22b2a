"""Figures as Markdown tables, and as a plot."""

import pathlib
from collections.abc import Sequence
from typing import Any

from experiments.bench.record import PASSES, Row
from experiments.bench.stages import STAGES
from experiments.routing_zoo.present import lines
from moe_jax.reporting.plots.style import BLACK, HATCHES, Legend, Plot, colour

MiB = 2**20
HEADS = (
    *("shape", "routing", "dispatch", "max/mean load", "kept"),
    *("forward, ms", "dense", "ratio", "quartiles"),
    *("with backward, ms", "dense", "ratio", "quartiles"),
    *("compile, s", "dense", "temp., MiB", "dense", "TFLOP/s", "FLOPs done/useful", "weights, MiB", "matmuls alone"),
)


def table(rows: Sequence[Row]) -> str:
    """A line for every row: medians, ratios and their quartiles."""
    return lines(HEADS, [cells(row) for row in rows], left=(0, 1, 2))


def cells(row: Row) -> list[str]:
    found = [row["shape"], row["routing"], f"`{row['dispatch']}`", f"{row['load']:.2f}", f"{row['kept']:.1%}"]
    for what in PASSES:
        times = row[what]
        low, high = times["tau_spread"]
        found += [number(times["layer_ms"][1]), number(times["dense_ms"][1])]
        found += [f"**{times['tau']:.2f}**", f"{low:.2f} to {high:.2f}"]
    found += [f"{sum(row['compile_seconds'][which]):.1f}" for which in ("layer", "dense")]
    found += [mebibytes(row["temp_bytes"][which]) for which in ("layer", "dense")]
    useful = row["flops"]["useful"]
    found += [number(useful / row["forward"]["layer_ms"][1] / 1e9)]
    found += [f"{row['flops']['done'] / useful:.2f}" if useful else "-", mebibytes(row["weight_bytes"])]
    least = row.get("batched")
    return [*found, " / ".join(f"{least[what]:.2f}" for what in PASSES) if least else "-"]


def stage_table(rows: Sequence[Row]) -> str:
    """Milliseconds of each stage alone, forward and with backward, and of the layer."""
    heads = ["shape", "routing", "dispatch", *(f"{stage}, ms" for stage in (*STAGES, "layer"))]
    found = []
    for row in rows:
        parts = [row["stages"].get(stage) for stage in STAGES]
        layer = " / ".join(number(row[what]["layer_ms"][1]) for what in PASSES)
        times = ["-" if part is None else " / ".join(number(part[what][1]) for what in PASSES) for part in parts]
        found.append([row["shape"], row["routing"], f"`{row['dispatch']}`", *times, layer])
    return lines(heads, found, left=(0, 1, 2))


def number(ms: float) -> str:
    """Formats milliseconds with three digits."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def mebibytes(n: int | None) -> str:
    return "-" if n is None else f"{n / MiB:,.0f}" if n >= 10 * MiB else f"{n / MiB:.1f}"


def plot(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """Bars of the ratio by shape and dispatcher, a panel for each routing and pass; strokes between quartiles."""
    routings = list(dict.fromkeys(row["routing"] for row in rows))
    shapes = list(dict.fromkeys(row["shape"] for row in rows))

    def draw(figure: Any) -> None:
        panels = figure.subplots(len(routings), len(PASSES), sharey=True, squeeze=False)
        for i, routing in enumerate(routings):
            for j, (what, words) in enumerate(PASSES.items()):
                bars(panels[i, j], [row for row in rows if row["routing"] == routing], what, shapes)
                panels[i, j].set_title(f"{routing}, {words}", loc="left")
            panels[i, 0].set_ylabel("time / dense baseline's")
        artists, labels = panels[0, 0].get_legend_handles_labels()
        Legend(labels, size[0]).draw(figure, artists)

    size = max(7.5, 2 + 1.1 * len(shapes) * len(PASSES)), 1 + 2.3 * len(routings)
    Plot(draw, size=size).save(path)


def bars(axes: Any, rows: Sequence[Row], what: str, shapes: Sequence[str]) -> None:
    names = list(dict.fromkeys(row["dispatch"] for row in rows))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        own_rows = [row for row in rows if row["dispatch"] == name]
        style = {"color": colour(i), "hatch": HATCHES[i % len(HATCHES)], "edgecolor": "white"}
        at = [shapes.index(row["shape"]) + (i + 0.5) * width - 0.4 for row in own_rows]
        axes.bar(at, [row[what]["tau"] for row in own_rows], width, label=name, **style)
        for x, row in zip(at, own_rows, strict=True):
            axes.plot([x, x], row[what]["tau_spread"], color=BLACK, lw=1)
    axes.axhline(1, color=BLACK, lw=0.9, ls=(0, (4, 3)))
    axes.set_xticks(range(len(shapes)), shapes, rotation=30, ha="right")
