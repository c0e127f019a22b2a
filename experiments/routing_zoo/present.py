"""Results of a sweep: a table for the terminal, the same in Markdown, and a plot."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.table

from experiments.routing_zoo.sweep import ranked, summaries
from experiments.routing_zoo.zoo import DENSE
from moe_jax.reporting.plots.style import BLACK, COLOURS, Legend, Plot

# A colour and a marker for each, so that colour is not the only distinction.
LOOKS = {
    "gate": (COLOURS[0], "o", "learned gate"),
    "fixed": (COLOURS[1], "s", "nothing learned"),
    DENSE: (BLACK, "D", "dense baseline"),
}
# Heading, key, format.
COLUMNS = (
    ("held-out loss", "loss", "{:.4f}"),
    ("bits/byte", "bits_per_byte", "{:.3f}"),
    ("with capacity", "loss_capacity", "{:.4f}"),
    ("dropped", "drop_rate_capacity", "{:.1%}"),
    ("load CV", "load_cv", "{:.2f}"),
    ("load entropy", "load_entropy", "{:.2f}"),
    ("experts", "active_experts", "{:.2f}"),
    ("FLOPs", "active_flops", "{:.2f}"),
    ("ms/step", "ms_per_step", "{:.0f}"),
)


def rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row for each contestant, the best first."""
    summary = summaries(results)
    router = {r["contestant"]: r["router"] for r in results}
    found = []
    for rank, name in enumerate(ranked(results), 1):
        cells = [cell(form, *summary[name][key]) for _, key, form in COLUMNS]
        seeds = sum(r["contestant"] == name for r in results)
        found.append([str(rank), name, router[name], *cells, str(seeds)])
    return found


def cell(form: str, mean: float, deviation: float) -> str:
    """A mean, and for losses with several seeds the standard deviation; "-" for none."""
    if math.isnan(mean):
        return "-"
    show_deviation = form == "{:.4f}" and not math.isnan(deviation)
    return form.format(mean) + (f" ± {deviation:.4f}" if show_deviation else "")


def heads() -> list[str]:
    return ["", "name", "router", *(head for head, _, _ in COLUMNS), "seeds"]


def table(results: Sequence[dict[str, Any]]) -> rich.table.Table:
    shown = rich.table.Table(box=None, pad_edge=False)
    for number, head in enumerate(heads()):
        shown.add_column(head, justify="left" if number in (1, 2) else "right", no_wrap=number != 2)
    for row in rows(results):
        shown.add_row(*row)
    return shown


def markdown(results: Sequence[dict[str, Any]]) -> str:
    code = [[*row[:2], f"`{row[2]}`", *row[3:]] for row in rows(results)]
    return lines(heads(), code, left=(1, 2))


def lines(heads: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """A Markdown table, the columns `left` to the left, the others to the right."""
    rule = ["---" if number in left else "---:" for number in range(len(heads))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, rule, *rows)) + "\n"


# ---------------------------------------------------------------- the plot


def plot(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """Held-out loss by contestant, a point for each seed; and over the time of a step, by rank."""
    names = [name for name in ranked(results) if not math.isnan(summaries(results)[name]["loss"][0])]

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1), sharex=True)
        draw_losses(left, names, results)
        draw_times(right, names, results)
        artists, labels = left.get_legend_handles_labels()
        Legend(labels, 11).draw(figure, artists)

    Plot(draw, size=(11, 1.8 + 0.21 * len(names))).save(path)


def draw_losses(axes: Any, names: Sequence[str], results: Sequence[dict[str, Any]]) -> None:
    """A row for each contestant: its seeds as points, their mean as a stroke; the dense baseline's mean as a line."""
    means = {name: summary["loss"][0] for name, summary in summaries(results).items()}
    for kind, (colour, marker, label) in LOOKS.items():
        points = [r for r in results if r["kind"] == kind and r["contestant"] in names]
        ranks = [names.index(r["contestant"]) for r in points]
        style = {"s": 26, "color": colour, "marker": marker, "alpha": 0.75, "linewidths": 0, "zorder": 3}
        if points:
            axes.scatter([r["loss"] for r in points], ranks, label=label, **style)
    for rank, name in enumerate(names):
        if sum(r["contestant"] == name for r in results) > 1:
            axes.plot([means[name]] * 2, [rank - 0.38, rank + 0.38], color=BLACK, lw=1.4, zorder=4)
    if DENSE in names:
        axes.axvline(means[DENSE], color=BLACK, lw=0.9, ls=(0, (4, 3)))
    axes.set_yticks(range(len(names)), [f"{name}  {rank}" for rank, name in enumerate(names, 1)])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set(xlabel="held-out loss, nats per byte, nothing dropped")
    axes.set_title("by router: points are seeds, strokes their means", loc="left")


def draw_times(axes: Any, names: Sequence[str], results: Sequence[dict[str, Any]]) -> None:
    """Each contestant at its mean loss and time, marked with its rank."""
    summary = summaries(results)
    kinds = {r["contestant"]: r["kind"] for r in results}
    for rank, name in enumerate(names, 1):
        colour, marker, _ = LOOKS[kinds[name]]
        at = summary[name]["loss"][0], summary[name]["ms_per_step"][0]
        axes.scatter(*at, s=26, color=colour, marker=marker, alpha=0.75, linewidths=0, zorder=3)
        axes.annotate(str(rank), at, xytext=(4, 3), textcoords="offset points", fontsize=8)
    axes.set(xlabel="held-out loss, nats per byte, nothing dropped", ylabel="milliseconds per training step")
    axes.set_title("by the time of a step: numbers are the ranks on the left", loc="left")
