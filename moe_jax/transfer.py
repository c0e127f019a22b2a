"""Parameters of another run, for a new one to begin with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.checkpoint import Checkpoints
from moe_jax.config import Experiment
from moe_jax.step import Program, State

PARAMS = "params/"  # how the names of parameters begin in a checkpoint
SHOWN = 6  # parameters that are named in a message


class RunCheckpoint(NamedTuple):
    """A checkpoint of a run: that of `step`, or the newest valid one (None)."""

    workdir: Path
    step: int | None = None

    def __str__(self) -> str:
        return f"{self.workdir}" if self.step is None else f"{self.workdir}@{self.step}"


class Fit(NamedTuple):
    """Parameters of a model that a checkpoint holds, and that it does not, by their names ("layers/0/moe/gate_DE")."""

    step: int
    checksum: str  # SHA-256 of the checkpoint's manifest, which holds the checksums of all its files
    taken: tuple[str, ...]
    not_taken: dict[str, str]  # and why
    unused: tuple[str, ...]  # there


def fit_checkpoint(params: Any, source: RunCheckpoint) -> Fit:
    """Finds the parameters of `params` (arrays or shapes) that a checkpoint holds in the same place and shape.

    Every byte of the checkpoint is verified. ValueError where there is none, or it holds none of them.
    """
    with Checkpoints(source.workdir / "checkpoints") as checkpoints:
        stored, step, checksum = checkpoints.leaves(source.step)
    there = {name.removeprefix(PARAMS): shape for name, (shape, _) in stored.items() if name.startswith(PARAMS)}
    here = {name: list(leaf.shape) for name, leaf in _by_name(params).items()}
    why = {
        name: "absent there" if name not in there else f"shape {there[name]} there, {shape} here"
        for name, shape in here.items()
        if there.get(name) != shape
    }
    found = Fit(step, checksum, tuple(n for n in here if n not in why), why, tuple(n for n in there if n not in here))
    if not found.taken:
        raise ValueError(
            f"No parameter fits of {source.workdir} step {step}: {_few(why)}; give a run of a similar model."
        )
    return found


def check_fit(exp: Experiment, source: RunCheckpoint) -> None:
    """ValueError where an experiment can take no parameter from a checkpoint; trains, writes and deletes nothing."""
    batch = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), exp.data.shapes(B=1))
    fit_checkpoint(jax.eval_shape(exp.model.init, jax.random.key(0), batch), source)


def begin_from(program: Program, source: RunCheckpoint) -> tuple[State, dict[str, Any]]:
    """The initial state with the parameters that fit of another run's checkpoint, and a record of where they are from.

    All else is as in any new run: the step, the optimizer's state and the routers'. The meshes may differ.
    """
    shapes = program.abstract_state().params
    found, wanted = fit_checkpoint(shapes, source), _by_name(shapes)
    with Checkpoints(source.workdir / "checkpoints") as checkpoints:
        read = checkpoints.restore_leaves({PARAMS + name: wanted[name] for name in found.taken}, found.step)
    state = program.init()
    leaves = [read.get(PARAMS + name, own) for name, own in _by_name(state.params).items()]
    params = jax.tree.unflatten(jax.tree.structure(state.params), leaves)
    origin = {
        "run": str(source.workdir.resolve()),
        "step": found.step,
        "checksum": found.checksum,
        "taken": len(found.taken),
        "not_taken": found.not_taken,
        "unused": list(found.unused),
    }
    return state._replace(params=params), origin


def check_origin(origin: Mapping[str, Any] | None, source: RunCheckpoint) -> None:
    """ValueError where a run that is continued did not begin with this source's parameters."""
    if origin is None:
        raise ValueError(
            f"The run began with parameters of its own, not with those of {source}; continue it without --init_from, "
            "or choose another --workdir."
        )
    if origin["run"] != str(source.workdir.resolve()) or source.step not in (None, origin["step"]):
        raise ValueError(
            f"The run began with the parameters of {origin['run']} step {origin['step']}, not with those of {source}; "
            "continue it without --init_from, or choose another --workdir."
        )


def describe_origin(origin: Mapping[str, Any]) -> str:
    """The record of `begin_from` in a sentence."""
    missing, unused = origin["not_taken"], origin["unused"]
    total = origin["taken"] + len(missing)
    said = [f"{origin['taken']} of {total} parameters taken from {origin['run']} step {origin['step']}"]
    said += [f"not taken: {_few(missing)}"] if missing else []
    said += [f"unused there: {_few(dict.fromkeys(unused, ''))}"] if unused else []
    return "; ".join(said)


def _few(names: Mapping[str, str]) -> str:
    """The first names with what is said of them, and how many there are besides."""
    shown = [f"{name} ({why})" if why else name for name, why in list(names.items())[:SHOWN]]
    return ", ".join(shown) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _by_name(params: Any) -> dict[str, Any]:
    """Parameters by their names, in the order of the tree."""
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
