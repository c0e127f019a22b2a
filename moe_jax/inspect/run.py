"""A trained model, opened from the folder of its run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.checkpoint import Checkpoints
from moe_jax.config import Experiment
from moe_jax.continuation import check_data
from moe_jax.data import AnyBatch, data_identity, default_directory, evaluation_batches, with_kept_tokenizers
from moe_jax.moe import LayerState
from moe_jax.workdir import CONFIG, check_same_run, confirmed_experiment, read_config


class TrainedRun(NamedTuple):
    """An experiment and a checkpoint of it."""

    exp: Experiment
    step: int
    params: Any
    router: LayerState  # state of the routers
    workdir: Path | None = None
    data: Mapping[str, str] = {}  # `data_identity` of what it was trained on; {} where an earlier version did not say

    @property
    def weights(self) -> dict[str, Any]:
        """Parameters and router state, which determine the outputs."""
        return {"params": self.params, "router": dict(self.router)}


def experiment(workdir: str | Path) -> Experiment:
    """Experiment that was run in a workdir; ValueError where none was."""
    return confirmed_experiment(workdir)


def examples(
    run: TrainedRun | Experiment,
    data_dir: str | Path | None = None,
    windows: int | None = None,
    held_out: bool = True,
) -> tuple[Any, list[AnyBatch]]:
    """The held-out split of a run, or the training split, and batches of it; or those of any experiment.

    windows: maximum number of examples, from all domains, in a fixed order; None for all. ValueError where a run was
    trained on other data than its config now gives: text, a data set or a tokenizer has changed.
    """
    exp, workdir, known = (run.exp, run.workdir, run.data) if isinstance(run, TrainedRun) else (run, None, {})
    data = exp.data if workdir is None else with_kept_tokenizers(exp.data, workdir)
    splits = data.prepare(Path(data_dir) if data_dir else default_directory())
    check_data(known, data_identity(*splits), workdir)
    split = splits[held_out]
    return split, list(evaluation_batches(split, exp.data.B // exp.data.microbatches, windows))


def open_run(workdir: str | Path, step: int | None = None) -> TrainedRun:
    """The run in a workdir at the newest valid checkpoint or that of `step`, whose bytes are checked.

    Parameters and router state are JAX arrays, which a jitted function may close over.
    ValueError where there is no run, or no such checkpoint.
    """
    values = read_config(workdir)
    with Checkpoints(Path(workdir) / "checkpoints") as checkpoints:
        state, meta, at = checkpoints.restore(step=step)
    if "experiment" in meta:
        check_same_run(values, kept := json.loads(meta["experiment"]), f"{workdir}/{CONFIG} is not that of step {at}")
        values = kept  # with which this checkpoint was trained
    exp = Experiment.from_json(json.dumps(values))
    params, router = jax.tree.map(jnp.asarray, (state["params"], state.get("router", {})))
    return TrainedRun(exp, at, params, router, Path(workdir), meta.get("data", {}))
