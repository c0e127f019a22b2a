"""What devices send to one another, as a list of collectives: what a config predicts, by arithmetic on shapes.

Predictions hold to the byte for what XLA compiles (`audit.communication`). What one device would do alone is left out.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import Experiment
from moe_jax.core import dims
from moe_jax.core.capacity import capacity
from moe_jax.core.context import Context
from moe_jax.core.groups import Padded
from moe_jax.core.routing import SlotChoice, TokenChoice
from moe_jax.core.shard import AXES, Shard, rules_for
from moe_jax.dispatch import Scatter
from moe_jax.exchanges import AllGather, AllToAll, RaggedAllToAll, TwoLevel
from moe_jax.models import Model
from moe_jax.models.layout import sparse_layers, stacks
from moe_jax.models.transformer import StackShape
from moe_jax.moe import MoE, MoEConfig
from moe_jax.optim import Adafactor

Sizes = Mapping[str, int]  # mesh axis -> devices
Shapes = Mapping[str, tuple[int, ...]]  # a shard's part of the parameters of a module, by name


class Collective(NamedTuple):
    """Collectives of one kind over the same axes: how many run, and what they move, on one device."""

    op: str  # HLO's opcode: all-to-all, all-reduce, all-gather, reduce-scatter, collective-permute, ragged-all-to-all
    axes: tuple[str, ...]  # of the mesh, in its order, along which its groups reach; () if no device needs another
    size: int  # devices in a group
    count: int  # type: ignore[assignment] # executions
    bytes: int  # of results, all executions together
    where: str = ""  # what it belongs to

    @property
    def wire(self) -> float:
        """Bytes that a device sends, by the ring or pairwise algorithm; at most, of a ragged all-to-all."""
        n = self.size
        if n == 1:
            return 0.0
        times = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
        return float(self.bytes * times.get(self.op, (n - 1) / n))


def merged(collectives: Iterable[Collective], where: bool = False) -> list[Collective]:
    """Sums of count and bytes, one per op, axes and size, and per place if asked for; sorted."""
    sums: dict[tuple[str, tuple[str, ...], int, str], tuple[int, int]] = {}
    for c in collectives:
        key = c.op, c.axes, c.size, c.where if where else ""
        count, moved = sums.get(key, (0, 0))
        sums[key] = count + c.count, moved + c.bytes
    return [Collective(op, axes, n, *sums[op, axes, n, place], place) for op, axes, n, place in sorted(sums)]


class Passes(NamedTuple):
    """Collectives of a train step."""

    forward: list[Collective]
    backward: list[Collective]  # gradients up to their sum over shards, and what is computed again for them
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
    """A MoE layer that stands alone on a mesh of these sizes; with the gradient of its parameters and input.

    B sequences in the whole batch, of L tokens of width D; dtype: the input's; platform: see `step`.
    """
    part = Part.of(cfg.exchange, sizes, B, L, D, dtype, platform)
    x = jax.ShapeDtypeStruct((1, L, D), dtype)
    (_, aux), variables = jax.eval_shape(MoE(cfg).init_with_output, jax.random.key(0), x)
    params = variables["params"]
    laid = dims.layouts(params, rules_for(cfg.exchange, part.sizes))
    sent = moe(cfg, part, part.local(params, laid), numbers(aux.stats), last=True)
    forward = [s.what for s in sent if not s.backward]
    return forward + [s.what for s in sent if s.backward] + gradients(part, params, laid, laid) if backward else forward


def step(exp: Experiment, sizes: Sizes, platform: str = "cpu") -> list[Collective]:
    """A whole train step on a mesh of these sizes, on "cpu", "gpu" or "tpu"; `passes` in three parts.

    XLA for CPU has no collectives in bfloat16 and sends float32; only on TPU `RaggedAllToAll` sends no more rows than
    it must.
    """
    return [c for part in passes(exp, sizes, platform) for c in part]


def passes(exp: Experiment, sizes: Sizes, platform: str = "cpu") -> Passes:
    """A whole train step, pass by pass."""
    cfg, data = exp.model, exp.data
    part = Part.of(exp.exchange, sizes, data.B // data.accumulate, data.L, cfg.D, cfg.dtype, platform)
    params, aux = shapes(dataclasses.replace(cfg, remat="none"), data.shapes(B=1))
    laid = dims.layouts(params, rules_for(exp.exchange, part.sizes))
    new = exp.optim.sharded(params, laid, part.sizes)
    forward, backward = model(exp, part, part.local(params, laid), numbers(aux.stats) // cfg.moe_layers if aux else 0)
    agreed = cfg.moe_layers // cfg.STACKS - 1 if aux and aux.expert_BLK is not None else 0
    pieces = part.one("all-reduce", part.here.tokens, 1, "losses", of="float32")
    pieces += cfg.STACKS * part.one("all-reduce", part.here.tokens, agreed, "routing statistics", of="float32")
    targets = part.one("all-reduce", part.here.tokens, 1, "losses", of="float32")
    return Passes(
        forward + times(pieces, data.accumulate) + targets,
        backward + gradients(part, params, laid, new),
        update(exp, part, params, laid, new),
    )


@lru_cache(maxsize=16)  # who compares many meshes asks again and again
def shapes(cfg: Model, batch: Any) -> tuple[Any, Any]:
    """Of a model's parameters, and of what its MoE layers report of batches like this one, of one row."""
    params = jax.eval_shape(cfg.init, jax.random.key(0), batch)
    one = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, S=None)) if cfg.moe_layers else cfg
    return params, jax.eval_shape(one.apply, params, batch, router=jax.eval_shape(cfg.init_router))[1]


# ---------------------------------------------------------------- a shard's part, and what it sends


class Part(NamedTuple):
    """A shard's part of a batch, and the mesh it is on."""

    sizes: Sizes
    here: Shard
    B: int  # of this shard
    L: int
    D: int
    dtype: str
    platform: str

    @classmethod
    def of(cls, exchange: Any, sizes: Sizes, B: int, *rest: Any) -> "Part":
        rules, sizes = rules_for(exchange, sizes), {a: sizes.get(a, 1) for a in AXES}
        here = Shard(rules["B"], rules["E"], rules["D"], rules["F"], exchange)
        return cls(sizes, here, B // math.prod(sizes[a] for a in here.tokens), *rest)

    def devices(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.sizes[a] for a in axes)

    def width(self, dtype: str) -> int:
        """Bytes of a number of this type when it travels."""
        return max(jnp.dtype(dtype).itemsize, 4 if self.platform == "cpu" else 0)

    def one(self, op: str, axes: tuple[str, ...], n: int, where: str, of: str = "", count: int = 1) -> list[Collective]:
        """`count` collectives with n numbers as their results, of the type that is computed in or another."""
        if not axes or not n:
            return []
        axes = tuple(a for a in AXES if a in axes)
        return [Collective(op, axes, self.devices(axes), count, n * self.width(of or self.dtype), where)]

    def local(self, params: Any, laid: Any) -> Any:
        """Shapes of a shard's part of a tree of parameters; without the axis of layers."""

        def leaf(path, x, layout):
            rank = len(dims.dims_of(str(path[-1].key)))
            return dims.local(x.shape, layout, self.sizes)[x.ndim - rank if rank else x.ndim :]

        return jax.tree.map_with_path(leaf, params, laid)


class Sent(NamedTuple):
    """A collective, and when it runs."""

    what: Collective
    again: tuple[str, ...] = ()  # under these rematerialisations, in the backward pass once more
    of: str = "activations"  # what it depends on; "weights" or "ids": on nothing else
    backward: bool = False  # in the backward pass alone


# Rematerialisations that compute once more what "exchanged" keeps, and what neither keeps.
FULL, BOTH = ("full",), ("full", "exchanged")


def sent(collectives: list[Collective], again: tuple[str, ...] = (), of="activations", backward=False) -> list[Sent]:
    """Several that run at the same times."""
    return [Sent(c, again, of, backward) for c in collectives]


def times(collectives: list[Collective], n: int) -> list[Collective]:
    """All of them, n times."""
    return [c._replace(count=n * c.count, bytes=n * c.bytes) for c in collectives]


def run(found: list[Sent], remat: str, n: int, pieces: int) -> tuple[list[Collective], list[Collective]]:
    """Forward and backward, of what is in each of n layers; n=1 for what is in no loop over layers, too.

    XLA does nothing twice that it can see to be the same. A loop over one layer it writes as that layer; then what
    depends on weights alone leaves the loop over pieces, and is not computed again for a gradient, whatever
    rematerialisation asks for (activations go through a buffer of the loop, and nobody sees that they are the same).
    What depends on ids alone leaves every loop over layers.
    """
    forward: list[Collective] = []
    backward: list[Collective] = []
    for s in found:
        once = s.of == "ids" or (s.of == "weights" and n == 1)
        often = {"ids": pieces, "weights": 1}[s.of] if once else n * pieces
        (backward if s.backward else forward).extend(times([s.what], often))
        if remat in s.again and not once:
            backward.extend(times([s.what._replace(where=s.what.where + ", again")], n * pieces))
    return forward, backward


def numbers(tree: Any) -> int:
    """How many a tree of arrays, or of their shapes, has."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


# ---------------------------------------------------------------- forward and backward


def model(exp: Experiment, part: Part, params: Any, stats: int) -> tuple[list[Collective], list[Collective]]:
    """Forward and backward of the model; `stats` numbers are counted in a MoE layer."""
    cfg, A = exp.model, exp.data.accumulate
    found = []
    for name in (n for n, shape in params.items() if isinstance(shape, tuple)):
        here = gathers(part, {name: params[name]})
        if name in ("embed_VD", "source_VD"):  # kept and summed in float32; XLA for TPU gathers what is used of it
            kept = gathers(part._replace(dtype="float32"), {name: params[name]})
            here = here[:1] + kept[1:] if part.platform == "tpu" else kept
        found.append(run(here, "none", 1, A))
    for shape in cfg.stacks(exp.data.shapes(B=1)):
        first = True
        for i, (block, n) in enumerate(stacks(sparse_layers(cfg.layout, cfg.N))):
            layers = params[f"{shape.prefix}stack_{i}"]
            for j, sparse in enumerate(block):
                here = layer_of(cfg, part._replace(L=shape.L), shape, layers, j, sparse, stats, j == len(block) - 1)
                here = here if first else [s for s in here if s.of != "ids"]
                first = first and not (sparse and isinstance(shape.moe, MoEConfig))
                found.append(run(here, cfg.remat, n, A))
    forward, backward = zip(*found, strict=True)
    return [c for part in forward for c in part], [c for part in backward for c in part]


def layer_of(
    cfg: Model, part: Part, shape: StackShape, layers: Any, j: int, sparse: bool, stats: int, last: bool
) -> list[Sent]:
    """The j-th layer of a block of a stack, the last one or not."""
    found = dense(part, layers[f"attention_{j}"], last=False)
    if shape.M:
        found += dense(part, layers[f"cross_{j}"], last=False)
        memory = part.one("all-reduce", part.here.tensor, part.B * shape.M * part.D, "tensor parallelism")
        found += sent(memory, backward=True)
    extra = sparse and cfg.extra is not None
    if sparse and isinstance(shape.moe, MoEConfig):
        found += moe(shape.moe, part, layers[f"moe_{j}"], stats, last and not extra)
    else:
        found += dense(part, layers[f"ffn_{j}"], last and not extra)
    return found + (dense(part, layers[f"extra_{j}"], last) if extra else [])


def dense(part: Part, params: Shapes, last: bool) -> list[Sent]:
    """Attention, or a dense feed-forward layer; the last one in a rematerialised block or not."""
    return gathers(part, params) + hidden(part, params, last)


def moe(cfg: MoEConfig, part: Part, params: Shapes, stats: int, last: bool) -> list[Sent]:
    """A MoE layer."""
    here, N = part.here, part.B * part.L
    S = cfg.S or part.L
    if N % S and cfg.groups_are_free(jax.random.key(0)):
        S = N
    G, C, weights = N // S, *slots(cfg, S, part.D, params)
    trained = bool(cfg.router.params)  # weights of outputs have gradients, and need these outputs
    travelling = {n: shape for n, shape in params.items() if not n.startswith("router_")}
    # What rows become is computed again where the gradient asks for it; after their way back only by "full".
    needed = (BOTH if isinstance(cfg.exchange, AllGather) or not here.experts else FULL) if trained or not last else ()
    found = gathers(part, travelling, {"down_ED": needed})
    found += hidden(part, travelling, last, G * weights if trained else 0)
    of = "activations" if trained or cfg.random else "ids"  # what it depends on who goes where
    ladder = isinstance(cfg.dispatch, Scatter) and cfg.dispatch.capacity_factor is None
    if ladder:
        found += sent(part.one("all-reduce", here.tokens, 1, "largest load of an expert", of="int32"), FULL, of)
    if here.experts:
        rows = cfg.E * G * C if cfg.dispatch.rows is Padded else N * cfg.router.K
        experts = {n: params[n] for n in cfg.experts.params}
        found += traffic(cfg.exchange)(cfg.exchange, part, Rows(rows, cfg.E, C * G, needed, ladder, of), experts)
    total = part.one("all-reduce", here.tokens, stats, "routing statistics", of="float32")
    return found + sent(total, FULL if trained and cfg.losses else (), of)


def slots(cfg: MoEConfig, S: int, D: int, params: Shapes) -> tuple[int, int]:
    """Slots of an expert in a group of S tokens, and numbers in the group that outputs are multiplied with."""
    if getattr(cfg.router, "makes", TokenChoice) is TokenChoice:
        factor, K = cfg.dispatch.capacity_factor, cfg.router.K
        convention = getattr(cfg.dispatch, "convention", "exact")
        return (S if factor is None else capacity(S, K, cfg.E, factor, convention)), S * K
    shape = lambda *n: jax.ShapeDtypeStruct(n, jnp.float32)  # noqa: E731
    gate = {n: shape(*params[f"router_{n}"]) for n in cfg.router.params}
    mask = jax.ShapeDtypeStruct((1, S), bool)
    routing = jax.eval_shape(partial(cfg.router, ctx=Context(cfg.E)), gate, shape(1, S, D), mask)
    weights = routing.weight_GEC if isinstance(routing, SlotChoice) else (routing.dispatch_GSEC, routing.combine_GSEC)
    return jax.tree.leaves(weights)[0].shape[-1], numbers(weights)


def gathers(part: Part, params: Shapes, again: Mapping[str, tuple[str, ...]] = {}) -> list[Sent]:
    """Weights gathered over fsdp, and their gradients scattered."""
    found = []
    for name, shape in params.items():
        letters = dims.dims_of(name)
        if "D" in letters and letters != "D":
            n, fsdp = math.prod(shape), part.here.fsdp
            whole = part.one("all-gather", fsdp, n * part.devices(fsdp), "fsdp gather of weights")
            found += sent(whole, again.get(name, BOTH), "weights")
            found += sent(part.one("reduce-scatter", fsdp, n, "fsdp scatter of gradients"), backward=True)
    return found


def hidden(part: Part, params: Shapes, last: bool, weights: int = 0) -> list[Sent]:
    """Tensor parallelism: what hidden units or heads of all shards add up to, and gradients of what they were given.

    The sum is needed again by what comes after it in a block.
    """
    axes, where = part.here.tensor, "tensor parallelism"
    x = part.one("all-reduce", axes, part.B * part.L * part.D, where)
    given = part.one("all-reduce", axes, weights, where, of="float32")
    for name, shape in params.items():
        if dims.dims_of(name) in ("D", "ED", "A"):  # biases that one shard of hidden units adds, scales of all heads
            fsdp = part.here.fsdp if dims.dims_of(name) == "ED" else ()
            n = math.prod(shape) * part.devices(fsdp)
            given += part.one("all-reduce", axes, n, where, of="" if fsdp else "float32")
    return sent(x, () if last else FULL) + sent(x + given, backward=True)


# ---------------------------------------------------------------- exchanges


class Rows(NamedTuple):
    """What a shard's tokens make of themselves for experts that lie on several shards."""

    rows: int
    E: int
    slots: int  # of an expert
    needed: tuple[str, ...]  # rematerialisations that compute again what experts have made of them
    ladder: bool  # it is one of several branches
    of: str  # what it depends on who goes where


def both_ways(there: list[Collective], back: list[Collective], rows: Rows) -> list[Sent]:
    """Rows travel and come back; so do gradients."""
    again = rows.needed and FULL
    return sent(there, FULL) + sent(back, again) + sent(there + back, backward=True)


def all_to_all(exchange: AllToAll, part: Part, rows: Rows, experts: Shapes) -> list[Sent]:
    """[E, G*C, D], in chunks."""
    chunks = min(exchange.chunks, rows.slots)
    way = part.one("all-to-all", part.here.experts, rows.rows * part.D, EXCHANGE, count=chunks)
    return both_ways(way, way, rows)


def two_level(exchange: TwoLevel, part: Part, rows: Rows, experts: Shapes) -> list[Sent]:
    """[E, G*C, D], inside a slice and across."""
    inner, outer = part.here.experts[-1:], part.here.experts[:-1]
    way = [c for axes in (inner, outer) for c in part.one("all-to-all", axes, rows.rows * part.D, EXCHANGE)]
    return both_ways(way, way, rows)


def ragged(exchange: RaggedAllToAll, part: Part, rows: Rows, experts: Shapes) -> list[Sent]:
    """Rows as they are on TPU, elsewhere those of everybody; first how many they are."""
    axes, R = part.here.experts, rows.rows
    X = part.devices(axes)
    room = X * R if exchange.buffer is None else min(X * R, math.ceil(exchange.buffer * R))
    asked = part.one("all-gather", axes, X * rows.E, EXCHANGE, of="int32")
    if part.platform == "tpu":
        there, back = (part.one("ragged-all-to-all", axes, n * part.D, EXCHANGE) for n in (room, R))
    else:
        there, back = (part.one("all-gather", axes, X * n * part.D, EXCHANGE) for n in (R, room))
    return sent(asked, BOTH, rows.of) + both_ways(there, back, rows)


def all_gather(exchange: AllGather, part: Part, rows: Rows, experts: Shapes) -> list[Sent]:
    """The weights of all experts, and their gradients on the way back."""
    found, axes = [], part.here.experts
    for name, shape in experts.items():
        n = math.prod(shape) * (part.devices(part.here.fsdp) if "D" in dims.dims_of(name) else 1)
        again = rows.needed if name == "down_ED" else BOTH
        whole = part.one("all-gather", axes, n * part.devices(axes), EXCHANGE)
        found += sent(whole, again, "activations" if rows.ladder else "weights")
        found += sent(part.one("reduce-scatter", axes, n, EXCHANGE), backward=True)
    return found


EXCHANGE = "exchange of MoE layers"
TRAFFIC: dict[type, Callable] = {
    AllToAll: all_to_all,
    TwoLevel: two_level,
    RaggedAllToAll: ragged,
    AllGather: all_gather,
}


def traffic(exchange: Any) -> Callable:
    """What an exchange sends."""
    if type(exchange) not in TRAFFIC:
        raise ValueError(f"{exchange} has no prediction of what it sends; add one to communication.TRAFFIC.")
    return TRAFFIC[type(exchange)]


# ---------------------------------------------------------------- gradients and the optimizer


def gradients(part: Part, params: Any, laid: Any, new: Any) -> list[Collective]:
    """Gradients of parameters that are `laid` so, summed over tokens' shards to lie as `new`."""

    def of(x, old, new):
        n, left, found = math.prod(dims.local(x.shape, old, part.sizes)), set(part.here.tokens), []
        for before, after in zip(dims.axes(old, x.ndim), dims.axes(new, x.ndim), strict=True):
            more = after[len(before) :]
            n, left = n // part.devices(more), left - set(after)
            found += part.one("reduce-scatter", more, n, "ZeRO-1 scatter of gradients", of="float32")
        return found + part.one("all-reduce", tuple(left), n, "gradients", of="float32")

    return [c for leaf in each(params, laid, new) for c in of(*leaf)]


def each(params: Any, *laid: Any) -> Iterator[tuple]:
    """A parameter at a time, with its layouts."""
    return zip(jax.tree.leaves(params), *map(jax.tree.leaves, laid), strict=True)


def update(exp: Experiment, part: Part, params: Any, laid: Any, new: Any) -> list[Collective]:
    """The optimizer: it works on what lies as `new`, and leaves parameters as they were `laid`."""
    # The partitioner adds up one spread dimension after another; the norm is computed for clipping once more.
    norms = 2 if exp.optim.clip else 1

    def of(x, old, new):
        before, after = math.prod(dims.local(x.shape, old, part.sizes)), dims.axes(new, x.ndim)
        more = {a for axes in after for a in axes} - {a for axes in dims.axes(old, x.ndim) for a in axes}
        found = [c for axes in after for c in part.one("all-reduce", axes, norms, "gradient norm", "float32", norms)]
        if isinstance(exp.optim.optimizer, Adafactor):
            found += means(exp.optim.optimizer, part, x.shape, old, new)
        return found + part.one("all-gather", tuple(more), before, "ZeRO-1 gather of parameters", of="float32")

    return [c for leaf in each(params, laid, new) for c in of(*leaf)]


def means(optimizer: Adafactor, part: Part, shape: tuple[int, ...], old: Any, new: Any) -> list[Collective]:
    """Adafactor's: of squares over rows and columns, and of what it limits and scales by."""
    axes, local = dims.axes(new, len(shape)), dims.local(shape, new, part.sizes)
    scalars = axes + 2 * dims.axes(old, len(shape)) * optimizer.relative  # of updates; of parameters, once safely
    found = [(a, 1) for a in scalars]
    if len(shape) > 1 and np.sort(shape)[-2] >= optimizer.smallest:
        second, longest = np.argsort(shape)[-2:]
        n = math.prod(local)
        found += [(axes[longest], n // local[longest]), (axes[second], n // local[second])]
        found += [(axes[second], n // local[longest] // local[second])]
    return [c for a, n in found for c in part.one("all-reduce", a, n, "Adafactor's means", of="float32")]
