"""A run in progress, from its `metrics.jsonl`: its view in a terminal."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from moe_jax.reporting.metrics import FILE, curve, duration, last, read

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 60  # characters of a curve


def follow(workdir: str | Path, every: float = 1.0) -> Iterator[list[dict]]:
    """The records of a run, now and after every change of its log, until it has ended.

    ValueError where there is no log. A resumed run may remove records.
    """
    path, known = Path(workdir) / FILE, None
    while True:
        records = read(workdir)
        state = path.stat()
        if (now := (state.st_size, state.st_mtime_ns)) != known:
            known = now
            yield records
        if last(records, "end"):
            return
        time.sleep(every)


def sparkline(values: Any, width: int = WIDTH) -> str:
    """A curve as one line of characters: means of equal parts, low to high; a blank where nothing is finite."""
    every = np.asarray(values, float)
    if not every.size:
        return ""
    parts = np.array_split(every, min(width, every.size))
    means = np.array([np.mean(p[np.isfinite(p)]) if np.isfinite(p).any() else np.nan for p in parts])
    low, high = (np.nanmin(means), np.nanmax(means)) if np.isfinite(means).any() else (0.0, 0.0)
    scaled = (means - low) / (high - low) if high > low else means * 0
    return "".join(" " if np.isnan(s) else BLOCKS[min(int(s * len(BLOCKS)), len(BLOCKS) - 1)] for s in scaled)


def load_bars(load_E: Any) -> str:
    """The load of each expert as one character: a full block is twice an even share or more."""
    times_mean = np.asarray(load_E, float) * len(load_E)
    levels = np.clip(times_mean / 2 * len(BLOCKS), 0, len(BLOCKS) - 1)
    return "".join("·" if share == 0 else BLOCKS[int(level)] for share, level in zip(times_mean, levels, strict=True))


def view(records: list[dict], total: int | None = None, now: float | None = None) -> Group:
    """The newest state of a run: progress, curves, a line for each MoE layer. now: seconds since the last record."""
    train, held_out, ended = (last(records, kind) for kind in ("train", "eval", "end"))
    step = max((r["step"] for r in records), default=0)
    head = f"step {step:,}" + (f" of {total:,}" if total else "")
    if seconds := max((r["seconds"] for r in records if r.get("seconds") is not None), default=0.0):
        head += f", {duration(seconds)}"
        if total and step and not ended:
            head += f", {duration(seconds / step * max(total - step, 0))} left"
    head += ", ended" if ended else f", nothing new for {duration(now)}" if now and now > 60 else ""
    parts: list[Any] = [Text(head, style="bold")]
    parts += [curves(records)] if train or held_out else [Text("no step yet")]
    if (moe := train.get("moe")) and "load" in moe:
        parts.append(layer_lines(moe))
    return Group(*parts)


def curves(records: list[dict]) -> Table:
    """Losses, drops and speed so far."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for words, key, kind, form in (
        ("loss", "loss", "train", "{:.4f}"),
        ("held-out", "loss", "eval", "{:.4f}"),
        ("with capacity", "loss_capacity", "eval", "{:.4f}"),
        ("dropped", "drop_rate", "train", "{:.2%}"),
        ("tokens/s", "tokens_per_second", "train", "{:,.0f}"),
    ):
        values = curve(records, key, kind)[1]
        if values.size:
            table.add_row(words, form.format(values[-1]), sparkline(values))
    return table


def layer_lines(moe: dict[str, Any]) -> Table:
    """A line for each MoE layer: load of its experts, drops, entropy, dead ones."""
    table = Table(box=None, pad_edge=False)
    for head in ("layer", "load of experts", "max/mean", "dropped", "entropy", "dead"):
        table.add_column(head, justify="left" if head == "load of experts" else "right", no_wrap=True)
    for n, name in enumerate(moe["layer"]):
        load_E = np.array([np.nan if v is None else v for v in moe["load"][n]], float)
        cells = [f"{np.nanmax(load_E) * len(load_E):.2f}"]
        for key, form in (("drop_rate", "{:.2%}"), ("router_entropy", "{:.3f}"), ("dead_experts", "{:.0f}")):
            value = moe.get(key, [None] * (n + 1))[n]
            cells.append("-" if value is None else form.format(value))
        table.add_row(str(name), load_bars(np.nan_to_num(load_E)[:96]), *cells)
    return table
