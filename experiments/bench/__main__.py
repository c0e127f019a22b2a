"""Times MoE layers against dense layers with the same active FLOPs: what does sparsity cost?

    python -m experiments.bench
    python -m experiments.bench --shapes=mixtral,qwen3 --routing=balanced,skewed --stages --json=runs/bench.json
    python -m experiments.bench --shapes=fine --mesh=data=2,expert=4 --against=runs/bench.json
    python -m experiments.bench.steps       whole training steps, and what a run does besides
    python -m experiments.bench.peers       the same layers in another library

Layer and dense baseline (one expert of K times the width) run in turn in a process, forward and forward with backward:
outputs, auxiliary losses and statistics, gradients by parameters and tokens. Prints a Markdown table of medians, the
ratios of pairs and their quartiles, compile time and temporary memory (of the pass with backward), FLOPs computed over
useful ones, bytes of expert weights read, and the ratio of the experts' matmuls alone, batched, with equally many rows
each (forward / with backward): the time if routing and moving rows were free. Where choices are
dropped ("kept"), a layer does less than its dense baseline.
"""

import pathlib

import jax
from absl import flags

from experiments import cli
from experiments.bench import present, record
from experiments.bench.measure import Job, say
from experiments.bench.options import at_least_one, placement_of
from experiments.bench.shapes import DISPATCHERS, QUICK, SHAPES, Shape, choose, usable
from experiments.bench.tokens import ROUTINGS

SHAPE = cli.flag(flags.DEFINE_list, "shapes", None, "Names of shapes; by default all for this platform.")
ROUTING = cli.flag(flags.DEFINE_list, "routing", None, f"Of {', '.join(ROUTINGS)}; by default all.")
DISPATCH = cli.flag(flags.DEFINE_list, "dispatch", None, f"Of {', '.join(DISPATCHERS)}; by default all.")
REPEATS = cli.flag(flags.DEFINE_integer, "repeats", 15, "How often a pair is timed; slow ones at least three times.")
STAGES = cli.flag(flags.DEFINE_bool, "stages", False, "Also time the parts of a layer, each alone.")
MESH = cli.flag(flags.DEFINE_string, "mesh", None, "Sizes of a mesh, data=2,expert=4; simulated devices on CPU.")
AGAINST = cli.flag(flags.DEFINE_multi_string, "against", [], "A file of --json; layers over 5% slower are named.")
JSON = cli.as_json()
OUT = cli.out("A .png or .svg file for bars of the ratios.")
QUICK_ONLY = cli.flag(flags.DEFINE_bool, "quick", False, "One tiny layer, twice: a smoke test.")


def main() -> None:
    dispatchers = choose("dispatch", DISPATCH.value, DISPATCHERS)
    routings = tuple(choose("routing", ROUTING.value, ROUTINGS))
    chosen = choose("shapes", SHAPE.value, SHAPES)
    repeats = 2 if QUICK_ONLY.value else at_least_one("repeats", REPEATS.value)
    files = cli.file("json", JSON.value), cli.file("out", OUT.value, (".png", ".svg"))
    old = {path: record.load(pathlib.Path(path)) for path in AGAINST.value}
    placement = placement_of(MESH.value)
    shapes = {QUICK.name: QUICK} if QUICK_ONLY.value else on_platform(chosen, SHAPE.value is not None)
    job = Job(shapes, routings, dispatchers, placement, MESH.value or "", repeats, stages=STAGES.value)
    rows = list(job.rows())
    show(rows)
    write(rows, *files)
    for path, before in old.items():
        print("\n".join(["", *record.against(rows, path, before)]))


def on_platform(chosen: dict[str, Shape], named: bool) -> dict[str, Shape]:
    """The chosen shapes that are for this platform; ValueError for one that was named and is not."""
    fits = usable(jax.default_backend())
    if named and (other := [name for name in chosen if name not in fits]):
        raise ValueError(f"{other[0]} is for a GPU, this is a {jax.default_backend()}; there are {', '.join(fits)}.")
    return {name: shape for name, shape in chosen.items() if name in fits}


def show(rows: list[record.Row]) -> None:
    print(present.table(rows), end="")
    if STAGES.value:
        print("\nEach part alone, forward / with backward; they do not add up exactly to the layer.\n")
        print(present.stage_table(rows), end="")


def write(rows: list[record.Row], json_file: pathlib.Path | None, plot_file: pathlib.Path | None) -> None:
    if json_file:
        cli.write_json(json_file, record.facts(rows))
    if plot_file:
        present.plot(plot_file, rows)
        say(f"written: {plot_file}")


if __name__ == "__main__":
    cli.run(main)
