"""A training step, top to bottom: state, gradients, update, and the compiled program on a mesh."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from moe_jax import optim
from moe_jax.config import Experiment
from moe_jax.core import dims, shard
from moe_jax.core.shard import RULES, TOKEN_AXES, make_mesh
from moe_jax.core.stats import Stats
from moe_jax.data import AnyBatch
from moe_jax.evaluate import evaluation_step
from moe_jax.models import Call, layer_tokens
from moe_jax.models import aux_loss as auxiliary
from moe_jax.xla import compiler_options


class State(NamedTuple):
    """All that training changes; its step is also the position in the data."""

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    router: Any  # state of routers and losses (biases, schedules, ...), by MoE layer; {} for most
    skipped: Int[Array, ""]  # steps without an update, for a loss or gradient that was not finite
    skipped_in_a_row: Int[Array, ""]


class Metrics(NamedTuple):
    """Measurements of one step. Losses are means over the step's targets."""

    loss: Float[Array, ""]  # nats per token
    aux_loss: Float[Array, ""]  # over all MoE layers, coefficients included
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    targets: Float[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]
    others: dict[str, Float[Array, ""]]  # further means of the objective
    stats: Stats | None  # of the routing, by layer


class StateSpecs(NamedTuple):
    """PartitionSpecs of parameters, gradients and the training state."""

    params: Any
    sharded: Any  # gradients, and optimizer state of each parameter
    state: State


# ---------------------------------------------------------------- one step


def init(exp: Experiment, tx: optax.GradientTransformation) -> State:
    """The state before the first step, from the experiment's seed."""
    batch = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), exp.data.shapes(B=1))
    params = exp.model.init(jax.random.key(exp.seed), batch)
    zero = jnp.zeros((), jnp.int32)
    return State(zero, params, tx.init(params), exp.model.init_router(), zero, zero)


class Losses(NamedTuple):
    """Losses of a batch, over all shards."""

    loss: Float[Array, ""]
    aux_loss: Float[Array, ""]
    targets: Float[Array, ""]
    others: dict[str, Float[Array, ""]]  # further means of the objective, see `data.Terms`
    stats: Stats | None


def backward(
    exp: Experiment, specs: StateSpecs, params: Any, router: Any, key: Key[Array, ""], batch: AnyBatch
) -> tuple[Any, Losses]:
    """Gradients and losses of a batch, microbatch by microbatch, on one shard; shards' gradients are summed once.

    The auxiliary losses of microbatches are averaged by their tokens: exact for a loss that is a mean over tokens
    (`losses.is_additive`), else a mean of the losses of parts.
    """
    A, here, objective = exp.data.microbatches, shard.local(), exp.data.objective
    targets = jnp.maximum(here.sum(objective.targets(batch).sum(dtype=jnp.float32)), 1)
    tokens_N = layer_tokens(exp.model, batch, here) if exp.weighs_microbatches else None

    def loss_of(params, microbatch: AnyBatch, key):
        output, aux = exp.model.apply(params, microbatch, Call(key, router))
        terms = objective.terms(output, microbatch, here)
        sums = here.sum((terms.nats_BL.sum(), jax.tree.map(lambda a: a.sum(dtype=jnp.float32), dict(terms.others))))
        loss, others = jax.tree.map(lambda total: total / targets, sums)
        aux_loss = auxiliary(exp.model, aux, tokens_N)
        return loss + aux_loss, (loss, aux_loss, others, None if aux is None else aux.stats)

    def gradient(microbatch: AnyBatch, key):
        return jax.grad(loss_of, has_aux=True)(params, microbatch, key)

    params = here.pvary(params)
    if A == 1:
        grads, (loss, aux_loss, others, stats) = gradient(batch, key)
    else:
        microbatches, keys_A = jax.tree.map(partial(split_microbatches, A), batch), jax.random.split(key, A)
        grads, (loss, aux_loss, others, stats) = _sum_over(gradient, params, microbatches, keys_A)
    return here.reduce(grads, specs.params, specs.sharded), Losses(loss, aux_loss, targets, others, stats)


def gradients(exp: Experiment, specs: StateSpecs, state: State, batch: AnyBatch) -> tuple[Any, Losses]:
    """Gradients and losses of a global batch: applies `backward` to every shard of the mesh."""
    here, replicated = shard.from_mesh(exp.exchange), P()
    in_specs = (specs.params, replicated, replicated, shard.token_spec(here))
    run = shard.per_shard(partial(backward, exp, specs), here, in_specs, (specs.sharded, replicated))
    return run(state.params, state.router, step_key(exp, state), batch)


def step_key(exp: Experiment, state: State) -> Key[Array, ""]:
    """PRNG key of this step."""
    return jax.random.fold_in(jax.random.key(exp.seed + 1), state.step)


def update(
    exp: Experiment, tx: optax.GradientTransformation, rate: optax.Schedule, state: State, grads: Any, losses: Losses
) -> tuple[State, Metrics]:
    """The state after a step with these gradients; the same one if anything is not finite."""
    loss, aux_loss, targets, others, stats = losses
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
    metrics = Metrics(loss, aux_loss, grad_norm, learning_rate, targets, skipped, in_a_row, others, stats)
    return State(state.step + 1, params, opt_state, router, skipped, in_a_row), metrics


def train_step(
    exp: Experiment,
    tx: optax.GradientTransformation,
    rate: optax.Schedule,
    specs: StateSpecs,
    state: State,
    batch: AnyBatch,
) -> tuple[State, Metrics]:
    """One update from one batch."""
    return update(exp, tx, rate, state, *gradients(exp, specs, state, batch))


def split_microbatches(A: int, x_B: Array) -> Array:
    """Splits a batch, [B, ...] -> [A, B/A, ...], every A-th row to a microbatch, so that rows stay on their device."""
    return x_B.reshape(-1, A, *x_B.shape[1:]).swapaxes(0, 1)


def _sum_over(f, params: Any, microbatches: Any, keys_A: Array) -> Any:
    """The sum of f's gradients (like params) and losses over microbatches, computed one after another."""
    first = jax.tree.map(lambda x: x[0], (microbatches, keys_A))
    losses = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(f, *first)[1])
    zeros = (jax.tree.map(jnp.zeros_like, params), losses)
    add = partial(jax.tree.map, jnp.add)
    return jax.lax.scan(lambda total, one: (add(total, f(*one)), None), zeros, (microbatches, keys_A))[0]


def check_tasks(exp: Experiment, domains: int) -> None:
    """Refuses a router or a loss by task that has too few tasks for the domains of the data."""
    moe = exp.model.routed
    if moe is None or "task" not in moe.needs:
        return
    by_task = "task" in moe.traits.needs  # M has another meaning in other routers
    limits = {"router.M": moe.router.M if by_task else domains, "tasks": moe.tasks if moe.tasks > 1 else domains}
    for name, n in limits.items():
        if n < domains:
            raise ValueError(f"The data has {domains} domains, but config.model.moe.{name}={n}; set it to {domains}.")


# ---------------------------------------------------------------- on a mesh


def state_specs(exp: Experiment, state: State, sizes: Mapping[str, int]) -> StateSpecs:
    """PartitionSpecs of an experiment's state on a mesh of these sizes.

    Parameters are sharded by the rules. With `optim.zero1`, gradients and the optimizer state are also sharded over
    `data` and `expert` (ZeRO stage 1, arXiv:1910.02054); over `fsdp` all of them are (stage 3).
    """
    params = dims.specs(state.params, shard.rules_for(exp.exchange, sizes))
    sharded = exp.optim.sharded(state.params, params, sizes)
    opt_state = optim.opt_state_specs(state.opt_state, state.params, sharded)
    router = jax.tree.map(lambda _: P(), state.router)
    replicated: Any = P()
    return StateSpecs(params, sharded, State(replicated, params, opt_state, router, replicated, replicated))


class Program:
    """The compiled functions of an experiment, and the shardings of their arrays."""

    def __init__(self, exp: Experiment, domains: int = 1, devices: Sequence[jax.Device] | None = None):
        check_tasks(exp, domains)
        self.mesh = make_mesh(devices, **dict(exp.mesh))
        tx, rate = exp.optim.build(exp.run.steps)
        make = partial(init, exp, tx)
        self.specs = state_specs(exp, jax.eval_shape(make), self.mesh.shape)
        on_mesh = partial(NamedSharding, self.mesh)
        replicated, rows = on_mesh(P()), P(RULES["B"])
        self.shardings = jax.tree.map(on_mesh, self.specs.state)
        self.rows = on_mesh(rows)
        self.options = compiler_options(self.mesh.devices.flat[0], exp.run.xla)
        jit = partial(jax.jit, compiler_options=self.options or None)
        self._init = jit(make, out_shardings=self.shardings)
        step = partial(train_step, exp, tx, rate, self.specs)
        self._step = jit(step, donate_argnums=0, out_shardings=(self.shardings, replicated))
        evaluation = partial(evaluation_step, exp.data.objective, exp.model, domains)
        with jax.set_mesh(self.mesh):
            in_specs = (self.specs.params, P(), shard.token_spec(here := shard.from_mesh(exp.exchange)))
            self._evaluate = jit(shard.per_shard(evaluation, here, in_specs, P()), out_shardings=replicated)

    def init(self) -> State:
        with jax.set_mesh(self.mesh):
            return self._init()

    def step(self, state: State, batch: AnyBatch) -> tuple[State, Metrics]:
        """The state and metrics after a batch; the given state is donated."""
        with jax.set_mesh(self.mesh):
            return self._step(state, self.to_global(batch))

    def lower(self, batch: AnyBatch) -> jax.stages.Lowered:
        """Lowers the train step for the shapes of a global batch of arrays or `jax.ShapeDtypeStruct`; runs nothing."""
        rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.rows), batch)
        with jax.set_mesh(self.mesh):
            return self._step.lower(self.abstract_state(), rows)

    def evaluate(self, state: State, batch: AnyBatch) -> Any:
        with jax.set_mesh(self.mesh):
            return self._evaluate(state.params, state.router, self.to_global(batch))

    @property
    def data_slice(self) -> dict[str, int]:
        """Arguments for `batches` of the part that this process reads; processes inside one shard read the same."""
        n = math.prod(self.mesh.shape[axis] for axis in TOKEN_AXES)
        indices = self.rows.addressable_devices_indices_map((n,)).values()
        return process_slice({index[0].indices(n)[0] for index in indices if index is not None}, n)

    def to_global(self, batch: AnyBatch) -> AnyBatch:
        """This process's rows of a batch, as part of the global one."""
        parts = self.data_slice["processes"]

        def global_array(x: Array | np.ndarray) -> Array:
            shape = (parts * len(x), *x.shape[1:])
            return jax.make_array_from_process_local_data(self.rows, x, shape)

        return jax.tree.map(global_array, batch)

    def abstract_state(self) -> State:
        """Shapes and shardings of the state, to restore it into."""
        shapes = jax.eval_shape(self._init)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self.shardings)


def process_slice(shards: set[int], n: int) -> dict[str, int]:
    """The part of n shards' rows that these are; ValueError if they are not contiguous."""
    first, size = min(shards), len(shards)
    if shards != set(range(first, first + size)) or first % size or n % size:
        raise ValueError(
            f"This process has the shards {sorted(shards)} of {n}, which are not contiguous; choose a mesh whose last "
            "axes fill the devices of a process."
        )
    return {"process": first // size, "processes": n // size}
