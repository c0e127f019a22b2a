"""Training, top to bottom: state, step, program, loop."""

import math
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from moe_jax import costs, optim
from moe_jax.checkpoint import Checkpoints
from moe_jax.config import Experiment
from moe_jax.core import dims, shard
from moe_jax.core.shard import RULES, TOKENS, make_mesh
from moe_jax.core.stats import Stats
from moe_jax.costs import chips
from moe_jax.costs.energy import of_run
from moe_jax.data import AnyBatch, batches, default_directory, evaluation_batches
from moe_jax.evaluate import bits_per_byte, drop_rate, evaluate, evaluation_step
from moe_jax.models import aux_loss as auxiliary
from moe_jax.models import cross_entropy
from moe_jax.moe import Aux, MoEConfig


class State(NamedTuple):
    """All that training changes; its step is also the position in the data."""

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    router: Any  # what routers and losses remember (biases, schedules, ...), by MoE layer; {} for most
    skipped: Int[Array, ""]  # steps without an update, for a loss or gradient that was not finite
    skipped_in_a_row: Int[Array, ""]


class Metrics(NamedTuple):
    """Of one step. Losses are means over the step's targets."""

    loss: Float[Array, ""]  # nats per token
    aux_loss: Float[Array, ""]  # over all MoE layers, coefficients included
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    targets: Float[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]
    stats: Stats | None  # of the routing, by layer


class Layouts(NamedTuple):
    """PartitionSpecs of a training state, and of what comes and goes with it."""

    params: Any
    sharded: Any  # gradients, and what the optimizer remembers of each parameter
    state: State


class TrainingDiverged(RuntimeError):
    """Too many steps in a row were not finite."""


# ---------------------------------------------------------------- one step


def init(exp: Experiment, tx: optax.GradientTransformation) -> State:
    """The state before the first step, from the experiment's seed."""
    batch = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), exp.data.shapes(B=1))
    params = exp.model.init(jax.random.key(exp.seed), batch)
    zero = jnp.zeros((), jnp.int32)
    return State(zero, params, tx.init(params), exp.model.init_router(), zero, zero)


class Losses(NamedTuple):
    """Of a batch, over all shards."""

    loss: Float[Array, ""]
    aux_loss: Float[Array, ""]
    targets: Float[Array, ""]
    stats: Stats | None


def backward(
    exp: Experiment, layouts: Layouts, params: Any, router: Any, key: Key[Array, ""], batch: AnyBatch
) -> tuple[Any, Losses]:
    """Gradients and losses of a batch, in `accumulate` pieces, on one shard; gradients are summed over shards once."""
    A, here = exp.data.accumulate, shard.here()
    targets = jnp.maximum(here.sum(batch.loss_mask_BL.sum(dtype=jnp.float32)), 1)

    def objective(params, piece: AnyBatch, key):
        logits_BLV, aux = exp.model.apply(params, piece, key, router)
        nats_BL = jnp.where(piece.loss_mask_BL, cross_entropy(logits_BLV, piece.target_BL), 0)
        loss, aux_loss = here.sum(nats_BL.sum()) / targets, auxiliary(exp.model, aux) / A
        return loss + aux_loss, (loss, aux_loss, None if aux is None else aux.stats)

    def of_piece(piece: AnyBatch, key):
        return jax.grad(objective, has_aux=True)(params, piece, key)

    params = here.vary(params)
    if A == 1:
        grads, (loss, aux_loss, stats) = of_piece(batch, key)
    else:
        pieces, keys_A = jax.tree.map(partial(interleave, A), batch), jax.random.split(key, A)
        grads, (loss, aux_loss, stats) = _sum_over(of_piece, params, pieces, keys_A)
    return here.reduce(grads, layouts.params, layouts.sharded), Losses(loss, aux_loss, targets, stats)


def gradients(exp: Experiment, layouts: Layouts, state: State, batch: AnyBatch) -> tuple[Any, Losses]:
    """Of a whole batch: the model is spread over the mesh here, as a function of one shard."""
    here, everywhere = shard.current(exp.exchange), P()
    specs = (layouts.params, everywhere, everywhere, shard.token_spec(here))
    run = shard.per_shard(partial(backward, exp, layouts), here, specs, (layouts.sharded, everywhere))
    return run(state.params, state.router, step_key(exp, state), batch)


def step_key(exp: Experiment, state: State) -> Key[Array, ""]:
    """Of all that is random in a step."""
    return jax.random.fold_in(jax.random.key(exp.seed + 1), state.step)


def update(
    exp: Experiment, tx: optax.GradientTransformation, rate: optax.Schedule, state: State, grads: Any, losses: Losses
) -> tuple[State, Metrics]:
    """The state after a step with these gradients; the same one if anything is not finite."""
    loss, aux_loss, targets, stats = losses
    grad_norm = optax.global_norm(grads)
    finite = jnp.isfinite(loss + aux_loss) & jnp.isfinite(grad_norm)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    router = exp.model.moe.update_state(state.router, stats) if state.router else state.router
    params, opt_state, router = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, opt_state, router),
        (state.params, state.opt_state, state.router),
    )
    skipped = state.skipped + ~finite
    in_a_row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
    learning_rate = jnp.asarray(rate(state.step - state.skipped), jnp.float32)
    metrics = Metrics(loss, aux_loss, grad_norm, learning_rate, targets, skipped, in_a_row, stats)
    return State(state.step + 1, params, opt_state, router, skipped, in_a_row), metrics


def train_step(
    exp: Experiment,
    tx: optax.GradientTransformation,
    rate: optax.Schedule,
    layouts: Layouts,
    state: State,
    batch: AnyBatch,
) -> tuple[State, Metrics]:
    """One update from one batch."""
    return update(exp, tx, rate, state, *gradients(exp, layouts, state, batch))


def interleave(A: int, x_B: Array) -> Array:
    """[B, ...] -> [A, B/A, ...], every A-th row to a piece, so that rows stay on their device."""
    return x_B.reshape(-1, A, *x_B.shape[1:]).swapaxes(0, 1)


def _sum_over(f, params: Any, pieces: Any, keys_A: Array) -> Any:
    """The sum of f's gradients (like params) and losses over pieces, computed one after another."""
    first = jax.tree.map(lambda x: x[0], (pieces, keys_A))
    losses = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(f, *first)[1])
    zeros = (jax.tree.map(jnp.zeros_like, params), losses)
    add = partial(jax.tree.map, jnp.add)
    return jax.lax.scan(lambda total, piece: (add(total, f(*piece)), None), zeros, (pieces, keys_A))[0]


def check_tasks(exp: Experiment, domains: int) -> None:
    """Refuses a router or a loss by task that has no room for the domains of the data."""
    moe = exp.model.moe
    if not isinstance(moe, MoEConfig) or "task" not in moe.needs:
        return
    by_task = "task" in getattr(moe.router, "needs", ())  # M is something else in other routers
    room = {"router.M": moe.router.M if by_task else domains, "tasks": moe.tasks if moe.tasks > 1 else domains}
    for name, n in room.items():
        if n < domains:
            raise ValueError(f"The data has {domains} domains, but config.model.moe.{name}={n}; set it to {domains}.")


# ---------------------------------------------------------------- on a mesh


def layouts_of(exp: Experiment, state: State, sizes: Mapping[str, int]) -> Layouts:
    """How an experiment's state lies on a mesh of these sizes.

    Parameters lie as the rules say. With `optim.zero1`, gradients and the optimizer's state are also spread over `data`
    and `expert` (ZeRO stage 1, arXiv:1910.02054); over `fsdp` everything is (stage 3).
    """
    params = dims.layouts(state.params, shard.rules_for(exp.exchange, sizes))
    sharded = exp.optim.sharded(state.params, params, sizes)
    opt_state = optim.layouts(state.opt_state, state.params, sharded)
    router = jax.tree.map(lambda _: P(), state.router)
    whole: Any = P()
    return Layouts(params, sharded, State(whole, params, opt_state, router, whole, whole))


class Program:
    """The compiled functions of an experiment, and where their arrays lie."""

    def __init__(self, exp: Experiment, domains: int = 1, devices: Sequence[jax.Device] | None = None):
        check_tasks(exp, domains)
        self.mesh = make_mesh(devices, **dict(exp.mesh))
        tx, rate = exp.optim.build(exp.run.steps)
        make = partial(init, exp, tx)
        self.layouts = layouts_of(exp, jax.eval_shape(make), self.mesh.shape)
        on_mesh = partial(NamedSharding, self.mesh)
        everywhere, rows = on_mesh(P()), P(RULES["B"])
        self.shardings = jax.tree.map(on_mesh, self.layouts.state)
        self.rows = on_mesh(rows)
        self._init = jax.jit(make, out_shardings=self.shardings)
        step = partial(train_step, exp, tx, rate, self.layouts)
        self._step = jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, everywhere))
        look = partial(evaluation_step, exp.model, domains)
        with jax.set_mesh(self.mesh):
            specs = (self.layouts.params, P(), shard.token_spec(here := shard.current(exp.exchange)))
            self._evaluate = jax.jit(shard.per_shard(look, here, specs, P()), out_shardings=everywhere)

    def init(self) -> State:
        with jax.set_mesh(self.mesh):
            return self._init()

    def step(self, state: State, batch: AnyBatch) -> tuple[State, Metrics]:
        """The state given is consumed."""
        with jax.set_mesh(self.mesh):
            return self._step(state, self.place(batch))

    def lower(self, batch: AnyBatch) -> jax.stages.Lowered:
        """Lowers the train step for the shapes of a global batch of arrays or `jax.ShapeDtypeStruct`; runs nothing."""
        rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.rows), batch)
        with jax.set_mesh(self.mesh):
            return self._step.lower(self.abstract_state(), rows)

    def evaluate(self, state: State, batch: AnyBatch) -> Any:
        with jax.set_mesh(self.mesh):
            return self._evaluate(state.params, state.router, self.place(batch))

    @property
    def share(self) -> dict[str, int]:
        """Which part of every batch this process reads, of how many; processes inside one shard read the same."""
        n = math.prod(self.mesh.shape[axis] for axis in TOKENS)
        places = self.rows.addressable_devices_indices_map((n,)).values()
        return part_of({place[0].indices(n)[0] for place in places if place is not None}, n)

    def place(self, batch: AnyBatch) -> AnyBatch:
        """This process's rows of a batch, as part of the global one."""
        parts = self.share["processes"]

        def global_array(x: Array | np.ndarray) -> Array:
            shape = (parts * len(x), *x.shape[1:])
            return jax.make_array_from_process_local_data(self.rows, x, shape)

        return jax.tree.map(global_array, batch)

    def abstract_state(self) -> State:
        """Shapes and shardings of the state, to restore it into."""
        shapes = jax.eval_shape(self._init)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self.shardings)


def part_of(mine: set[int], n: int) -> dict[str, int]:
    """The part of n shards' rows that these are; ValueError if they do not lie together."""
    first, size = min(mine), len(mine)
    if mine != set(range(first, first + size)) or first % size or n % size:
        raise ValueError(
            f"This process has the shards {sorted(mine)} of {n}, which do not lie together; choose a mesh whose last "
            "axes fill the devices of a process."
        )
    return {"process": first // size, "processes": n // size}


# ---------------------------------------------------------------- the loop


def train(
    exp: Experiment, workdir: pathlib.Path | None = None, data_dir: pathlib.Path | None = None
) -> Iterator[dict[str, Any]]:
    """Trains, and yields a record when it starts, every `log_every` steps, at every evaluation, and at the end.

    With a workdir, checkpoints are kept there, and training goes on from the newest valid one.
    TrainingDiverged after `max_bad_steps` steps in a row without a finite loss and gradient.
    """
    run, data = exp.run, exp.data
    windows, held_out = data.prepare(data_dir or default_directory())
    program = Program(exp, len(windows.domains))
    checkpoints = Checkpoints(workdir / "checkpoints", run.keep_last, run.keep_best) if workdir else None
    state, seconds = restore(checkpoints, program)
    step, tally = int(state.step), Tally(exp, windows.bytes_per_token, seconds)

    def evaluation() -> dict[str, Any]:
        began, B = time.monotonic(), data.B // data.accumulate
        chosen = evaluation_batches(held_out, B, run.eval_windows, **program.share)
        record = evaluate(partial(program.evaluate, state), chosen, held_out.domains)
        for name in ("", "_capacity"):
            if "loss" + name in record and held_out.bytes_per_token:
                record["bits_per_byte" + name] = bits_per_byte(record["loss" + name], held_out.bytes_per_token)
        if "moe" in record:
            record["moe"] = {"layer": tally.layers, **record["moe"]}
        tally.since += time.monotonic() - began  # not training
        return {"kind": "eval", "step": step, "seconds": tally.seconds(), **record}

    def save(loss: float | None = None) -> None:
        if checkpoints is not None and step not in checkpoints.steps():
            checkpoints.save(step, state, {"seconds": tally.seconds(), "experiment": exp.to_json()}, loss)

    try:
        yield {"kind": "start", "step": step, "seconds": seconds, "data": windows.fingerprint}
        late: Metrics | None = None  # fetched while the next step runs
        for batch in batches(windows, data.B, exp.seed, step, **program.share):
            if step >= run.steps:
                break
            state, metrics = program.step(state, batch)
            if late is not None:
                tally.add(late)
            step, late = step + 1, metrics
            due = {what for what, n in run.intervals.items() if step % n == 0 or step == run.steps}
            if due:
                tally.add(late)
                late = None
            if "log" in due:
                yield tally.record(step)
            held_out_record = evaluation() if "eval" in due else None
            if "save" in due:
                save(held_out_record["loss"] if held_out_record else None)
            if held_out_record:
                yield held_out_record
            if tally.skipped_in_a_row >= run.max_bad_steps:
                state = state._replace(skipped_in_a_row=jnp.zeros_like(state.skipped_in_a_row))
                save()
                raise TrainingDiverged(
                    f"{tally.skipped_in_a_row} steps in a row had no finite loss or gradient; stopped at step {step}, "
                    f"its parameters are the last good ones{f' and saved in {workdir}' if workdir else ''}: go on "
                    "with a lower learning rate, or look at the data."
                )
        yield {"kind": "end", "step": step, "seconds": (seconds := tally.seconds()), "energy": taken(exp, seconds)}
    finally:
        if checkpoints is not None:
            checkpoints.close()


def taken(exp: Experiment, seconds: float) -> dict[str, Any]:
    """What these seconds of a run took from the grid and emitted, estimated as `config.run` says."""
    run, kind = exp.run, jax.devices()[0].device_kind
    return dict(of_run(seconds, kind, jax.device_count(), run.watts, run.pue, run.carbon))


def restore(checkpoints: Checkpoints | None, program: Program) -> tuple[State, float]:
    """The newest valid state and the seconds it took; the initial one where there is none."""
    if checkpoints is None or checkpoints.empty():
        return program.init(), 0.0
    state, meta, _ = checkpoints.restore(program.abstract_state())
    return state, meta["seconds"]


class Tally:
    """Adds up steps until they are logged: sums first, then ratios."""

    def __init__(self, exp: Experiment, bytes_per_token: float | None, seconds: float):
        self.bytes_per_token = bytes_per_token  # None of what is no text
        self.work = costs.flops(exp.model, exp.data.shapes(B=1)).training * exp.data.B  # FLOPs of a step
        peak = chips.peak(jax.devices()[0].device_kind)
        self.peak = peak and peak * jax.device_count()
        self.start = time.monotonic() - seconds
        self.skipped_in_a_row = 0
        is_moe = isinstance(exp.model.moe, MoEConfig)
        self.layers = [i for i, sparse in enumerate(exp.model.sparse) if sparse] if is_moe else []
        self.clear()

    def clear(self) -> None:
        self.last: Metrics | None = None
        self.nats = self.targets = 0.0
        self.steps = 0
        self.stats: Stats | None = None
        self.since = time.monotonic()

    def seconds(self) -> float:
        """Since the run began, interruptions left out."""
        return time.monotonic() - self.start

    def add(self, metrics: Metrics) -> None:
        """Waits for a step and adds it."""
        self.last = last = jax.device_get(metrics)
        self.steps += 1
        self.skipped_in_a_row = int(last.skipped_in_a_row)
        if self.skipped_in_a_row == 0:
            self.nats += float(last.loss * last.targets)
            self.targets += float(last.targets)
            if last.stats is not None:
                self.stats = last.stats if self.stats is None else jax.tree.map(np.add, self.stats, last.stats)

    def record(self, step: int) -> dict[str, Any]:
        """What has been added up since the last record."""
        assert self.last is not None
        elapsed = time.monotonic() - self.since
        loss, rate = self.nats / self.targets if self.targets else float("nan"), self.work * self.steps / elapsed
        record = {
            "kind": "train",
            "step": step,
            "seconds": self.seconds(),
            "loss": loss,
            "aux_loss": float(self.last.aux_loss),
            "grad_norm": float(self.last.grad_norm),
            "learning_rate": float(self.last.learning_rate),
            "tokens_per_second": self.targets / elapsed,
            "flops_per_second": rate,
            "skipped": int(self.last.skipped),
        }
        if self.bytes_per_token:
            record["bits_per_byte"] = bits_per_byte(loss, self.bytes_per_token)
        if self.peak:
            record["mfu"] = rate / self.peak
        if self.stats is not None:
            moe = jax.tree.map(lambda a: np.asarray(a).tolist(), Aux(self.last.aux_loss, self.stats).metrics)
            record |= {
                "drop_rate": drop_rate(self.stats),
                "load_max_over_mean": float(np.mean(moe["load_max_over_mean"])),
                "moe": {"layer": self.layers, **moe},
            }
        self.clear()
        return record
