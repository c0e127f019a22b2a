"""Figures of recordings and of experiments on experts; each draws the result of the function it is named after."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.reporting.plots import NARROW, WIDE, Curve, Plot, bars, beside, lines, matrices

PANELS = 6  # layers that are drawn, of more an even selection
MOST = 24  # experts in a figure that has a row for each


def draw_load(load_NE: Any, names: Sequence[str]) -> Plot:
    """Draws `expert_load`: a row for each layer, experts from busy to idle."""
    sorted_NE = -np.sort(-np.asarray(load_NE, float), axis=1) * np.shape(load_NE)[1]
    note = "experts of each layer, busiest first; 1 is an even share"
    if len(names) <= PANELS:
        E = np.arange(sorted_NE.shape[1])
        curves = [Curve(E, row, name, "both", n) for n, (row, name) in enumerate(zip(sorted_NE, names, strict=True))]
        return lines(curves, "rank of the expert", "load / mean", "Load", note, level=1, ylim=(0, None))
    return matrices({"": sorted_NE}, "rank of the expert", "layer", "load / mean", "ratio", "Load", note, rows=names)


def shown(names: Sequence[str], most: int = PANELS) -> list[int]:
    """Chooses the layers to draw: all, or `most` of them, the first and the last included."""
    return sorted({round(i) for i in np.linspace(0, len(names) - 1, min(len(names), most))})


def draw_specialisation(lift_NEA: Any, names: Sequence[str], classes: Sequence[str], of: str = "domain") -> Plot:
    """Draws `domain_specialisation` and the like: experts in the order of the class of tokens that prefers them."""
    panels = {}
    for n in shown(names):
        lift_EA = np.nan_to_num(np.asarray(lift_NEA[n], float), nan=1.0)
        order_E = np.lexsort((-lift_EA.max(1), lift_EA.argmax(1)))
        panels[names[n]] = lift_EA[order_E].T
    whose = "the token" if of == "token" else f"a token of the {of}"
    note = f"how often {whose} chooses the expert, over the share of all tokens that do"
    across = 1 if np.shape(lift_NEA)[1] > 32 else min(len(panels), 2)
    height = (0.9 + 0.24 * len(classes)) * -(-len(panels) // across)
    return matrices(
        panels,
        f"experts, by the {of} that prefers them",
        "",
        "lift",
        "ratio",
        f"{of.capitalize()}s of experts",
        note,
        rows=classes,
        columns=[],
        across=across,
        size=(WIDE[0] if np.shape(lift_NEA)[1] > 16 or across > 1 else 7.0, max(height, 2.4)),
    )


def draw_information(nats_N: Any, chance_N: Any, p_N: Any, names: Sequence[str]) -> Plot:
    """Draws `domain_information`: the measured value, and those of permuted domains."""
    words = [f"{name} (p = {p:.3f})" for name, p in zip(names, p_N, strict=True)]
    values = {"seen": nats_N, "by chance": chance_N}
    note = "mutual information; chance: domains exchanged between sequences"
    return bars(words, values, "nats", "Domain and expert", note, write="{:.3f}")


def draw_coactivation(both_NEE: Any, names: Sequence[str], title: str = "Chosen together") -> Plot:
    """Draws `coactivation`, without the diagonal: the share of one expert's tokens that chose another too."""
    panels = {}
    for n in shown(names):
        panels[names[n]] = np.array(both_NEE[n], float)
        np.fill_diagonal(panels[names[n]], np.nan)
    note = "of the tokens of one expert (row), the share that chose another too"
    return matrices(panels, "expert", "expert", "share", "share", title, note)


def draw_transitions(next_MEE: Any, names: Sequence[str]) -> Plot:
    """Draws `transitions`: the share of an expert's tokens that chose each expert of the next MoE layer."""
    words = [f"{a} to {b.removeprefix('layer ')}" for a, b in itertools.pairwise(names)]
    panels = {words[m]: np.asarray(next_MEE[m], float) for m in shown(words)}
    note = "of the tokens of an expert (row), the share that chose each of the next MoE layer"
    return matrices(panels, "expert of the next layer", "expert", "share", "share", "From layer to layer", note)


def draw_similarity(cosine_NEE: Any, names: Sequence[str], title: str = "Likeness of experts' weights") -> Plot:
    """Draws `weight_similarity` or `output_similarity`, a matrix for each layer, without the diagonal."""
    panels = {}
    for n in shown(names):
        panels[names[n]] = np.array(cosine_NEE[n], float)
        np.fill_diagonal(panels[names[n]], np.nan)
    return matrices(panels, "expert", "expert", "cosine", "signed", title, "cosine between experts; red: alike")


def draw_by_position(
    position_A: Any, value_AN: Any, names: Sequence[str], y: str, title: str, level: float | None = None
) -> Plot:
    """Draws `drop_rate_by` or `entropy_by` over positions in the document."""
    values = np.asarray(value_AN, float)
    curves = [Curve(position_A, values[:, n], names[n], "both", i) for i, n in enumerate(shown(names))]
    return lines(curves, "position in the document", y, title, ylim=(0, None), level=level)


def draw_margin(edges: Any, share_NX: Any, names: Sequence[str]) -> Plot:
    """Draws `router_margin`: a histogram of the tokens' distance to another expert."""
    middle = (np.asarray(edges)[1:] + np.asarray(edges)[:-1]) / 2
    curves = [Curve(middle, share_NX[n], names[n], "line", i) for i, n in enumerate(shown(names))]
    note = "probability of the last chosen expert less that of the runner-up"
    return lines(curves, "margin", "share of tokens", "Router margin", note, ylim=(0, None))


def draw_knock_out(effects: Mapping[str, Any], names: Sequence[str], classes: Sequence[str], most: int = MOST) -> Plot:
    """Draws `analysis.effects_of`: the experts whose loss costs most, by domain."""
    rise_P, rise_PZ = np.asarray(effects["rise"], float), np.asarray(effects["rise_by_domain"], float)
    worst = np.argsort(-rise_P, kind="stable")[:most]
    words = [f"{names[n].removeprefix('layer ')}:{e}" for n, e in (effects["expert"][int(p)] for p in worst)]
    every_AZ = np.vstack([rise_P[worst], rise_PZ[worst].T])
    title, note = "What is lost without an expert", "nats per target; experts as layer:number, the most missed first"
    return matrices(
        {"": every_AZ},
        "masked expert",
        "",
        "rise of the loss",
        "signed",
        title,
        note,
        rows=["all", *classes],
        columns=words,
        size=(WIDE[0], 1.2 + 0.26 * (len(classes) + 1)),
    )


def draw_gaps(value: Mapping[str, Any], interval: Mapping[str, Any], classes: Sequence[str]) -> Plot:
    """Draws `fairness`: every metric by group, with bootstrap intervals."""
    words = {
        "drop_rate": "dropped",
        "active_compute": "experts per token",
        "entropy": "entropy, nats",
        "loss": "loss, nats",
    }
    height = 0.8 + 0.24 * len(classes)
    parts = []
    for name, value_A in value.items():
        low, high = np.asarray(interval[name], float)
        panel = bars(classes, {name: value_A}, words.get(name, name), spread={name: np.stack([low, high])})
        parts.append(Plot(panel.draw, name.replace("_", " "), size=(NARROW[0], height)))
    return beside(parts, min(2, len(parts)), "By domain", "strokes: 95 % bootstrap intervals over sequences")


def draw_saturation(share_N: Any, chance_N: Any, names: Sequence[str], other: str) -> Plot:
    """Draws `router_saturation`, and that of independent choices with the same loads."""
    values = {"the same choice": share_N, "by chance": chance_N}
    note = f"choices that are the same in {other}"
    return bars(list(names), values, "share", "Router saturation", note, write="{:.2f}", xlim=(0, 1.15))
