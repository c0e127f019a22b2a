"""Times whole training steps against those of the dense baseline, and the time of a run outside of its steps.

    python -m experiments.bench.steps
    python -m experiments.bench.steps --config=configs/mixtral_nano.py --mesh=data=2 --train_steps=200

Tokens per second of the jitted train steps of an experiment and its dense baseline, in alternating bursts, on batches
that are already on the devices. Then a short run of `train` with its log and checkpoints: the time in which no step is
computed, by cause, after the first record. Evaluation is left out; checkpoints are counted as often as the config saves
them.
"""

import dataclasses
import itertools
import math
import pathlib
import tempfile
from typing import Any, NamedTuple

import jax
from absl import flags

from experiments import cli
from experiments.bench.measure import say
from experiments.bench.options import at_least_one, simulate, sizes_of
from experiments.bench.present import number
from experiments.bench.timing import compiled, in_turn, quartiles
from experiments.bench.watch import Outside, watched
from experiments.routing_zoo.present import lines
from moe_jax.config import Experiment, build
from moe_jax.core.shard import AXES, make_mesh
from moe_jax.data import batches, default_directory
from moe_jax.step import Program

cli.define_config()
BASELINE = cli.flag(flags.DEFINE_string, "baseline", None, "Config of the dense baseline; by default that of --config.")
DATA_DIR = cli.data_dir()
MESH = cli.flag(flags.DEFINE_string, "mesh", None, "Sizes of a mesh, data=2,expert=4 (default: the config's).")
BURSTS = cli.flag(flags.DEFINE_integer, "bursts", 15, "How many bursts of each.")
BURST = cli.flag(flags.DEFINE_integer, "burst", 4, "Steps of a burst.")
TRAIN_STEPS = cli.flag(flags.DEFINE_integer, "train_steps", 121, "Steps of the short run; 0 for none.")
JSON = cli.as_json()

CONFIG = "configs/glam_nano.py"
LEAST = 4  # steps of a run: those until the first record are left out
TARGET = 0.03  # of the time of a run that may be spent outside of steps


def main() -> None:
    at_least_one("bursts", BURSTS.value)
    at_least_one("burst", BURST.value)
    if TRAIN_STEPS.value < 0 or 0 < TRAIN_STEPS.value < LEAST:
        raise ValueError(f"--train_steps={TRAIN_STEPS.value} must be at least {LEAST}, or 0 for no run.")
    table = cli.file("json", JSON.value)
    data_dir = pathlib.Path(DATA_DIR.value) if DATA_DIR.value else default_directory()
    pair = [on_mesh(exp) for exp in experiments()]
    names = "config", "baseline"
    speeds = dict(zip(names, in_bursts(pair, data_dir), strict=True))
    print(speed_table(speeds), end="")
    found: dict[str, Outside] = {}
    if TRAIN_STEPS.value:
        found = {name: outside(exp, data_dir, TRAIN_STEPS.value) for name, exp in zip(names, pair, strict=True)}
        print("\nA run: milliseconds per step, and the part of them outside of the jitted step.\n")
        print(outside_table(found), end="")
    cli.write_json(table, as_json(speeds, found))


def as_json(speeds: dict[str, "Speed"], found: dict[str, Outside]) -> dict[str, Any]:
    """All figures, by experiment: `Speed`, and `Outside` with its share where a run was made."""
    runs = {name: {"run_ms": {**out._asdict(), "share": out.share}} for name, out in found.items()}
    return {name: {**speed._asdict(), **runs.get(name, {})} for name, speed in speeds.items()}


def experiments() -> list[Experiment]:
    """The experiment of --config, with its overrides, and its dense baseline."""
    sizes = sizes_of(MESH.value) if MESH.value else {}
    overrides = [f"--config.mesh.{axis}={sizes.get(axis, 1)}" for axis in AXES if sizes]
    exp = cli.experiment(CONFIG, *overrides)
    if BASELINE.value:
        return [exp, build(cli.overridden(cli.load(BASELINE.value), overrides))]
    return [exp, dataclasses.replace(exp, model=exp.model.dense_baseline())]


def on_mesh(exp: Experiment) -> Experiment:
    """Puts an experiment on the mesh of --mesh, or its own."""
    if not MESH.value:
        cli.simulate(exp)
        return dataclasses.replace(exp, mesh=tuple(make_mesh(**dict(exp.mesh)).shape.items()))
    sizes = sizes_of(MESH.value)
    simulate(math.prod(sizes.values()))
    return dataclasses.replace(exp, mesh=tuple(make_mesh(**sizes).shape.items()))


# ---------------------------------------------------------------- the jitted step


class Speed(NamedTuple):
    """Speed of an experiment's train step."""

    step_ms: list[float]  # quartiles
    tokens: int  # of a step
    compile_seconds: float


class Stepper:
    """A train step, compiled ahead, that cycles through a few batches on the devices."""

    def __init__(self, exp: Experiment, data_dir: pathlib.Path):
        windows, _ = exp.data.prepare(data_dir)
        self.program = Program(exp, len(windows.domains))
        stream = batches(windows, exp.data.B, exp.seed, 0, **self.program.data_slice)
        few = [self.program.to_global(batch) for batch in itertools.islice(stream, 4)]
        self.state, self.batches = self.program.init(), itertools.cycle(few)
        self.compiled = compiled(self.program, few[0])

    def burst(self) -> None:
        for _ in range(BURST.value):
            self.state, _ = self.compiled.run(self.state, next(self.batches))
        jax.block_until_ready(self.state)


def in_bursts(pair: list[Experiment], data_dir: pathlib.Path) -> list[Speed]:
    """Speeds of both experiments, in alternating bursts."""
    steppers = [Stepper(exp, data_dir) for exp in pair]
    times = in_turn([stepper.burst for stepper in steppers], BURSTS.value, patience=300.0) / BURST.value
    return [
        Speed(quartiles(times[:, i]), exp.data.B * exp.data.L, stepper.compiled.seconds)
        for i, (exp, stepper) in enumerate(zip(pair, steppers, strict=True))
    ]


def speed_table(speeds: dict[str, Speed]) -> str:
    """Table of median step times, and of their ratios to the dense baseline's."""
    heads = ["", "tokens/s", "step, ms", "quartiles, ms", "of the baseline's", "compile, s"]
    found, baseline = [], speeds["baseline"]
    for name, speed in speeds.items():
        low, middle, high = speed.step_ms
        ratio = (middle / speed.tokens) / (baseline.step_ms[1] / baseline.tokens)
        rate, interval = f"{1e3 * speed.tokens / middle:,.0f}", f"{number(low)} to {number(high)}"
        found.append([name, rate, number(middle), interval, f"{ratio:.2f}", f"{speed.compile_seconds:.1f}"])
    return lines(heads, found, left=(0,))


# ---------------------------------------------------------------- a run


def outside(exp: Experiment, data_dir: pathlib.Path, steps: int) -> Outside:
    """Measures the time of a short run by cause; it logs as configured, if it is long enough, and saves twice."""
    every = {
        "log_every": min(exp.run.log_every, (steps - 1) // 2),
        "eval_every": steps,
        "save_every": max(1, steps // 2),
    }
    short = dataclasses.replace(exp, run=dataclasses.replace(exp.run, steps=steps, **every))
    with tempfile.TemporaryDirectory() as folder:
        found = watched(short, pathlib.Path(folder) / "run", data_dir, exp.run.save_every)
    say(f"a run of {steps} steps: {found.share:.1%} outside of steps")
    return found


def outside_table(found: dict[str, Outside]) -> str:
    heads = ["", "step", *Outside._fields[1:], f"share (target: under {TARGET:.0%})"]
    rows: list[list[str]] = [[name, *map(number, out), f"**{out.share:.2%}**"] for name, out in found.items()]
    return lines(heads, rows, left=(0,))


if __name__ == "__main__":
    cli.run(main)
