"""The MoE layer: `forward` is the algorithm on one shard, `MoE` holds its parameters."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.core import dims, shard
from moe_jax.core.context import Context, Ids
from moe_jax.core.groups import Dense, Ragged
from moe_jax.core.parameter import parameter
from moe_jax.core.routing import Routing, TokenChoice, position_in_expert
from moe_jax.core.shard import Shard
from moe_jax.core.stats import Stats, describe, stats
from moe_jax.core.tokens import check_tokens
from moe_jax.core.traits import traits
from moe_jax.losses import LOGGED
from moe_jax.moe_config import LayerState, MoEConfig, sizes_of

__all__ = ["RECORDED", "Aux", "LayerState", "MoE", "MoEConfig", "Recorded"]


class Recorded(NamedTuple):
    """Details of each token's routing, by `record`; None where not asked for. Layers may be stacked in front."""

    weight_BLK: Float[Array, "*N B L K"] | None = None  # combine weights
    kept_BLK: Bool[Array, "*N B L K"] | None = None  # whether the choice reached its expert
    slot_BLK: Int[Array, "*N B L K"] | None = None  # position in expert, in the routing group; -1 without one
    probs_BLE: Float[Array, "*N B L E"] | None = None  # of the router
    logits_BLE: Float[Array, "*N B L E"] | None = None  # of the router
    input_BLD: Float[Array, "*N B L D"] | None = None  # input of router and experts; 0 for padding
    assignments_BLE: Float[Array, "*N B L E"] | None = None  # assignments to each expert, before drops
    combine_BLE: Float[Array, "*N B L E"] | None = None  # combine weight of each expert, before drops


RECORDED: dict[str, str] = {field.split("_")[0]: field for field in Recorded._fields}
"""Names that `record` may hold, and the fields of `Recorded` that they fill; [..., K] only where tokens choose."""


class Aux(NamedTuple):
    """Report of a layer, in addition to its output. Layers may be stacked in front."""

    loss: Float[Array, "*N"]  # weighted sum of auxiliary losses, equal on all shards
    stats: Stats  # sums over all tokens of all shards
    expert_BLK: Int[Array, "*N B L K"] | None = None  # each token's choices, E is the padding id; for token choice
    recorded: Recorded | None = None  # where requested

    @property
    def metrics(self) -> dict[str, Array]:
        """Load, drop rate, entropies, ... and the usual auxiliary losses without their coefficients."""
        s = jax.tree.map(jnp.asarray, self.stats)
        return describe(s) | {name: loss(s, {}, None) for name, loss in LOGGED.items()}


class LayerParams(NamedTuple):
    """Parameters of a layer; names carry their dimensions."""

    router: Any  # here and below arrays by name, or their PartitionSpecs
    experts: Any
    shared: Any


def forward(
    cfg: MoEConfig,
    here: Shard,
    params: LayerParams,
    state: LayerState,
    key: Key[Array, ""] | None,
    x_BLD: Float[Array, "B L D"],
    mask_BL: Bool[Array, "B L"],
    ids: Ids,
    record: tuple[str, ...] = (),
) -> tuple[Float[Array, "B L O"], Int[Array, "B L K"] | None, Recorded | None, tuple[Float[Array, ""], Stats]]:
    """Route, exchange, compute, combine: the layer on one shard's tokens. O is D, or what the experts declare."""
    B, L, D = x_BLD.shape
    S = cfg.group(B, L, training=key is not None)
    x_BLD = jnp.where(mask_BL[..., None], x_BLD, 0)  # drops the content of padding, NaN included
    x_GSD, mask_GS = x_BLD.reshape(-1, S, D), mask_BL.reshape(-1, S)
    ctx = context(cfg, here, state, key, len(x_GSD), jax.tree.map(lambda a: a.reshape(-1, S, *a.shape[2:]), ids))
    routing = cfg.router(here.pvary(params.router), x_GSD, mask_GS, ctx)
    # Choices to replay are the caller's: they may repeat an expert.
    here = dataclasses.replace(here, distinct=1 if ids.expert_BLK is not None else cfg.distinct)
    inner_GSD = here.tensor_enter(x_GSD)
    experts = gather_params(here, here.pvary(params.experts), x_GSD.dtype, "E")
    y_GSO, kept = cfg.dispatch(inner_GSD, routing, cfg.experts, experts, here)
    if cfg.shared is not None:
        y_GSO += cfg.shared(gather_params(here, here.pvary(params.shared), x_GSD.dtype), inner_GSD, Dense())
    y_GSO = here.tensor_exit(y_GSO)
    total = here.sum(stats(routing, kept, B, ctx.task_GS, cfg.tasks))
    loss = sum((part.weight * part(total, state, cfg.router) for part in cfg.losses), jnp.zeros((), jnp.float32))
    chosen = routing.expert_GSK.reshape(B, L, -1) if isinstance(routing, TokenChoice) else None
    recorded = collect_recorded(cfg, record, x_BLD, routing, kept) if record else None
    return y_GSO.reshape(B, L, -1), chosen, recorded, (loss, total)


def collect_recorded(
    cfg: MoEConfig, record: tuple[str, ...], x_BLD: Float[Array, "B L D"], routing: Routing, kept: Bool[Array, "G _ _"]
) -> Recorded:
    """Returns the requested details by token; computes nothing else."""
    B, L, _ = x_BLD.shape
    chosen: Any = routing  # a TokenChoice, where these fields are requested
    compute: dict[str, Callable[[], Array]] = {
        "weight": lambda: chosen.weight_GSK,
        "kept": lambda: kept,
        "slot": lambda: slot_of_choice(cfg, chosen),
        "probs": lambda: routing.probs_GSE,
        "logits": lambda: routing.logits_GSE,
        "input": lambda: x_BLD,
        "assignments": lambda: routing.assignments_GSE,
        "combine": lambda: routing.combine_GSE,
    }
    return Recorded(**{RECORDED[name]: compute[name]().reshape(B, L, -1) for name in record})


def slot_of_choice(cfg: MoEConfig, routing: TokenChoice) -> Int[Array, "G S K"]:
    """Returns each choice's position in expert, -1 for choices of the padding id."""
    position_GSK = position_in_expert(routing, getattr(cfg.dispatch, "priority", "token-major"))
    return jnp.where(routing.expert_GSK < cfg.E, position_GSK, -1)


def context(cfg: MoEConfig, here: Shard, state: LayerState, key: Key[Array, ""] | None, G: int, ids: Ids) -> Context:
    """Context of the router for a shard's G groups; `ids` are in groups [G, S].

    A group's key and number follow from its index in the global batch, so that noise is the same on every mesh.
    """
    group_G = here.batch_shard_index * G + jnp.arange(G)
    keys_G = None if key is None else jax.vmap(partial(jax.random.fold_in, key))(group_G)
    return Context(cfg.E, keys_G, key, state, *ids, cfg.gating, group_G)


def apply(
    cfg: MoEConfig,
    params: LayerParams,
    x_BLD: Float[Array, "B L D"],
    mask_BL: Bool[Array, "B L"] | None = None,
    key: Key[Array, ""] | None = None,
    state: LayerState | None = None,
    ids: Ids = Ids(),
    record: tuple[str, ...] = (),
    here: Shard | None = None,
) -> tuple[Float[Array, "B L O"], Aux]:
    """The layer as a pure function of its parameters: `forward` on every shard of the current mesh.

    Arguments are those of `MoE`. here: the shard; by default that of the current mesh. ValueError where x is not
    [B, L, D] of real numbers, or something else does not fit.
    """
    x_BLD = jnp.asarray(x_BLD)
    check_sizes(x_BLD)
    check_tokens(x_BLD, mask_BL)
    if here is None:
        here = shard.with_batch_axes(shard.from_mesh(cfg.exchange), x_BLD, params)
    if 0 in x_BLD.shape[:2]:
        return apply_to_nothing(cfg, params, x_BLD, key, state, ids, record, here)
    shard.check_axes(here, x_BLD)
    check_call(cfg, here, x_BLD, state, ids, record)
    check_local_experts(cfg, here, params.experts)
    params, x_BLD = shard.vary_alike(here, (params, x_BLD))
    mask_BL = jnp.ones(x_BLD.shape[:2], bool) if mask_BL is None else jnp.asarray(mask_BL).astype(bool)
    tokens, everywhere = shard.token_spec(here), P()
    param_specs = LayerParams(everywhere, dims.specs(params.experts, here.rules), shared_specs(params.shared, here))
    specs = (param_specs, everywhere, everywhere, tokens, tokens, tokens)
    layer = partial(forward, cfg, here, record=record)
    run = shard.per_shard(layer, here, specs, (tokens, tokens, tokens, everywhere))
    given = (params, state or {}, key if cfg.random else None, x_BLD, mask_BL, ids)
    y_BLO, expert_BLK, recorded, (loss, total) = run(*given)
    return y_BLO, Aux(loss, total, expert_BLK, recorded)


def apply_to_nothing(
    cfg: MoEConfig,
    params: LayerParams,
    x_BLD: Float[Array, "B L D"],
    key: Key[Array, ""] | None,
    state: LayerState | None,
    ids: Ids,
    record: tuple[str, ...],
    here: Shard,
) -> tuple[Float[Array, "B L O"], Aux]:
    """The layer on no tokens, B=0 or L=0: an empty output, and the report of a batch of padding alone."""
    B, L = x_BLD.shape[:2]
    sizes = {} if shard.in_shard_map() else dict(jax.sharding.get_abstract_mesh().shape)
    rows, length = B or math.prod(sizes.get(axis, 1) for axis in here.tokens), L or 1

    def pad(a: Array) -> Array:
        return jnp.pad(a, [(0, rows - B), (0, length - L), *[(0, 0)] * (a.ndim - 2)])

    x_BLD, ids = jax.tree.map(pad, (x_BLD, ids))
    padding_BL, cfg = jnp.zeros((rows, length), bool), dataclasses.replace(cfg, S=None)
    y_BLO, aux = apply(cfg, params, x_BLD, padding_BL, key, state, ids, record, here)
    y_BLO, *by_token = jax.tree.map(lambda a: a[:B, :L], (y_BLO, aux.expert_BLK, aux.recorded))
    return y_BLO, Aux(aux.loss, aux.stats, *by_token)


class MoE(nn.Module):
    """A sparse layer for any Linen model: `MoE(MoEConfig(E=8))` or `MoE.of(E=8)`; `moe_jax.nnx` has it for NNX.

    Under a mesh (`jax.set_mesh`, `make_mesh`) the layer is sharded by the rules of `core.shard`, within `jax.jit`;
    without one it is an ordinary function, and inside a `shard_map` of the whole model a function of one shard.
    Axes of the mesh may be Auto or Explicit; those with other names than `core.shard.AXES` do not shard it.
    """

    cfg: MoEConfig

    @classmethod
    def of(cls, *, name: str | None = None, **fields: Any) -> "MoE":
        """The layer from the fields of a `MoEConfig`."""
        return cls(MoEConfig(**fields), name=name)

    @nn.compact
    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        mask_BL: Bool[Array, "B L"] | None = None,
        key: Key[Array, ""] | None = None,
        state: LayerState | None = None,
        ids: Ids = Ids(),
        record: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "B L O"], Aux]:
        """Output and report of the layer; without a key nothing is random (evaluation).

        state: the state of the layer, where its config has any (`MoEConfig.init_state`); the call does not change it.
        ids: of tokens and tasks, for components that route by them, and recorded choices to replay (they fix the
        selection; weights and gradients are computed).
        record: names of `RECORDED` to report, like ("weight", "kept"); it changes nothing else.
        """
        check_tokens(x_BLD, mask_BL)
        params = make_params(self.cfg, x_BLD.shape[-1], partial(linen_param, self, exchange=self.cfg.exchange))
        if not self.is_initializing():
            return apply(self.cfg, params, x_BLD, mask_BL, key, state, ids, record)
        # The batch may have any size, on any mesh.
        cfg, state, (B, L, _) = dataclasses.replace(self.cfg, S=None), self.cfg.init_state(), x_BLD.shape
        ids = Ids(*(jnp.zeros((B, L), jnp.int32) for _ in range(2)))
        return apply(cfg, params, shard.replicate(x_BLD), None, key, state, ids, record, here=Shard())


Make = Callable[[str, Mapping[str, int], float], Array]  # (name, sizes of its dimensions, scale) -> a parameter


def make_params(cfg: MoEConfig, D: int, make: Make) -> LayerParams:
    """Parameters of a layer of width D, each from `make`, in the order in which they are created."""

    def every(component: Any, pattern: str) -> dict[str, Array]:
        sizes, zeros = {**sizes_of(component), "E": cfg.E, "D": D}, traits(component).zeros
        scales = {n: 0.0 if n in zeros else cfg.init_scale for n in component.params}
        return {n: make(pattern.format(n), sizes, scale) for n, scale in scales.items()}

    experts = every(cfg.router, "router_{}"), every(cfg.experts, "{}")
    return LayerParams(*experts, dense_params_from(cfg.shared, "shared_{}", D, make, cfg.init_scale))


def dense_params_from(expert: Any, pattern: str, D: int, make: Make, scale: float = 1.0) -> dict[str, Array]:
    """Parameters of a dense expert, each from `make`: `up_EDF` is declared as `up_DF`."""
    if expert is None:
        return {}
    sizes = {**sizes_of(expert), "D": D}
    return {n: make(pattern.format(n.replace("_E", "_")), sizes, scale) for n in expert.params}


def dense_params(module: nn.Module, expert: Any, pattern: str, D: int, scale: float = 1.0) -> dict[str, Array]:
    """Parameters of a Linen module with one dense expert."""
    return dense_params_from(expert, pattern, D, partial(linen_param, module), scale)


def shared_specs(params: Mapping[str, Array], here: Shard) -> dict[str, P]:
    """PartitionSpecs of a shared expert: `up_EDF` is sharded as `up_DF`."""
    bare = dims.specs({n.replace("_E", "_"): w for n, w in params.items()}, here.rules)
    return {n: bare[n.replace("_E", "_")] for n in params}


def gather_params(here: Shard, params: Mapping[str, Array], dtype: Any, experts: str = "") -> dict[str, Array]:
    """A shard's parameters of experts, ready for use: gathered over fsdp, and biases added once."""
    names = {n: n if experts else n.replace("_E", "_") for n in params}
    return {n: here.bias_once(names[n], here.unshard(names[n], w, dtype)) for n, w in params.items()}


def linen_param(module: nn.Module, name: str, sizes: Mapping[str, int], scale: float, exchange: Any = None) -> Array:
    """A parameter of a Linen module."""
    return parameter(module, name, sizes, initializer(name, scale), exchange)


def initializer(name: str, scale: float) -> Callable:
    """Initializer of a parameter: matrices are drawn; biases, scalars and arrays of scale 0 are zero."""
    letters = dims.dims_of(name)
    zero = not scale or len(letters.removeprefix("E")) < 2
    return nn.initializers.zeros if zero else dims.kernel_init(letters, scale)


def check_sizes(x_BLD: Array) -> None:
    """Refuses tokens of a symbolic shape (`jax.export.symbolic_shape`)."""
    if any(jax.export.is_symbolic_dim(n) for n in x_BLD.shape):
        raise ValueError(
            f"Tokens have the symbolic shape {x_BLD.shape}, but capacities and loops over rows are made for numbers; "
            "export a program for each size that is needed."
        )


def check_call(
    cfg: MoEConfig, here: Shard, x_BLD: Array, state: LayerState | None, ids: Ids, record: tuple[str, ...] = ()
) -> None:
    """Refuses a call without inputs that the layer needs, or that cannot be sharded over the current mesh."""
    check_record(record)
    if missing := set(cfg.init_state()) - set(state or {}):
        raise ValueError(
            f"A layer with {cfg.router} keeps {', '.join(sorted(missing))} from step to step, but was called "
            "without; start with state=config.init_state(), and go on with config.update_state(...)."
        )
    for what in cfg.needs:
        if getattr(ids, f"{what}_BL") is None:
            raise ValueError(
                f"The layer goes by {what} ids ({cfg.router}, tasks={cfg.tasks}); call it with Ids({what}_BL=...)."
            )
    of_choices = ids.expert_BLK is not None or any(RECORDED[name].endswith("K") for name in record)
    if of_choices and cfg.traits.routing is not TokenChoice:
        raise ValueError(
            f"{type(cfg.router).__name__}() makes no choices of tokens that could be recorded or replayed."
        )
    if here.alone or shard.in_shard_map():
        return
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    check_mesh(cfg, sizes, x_BLD.shape[-1])
    if len(x_BLD) % (shards := math.prod(sizes[a] for a in here.tokens)):
        raise ValueError(
            f"A batch of {len(x_BLD)} sequences does not spread evenly over {shards} shards; change B or mesh."
        )


def check_record(record: Any) -> None:
    """Refuses anything but a tuple of names of `RECORDED`."""
    if not isinstance(record, tuple) or set(record) - set(RECORDED):
        raise ValueError(
            f'record={record!r} is no tuple of names to record; write record=("weight", "kept"), or others of '
            f"{', '.join(RECORDED)}."
        )


def check_local_experts(cfg: MoEConfig, here: Shard, experts: Mapping[str, Array]) -> None:
    """Refuses, inside a shard_map, experts that are not this shard's."""
    if not shard.in_shard_map():
        return
    E, shards = cfg.E, here.axis_size(here.experts)
    for name, w in experts.items():
        if dims.dims_of(name).startswith("E") and len(w) * shards != E:
            raise ValueError(
                f"In this shard_map {name} has {len(w)} experts, but a shard has {E // shards} of E={E}; give "
                f"parameters in_specs that shard E over {here.experts}, or call the layer outside."
            )


def check_mesh(cfg: MoEConfig, sizes: Mapping[str, int], D: int, where: str = "") -> None:
    """Refuses a layer of width D that cannot be sharded over a mesh of these sizes."""
    over = [a for a in cfg.exchange.over if sizes.get(a, 1) > 1]
    axes = " x ".join(f"{where}mesh.{a}" for a in over) + f"={math.prod(sizes[a] for a in over)}"
    if over and not cfg.spreads:
        fits = "RaggedAllToAll()" if cfg.dispatch.layout is Ragged else "AllToAll()"
        raise ValueError(
            f"{type(cfg.exchange).__name__}() does not carry the rows of {type(cfg.dispatch).__name__}() between "
            f"shards, but {axes}; use {fits} as exchange, or set mesh.expert=1."
        )
    cuts = {"E": (cfg.E, over), "D": (D, ["fsdp"])}
    cuts |= {f"{n}.F": (part.F, ["tensor"]) for n in ("experts", "shared") if (part := getattr(cfg, n)) is not None}
    check_divides(cuts, sizes, where)


def check_divides(cuts: Mapping[str, tuple[int, list[str]]], sizes: Mapping[str, int], where: str = "") -> None:
    """Refuses a size that does not divide evenly over its mesh axes."""
    for name, (n, axes) in cuts.items():
        if n % (shards := math.prod(sizes.get(a, 1) for a in axes)):
            over = " x ".join(f"{where}mesh.{a}" for a in axes)
            raise ValueError(
                f"{name}={n} does not spread evenly over {over}={shards}; make it a multiple, or change it."
            )
