"""Times MoE layers of Hugging Face transformers on PyTorch, in turn with these.

    pip install torch transformers
    python -m experiments.bench.peers --shapes=mixtral,qwen3

`MixtralSparseMoeBlock` with each of the implementations of experts that the installed version has, on the same tokens,
with the same weights, float32, all cores; outputs are compared before anything is timed. Forward, and forward with
backward by all parameters and the tokens. The layers here have auxiliary losses and statistics besides; those with a
capacity leave out what is over it. The last row of a shape is the dense layer of the same active FLOPs here.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import cli
from experiments.bench.huggingface import Calls, libraries, peers
from experiments.bench.layers import Passes, Place, layer_inputs, layer_passes, twin_inputs, twin_passes
from experiments.bench.measure import say
from experiments.bench.options import at_least_one
from experiments.bench.present import number
from experiments.bench.shapes import QUICK_GLU, SHAPES, Shape, choose
from experiments.bench.timing import PATIENCE, in_turn, quartiles
from experiments.bench.tokens import ROUTINGS
from experiments.routing_zoo.present import lines
from moe_jax.dispatch import Einsum, Scatter, Sort
from moe_jax.experts import GLU
from moe_jax.moe import MoE, MoEConfig

SHAPE = cli.flag(flags.DEFINE_list, "shapes", None, "Names of shapes; mixtral and qwen3 without it.")
ROUTING = cli.flag(flags.DEFINE_list, "routing", None, f"Of {', '.join(ROUTINGS)}; real without it.")
REPEATS = cli.flag(flags.DEFINE_integer, "repeats", 15, "How often a pair is timed; slow ones at least three times.")
QUICK_ONLY = cli.flag(flags.DEFINE_bool, "quick", False, "One tiny layer, twice: only to see that it works.")
JSON = cli.as_json()

OURS = {"Sort()": Sort(), "Scatter(None)": Scatter(None), "Scatter(1.25)": Scatter(1.25), "Einsum(1.25)": Einsum(1.25)}
CLOSE = 1e-3  # relative to the largest output
ODD = 1e-3  # of tokens, whose last choice is a matter of rounding


def main() -> None:
    glu = {name: shape for name, shape in SHAPES.items() if isinstance(shape.experts, GLU)}
    shapes = list(choose("shapes", SHAPE.value or ["mixtral", "qwen3"], glu).values())
    shapes = [QUICK_GLU] if QUICK_ONLY.value else shapes
    routings = choose("routing", ROUTING.value or ["real"], ROUTINGS)
    repeats, rows = 2 if QUICK_ONLY.value else at_least_one("repeats", REPEATS.value), []
    file = cli.file("json", JSON.value)
    torch = libraries()
    torch.set_num_threads(os.cpu_count() or 1)
    for shape, routing in itertools.product(shapes, routings):
        rows += compared(shape, routing, partial(peers, torch), repeats)
    print(table(rows), end="")
    cli.write_json(file, [dataclasses.asdict(row) for row in rows])


# ---------------------------------------------------------------- both sides


@dataclasses.dataclass(frozen=True)
class Row:
    """Medians of milliseconds: the best peer's, and those of a layer here that ran in turn with it."""

    shape: str
    routing: str
    ours: str
    peer: tuple[str, str]  # the fastest, forward and with backward
    ours_ms: tuple[float, float]
    peer_ms: tuple[float, float]
    ratio: tuple[float, float]  # the peer's time over this one's, median of pairs


def compared(shape: Shape, routing: str, make: Callable[..., Iterator], repeats: int) -> list[Row]:
    """A row for every dispatcher, against the peer that is the fastest; make(shape, params, x) gives (name, calls)."""
    tokens, place, rows = ROUTINGS[routing](shape), Place(), []
    params, x_BLD, mask_BL = layer_inputs(shape.layer(Sort()), shape, tokens, place)
    wanted = np.asarray(jax.jit(output, static_argnums=0)(shape.layer(Sort()), params, x_BLD))
    found = dict(checked(make(shape, jax.device_get(params), np.asarray(x_BLD)), wanted))
    fastest = [min(found, key=lambda name: alone(found[name][i])) for i in range(2)]
    for name, passes, inputs in ours(shape, place, params, x_BLD, mask_BL):
        mine, its, ratio = [], [], []
        for i in range(2):
            calls = passes[i].on(*inputs), found[fastest[i]][i]
            times = in_turn(calls, repeats, PATIENCE)
            mine.append(quartiles(times[:, 0])[1])
            its.append(quartiles(times[:, 1])[1])
            ratio.append(quartiles(times[:, 1] / times[:, 0])[1])
        rows.append(Row(shape.name, routing, name, tuple(fastest), tuple(mine), tuple(its), tuple(ratio)))
        say(f"{shape.name} {routing} {name}: {ratio[0]:.2f} times as fast forward, {ratio[1]:.2f} with backward")
    return rows


def ours(shape: Shape, place: Place, *inputs: Any) -> Iterator[tuple[str, Passes, Any]]:
    """Every dispatcher, and the dense layer of the same active FLOPs: how fast the matmuls of this side are."""
    for name, dispatch in OURS.items():
        yield name, layer_passes(shape.layer(dispatch), place, *inputs), inputs
    dense = twin_inputs(shape, place)
    yield "dense twin", twin_passes(shape, place, *dense), dense


def output(cfg: MoEConfig, params: Any, x_BLD: Any) -> Any:
    return MoE(cfg).apply({"params": params}, x_BLD)[0]


def checked(made: Iterator[tuple[str, Calls]], wanted: np.ndarray) -> Iterator[tuple[str, Calls]]:
    """Checks that each peer computes what is computed here; ValueError for one that does not."""
    for name, calls in made:
        off_BL = np.abs(np.asarray(calls[0]()).reshape(wanted.shape) - wanted).max(-1)
        if not (odd := (~(off_BL < CLOSE * np.abs(wanted).max())).mean()) <= ODD:
            raise ValueError(f"{name} computes something else, for {odd:.1%} of the tokens.")
        yield name, calls


def alone(call: Callable[[], Any]) -> float:
    """Median milliseconds of three."""
    return quartiles(in_turn([call], 3)[:, 0])[1]


def table(rows: list[Row]) -> str:
    heads = ["shape", "routing", "layer", "forward, ms", "fastest peer, ms", "its time / this one's"]
    heads += ["with backward, ms", "fastest peer, ms", "its time / this one's"]
    found = []
    for row in rows:
        cells = [row.shape, row.routing, f"`{row.ours}`"]
        for i in range(2):
            cells += [number(row.ours_ms[i]), f"{number(row.peer_ms[i])} ({row.peer[i]})", f"**{row.ratio[i]:.2f}**"]
        found.append(cells)
    return lines(heads, found, left=(0, 1, 2))


if __name__ == "__main__":
    cli.run(main)
