"""Trains all routers at equal active FLOPs: which learns best?

    python -m experiments.routing_zoo --workdir=runs/routing_zoo
    python -m experiments.routing_zoo --workdir=runs/zoo_3 --only=top_k,switch,hash --seeds=3 --leaders=0

Trains every contestant of `zoo.py`, then the best of them on more seeds, one run after another in one process.
In the workdir: results.json, results.md, results.svg, and a folder for each run. The same command continues an
interrupted sweep; an unfinished run starts from its beginning.
"""

import sys
from functools import partial

import rich.console
from absl import flags

from experiments import cli
from experiments.routing_zoo import present, zoo
from experiments.routing_zoo.sweep import Sweep, save, say
from moe_jax.files import write_file

WORKDIR = cli.workdir()
DATA_DIR = cli.data_dir()
STEPS = flags.DEFINE_integer("steps", zoo.STEPS, "Training steps of each run.", lower_bound=1)
SEEDS = cli.flag(partial(flags.DEFINE_integer, lower_bound=1), "seeds", 1, "How many seeds.")
LEADERS = flags.DEFINE_integer("leaders", 4, "How many of the best are trained on more seeds.", lower_bound=0)
LEADER_SEEDS = flags.DEFINE_integer("leader_seeds", 3, "Seeds of these, the first ones included.", lower_bound=1)
ONLY = flags.DEFINE_list("only", None, "Names of contestants; by default all.")


def main() -> None:
    if not WORKDIR.value:
        raise ValueError("No folder for the runs was given; give --workdir=runs/routing_zoo, for instance.")
    workdir = cli.folder("workdir", WORKDIR.value)
    data_dir = cli.folder("data_dir", DATA_DIR.value) if DATA_DIR.value else None
    base, contestants = zoo.base(STEPS.value), zoo.choose(ONLY.value)
    sweep = Sweep(base, workdir, data_dir)
    results = sweep.run(contestants, SEEDS.value, LEADERS.value, LEADER_SEEDS.value)
    save(workdir / "results.json", base, results)
    write_file(workdir / "results.md", present.markdown(results))
    present.plot(workdir / "results.svg", results)
    width = None if sys.stdout.isatty() else 200
    rich.console.Console(width=width).print(present.table(results), highlight=False)
    say(f"written: {workdir / 'results.json'}, results.md, results.svg")


if __name__ == "__main__":
    cli.run(main)
