"""A trained model, opened from the folder of its run."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.checkpoint import Checkpoints
from moe_jax.config import Experiment
from moe_jax.data import AnyBatch, default_directory, evaluation_batches
from moe_jax.moe import LayerState


class TrainedRun(NamedTuple):
    """An experiment and a checkpoint of it."""

    exp: Experiment
    step: int
    params: Any
    router: LayerState  # state of the routers

    @property
    def weights(self) -> dict[str, Any]:
        """Parameters and router state, which determine the outputs."""
        return {"params": self.params, "router": dict(self.router)}


def experiment(workdir: str | Path) -> Experiment:
    """Experiment that was run in a workdir; ValueError where none was."""
    config = Path(workdir) / "config.json"
    if not config.is_file():
        raise ValueError(f"There is no run in {workdir}: it has no config.json; give the workdir of a trained run.")
    return Experiment.from_json(config.read_text())


def examples(
    exp: Experiment, data_dir: str | Path | None = None, windows: int | None = None, held_out: bool = True
) -> tuple[Any, list[AnyBatch]]:
    """The held-out split of an experiment, or the training split, and batches of it.

    windows: maximum number of examples, from all domains, in a fixed order; None for all.
    """
    split = exp.data.prepare(Path(data_dir) if data_dir else default_directory())[held_out]
    return split, list(evaluation_batches(split, exp.data.B // exp.data.microbatches, windows))


def open_run(workdir: str | Path, step: int | None = None) -> TrainedRun:
    """The run in a workdir at the newest valid checkpoint or that of `step`, whose bytes are checked.

    Parameters and router state are JAX arrays, which a jitted function may close over.
    ValueError where there is no run, or no such checkpoint.
    """
    exp = experiment(workdir)
    with Checkpoints(Path(workdir) / "checkpoints") as checkpoints:
        state, _, at = checkpoints.restore(step=step)
    params, router = jax.tree.map(jnp.asarray, (state["params"], state.get("router", {})))
    return TrainedRun(exp, at, params, router)
