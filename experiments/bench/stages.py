"""Parts of a layer, each timed in a program of its own; the times do not add up exactly to that of the layer.

route      logits, choice, statistics, auxiliary losses
dispatch   positions of choices, and rows to experts: the time of a layer without experts beyond `combine`
exchange   rows to the shards of their experts and back; on a mesh that shards experts
experts    their matmuls on precomputed rows
combine    weighted sums of precomputed rows
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from experiments.bench.layers import Placement, square
from experiments.bench.shapes import Shape
from experiments.bench.timing import Program, compiled, in_a_row, in_turn, quartiles
from experiments.bench.tokens import Tokens
from experiments.bench.work import by_rows, kept, slots
from moe_jax.core import dims, shard
from moe_jax.core.context import Ids
from moe_jax.core.groups import Padded, Ragged
from moe_jax.core.rows import LazyRows, materialize
from moe_jax.core.shard import Shard
from moe_jax.core.stats import stats
from moe_jax.moe import MoEConfig, context, gather_params

STAGES = ("route", "dispatch", "exchange", "experts", "combine")


class IdentityExperts(Shard):
    """Stub of a shard that returns rows unchanged."""

    def apply_experts(self, experts: Callable, params: Any, x: Array | LazyRows, groups: Any) -> tuple[Array, Array]:
        return fusion_barrier(materialize(x)), jnp.ones((), bool)


@jax.custom_vjp
def fusion_barrier(x: Array) -> Array:
    """Returns x from memory: XLA does not fuse its producer with its consumer across a loop of unknown trip count."""
    turns = (x.ravel()[:1] != x.ravel()[:1]).sum()  # 0, unless that number is NaN
    return lax.while_loop(lambda carry: carry[0] > 0, lambda carry: (carry[0] - 1, -carry[1]), (turns, x))[1]


fusion_barrier.defvjp(lambda x: (fusion_barrier(x), ()), lambda _, g: (fusion_barrier(g),))


class PrecomputedRows(Shard):
    """Stub of a shard that returns precomputed rows, without an exchange."""

    def apply_experts(self, experts: Callable, params: Any, x: Array | LazyRows, groups: Any) -> tuple[Array, Array]:
        shape = jax.eval_shape(materialize, x).shape
        rows, n = params["rows"], math.prod(shape[:-1])
        # Branches of larger capacities, which do not run, get zeros.
        return rows[:n].reshape(shape) if n <= len(rows) else jnp.zeros(shape, rows.dtype), jnp.ones((), bool)


def measure(
    cfg: MoEConfig, shape: Shape, tokens: Tokens, placement: Placement, inputs: Any, repeats: int, known: dict[Any, Any]
) -> dict[str, dict[str, list[float]]]:
    """Quartiles of milliseconds by stage, of forward and of forward with backward.

    known: compiled programs of this layer; new ones are added.
    """
    params, x_BLD, _ = inputs
    with placement.active():
        here = dataclasses.replace(shard.from_mesh(cfg.exchange), distinct=cfg.distinct)
        x_GSD = x_BLD.reshape(-1, shape.L, shape.D)
        run, gate = router(cfg, here), params["router_gate_DE"]
        routing = jax.jit(run)((gate, x_GSD))[2]
        rows, weights = precomputed_rows(cfg, here, shape, tokens, placement), routing.weight_GSK
        parts = {
            "route": (lambda by: run(by)[:2], (gate, x_GSD)),
            "dispatch": (dispatcher(cfg, here, IdentityExperts), (x_GSD, rows[:0], weights), routing),
            "exchange": exchange(cfg, here, shape, tokens, placement),
            "experts": experts(cfg, here, shape, tokens, placement, params),
            "combine": (dispatcher(cfg, here, PrecomputedRows), (x_GSD, rows, weights), routing),
        }
        times = {}
        for name, part in parts.items():
            if part is not None:
                f, *args = part
                key = name, str(jax.tree.map(jnp.shape, args))
                known[key] = known.get(key) or programs(f, *args)
                times[name] = in_turn([program.bind(*args) for program in known[key]], repeats, row=in_a_row())
    times["dispatch"] = np.maximum(times["dispatch"] - np.median(times["combine"], axis=0), 0)
    return {name: {"forward": quartiles(both[:, 0]), "both": quartiles(both[:, 1])} for name, both in times.items()}


def programs(f: Callable, by: Any, *args: Any) -> tuple[Program, Program]:
    """Compiles f(by, *args) -> (value, ...) or an array to be squared, and its gradients by `by`."""

    def objective(by, *args):
        y = f(by, *args)
        return (y[0], y[1:]) if isinstance(y, tuple) else (square(y), ())

    return compiled(f, by, *args), compiled(jax.value_and_grad(objective, has_aux=True), by, *args)


def router(cfg: MoEConfig, here: Shard) -> Callable:
    """(gate, x) -> objective, statistics and routing; combine weights have gradients, as in training."""

    def local(gate_DE, x_GSD):  # groups are sequences
        mask_GS = jnp.ones(x_GSD.shape[:2], bool)
        ctx = context(cfg, here, {}, None, len(x_GSD), Ids())
        routing = cfg.router(here.pvary({"gate_DE": gate_DE}), x_GSD, mask_GS, ctx)
        total = here.sum(stats(routing, routing.expert_GSK < cfg.E, len(x_GSD)))
        losses = sum(part.weight * part(total, {}, cfg.router) for part in cfg.losses)
        return losses + (total.combine_E**2).mean(), total, routing

    rows = shard.token_spec(here)
    run = shard.per_shard(local, here, (P(), rows), (P(), P(), rows))
    return lambda by: run(*by)


def dispatcher(cfg: MoEConfig, here: Shard, kind: type[Shard]) -> Callable:
    """((x, rows, weights), routing) -> y, with a stub of the experts."""
    stub_shard = kind(here.tokens, here.experts, here.fsdp, here.tensor, here.exchange)

    def local(by, routing):
        x_GSD, rows, weight_GSK = by
        weighted = routing._replace(weight_GSK=weight_GSK)
        y_GSD, _ = cfg.dispatch(
            stub_shard.tensor_enter(x_GSD), weighted, cfg.experts, {"rows": stub_shard.tensor_enter(rows)}, stub_shard
        )
        return stub_shard.tensor_exit(y_GSD)

    rows = shard.token_spec(here)
    return shard.per_shard(local, here, ((rows, rows, rows), rows), rows)


def precomputed_rows(cfg: MoEConfig, here: Shard, shape: Shape, tokens: Tokens, placement: Placement) -> Array:
    """Precomputed rows, as many as the experts' outputs for all tokens."""
    count_GE, n = tokens.count_GE(shape.L), shape.T * shape.K
    if not by_rows(cfg, jax.default_backend(), bool(here.experts)):
        n = cfg.E * len(count_GE) * slots(cfg, count_GE, shape.L)
    return placement.put(random_rows(shape, n), shard.token_spec(here))


def exchange(cfg: MoEConfig, here: Shard, shape: Shape, tokens: Tokens, placement: Placement) -> tuple | None:
    """Program and arguments that exchange rows with the experts and back; None without sharded experts."""
    if not here.experts:
        return None
    count_GE, rows = tokens.count_GE(shape.L), shard.token_spec(here)  # every shard has rows for all experts
    padded = not by_rows(cfg, jax.default_backend(), sharded=True)

    def local(x, count_GE):
        groups = Padded() if padded else Ragged(count_GE.sum(0))
        return here.exchange(here, lambda params, x, groups: x, {}, x, groups)[0]

    padded_size = (cfg.E * placement.shards, shape.T // shape.L // placement.shards * slots(cfg, count_GE, shape.L))
    x = random_rows(shape, *(padded_size if padded else (shape.T * shape.K,)))
    run = shard.per_shard(local, here, (rows, rows), rows)
    return run, placement.put(x, rows), placement.put(jnp.asarray(count_GE, jnp.int32), rows)


def experts(
    cfg: MoEConfig, here: Shard, shape: Shape, tokens: Tokens, placement: Placement, params: dict[str, Array]
) -> tuple | None:
    """Program and arguments of experts on rows in slots or contiguous; None where rows of several shards meet."""
    count_GE, by_row = tokens.count_GE(shape.L), by_rows(cfg, jax.default_backend(), bool(here.experts))
    if by_row and here.experts:
        return None
    own = {name: params[name] for name in cfg.experts.params}
    rows, param_specs = shard.token_spec(here), dims.specs(own, here.rules)

    def local(by, kept_GE):
        params, x = by
        groups = Ragged(kept_GE.sum(0)) if by_row else Padded()
        y = groups.apply(cfg.experts, gather_params(here, here.pvary(params), x.dtype, "E"), here.tensor_enter(x))
        return here.tensor_exit(y)

    run = shard.per_shard(local, here, ((param_specs, rows), rows), rows)
    if by_row:
        size: tuple[int, ...] = (shape.T * shape.K,)
    else:  # the local experts of token shards are stacked in front
        E = cfg.E * placement.shards // placement.axis_size(here.experts)
        size = (E, cfg.E * len(count_GE) * slots(cfg, count_GE, shape.L) // E)
    kept_GE = jnp.asarray(kept(cfg, count_GE, shape.L), jnp.int32)
    return run, (own, placement.put(random_rows(shape, *size), rows)), placement.put(kept_GE, rows)


def random_rows(shape: Shape, *size: int) -> Array:
    """Rows of random numbers."""
    return jnp.asarray(np.random.default_rng(1).standard_normal((*size, shape.D), np.float32), shape.dtype)
