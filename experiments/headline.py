"""Compares an MoE with its dense baseline by steps and by the clock, in a table and a figure.

    python -m experiments.sweep --config=configs/glam_nano.py --seeds=3 --workdir=runs/moe
    python -m experiments.sweep --config=configs/dense_nano.py --grid run.steps=1200,1536,2000 --seeds=3 \\
        --workdir=runs/dense
    python -m experiments.bench.steps --config=configs/glam_nano.py     # the ratio of step times
    python -m experiments.headline --moe=runs/moe --dense=runs/dense --ratio=1.26 --json=docs/results.json \\
        --out=docs/results.svg

The dense baseline has the same matrix multiplications per token, so its step is shorter. It is trained for as many
steps as the MoE, for as long as the MoE, and for longer, each with a schedule of that length. W is the time that the
baseline needs for the MoE's loss over the MoE's time: above 1 the MoE is ahead by the clock. Loss is interpolated
linearly in the logarithm of the steps. Without --moe and --dense, the numbers of --json are read again.
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments import cli
from experiments.compare.runs import find, open_runs
from moe_jax.files import parse_json
from moe_jax.reporting import plots
from moe_jax.reporting.plots import Curve, Plot

MOE = cli.flag(flags.DEFINE_string, "moe", None, "A folder with the MoE's runs, one for each seed.")
DENSE = cli.flag(flags.DEFINE_string, "dense", None, "A folder with the baseline's runs, for each seed and length.")
RATIO = cli.flag(flags.DEFINE_float, "ratio", None, "Time of the MoE's step over the baseline's, measured in turn.")
JSON = cli.as_json()
OUT = cli.out("A .svg or .png file for the figure.")

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # quantiles of Student's t at 97.5 % for the mean of n seeds


@dataclasses.dataclass(frozen=True)
class Losses:
    """Held-out losses in nats per token. moe: by seed; dense: by steps and seed; steps: the MoE's; ratio: of a step."""

    steps: int
    ratio: float
    moe: dict[int, float]
    dense: dict[int, dict[int, float]]

    @property
    def seeds(self) -> list[int]:
        return sorted(self.moe)

    @property
    def same_time(self) -> int:
        """The baseline's number of steps whose time is nearest to that of the MoE's run."""
        return min(self.dense, key=lambda steps: abs(math.log(steps / (self.steps * self.ratio))))

    def differences(self, steps: int) -> np.ndarray:
        """The baseline's loss after so many steps less the MoE's, by seed."""
        return np.array([self.dense[steps][seed] - self.moe[seed] for seed in self.seeds])

    def w(self) -> np.ndarray:
        """Time of the baseline for the MoE's loss over the MoE's time, by seed; ValueError where none is as good."""
        found = []
        for seed in self.seeds:
            steps = sorted(self.dense)
            losses = [self.dense[n][seed] for n in steps]
            if not min(losses) <= self.moe[seed] <= max(losses):
                raise ValueError(
                    f"The baseline's losses of seed {seed}, {min(losses):.4f} to {max(losses):.4f}, are all on one "
                    f"side of the MoE's {self.moe[seed]:.4f}; train it for other numbers of steps too."
                )
            needed = math.exp(np.interp(-self.moe[seed], [-loss for loss in losses], np.log(steps)))
            found.append(needed / (self.steps * self.ratio))
        return np.array(found)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The mean over seeds, and half of its 95 % interval by Student's t; NaN where there is no such number of seeds."""
    return float(values.mean()), T_95.get(len(values), math.nan) * float(values.std(ddof=1)) / math.sqrt(len(values))


def collect(moe: pathlib.Path, dense: pathlib.Path, ratio: float) -> Losses:
    """Reads the last held-out loss of every finished run below two folders."""
    ours, theirs = finished(moe), finished(dense)
    if not ours or len({steps for steps, _ in ours}) != 1:
        raise ValueError(f"{moe} must hold finished runs of one length, one for each seed; it has {sorted(ours)}.")
    lengths = {steps: {seed: loss for (n, seed), loss in theirs.items() if n == steps} for steps, _ in theirs}
    seeds = {seed for _, seed in ours}
    whole = {steps: losses for steps, losses in sorted(lengths.items()) if seeds <= set(losses)}
    if not whole:
        raise ValueError(f"{dense} has no length with finished runs of all seeds {sorted(seeds)}; train the others.")
    return Losses(next(iter(ours))[0], ratio, {seed: loss for (_, seed), loss in sorted(ours.items())}, whole)


def finished(folder: pathlib.Path) -> dict[tuple[int, int], Any]:
    """(steps, seed) -> last held-out loss of the finished runs below a folder."""
    runs, _ = open_runs(find([str(folder)])[0])
    return {(run.exp.run.steps, run.exp.seed): run.numbers["loss"] for run in runs if run.finished}


def table(it: Losses) -> str:
    """Three rows in Markdown: the MoE, the baseline after as many steps, and after as much time."""
    seeds = it.seeds
    rows = [("MoE", it.steps, [it.moe[s] for s in seeds])]
    rows.append(("dense baseline, equal steps", it.steps, [it.dense[it.steps][s] for s in seeds]))
    rows.append(("dense baseline, equal time", it.same_time, [it.dense[it.same_time][s] for s in seeds]))
    lines = [f"| held-out loss, nats per byte | steps | {' | '.join(f'seed {s}' for s in seeds)} | mean |"]
    lines.append("|---|---:|" + "---:|" * (len(seeds) + 1))
    for words, steps, losses in rows:
        lines.append(f"| {words} | {steps:,} | {' | '.join(f'{x:.4f}' for x in losses)} | **{np.mean(losses):.4f}** |")
    return "\n".join(lines)


def sentence(it: Losses) -> str:
    """The result in words: differences by steps and by the clock, and W, with 95 % intervals over seeds."""
    each = it.differences(it.steps), it.differences(it.same_time), it.w()
    (steps, e), (time, f), (w, g) = map(interval, each)
    return (
        f"The MoE is better by {steps:.3f} ± {e:.3f} nats after equal steps and by {time:.3f} ± {f:.3f} after equal "
        f"time; the baseline needs {w:.2f} ± {g:.2f} times the MoE's time for its loss (means of {len(it.seeds)} "
        f"seeds, 95 % intervals; a step of the MoE takes {it.ratio:.2f} times the baseline's)."
    )


def figure(it: Losses) -> Plot:
    """Held-out loss over steps and over time, a point for each seed, the baseline's mean as a line."""

    def panel(unit: float, ratio: float, x: str) -> Plot:
        own = [Curve(np.full(len(it.moe), it.steps * ratio / unit), list(it.moe.values()), "MoE", "points", 1)]
        steps = np.array(sorted(it.dense))
        means = [np.mean(list(it.dense[n].values())) for n in steps]
        points = [(n / unit, loss) for n in steps for loss in it.dense[n].values()]
        dense = [Curve(steps / unit, means, "dense baseline, mean", "line", 0)]
        dense += [Curve(*zip(*points, strict=True), "dense baseline, by seed", "points", 0)]
        return plots.lines([*dense, *own], x, "held-out loss, nats per byte", size=(4.2, 3.2))

    time = it.steps * it.ratio
    return plots.beside([panel(1, 1, "steps"), panel(time, it.ratio, "time, 1 is the MoE's run")])


def load(path: pathlib.Path) -> Losses:
    """Reads what --json has written."""
    values = parse_json(path.read_text())
    by_seed = lambda losses: {int(seed): loss for seed, loss in losses.items()}  # noqa: E731
    dense = {int(steps): by_seed(losses) for steps, losses in values["dense"].items()}
    return Losses(values["steps"], values["ratio"], by_seed(values["moe"]), dense)


def main() -> None:
    file, out = cli.file("json", JSON.value), cli.file("out", OUT.value, (".svg", ".png"))
    given: Sequence[Any] = (MOE.value, DENSE.value, RATIO.value)
    if None not in given:
        if not 0 < RATIO.value < math.inf:
            raise ValueError(
                f"--ratio={RATIO.value} is no ratio of times; give the one that experiments.bench.steps prints."
            )
        found = collect(cli.folder("moe", MOE.value), cli.folder("dense", DENSE.value), RATIO.value)
        cli.write_json(file, dataclasses.asdict(found))
    elif given == (None, None, None) and file is not None and file.is_file():
        found = load(file)
    else:
        raise ValueError("Give --moe, --dense and --ratio, or --json alone with a file that was written before.")
    print(table(found), sentence(found), sep="\n\n")
    if out is not None:
        figure(found).save(out)


if __name__ == "__main__":
    cli.run(main)
