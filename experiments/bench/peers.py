"""Times MoE layers of Hugging Face transformers on PyTorch, in turn with these.

    pip install torch transformers
    python -m experiments.bench.peers --shapes=mixtral,qwen3

`MixtralSparseMoeBlock` with every implementation of experts that the installed version has, on the same tokens,
with the same weights, float32, all cores; outputs are compared before anything is timed. Forward, and forward with
backward by all parameters and the tokens. The layers here also compute auxiliary losses and statistics; those with
a capacity drop choices beyond it. The last row of a shape is the dense layer of the same active FLOPs here.
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
from experiments.bench.layers import Passes, Placement, baseline_inputs, baseline_passes, layer_inputs, layer_passes
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

SHAPE = cli.flag(flags.DEFINE_list, "shapes", None, "Names of shapes; by default mixtral and qwen3.")
ROUTING = cli.flag(flags.DEFINE_list, "routing", None, f"Of {', '.join(ROUTINGS)}; by default real.")
REPEATS = cli.flag(flags.DEFINE_integer, "repeats", 15, "How often a pair is timed; slow ones at least three times.")
QUICK_ONLY = cli.flag(flags.DEFINE_bool, "quick", False, "One tiny layer, twice: a smoke test.")
JSON = cli.as_json()

OURS = {"Sort()": Sort(), "Scatter(None)": Scatter(None), "Scatter(1.25)": Scatter(1.25), "Einsum(1.25)": Einsum(1.25)}
CLOSE = 1e-3  # relative to the largest output
ODD = 1e-3  # of tokens: their last choice may differ by rounding


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
    """Medians of milliseconds: of the best peer, and of a layer here that ran in turn with it."""

    shape: str
    routing: str
    ours: str
    peer: tuple[str, str]  # the fastest, forward and with backward
    ours_ms: tuple[float, float]
    peer_ms: tuple[float, float]
    ratio: tuple[float, float]  # time of the peer over that of the layer here, median of pairs


def compared(shape: Shape, routing: str, make: Callable[..., Iterator], repeats: int) -> list[Row]:
    """A row for every dispatcher, against the fastest peer; make(shape, params, x) gives (name, calls)."""
    tokens, placement, rows = ROUTINGS[routing](shape), Placement(), []
    params, x_BLD, mask_BL = layer_inputs(shape.layer(Sort()), shape, tokens, placement)
    wanted = np.asarray(jax.jit(output, static_argnums=0)(shape.layer(Sort()), params, x_BLD))
    found = dict(checked(make(shape, jax.device_get(params), np.asarray(x_BLD)), wanted))
    fastest = [min(found, key=lambda name: median_ms(found[name][i])) for i in range(2)]
    for name, passes, inputs in ours(shape, placement, params, x_BLD, mask_BL):
        ours_ms, peer_ms, ratio = [], [], []
        for i in range(2):
            calls = passes[i].bind(*inputs), found[fastest[i]][i]
            times = in_turn(calls, repeats, PATIENCE)
            ours_ms.append(quartiles(times[:, 0])[1])
            peer_ms.append(quartiles(times[:, 1])[1])
            ratio.append(quartiles(times[:, 1] / times[:, 0])[1])
        rows.append(Row(shape.name, routing, name, tuple(fastest), tuple(ours_ms), tuple(peer_ms), tuple(ratio)))
        say(f"{shape.name} {routing} {name}: {ratio[0]:.2f} times as fast forward, {ratio[1]:.2f} with backward")
    return rows


def ours(shape: Shape, placement: Placement, *inputs: Any) -> Iterator[tuple[str, Passes, Any]]:
    """Every dispatcher, and the dense layer of the same active FLOPs: the speed of matmuls here."""
    for name, dispatch in OURS.items():
        yield name, layer_passes(shape.layer(dispatch), placement, *inputs), inputs
    dense = baseline_inputs(shape, placement)
    yield "dense baseline", baseline_passes(shape, placement, *dense), dense


def output(cfg: MoEConfig, params: Any, x_BLD: Any) -> Any:
    return MoE(cfg).apply({"params": params}, x_BLD)[0]


def checked(made: Iterator[tuple[str, Calls]], wanted: np.ndarray) -> Iterator[tuple[str, Calls]]:
    """Yields the peers, after checking that they compute the same; ValueError for one that does not."""
    for name, calls in made:
        off_BL = np.abs(np.asarray(calls[0]()).reshape(wanted.shape) - wanted).max(-1)
        if not (odd := (~(off_BL < CLOSE * np.abs(wanted).max())).mean()) <= ODD:
            raise ValueError(f"{name} computes something else, for {odd:.1%} of the tokens.")
        yield name, calls


def median_ms(call: Callable[[], Any]) -> float:
    """Median milliseconds of three calls."""
    return quartiles(in_turn([call], 3)[:, 0])[1]


def table(rows: list[Row]) -> str:
    heads = ["shape", "routing", "layer", "forward, ms", "fastest peer, ms", "peer's time / ours"]
    heads += ["with backward, ms", "fastest peer, ms", "peer's time / ours"]
    found = []
    for row in rows:
        cells = [row.shape, row.routing, f"`{row.ours}`"]
        for i in range(2):
            cells += [number(row.ours_ms[i]), f"{number(row.peer_ms[i])} ({row.peer[i]})", f"**{row.ratio[i]:.2f}**"]
        found.append(cells)
    return lines(heads, found, left=(0, 1, 2))


if __name__ == "__main__":
    cli.run(main)
