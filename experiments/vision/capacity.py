"""Measures the accuracy of a trained V-MoE whose experts take fewer tokens, by which tokens go first.

    python -m experiments.vision.capacity --run=runs/vmoe_nano
    python -m experiments.vision.capacity --run=runs/vmoe_0 --run=runs/vmoe_1

The held-out accuracy of finished runs at several capacities, as a table: their mean, and from the worst to the best.
"""

import dataclasses
import pathlib
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from experiments import cli
from moe_jax.checkpoint import Checkpoints
from moe_jax.config import Experiment
from moe_jax.data import Images, default_directory, evaluation_batches
from moe_jax.dispatch import Scatter
from moe_jax.models import Call, ViTConfig
from moe_jax.step import Program, State
from moe_jax.train import restore
from moe_jax.workdir import confirmed_experiment

RUN = flags.DEFINE_multi_string("run", [], "Where a finished run is kept; several may be given.")
DATA_DIR = cli.data_dir()
JSON = cli.as_json()

FACTORS = (2.0, 1.0, 0.5, 0.25)  # slots over choices, of all experts together
PRIORITIES = {"probability": "largest gates first", "choice-major": "first choices first", "token-major": "in order"}


class Seen(NamedTuple):
    """Results on the held-out images."""

    accuracy: float
    dropped: float  # of all choices


def main() -> None:
    if not RUN.value:
        raise ValueError("No run was given; say --run=runs/vmoe_nano, once it is trained.")
    file, rows = cli.file("json", JSON.value), []
    data_dir = cli.folder("data_dir", DATA_DIR.value) if DATA_DIR.value else default_directory()
    runs = [opened(cli.folder("run", workdir)) for workdir in RUN.value]
    print(f"| capacity | {' | '.join(PRIORITIES.values())} | dropped |\n|{'---|' * (len(PRIORITIES) + 2)}")
    for factor in FACTORS:
        seen = {p: [look(*run, Scatter(factor, p), data_dir) for run in runs] for p in PRIORITIES}
        cells = [spread([one.accuracy for one in several]) for several in seen.values()]
        dropped = spread([one.dropped for one in seen["probability"]])
        print(f"| {factor} | {' | '.join(cells)} | {dropped} |", flush=True)
        runs_of = {p: [one._asdict() for one in several] for p, several in seen.items()}
        rows.append({"capacity": factor, "priorities": runs_of})
    cli.write_json(file, rows)


def opened(workdir: pathlib.Path) -> tuple[Experiment, State]:
    """A run's experiment, on one device, and its last state; ValueError if it is no sparse model of images."""
    exp = dataclasses.replace(confirmed_experiment(workdir), mesh=())
    if exp.model.batch_kind != "images" or exp.model.routed is None:
        raise ValueError(f"{workdir} is no sparse model of images; give a run of configs/vmoe_nano.py.")
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        return exp, restore(checkpoints, Program(exp, devices=jax.devices()[:1]))[0]


def look(exp: Experiment, state: State, dispatch: Scatter, data_dir: pathlib.Path) -> Seen:
    """The whole held-out split, with this dispatcher."""
    model = dataclasses.replace(exp.model, moe=dataclasses.replace(exp.model.moe, dispatch=dispatch))
    right = images = kept = choices = 0.0
    for batch in evaluation_batches(exp.data.prepare(data_dir)[1], exp.data.B):
        logits_BLV, aux = jax.device_get(apply(model, state.params, state.router, batch))
        right += float((batch.loss_mask_BL & (logits_BLV.argmax(-1) == batch.target_BL)).sum())
        images += float(batch.loss_mask_BL.sum())
        kept, choices = kept + float(aux.stats.kept.sum()), choices + float(aux.stats.choices_E.sum())
    return Seen(right / images, 1 - kept / choices)


@partial(jax.jit, static_argnums=0)
def apply(model: ViTConfig, params: Any, router: Any, batch: Images) -> Any:
    """One program for all runs of a config."""
    return model.apply(params, batch, Call(router=router))


def spread(fractions: list[float]) -> str:
    """Mean, and the worst and the best where there are several."""
    mean, *ends = (f"{100 * f(fractions):.1f}" for f in (np.mean, min, max))
    return f"{mean} %" if len(fractions) == 1 else f"{mean} % ({ends[0]} to {ends[1]})"


if __name__ == "__main__":
    cli.run(main)
