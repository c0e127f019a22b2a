"""The MoE layer: `forward` is the algorithm on one shard, `MoE` holds its parameters."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Key

from moe_jax.core import dims, shard
from moe_jax.core.groups import Dense
from moe_jax.core.routing import Stats, describe, stats
from moe_jax.core.shard import Shard
from moe_jax.dispatch import Scatter
from moe_jax.experts import MLP
from moe_jax.losses import LOSSES
from moe_jax.routers import TopK

LOSS = {f.__name__: f for f in LOSSES}


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """One MoE layer, as four independent choices.

    S: tokens per routing group, in which capacity is counted; None is one sequence. It is not the size of a
       shard, so that which tokens are dropped does not depend on the mesh.
    shared: an expert that every token visits beside its routed ones (n shared experts of width F are one of
       width n*F; DeepSeekMoE, arXiv:2401.06066).
    losses: auxiliary losses and their coefficients.
    init_scale: router and experts start with std sqrt(init_scale / fan_in); Switch found 0.1 more stable.
    """

    E: int
    router: Any = TopK(K=2)
    experts: Any = MLP(F=1024)
    dispatch: Any = Scatter()
    shared: Any = None
    losses: Mapping[str, float] | tuple[tuple[str, float], ...] = (("load_balance", 0.01), ("router_z", 0.001))
    S: int | None = None
    init_scale: float = 1.0

    def __post_init__(self):
        object.__setattr__(self, "losses", tuple(dict(self.losses).items()))  # hashable
        if not 1 <= self.router.K <= self.E:
            raise ValueError(f"The router picks K={self.router.K} of E={self.E} experts; K must lie between 1 and E.")
        for name in dict(self.losses):
            if name not in LOSS:
                raise ValueError(f"Loss {name!r} is unknown; use {' or '.join(map(repr, LOSS))}.")
        if self.S is not None and self.S < 1:
            raise ValueError(f"S={self.S} tokens per routing group; it must be positive, or None for a sequence.")
        if self.init_scale <= 0:
            raise ValueError(f"init_scale={self.init_scale} must be positive.")

    @property
    def causal(self) -> bool:
        """Whether a token's output is free of what comes after it: no later token may take its slot."""
        d = self.dispatch
        return (
            d.capacity_factor is None
            or d.priority == "token-major"
            or (d.priority == "choice-major" and self.router.K == 1)
        )

    def dropless(self) -> "MoEConfig":
        """The same layer without a limit to what an expert takes."""
        if self.dispatch.capacity_factor is None:
            return self
        return dataclasses.replace(self, dispatch=dataclasses.replace(self.dispatch, capacity_factor=None))


class Aux(NamedTuple):
    """What a layer reports besides its output. Layers may be stacked in front."""

    loss: Float[Array, "*N"]  # auxiliary losses times their coefficients, equal on all shards
    stats: Stats  # sums over all tokens of all shards

    @property
    def metrics(self) -> dict[str, Array]:
        """Load, drop rate, router entropy and every auxiliary loss without its coefficient."""
        return describe(self.stats) | {name: f(self.stats) for name, f in LOSS.items()}


def forward(
    cfg: MoEConfig,
    here: Shard,
    router: Mapping[str, Array],
    experts: Mapping[str, Array],
    shared: Mapping[str, Array],
    x_BLD: Float[Array, "B L D"],
    mask_BL: Bool[Array, "B L"],
    key: Key[Array, ""] | None,
) -> tuple[Float[Array, "B L D"], Aux]:
    """Route, exchange, compute, combine: the layer on one shard's tokens."""
    (B, L, D), S = x_BLD.shape, cfg.S or x_BLD.shape[1]
    if B * L % S and cfg.dispatch.capacity_factor is None:
        S = B * L  # groups only limit capacity, and there is no limit
    if B * L % S:
        raise ValueError(f"A shard's {B} x {L} tokens are not whole routing groups of S={S}; S must divide them.")
    x_BLD = jnp.where(mask_BL[..., None], x_BLD, 0)  # whatever padding holds, NaN too, ends here
    x_GSD, mask_GS = x_BLD.reshape(-1, S, D), mask_BL.reshape(-1, S)
    routing = cfg.router(router, x_GSD, mask_GS, group_keys(key, here, len(x_GSD)))
    y_GSD, kept_GSK = cfg.dispatch(x_GSD, routing, cfg.experts, here.vary(experts), here)
    if cfg.shared is not None:
        y_GSD += cfg.shared(shared, x_GSD, Dense())
    total = here.sum(stats(routing, kept_GSK))
    loss = sum((weight * LOSS[name](total) for name, weight in dict(cfg.losses).items()), jnp.zeros(()))
    return y_GSD.reshape(x_BLD.shape), Aux(loss, total)


def group_keys(key: Key[Array, ""] | None, here: Shard, G: int) -> Key[Array, "G"] | None:
    """A key for each routing group by its place in the whole batch, so that noise is the same on every mesh."""
    if key is None:
        return None
    return jax.vmap(partial(jax.random.fold_in, key))(here.index * G + jnp.arange(G))


class MoE(nn.Module):
    """A sparse layer for any Linen model: `MoE(MoEConfig(E=8))` or `MoE.of(E=8)`.

    Under a mesh (`jax.set_mesh`) with the axes `data` and `expert`, tokens are sharded over both and experts
    over the second; without one it is an ordinary function.
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
    ) -> tuple[Float[Array, "B L D"], Aux]:
        """Output and what there is to report; without a key nothing is random (evaluation)."""
        cfg, here = self.cfg, shard.current()
        if self.is_initializing():  # only shapes matter, and the batch may be of any size
            cfg, here = dataclasses.replace(cfg, S=None), Shard()
        check_mesh(cfg, here, x_BLD.shape[0])
        x_BLD = jnp.asarray(x_BLD)
        if mask_BL is None:
            mask_BL = jnp.ones(x_BLD.shape[:2], bool)
        router = self._params(cfg.router, "router_{}", x_BLD.shape[-1])
        experts = self._params(cfg.experts, "{}", x_BLD.shape[-1])
        shared = dense_params(self, cfg.shared, "shared_{}", x_BLD.shape[-1], cfg.init_scale)
        tokens, everywhere = shard.token_spec(here), P()
        run = shard.per_shard(
            partial(forward, cfg, here),
            here,
            (everywhere, shard.expert_spec(here), everywhere, tokens, tokens, everywhere),
            (tokens, everywhere),
        )
        return run(router, experts, shared, x_BLD, mask_BL, key if cfg.router.random else None)

    def _params(self, component: Any, pattern: str, D: int) -> dict[str, Array]:
        sizes = {**sizes_of(component), "E": self.cfg.E, "D": D}
        return {n: param(self, pattern.format(n), sizes, self.cfg.init_scale) for n in component.params}


def dense_params(module: nn.Module, expert: Any, pattern: str, D: int, scale: float = 1.0) -> dict[str, Array]:
    """Parameters of an expert that stands alone: `up_EDF` is declared as `up_DF`."""
    if expert is None:
        return {}
    sizes = {**sizes_of(expert), "D": D}
    return {n: param(module, pattern.format(n.replace("_E", "_")), sizes, scale) for n in expert.params}


def param(module: nn.Module, name: str, sizes: Mapping[str, int], scale: float) -> Array:
    """Matrices are drawn, biases start at zero."""
    letters = dims.dims_of(name)
    bias = len(letters.removeprefix("E")) == 1 and letters != "DE"
    return dims.param(module, name, sizes, nn.initializers.zeros if bias else dims.kernel_init(letters, scale))


def sizes_of(component: Any) -> Mapping[str, int]:
    """The sizes a component brings itself: its single-letter fields."""
    return {f.name: getattr(component, f.name) for f in dataclasses.fields(component) if len(f.name) == 1}


def check_mesh(cfg: MoEConfig, here: Shard, B: int) -> None:
    """Refuses what cannot be spread over the current mesh."""
    size = jax.sharding.get_abstract_mesh().shape
    if here.experts and not cfg.dispatch.parallel:
        raise ValueError(
            f"{type(cfg.dispatch).__name__}() needs all experts on every shard, but mesh.expert={size['expert']}; "
            "set mesh.expert=1, or use Scatter(capacity_factor=None)."
        )
    if here.experts and cfg.E % size["expert"]:
        raise ValueError(f"E={cfg.E} experts do not spread evenly over mesh.expert={size['expert']}; change one.")
    if here.tokens and B % (shards := size.get("data", 1) * size.get("expert", 1)):
        raise ValueError(f"A batch of {B} sequences does not spread evenly over {shards} shards; change B or mesh.")
