"""Laws 1 and 5 of an experiment: one model on every mesh, replicas that are replicas.

A training step is compiled once per mesh; its trace is compared with that of a single device.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from moe_jax import step
from moe_jax.audit.routing import Verdict
from moe_jax.audit.samples import tasks
from moe_jax.config import Experiment
from moe_jax.core import shard
from moe_jax.core.shard import AXES
from moe_jax.data import AnyBatch
from moe_jax.evaluate import EvaluationSums, evaluation_step
from moe_jax.models import Call

CLOSE = 1e-5  # relative to the largest number of an array, in float32
STEP = 1e-4  # of an update, where the gradient is more than rounding: optimizers divide by its size
SURE = 1e-3  # of the largest gradient of a parameter: more than rounding
# All pairs of axes, and every axis with more than two shards; the small ones are for few devices.
MESHES: tuple[Mapping[str, int], ...] = (
    {"data": 2, "expert": 4},
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"slice": 4, "expert": 2},
    {"slice": 2, "data": 2, "fsdp": 2},
    {"data": 4, "tensor": 2},
    {"slice": 2, "tensor": 4},
    {"fsdp": 8},
    {"expert": 8},
    {"fsdp": 2, "tensor": 2},
    {"expert": 4},
    {"slice": 2, "expert": 2},
    {"expert": 2},
    {"tensor": 2},
)


class StepTrace(NamedTuple):
    """Trace of a training step: logits, choices, metrics, gradients, the state after it, an evaluation."""

    logits_BLV: Float[Array, "B L V"]
    expert_NBLK: Int[Array, "N B L K"] | None
    metrics: step.Metrics
    grads: Any
    state: step.State  # after the step
    evaluated: EvaluationSums


class Trial:
    """A training step of an experiment on its mesh, over the first devices there are."""

    def __init__(self, exp: Experiment, devices: list[jax.Device]):
        self.program = step.Program(exp, devices=devices)
        self.run = jax.jit(partial(trace_step, exp, self.program.specs))

    def __call__(self, state: step.State, batch: AnyBatch) -> StepTrace:
        """Runs the step on a state and a batch in host memory."""
        state = jax.device_put(state, self.program.shardings)
        with jax.set_mesh(self.program.mesh):
            return self.run(state, self.program.to_global(batch))


def trace_step(exp: Experiment, specs: step.StateSpecs, state: step.State, batch: AnyBatch) -> StepTrace:
    """Trace of a training step on the current mesh."""
    tx, rate = exp.optim.build(exp.run.steps)
    grads, losses = step.gradients(exp, specs, state, batch)
    after, metrics = step.update(exp, tx, rate, state, grads, losses)

    def outputs(params: Any, router: Any, key: Array, batch: AnyBatch) -> Any:
        logits_BLV, aux = exp.model.apply(params, batch, Call(key, router))
        evaluated = evaluation_step(exp.data.objective, exp.model, tasks(exp), params, router, batch)
        return logits_BLV, None if aux is None else aux.expert_BLK, evaluated

    here = shard.from_mesh(exp.exchange)
    tokens = shard.token_spec(here)
    traced_outputs = shard.per_shard(outputs, here, (specs.params, P(), P(), tokens), (tokens, P(None, *tokens), P()))
    logits_BLV, expert_NBLK, evaluated = traced_outputs(state.params, state.router, step.step_key(exp, state), batch)
    return StepTrace(logits_BLV, expert_NBLK, metrics, grads, after, evaluated)


def sharpen_routers(state: step.State) -> step.State:
    """Sharpens the routers of a state, so that some experts overflow."""

    def leaf(path: Any, x: np.ndarray) -> np.ndarray:
        name = str(path[-1].key)
        return x * (4 if name.startswith("router") else 1)

    return jax.device_get(state)._replace(params=jax.tree.map_with_path(leaf, jax.device_get(state.params)))


def start(exp: Experiment) -> step.State:
    """A state before the first step, in host memory."""
    tx, _ = exp.optim.build(exp.run.steps)
    return sharpen_routers(jax.jit(partial(step.init, exp, tx))())


# ---------------------------------------------------------------- law 1


def meshes(exp: Experiment, devices: list[jax.Device]) -> Iterator[tuple[str, Experiment]]:
    """Yields the experiment on its own mesh, and on others that it fits, with their names.

    A mesh with no axis, and on no axis more shards, than one that was tried is left out.
    """
    tried: list[Mapping[str, int]] = []
    for sizes in ({a: n for a, n in exp.mesh if n > 1}, *MESHES):
        count = int(np.prod([*sizes.values()]))
        if 1 < count <= len(devices) and not any(within(sizes, other) for other in tried):
            try:
                on_mesh = dataclasses.replace(exp, mesh=tuple(sizes.items()))
            except ValueError:  # one of its sizes does not divide
                continue
            tried.append(sizes)
            yield " x ".join(f"{a}={sizes[a]}" for a in AXES if a in sizes), on_mesh


def within(sizes: Mapping[str, int], other: Mapping[str, int]) -> bool:
    """Tells whether another mesh has all axes of this one, in at least its sizes."""
    return all(other.get(axis, 1) >= n for axis, n in sizes.items())


def on_one_device(exp: Experiment) -> Experiment:
    return dataclasses.replace(exp, mesh=())


def run_on(exp: Experiment, state: step.State, batch: AnyBatch, devices: list[jax.Device]) -> StepTrace:
    """Trace of a step on the experiment's mesh, in host memory."""
    count = int(np.prod([n for _, n in exp.mesh]))
    return jax.device_get(Trial(exp, devices[:count])(state, batch))


def compare_with_one_device(one: StepTrace, many: StepTrace, before: step.State) -> dict[str, Verdict]:
    """Law 1: compares a mesh with a single device: outputs, losses, drops, gradients, one step."""
    one, many = (trace._replace(grads=drop_key_bias(trace.grads)) for trace in (one, many))
    stats = {n: v for n, v in (one.metrics.stats._asdict() if one.metrics.stats else {}).items() if n != "kept"}
    found = {
        "outputs": at_most(CLOSE, worst(one.logits_BLV, many.logits_BLV)),
        "losses": at_most(
            CLOSE,
            worst(
                {**one.metrics._asdict(), "stats": stats},
                {**many.metrics._asdict(), "stats": {n: getattr(many.metrics.stats, n) for n in stats}},
            ),
        ),
        "gradients": at_most(CLOSE, worst(one.grads, many.grads, least=largest(one.grads) * SURE)),
        "one step": at_most(STEP, step_error(one, many, before)),
        "evaluation": at_most(CLOSE, worst(one.evaluated, many.evaluated)),
        "router state": at_most(CLOSE, worst(one.state.router, many.state.router)),
    }
    if one.metrics.stats is not None:
        found["drops"] = compare_choices(one, many)
    return found


def drop_key_bias(grads: Any) -> Any:
    """Gradients with zero for the bias of keys: it shifts all scores of a query alike, so its gradient is rounding."""
    return jax.tree.map_with_path(lambda path, g: g * (str(path[-1].key) != "key_JA"), grads)


def compare_choices(one: StepTrace, many: StepTrace) -> Verdict:
    """Compares choices exactly, and the number of dropped ones in every layer."""
    first, second = one.metrics.stats, many.metrics.stats
    assert first is not None
    assert second is not None
    if one.expert_NBLK is not None and many.expert_NBLK is not None:
        moved = np.not_equal(one.expert_NBLK, many.expert_NBLK).any((1, 2, 3))
        if moved.any():
            return Verdict(False, f"other experts chosen in MoE layer {np.flatnonzero(moved)[0]}")
    kept, asked = float(np.sum(first.kept)), float(np.sum(first.choices_E))
    if len(layers := np.flatnonzero(np.not_equal(first.kept, second.kept))):
        return Verdict(False, f"other drops in MoE layer {layers[0]}")
    return Verdict(True, f"{asked - kept:.0f} of {asked:.0f}")


class Worst(NamedTuple):
    """The largest difference between two trees."""

    error: float
    where: str


def worst(one: Any, many: Any, least: float = 1e-6) -> Worst:
    """The largest difference, relative to the largest number of each array or to `least`; non-finite numbers differ."""
    found = Worst(0.0, "")
    pairs = zip(jax.tree.leaves_with_path(one), jax.tree.leaves(many), strict=True)
    for (path, a), b in pairs:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        size = max(np.abs(np.nan_to_num(a)).max(initial=0), least)
        both = (a == b) | (np.isnan(a) & np.isnan(b))
        error = np.where(both, 0, np.nan_to_num(np.abs(a - b), nan=np.inf)).max(initial=0) / size
        found = max(found, Worst(float(error), jax.tree_util.keystr(path, simple=True, separator="/")))
    return found


def step_error(one: StepTrace, many: StepTrace, before: step.State) -> Worst:
    """The largest difference between updates, relative to them, where gradients are more than rounding."""

    def clear_updates(grad: Any, new: Any, old: Any) -> np.ndarray:
        grad, moved = np.asarray(grad, np.float64), np.asarray(new, np.float64) - np.asarray(old, np.float64)
        return np.where(np.abs(grad) > SURE * np.abs(grad).max(initial=0), moved, 0)

    first, second = (jax.tree.map(clear_updates, one.grads, trace.state.params, before.params) for trace in (one, many))
    return worst(first, second, least=1e-7)


def largest(tree: Any) -> float:
    return max(float(np.abs(x).max(initial=0)) for x in jax.tree.leaves(tree))


def at_most(limit: float, found: Worst) -> Verdict:
    holds = found.error <= limit
    where = f" in {found.where}" if found.where else ""
    return Verdict(holds, f"{found.error:.0e}" + ("" if holds else f"{where}, where {limit:.0e} is rounding"))


# ---------------------------------------------------------------- law 5


def replicas(exp: Experiment, state: step.State, batch: AnyBatch, devices: list[jax.Device], steps: int = 3) -> Verdict:
    """Law 5: after steps, all replicas of an array are bit-identical."""
    program = step.Program(exp, devices=devices)
    current, copies = jax.device_put(state, program.shardings), 0
    for _ in range(steps):
        current, metrics = program.step(current, batch)
    for path, leaf in jax.tree.leaves_with_path({"state": current._asdict(), "metrics": metrics._asdict()}):
        by_index: dict[str, list[bytes]] = {}
        for part in leaf.addressable_shards:
            by_index.setdefault(str(part.index), []).append(np.asarray(part.data).tobytes())
        copies += sum(len(same) - 1 for same in by_index.values())
        if any(len(set(same)) > 1 for same in by_index.values()):
            return Verdict(False, f"{jax.tree_util.keystr(path, simple=True, separator='/')} differs between devices")
    return Verdict(True, f"{copies} copies after {steps} steps, all bit-identical")
