"""Figures of a run, from the records of its `metrics.jsonl`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.reporting.formulas import LOSS, METRICS
from moe_jax.reporting.metrics import curve, last
from moe_jax.reporting.plots.charts import Curve, bars, lines, matrices
from moe_jax.reporting.plots.style import COLOURS, WIDE, Plot

Runs = Mapping[str, list[dict]]  # records by name of the run, the reported one first


def losses(runs: Runs, over: str = "step") -> Plot:
    """Train, held-out and capacity-limited loss of every run; `over` is "step" or "seconds"."""
    unit, drawn = _Time(runs.values()), list[Curve]()
    for number, (name, records) in enumerate(runs.items()):
        evaluated = np.isfinite(curve(records, "loss", "eval")[1]).any()
        label = name if len(runs) > 1 else None
        for kind, key, look in (
            ("train", "loss", {"width": 0.8, "label": None if evaluated else label}),
            ("eval", "loss", {"width": 1.6, "look": "both", "label": label}),
            ("eval", "loss_capacity", {"width": 1.2, "look": "dashed"}),
        ):
            x, y = _loss(records, key, kind, over, unit)
            if np.isfinite(y).any():
                drawn.append(Curve(x, y, colour=number, **look))
    note = f"{LOSS}; thin: train, marks: held-out"
    if any("loss_capacity" in last(records, "eval") for records in runs.values()):
        note += ", dashed: held-out with capacity"
    return _losses(drawn, over, unit, note)


def compared_losses(groups: Mapping[str, Sequence[list[dict]]], over: str = "step") -> Plot:
    """Train and held-out loss of groups of runs, a colour for each group; `over` is "step" or "seconds"."""
    import matplotlib

    unit, drawn = _Time(records for group in groups.values() for records in group), list[Curve]()
    shades = matplotlib.colormaps["plasma"](np.linspace(0.25, 0.85, len(groups)))
    for number, (name, group) in enumerate(groups.items()):
        colour = number if len(groups) <= len(COLOURS) else matplotlib.colors.to_hex(shades[number])
        for i, records in enumerate(group):
            label = name if i == 0 else None
            drawn.append(Curve(*_loss(records, "loss", "train", over, unit), width=0.7, colour=colour))
            held_out = _loss(records, "loss", "eval", over, unit)
            drawn.append(Curve(*held_out, label, "both", colour, width=1.6, mark=number))
    size = (WIDE[0], max(4.2, 0.6 + 0.2 * len(groups)))  # room for the legend
    return _losses(drawn, over, unit, "thin: train, marks: held-out", size=size)


class _Time:
    """The unit in which the longest of some runs is read best."""

    def __init__(self, runs: Iterable[list[dict]]):
        longest = max((r.get("seconds") or 0.0 for records in runs for r in records), default=0.0)
        self.seconds, self.name = (
            (3600, "hours") if longest > 7200 else (60, "minutes") if longest > 120 else (1, "seconds")
        )


def _loss(records: list[dict], key: str, kind: str, over: str, unit: _Time) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of a loss, that of training smoothed."""
    x, y = _line(records, key, kind, over)
    return x / unit.seconds if over == "seconds" else x, smooth(y) if kind == "train" else y


def _losses(drawn: Sequence[Curve], over: str, unit: _Time, note: str, **look: Any) -> Plot:
    values = np.concatenate([curve.y for curve in drawn] + [np.zeros(0)])
    values = values[np.isfinite(values)]
    if values.size > 50:  # the first steps would flatten the rest
        look |= {"ylim": (values.min() - 0.03 * np.ptp(values), np.percentile(values, 97) * 1.02)}
    if over == "seconds":
        words = f"wall time, {unit.name}", "loss, nats per token", "Loss by wall time", "the same, by what they cost"
        return lines(drawn, *words, **look)
    return lines(drawn, "step", "loss, nats per token", "Loss", note, **look)


def loads(records: list[dict]) -> Plot:
    """One heat map per MoE layer: experts by steps."""
    steps, load = curve(records, "moe.load")  # [n, layers, E]
    names = last(records, "train")["moe"]["layer"]
    E = load.shape[-1]
    extent = (steps[0], max(steps[-1], steps[0] + 1), E - 0.5, -0.5)
    panels = {f"layer {name}": load[:, i].T * E for i, name in enumerate(names)}
    note = f"{METRICS['load'].formula}; over the mean of its layer, blue: few, red: many"
    across = min(len(names), 3)
    size = (WIDE[0], 0.6 + 1.9 * -(-len(names) // across))
    return matrices(
        panels, "step", "expert", "load / mean", "ratio", "Expert load", note, extent=extent, across=across, size=size
    )


def layers(records: list[dict], key: str, title: str, note: str = "", unit: str = "per layer") -> Plot:
    """A line per MoE layer, early ones dark and late ones light."""
    import matplotlib

    steps, values = curve(records, f"moe.{key}")  # [n, layers]
    names = last(records, "train")["moe"]["layer"]
    shades = matplotlib.colormaps["plasma"](np.linspace(0.38, 0.8, len(names)))
    measured = [i for i in range(len(names)) if np.isfinite(values[:, i]).any()]
    drawn = []
    for i in measured:
        label = f"layer {names[i]}" if len(measured) <= 6 or i in (measured[0], measured[-1]) else None
        drawn.append(Curve(steps, smooth(values[:, i]), label, width=1.2, colour=matplotlib.colors.to_hex(shades[i])))
    settings: dict[str, Any] = {}
    if unit == "experts":
        settings["ylim"] = (0, max(1.0, np.nanmax(values, initial=0.0)) * 1.05)
    elif unit not in ("per layer", "unweighted"):
        settings["ylim"] = (0, max(1e-9, np.nanmax(values, initial=0.0)) * 1.05)
    return lines(drawn, "step", unit, title, note, **settings)


def auxiliary(records: list[dict], title: str, note: str = "", unit: str = "nats") -> Plot:
    """Draws the auxiliary losses' part of the loss."""
    steps, values = curve(records, "aux_loss")
    return lines([Curve(steps, smooth(values), width=1.2)], "step", unit, title, note)


def domains(runs: Runs, unit: float = 1.0, x: str = "loss, nats per token") -> Plot:
    """The last held-out loss of each domain, of every run that has it; times `unit`."""
    tables = {name: last(records, "eval").get("loss_by_domain", {}) for name, records in runs.items()}
    names = list(next(iter(tables.values())))
    values = {
        name: [np.nan if table.get(domain) is None else table[domain] * unit for domain in names]
        for name, table in tables.items()
    }
    words = x, "Held-out loss by domain", "at the last evaluation"
    return bars(names, values, *words, write="{:.3f}")


def smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over 2 % of a long curve; short ones as they are."""
    width = len(values) // 50
    if width < 2:
        return values
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def _line(records: list[dict], key: str, kind: str, over: str) -> tuple[np.ndarray, np.ndarray]:
    """(x, y), x the step or the seconds of each record that has the key."""
    holding = [r for r in records if r["kind"] == kind and key in r]
    return curve(holding, over, kind)[1], curve(holding, key, kind)[1]
