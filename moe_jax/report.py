"""The report of a run: one static HTML page, everything inside it, written from `metrics.jsonl` alone."""

import html
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.metrics import curve, last, read, summary_rows

FILE = "report.html"
INK = "#123456"  # stands for the page's text colour in a figure, so that one page serves light and dark
COLOURS = ["#3b82c4", "#d9722e", "#3f9e6e", "#a769c9", "#c2a02b", "#8c8c8c"]  # legible on white and on black
STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "moe_jax",  # the same run gives the same page
}
Runs = dict[str, list[dict]]  # records by name of the run, the reported one first


def write_report(workdir: str | Path, config_text: str, others: Mapping[str, str | Path] | None = None) -> Path:
    """Writes and returns `workdir`/report.html; `others` (name -> workdir) are laid over the loss curves.

    Raises ValueError where a run has no log.
    """
    workdir = Path(workdir)
    name = workdir.resolve().name
    runs: Runs = {name: read(workdir)}
    for other, directory in (others or {}).items():
        runs[other if other != name else f"{other} (other)"] = read(directory)
    body = [_summary(runs), *_figures(runs), _config(config_text)] if runs[name] else ["<p>no records yet</p>"]
    page = PAGE.replace("TITLE", html.escape(name)).replace("BODY", "\n".join(body))
    written = workdir / f"{FILE}.part"
    written.write_text(page, encoding="utf-8")
    return written.replace(workdir / FILE)


def _summary(runs: Runs) -> str:
    """A row per quantity, a column per run."""
    columns = [dict(summary_rows(records)) for records in runs.values()]
    words = list(dict.fromkeys(word for column in columns for word in column))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in runs) if len(runs) > 1 else ""
    rows = "".join(
        f"<tr><th>{word}</th>" + "".join(f"<td>{column.get(word, '-')}</td>" for column in columns) + "</tr>"
        for word in words
    )
    return f"<table>{'<tr><th></th>' + head + '</tr>' if head else ''}{rows}</table>"


def _config(text: str) -> str:
    return f"<details><summary>Resolved config</summary><pre>{html.escape(text)}</pre></details>"


def _figures(runs: Runs) -> list[str]:
    """The figures of the page, without those the run has no numbers for."""
    import matplotlib

    records = next(iter(runs.values()))
    note = "lighter: train, points: held-out"
    if "loss_capacity" in last(records, "eval"):
        note += ", dashed: held-out with capacity"
    with matplotlib.rc_context(STYLE):
        figures = [
            figure_of("Loss", note, _losses, runs, "step"),
            figure_of("Loss by wall time", "the same curves, by what they cost", _losses, runs, "seconds"),
        ]
        if curve(records, "moe.load")[0].size:
            figures += _moe_figures(records)
        if last(records, "eval").get("loss_by_domain"):
            figures.append(figure_of("Held-out loss by domain", "at the last evaluation", _domains, runs))
    return figures


def _moe_figures(records: list[dict]) -> list[str]:
    panels = [
        ("Dropped choices", "fraction of the choices without a slot", "drop_rate", "fraction dropped"),
        ("Load, busiest expert over mean", "1 is balanced", "load_max_over_mean", "max load / mean load"),
        ("Dead experts", "experts that nobody chose", "dead_experts", "experts"),
        ("Router entropy", "of the router's distribution, per token", "router_entropy", "nats"),
    ]
    shown = {"layer", "load", "load_cv", *(key for _, _, key, _ in panels)}
    rest = [key for key in last(records, "train").get("moe", {}) if key not in shown]
    panels += [(key.replace("_", " ").capitalize(), "unweighted", key, "per layer") for key in rest]
    note = "choices per expert over the mean of its layer, blue: few, red: many"
    figures = [figure_of("Expert load", note, _loads, records, wide=True)]
    for title, note, key, unit in panels:
        if curve(records, f"moe.{key}")[1].ndim == 2:
            figures.append(figure_of(title, note, _layers, records, key, unit))
    if curve(records, "aux_loss")[0].size:
        note = "with coefficients, mean over layers, as added to the loss"
        figures.append(figure_of("Auxiliary loss", note, _auxiliary, records))
    return figures


def figure_of(title: str, note: str, draw: Callable[..., None], *arguments: Any, wide: bool = False) -> str:
    """One <figure>, its SVG inline; `draw` gets an empty matplotlib figure and the arguments."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.4, 3) if wide else (5.6, 3.1), layout="constrained")  # no pyplot, no global state
    draw(figure, *arguments)
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = svg.getvalue()[svg.getvalue().index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # ids would repeat from figure to figure
    kind = ' class="wide"' if wide else ""
    return f"<figure{kind}><figcaption>{title}<span>{html.escape(note)}</span></figcaption>{text}</figure>"


# ---- what is drawn


def _losses(figure, runs: Runs, over: str) -> None:
    """Train, held-out and capacity-limited loss of every run; `over` is "step" or "seconds"."""
    axes = figure.subplots()
    longest = max((r.get("seconds") or 0.0 for records in runs.values() for r in records), default=0.0)
    scale, unit = (3600, "hours") if longest > 7200 else (60, "minutes") if longest > 120 else (1, "seconds")
    every = []
    for number, (name, records) in enumerate(runs.items()):
        colour = COLOURS[number % len(COLOURS)]
        for kind, key, look in (
            ("train", "loss", {"lw": 1, "alpha": 0.55}),
            ("eval", "loss", {"lw": 1.6, "marker": "o", "ms": 3.5, "label": name}),
            ("eval", "loss_capacity", {"lw": 1.2, "ls": (0, (3, 2))}),
        ):
            x, y = _line(records, key, kind, over)
            every.append(y)
            x = x / scale if over == "seconds" else x
            axes.plot(x, _smooth(y) if kind == "train" else y, color=colour, **look)
    values = np.concatenate(every)
    values = values[np.isfinite(values)]
    if values.size > 50:  # the first steps would flatten the rest
        axes.set_ylim(top=np.percentile(values, 97) * 1.02)
    axes.set(xlabel="step" if over == "step" else f"wall time, {unit}", ylabel="loss, nats per token")
    if len(runs) > 1:
        axes.legend()


def _line(records: list[dict], key: str, kind: str, over: str) -> tuple[np.ndarray, np.ndarray]:
    """(x, y), x the step or the seconds of each record that has the key."""
    holding = [r for r in records if r["kind"] == kind and key in r]
    return curve(holding, over, kind)[1], curve(holding, key, kind)[1]


def _smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over 2 % of a long curve; short ones as they are."""
    width = len(values) // 50
    if width < 2:
        return values
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def _loads(figure, records: list[dict]) -> None:
    """One heat map per MoE layer: experts by steps."""
    steps, load = curve(records, "moe.load")  # [n, layers, E]
    names = last(records, "train")["moe"]["layer"]
    layers, experts = load.shape[1:]
    columns = min(layers, 3)
    rows = -(-layers // columns)
    figure.set_size_inches(11.4, 0.6 + 1.9 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    times_mean = np.log2(np.maximum(load * experts, 1e-9))
    image = None
    for number, axes in enumerate(grid.flat):
        axes.grid(False)
        axes.set_visible(number < layers)
        if number < layers:
            extent = (steps[0], max(steps[-1], steps[0] + 1), experts - 0.5, -0.5)
            look = {"cmap": "RdBu_r", "vmin": -2, "vmax": 2, "aspect": "auto", "interpolation": "nearest"}
            image = axes.imshow(times_mean[:, number].T, extent=extent, **look)
            axes.set_title(f"layer {names[number]}")
            axes.yaxis.get_major_locator().set_params(integer=True)
    figure.supxlabel("step", fontsize=9.5)
    figure.supylabel("expert", fontsize=9.5)
    bar = figure.colorbar(image, ax=grid, ticks=[-2, -1, 0, 1, 2], label="load / mean", pad=0.01)
    bar.ax.set_yticklabels(["≤ ¼", "½", "1", "2", "≥ 4"])
    bar.outline.set_visible(False)


def _layers(figure, records: list[dict], key: str, unit: str) -> None:
    """A line per MoE layer, early ones dark and late ones light."""
    import matplotlib

    axes = figure.subplots()
    steps, values = curve(records, f"moe.{key}")  # [n, layers]
    names = last(records, "train")["moe"]["layer"]
    colours = matplotlib.colormaps["plasma"](np.linspace(0.38, 0.8, len(names)))
    for number, name in enumerate(names):
        label = f"layer {name}" if len(names) <= 6 or number in (0, len(names) - 1) else None
        axes.plot(steps, _smooth(values[:, number]), color=colours[number], lw=1.2, label=label)
    axes.set(xlabel="step", ylabel=unit)
    axes.legend()
    if unit == "experts":
        axes.set_ylim(0, max(1.0, np.nanmax(values, initial=0.0)) * 1.05)
        axes.yaxis.get_major_locator().set_params(integer=True)
    elif unit != "per layer":
        axes.set_ylim(bottom=0)


def _auxiliary(figure, records: list[dict]) -> None:
    axes = figure.subplots()
    steps, values = curve(records, "aux_loss")
    axes.plot(steps, _smooth(values), color=COLOURS[0], lw=1.2)
    axes.set(xlabel="step", ylabel="nats per token")


def _domains(figure, runs: Runs) -> None:
    """Bars of the last held-out loss of each domain, of every run that has it."""
    axes = figure.subplots()
    tables = {name: last(records, "eval").get("loss_by_domain", {}) for name, records in runs.items()}
    domains = list(next(iter(tables.values())))
    height = 0.8 / len(tables)
    for number, (name, table) in enumerate(tables.items()):
        values = [np.nan if table.get(domain) is None else table[domain] for domain in domains]
        places = np.arange(len(domains)) + number * height
        bars = axes.barh(places, values, height * 0.9, color=COLOURS[number % len(COLOURS)], label=name)
        axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.set_yticks(np.arange(len(domains)) + 0.4 - height / 2, domains)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    axes.set_xlabel("loss, nats per token")
    if len(tables) > 1:
        axes.legend()


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>TITLE</title>
<style>
:root { color-scheme: light dark; --ink: #1f2328; --soft: #6a737d; --line: #d8dee4; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dfe3e8; --soft: #98a1ab; --line: #363c44; --page: #15181c; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
       max-width: 1120px; margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; font-weight: 600; }
main { display: grid; grid-template-columns: 1fr 1fr; gap: 2rem 2rem; }
main > * { grid-column: 1 / -1; margin: 0; min-width: 0; }
figure:not(.wide) { grid-column: auto; }
@media (max-width: 800px) { figure:not(.wide) { grid-column: 1 / -1; } }
figcaption { font-weight: 600; margin-bottom: .4rem; }
figcaption span { font-weight: 400; color: var(--soft); margin-left: .6rem; font-size: .87rem; }
svg { width: 100%; height: auto; } svg text { font-family: system-ui, sans-serif !important; }
table { border-collapse: collapse; justify-self: start; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem 2rem .22rem 0; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child { text-align: left; font-weight: 400; color: var(--soft); }
pre { overflow-x: auto; font-size: .84rem; } summary { cursor: pointer; font-weight: 600; }
</style></head>
<body><h1>TITLE</h1><main>
BODY
</main></body></html>
"""
