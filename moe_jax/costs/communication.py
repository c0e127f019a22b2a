"""Collectives of a train step, predicted from its config by arithmetic on shapes.

Predictions hold to the byte for what XLA compiles (`audit.communication`). Collectives of a single device are left out.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import Experiment
from moe_jax.core import dims
from moe_jax.core.context import Context
from moe_jax.core.groups import Padded
from moe_jax.core.routing import SlotChoice, TokenChoice
from moe_jax.core.shard import rules_for
from moe_jax.core.traffic import BOTH, FULL, Collective, ExchangedRows, Scheduled, Shapes, ShardBatch, Sizes, scheduled
from moe_jax.dispatch import Scatter
from moe_jax.exchanges import AllGather
from moe_jax.models import Model
from moe_jax.models.pattern import StackShape, Sublayer, blocks
from moe_jax.models.transformer import Call
from moe_jax.moe import MoE, MoEConfig
from moe_jax.moe_config import output_width
from moe_jax.optim import Adafactor


def merged(collectives: Iterable[Collective], where: bool = False) -> list[Collective]:
    """Sums of count and bytes, one per op, axes and size, and with `where` per origin; sorted."""
    sums: dict[tuple[str, tuple[str, ...], int, str], tuple[int, int]] = {}
    for c in collectives:
        key = c.op, c.axes, c.size, c.where if where else ""
        count, moved = sums.get(key, (0, 0))
        sums[key] = count + c.count, moved + c.bytes
    return [Collective(op, axes, n, *sums[op, axes, n, origin], origin) for op, axes, n, origin in sorted(sums)]


class Passes(NamedTuple):
    """Collectives of a train step."""

    forward: list[Collective]
    backward: list[Collective]  # gradients up to their sum over shards, and recomputation
    update: list[Collective]  # the optimizer's


def layer(
    cfg: MoEConfig,
    sizes: Sizes,
    B: int,
    L: int,
    D: int,
    dtype: str = "float32",
    backward: bool = True,
    platform: str = "cpu",
) -> list[Collective]:
    """Collectives of one MoE layer on a mesh of these sizes; by default with the gradient of its parameters and input.

    B: sequences of the global batch, of L tokens of width D. dtype: of the input. platform: see `step`.
    """
    part = ShardBatch.of(cfg.exchange, sizes, B, L, D, dtype, platform)
    x = jax.ShapeDtypeStruct((1, L, D), dtype)
    (_, aux), variables = jax.eval_shape(MoE(cfg).init_with_output, jax.random.key(0), x)
    params = variables["params"]
    specs = dims.specs(params, rules_for(cfg.exchange, part.sizes))
    found = moe_collectives(cfg, part, part.local(params, specs), n_elements(aux.stats), last=True)
    forward = [s.what for s in found if not s.backward]
    return (
        forward + [s.what for s in found if s.backward] + gradient_collectives(part, params, specs, specs)
        if backward
        else forward
    )


def step(exp: Experiment, sizes: Sizes, platform: str = "cpu") -> list[Collective]:
    """Collectives of a train step on a mesh of these sizes, on "cpu", "gpu" or "tpu"; `passes` splits them.

    XLA for CPU has no collectives in bfloat16 and sends float32. Only on TPU does `RaggedAllToAll` send no more than
    the rows that travel.
    """
    return [c for part in passes(exp, sizes, platform) for c in part]


def passes(exp: Experiment, sizes: Sizes, platform: str = "cpu") -> Passes:
    """Collectives of a train step, pass by pass."""
    cfg, data = exp.model, exp.data
    part = ShardBatch.of(exp.exchange, sizes, data.B // data.microbatches, data.L, cfg.D, cfg.dtype, platform)
    params, aux = model_shapes(dataclasses.replace(cfg, remat="none"), data.shapes(B=1))
    specs = dims.specs(params, rules_for(exp.exchange, part.sizes))
    new = exp.optim.sharded(params, specs, part.sizes)
    of_layers = aux and aux.stats._replace(agreed=None, compared=None)
    stats = n_elements(of_layers) // cfg.n_moe_layers if of_layers else 0
    forward, backward = model(exp, part, part.local(params, specs), stats)
    agreed = cfg.n_moe_layers // cfg.STACKS - 1 if aux and aux.expert_BLK is not None else 0
    per_microbatch = part.one("all-reduce", part.here.tokens, 1, "losses", dtype="float32")
    per_microbatch += cfg.STACKS * part.one(
        "all-reduce", part.here.tokens, agreed, "routing statistics", dtype="float32"
    )
    counts = 1 + cfg.STACKS * exp.weighs_microbatches  # of targets, of the tokens of each stack
    totals = part.one("all-reduce", part.here.tokens, counts, "losses", dtype="float32")
    return Passes(
        forward + repeat(per_microbatch, data.microbatches) + totals,
        backward + gradient_collectives(part, params, specs, new),
        update_collectives(exp, part, params, specs, new),
    )


@lru_cache(maxsize=16)  # comparisons of many meshes repeat the call
def model_shapes(cfg: Model, batch: Any) -> tuple[Any, Any]:
    """Shapes of a model's parameters, and of the reports of its MoE layers on one row of a batch like this one."""
    params = jax.eval_shape(cfg.init, jax.random.key(0), batch)
    one = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, S=None)) if cfg.n_moe_layers else cfg
    return params, jax.eval_shape(one.apply, params, batch, Call(router=jax.eval_shape(cfg.init_router)))[1]


# ---------------------------------------------------------------- passes of a loop over layers


def repeat(collectives: list[Collective], n: int) -> list[Collective]:
    """Repeats collectives n times: their counts and bytes."""
    return [c._replace(count=n * c.count, bytes=n * c.bytes) for c in collectives]


def split_passes(
    found: list[Scheduled], remat: str, n: int, microbatches: int
) -> tuple[list[Collective], list[Collective]]:
    """Splits the collectives of each of n layers into forward and backward; n=1 also for those outside of the loop.

    XLA merges computations that it can prove equal. It unrolls a loop over one layer; then a collective that depends on
    weights only is hoisted out of the loop over microbatches and not repeated for the gradient, whatever the
    rematerialisation (activations pass through a buffer of the loop, which hides that they are equal). A collective
    that depends on ids only is hoisted out of every loop over layers.
    """
    forward: list[Collective] = []
    backward: list[Collective] = []
    for s in found:
        hoisted = s.depends_on == "ids" or (s.depends_on == "weights" and n == 1)
        times = {"ids": microbatches, "weights": 1}[s.depends_on] if hoisted else n * microbatches
        (backward if s.backward else forward).extend(repeat([s.what], times))
        if remat in s.again and not hoisted:
            backward.extend(repeat([s.what._replace(where=s.what.where + ", again")], n * microbatches))
    return forward, backward


def n_elements(tree: Any) -> int:
    """Returns the number of elements in a tree of arrays, or of their shapes."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


# ---------------------------------------------------------------- forward and backward


def model(exp: Experiment, part: ShardBatch, params: Any, stats: int) -> tuple[list[Collective], list[Collective]]:
    """Forward and backward collectives of the model; stats: numbers in the statistics of a MoE layer."""
    cfg, A = exp.model, exp.data.microbatches
    found = []
    for name in (n for n, shape in params.items() if isinstance(shape, tuple)):
        sent = gather_collectives(part, {name: params[name]})
        if name in ("embed_VD", "source_VD"):  # kept and summed in float32; XLA for TPU gathers in the compute type
            kept = gather_collectives(part._replace(dtype="float32"), {name: params[name]})
            sent = sent[:1] + kept[1:] if part.platform == "tpu" else kept
        found.append(split_passes(sent, "none", 1, A))
    for shape in cfg.stacks(exp.data.shapes(B=1)):
        first = True
        for i, block in enumerate(blocks(cfg, shape)):
            modules, subs = params[f"{shape.prefix}stack_{i}"], [*block.parts()]
            for name, sub in subs:
                sent = sublayer_collectives(
                    part._replace(L=shape.L), shape, sub, modules[name], stats, name == subs[-1][0]
                )
                sent = sent if first else [s for s in sent if s.depends_on != "ids"]
                first = first and sub.kind != "moe"
                found.append(split_passes(sent, cfg.remat, block.n, A))
    forward, backward = zip(*found, strict=True)
    return [c for part in forward for c in part], [c for part in backward for c in part]


def sublayer_collectives(
    part: ShardBatch, shape: StackShape, sub: Sublayer, params: Shapes, stats: int, last: bool
) -> list[Scheduled]:
    """Schedules the collectives of one part of a layer; last: whether it ends the repeated block of layers."""
    if sub.kind == "moe":
        return moe_collectives(sub.part, part, params, stats, last)
    entering = sub.part.entering if sub.kind == "attention" else "D"
    sizes = {**getattr(sub.part, "sizes", {}), "D": part.D}
    found = gather_collectives(part, params) + tensor_collectives(
        part, params, last, sum(sizes[letter] for letter in entering)
    )
    if sub.memory:
        memory = part.one("all-reduce", part.here.tensor, part.B * shape.M * part.D, "tensor parallelism")
        found += scheduled(memory, backward=True)
    return found


def moe_collectives(cfg: MoEConfig, part: ShardBatch, params: Shapes, stats: int, last: bool) -> list[Scheduled]:
    """Schedules the collectives of an MoE layer; last: see `sublayer_collectives`."""
    here, N = part.here, part.B * part.L
    S = cfg.group(part.B, part.L, training=True)
    G, C, weights = N // S, cfg.slots(S), combine_weights(cfg, S, part.D, params)
    trained = bool(cfg.router.params)  # combine weights have gradients, which need the outputs
    sharded = {n: shape for n, shape in params.items() if not n.startswith("router_")}
    # The gradient may need the experts' outputs recomputed; outputs after the exchange only under "full".
    needed = (BOTH if isinstance(cfg.exchange, AllGather) or not here.experts else FULL) if trained or not last else ()
    found = gather_collectives(part, sharded, {"down_ED": needed})
    O = output_width(cfg.experts, part.D)
    found += tensor_collectives(part, sharded, last, part.D, G * weights if trained else 0, O)
    depends_on = "activations" if trained or cfg.random else "ids"  # of the assignments
    bucketed = isinstance(cfg.dispatch, Scatter) and cfg.dispatch.capacity_factor is None
    if bucketed:
        found += scheduled(
            part.one("all-reduce", here.tokens, 1, "largest load of an expert", dtype="int32"), FULL, depends_on
        )
    if here.experts:
        rows = cfg.E * G * C if cfg.dispatch.layout is Padded else N * cfg.router.K
        experts = {n: params[n] for n in cfg.experts.params}
        handed = ExchangedRows(rows, cfg.E, C * G, needed, bucketed, depends_on, O, cfg.distinct)
        found += cfg.exchange.traffic(part, handed, experts)
    total = part.one("all-reduce", here.tokens, stats, "routing statistics", dtype="float32")
    return found + scheduled(total, FULL if trained and cfg.losses else (), depends_on)


def combine_weights(cfg: MoEConfig, S: int, D: int, params: Shapes) -> int:
    """Counts the combine weights of a group of S tokens."""
    if cfg.traits.routing is TokenChoice:
        return S * cfg.router.K
    shape = lambda *n: jax.ShapeDtypeStruct(n, jnp.float32)  # noqa: E731
    gate = {n: shape(*params[f"router_{n}"]) for n in cfg.router.params}
    mask = jax.ShapeDtypeStruct((1, S), bool)
    routing = jax.eval_shape(partial(cfg.router, ctx=Context(cfg.E)), gate, shape(1, S, D), mask)
    soft = cfg.traits.routing is not SlotChoice
    return n_elements((routing.dispatch_GSEC, routing.combine_GSEC) if soft else routing.weight_GEC)


def gather_collectives(part: ShardBatch, params: Shapes, again: Mapping[str, tuple[str, ...]] = {}) -> list[Scheduled]:
    """Schedules the gathering of weights over fsdp, and the scattering of their gradients."""
    found = []
    for name, shape in params.items():
        if dims.fsdp_dim(dims.dims_of(name)):
            n, fsdp = math.prod(shape), part.here.fsdp
            gathered = part.one("all-gather", fsdp, n * part.devices(fsdp), "fsdp gather of weights")
            found += scheduled(gathered, again.get(name, BOTH), "weights")
            found += scheduled(part.one("reduce-scatter", fsdp, n, "fsdp scatter of gradients"), backward=True)
    return found


# Parameters replicated over tensor shards: biases that one shard adds, scales of all heads.
OF_ALL_HEADS = ("D", "O", "ED", "EO", "A")


def tensor_collectives(
    part: ShardBatch, params: Shapes, last: bool, entering: int, weights: int = 0, O: int | None = None
) -> list[Scheduled]:
    """Schedules tensor parallelism: the sum of all shards' outputs, and the gradients of their inputs.

    entering: numbers of a token that enter the hidden units. O: width of the output; None is D. Recomputing a block
    needs the sum again, unless it is the last.
    """
    axes, where = part.here.tensor, "tensor parallelism"
    x = part.one("all-reduce", axes, part.B * part.L * (part.D if O is None else O), where)
    entered = part.one("all-reduce", axes, part.B * part.L * entering, where)
    entered += part.one("all-reduce", axes, weights, where, dtype="float32")
    for name, shape in params.items():
        if dims.dims_of(name) in OF_ALL_HEADS:
            fsdp = part.here.fsdp if dims.dims_of(name) == "ED" else ()
            n = math.prod(shape) * part.devices(fsdp)
            entered += part.one("all-reduce", axes, n, where, dtype="" if fsdp else "float32")
    return scheduled(x, () if last else FULL) + scheduled(entered, backward=True)


# ---------------------------------------------------------------- gradients and the optimizer


def gradient_collectives(part: ShardBatch, params: Any, specs: Any, new: Any) -> list[Collective]:
    """Sums of gradients over batch shards, from the sharding of the parameters to the sharding `new`."""

    def leaf_collectives(x, old, new):
        n, left, found = math.prod(dims.local_shape(x.shape, old, part.sizes)), set(part.here.tokens), []
        for before, after in zip(dims.axes(old, x.ndim), dims.axes(new, x.ndim), strict=True):
            more = after[len(before) :]
            n, left = n // part.devices(more), left - set(after)
            found += part.one("reduce-scatter", more, n, "ZeRO-1 scatter of gradients", dtype="float32")
        return found + part.one("all-reduce", tuple(left), n, "gradients", dtype="float32")

    return [c for leaf in each_parameter(params, specs, new) for c in leaf_collectives(*leaf)]


def each_parameter(params: Any, *specs: Any) -> Iterator[tuple]:
    """Yields every parameter with its PartitionSpecs."""
    return zip(jax.tree.leaves(params), *map(jax.tree.leaves, specs), strict=True)


def update_collectives(exp: Experiment, part: ShardBatch, params: Any, specs: Any, new: Any) -> list[Collective]:
    """Collectives of the optimizer: it updates parts sharded as `new`, and gathers parameters to `specs`."""
    # The partitioner sums one sharded dimension after another; clipping computes the norm a second time.
    norms = 2 if exp.optim.clip else 1

    def leaf_collectives(x, old, new):
        before, after = math.prod(dims.local_shape(x.shape, old, part.sizes)), dims.axes(new, x.ndim)
        more = {a for axes in after for a in axes} - {a for axes in dims.axes(old, x.ndim) for a in axes}
        found = [c for axes in after for c in part.one("all-reduce", axes, norms, "gradient norm", "float32", norms)]
        if isinstance(exp.optim.optimizer, Adafactor):
            found += factor_means(exp.optim.optimizer, part, x.shape, old, new)
        return found + part.one("all-gather", tuple(more), before, "ZeRO-1 gather of parameters", dtype="float32")

    return [c for leaf in each_parameter(params, specs, new) for c in leaf_collectives(*leaf)]


def factor_means(
    optimizer: Adafactor, part: ShardBatch, shape: tuple[int, ...], old: Any, new: Any
) -> list[Collective]:
    """Adafactor's means: of squares over rows and columns, and of the norms that limit and scale updates."""
    axes, local = dims.axes(new, len(shape)), dims.local_shape(shape, new, part.sizes)
    scalars = axes + 2 * dims.axes(old, len(shape)) * optimizer.relative  # of updates; of parameters, twice
    found = [(a, 1) for a in scalars]
    if len(shape) > 1 and np.sort(shape)[-2] >= optimizer.smallest:
        second, longest = np.argsort(shape)[-2:]
        n = math.prod(local)
        found += [(axes[longest], n // local[longest]), (axes[second], n // local[second])]
        found += [(axes[second], n // local[longest] // local[second])]
    return [c for a, n in found for c in part.one("all-reduce", a, n, "Adafactor's means", dtype="float32")]
