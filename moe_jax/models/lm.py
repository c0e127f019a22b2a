"""A decoder-only language model with GLaM's interleaved dense and sparse layers (arXiv:2112.06905)."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.core import dims, shard
from moe_jax.core.context import Ids
from moe_jax.core.parameter import weight
from moe_jax.experts import GLU
from moe_jax.models.blocks import POSITIONS, Attention, FeedForward, RMSNorm, attention_mask
from moe_jax.models.layout import sparse_layers, stacks
from moe_jax.moe import Aux, MoE, MoEConfig, State

SAVED = jax.checkpoint_policies.save_only_these_names(shard.EXCHANGED)
REMAT: dict[str, Callable] = {
    "none": lambda block: block,
    "full": partial(nn.remat, prevent_cse=False),
    "exchanged": partial(nn.remat, prevent_cse=False, policy=SAVED),
}


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """A language model.

    V, D, N, H, A: vocabulary, width, layers, heads, width of a head.
    ffn: the feed-forward part of dense layers.
    moe: that of the layers which `layout` chooses: a MoEConfig, or an expert alone in a dense twin.
    causal: with False, routing that depends on later tokens is allowed (attention is always causal).
    remat: what the backward pass computes again: nothing ("none"), layers ("full"), or layers but for what came from
        other devices ("exchanged": 4 instead of 6 all-to-alls per MoE layer).
    aux_over_layers: whether the MoE layers' auxiliary losses are averaged ("mean") or added up ("sum").
    """

    V: int
    D: int
    N: int
    H: int
    A: int
    ffn: Any = GLU(F=1024, activation="gelu")
    moe: Any = None
    layout: str = "every 2"
    position: str = "rotary"
    tied: bool = True
    remat: str = "full"
    dtype: str = "float32"
    init_scale: float = 1.0
    causal: bool = True
    aux_over_layers: str = "mean"

    def __post_init__(self):
        for name in "VDNHA":
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} of the model must be positive.")
        if self.position not in POSITIONS:
            raise ValueError(f"position={self.position!r} is unknown; use one of {', '.join(POSITIONS)}.")
        if self.position == "rotary" and self.A % 2:
            raise ValueError(f"Rotary positions need heads of even width, but A={self.A}.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r} is unknown; use 'float32' or 'bfloat16'.")
        if any(self.sparse) and self.moe is None:
            raise ValueError(f"layout={self.layout!r} has sparse layers, but moe is None; set moe or layout='none'.")
        if self.remat not in REMAT:
            raise ValueError(f"remat={self.remat!r} is unknown; use {', '.join(map(repr, REMAT))}.")
        if self.aux_over_layers not in ("mean", "sum"):
            raise ValueError(f"aux_over_layers={self.aux_over_layers!r} is unknown; use 'mean' or 'sum'.")
        if self.causal and isinstance(self.moe, MoEConfig) and not self.moe.causal:
            if not getattr(self.moe.router, "causal", True):
                raise ValueError(
                    f"{type(self.moe.router).__name__}() decides about a token by later ones; in a language model use "
                    "a router that is causal, or say causal=False."
                )
            if getattr(self.moe.exchange, "buffer", None):
                raise ValueError(
                    f"{self.moe.exchange} shares its room with later tokens; in a language model use buffer=None, "
                    "or say causal=False."
                )
            raise ValueError(
                f"Slot priority {self.moe.dispatch.priority!r} lets later tokens take earlier ones' slots; in a "
                "language model use 'token-major', or say causal=False."
            )

    @property
    def sparse(self) -> tuple[bool, ...]:
        """For each layer, whether `moe` stands in it."""
        return sparse_layers(self.layout, self.N)

    @property
    def moe_layers(self) -> int:
        """How many layers route."""
        return sum(self.sparse) if isinstance(self.moe, MoEConfig) else 0

    def init_router(self) -> State:
        """What the routers of all MoE layers remember before the first step ({} for most)."""
        return self.moe.init_state(self.moe_layers) if isinstance(self.moe, MoEConfig) else {}

    def dropless(self) -> "LMConfig":
        """The same model without a limit to what an expert takes."""
        if not isinstance(self.moe, MoEConfig):
            return self
        return dataclasses.replace(self, moe=self.moe.dropless())

    def dense_twin(self) -> "LMConfig":
        """The dense model with the same active matrix multiplications per token, up to the router's.

        Every MoE becomes one expert of K times the hidden width, plus the shared one's.
        """
        moe = self.moe
        if not isinstance(moe, MoEConfig):
            return self
        if moe.shared is not None and dataclasses.replace(moe.shared, F=1) != dataclasses.replace(moe.experts, F=1):
            raise ValueError(f"The shared expert {moe.shared} is of another kind than {moe.experts}; no single twin.")
        F = moe.router.K * moe.experts.F + (moe.shared.F if moe.shared is not None else 0)
        return dataclasses.replace(self, moe=dataclasses.replace(moe.experts, F=F))


class LM(nn.Module):
    """Logits, and what the MoE layers report, stacked over them in order (None without MoE layers)."""

    cfg: LMConfig

    @nn.compact
    def __call__(
        self,
        tokens_BL: Int[Array, "B L"],
        segment_BL: Int[Array, "B L"] | None = None,
        position_BL: Int[Array, "B L"] | None = None,
        key: Key[Array, ""] | None = None,
        router: State | None = None,
        task_B: Int[Array, "B"] | None = None,
        replay: Int[Array, "N B L K"] | None = None,
    ) -> tuple[Float[Array, "B L V"], Aux | None]:
        """segment_BL: documents packed into a row, 0 is padding. Without a key nothing is random.

        router: what the MoE layers remember (`LMConfig.init_router`). task_B: a task or domain for each row.
        replay: choices of the MoE layers, as `Aux.expert_BLK` has them, to be made again.
        """
        cfg = self.cfg
        if segment_BL is None:
            segment_BL = jnp.ones_like(tokens_BL)
        if position_BL is None:
            position_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
        if self.is_initializing():
            router = cfg.init_router()
        task_BL = None if task_B is None else jnp.broadcast_to(task_B[:, None], tokens_BL.shape)
        embed_VD = weight(self, "embed_VD", vars(cfg), nn.initializers.normal(cfg.D**-0.5))
        x_BLD = embed_VD[tokens_BL].astype(cfg.dtype) * cfg.D**0.5
        shared = (attention_mask(segment_BL), position_BL, segment_BL > 0, Ids(tokens_BL, task_BL))
        reports, layer = [], 0
        for i, (block, n) in enumerate(stacks(cfg.sparse)):
            keys_N = None if key is None else jax.random.split(jax.random.fold_in(key, i), n)
            m = sum(block) if isinstance(cfg.moe, MoEConfig) else 0
            here = slice(layer, layer := layer + n * m)
            own = jax.tree.map(lambda a: a[here].reshape(n, m, *a.shape[1:]), (router or {}, replay))  # noqa: B023
            Stack = nn.scan(
                REMAT[cfg.remat](Block),
                length=n,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, 0, nn.broadcast),
            )
            x_BLD, report = Stack(cfg, block, name=f"stack_{i}")(x_BLD, keys_N, own, shared)
            if report is not None:  # [n, MoE layers in the block, ...] -> [layers, ...]
                reports.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), report))
        x_BLD = RMSNorm(name="norm")(x_BLD)
        if cfg.tied:
            head_DV = embed_VD.T
        else:
            head_DV = weight(self, "head_DV", vars(cfg), dims.kernel_init("DV"), cfg.dtype)
        logits_BLV = jnp.einsum("bld,dv->blv", x_BLD, head_DV.astype(cfg.dtype)).astype(jnp.float32)
        return logits_BLV, compare(jax.tree.map(lambda *xs: jnp.concatenate(xs), *reports)) if reports else None


class Block(nn.Module):
    """The layers that a stack repeats: attention, then a dense or a sparse feed-forward, in each."""

    cfg: LMConfig
    sparse: tuple[bool, ...]

    @nn.compact
    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        key: Key[Array, ""] | None,
        own: tuple[State, Int[Array, "M B L K"] | None],
        shared: tuple[Bool[Array, "B L L"], Int[Array, "B L"], Bool[Array, "B L"], Ids],
    ) -> tuple[Float[Array, "B L D"], Aux | None]:
        cfg, (mask_BLL, position_BL, real_BL, ids) = self.cfg, shared
        reports: list[Aux] = []
        for i, sparse in enumerate(self.sparse):
            attention = Attention(cfg.H, cfg.A, cfg.position, cfg.init_scale, name=f"attention_{i}")
            x_BLD += attention(RMSNorm(name=f"norm_attention_{i}")(x_BLD), mask_BLL, position_BL)
            h_BLD = RMSNorm(name=f"norm_ffn_{i}")(x_BLD)
            if sparse and isinstance(cfg.moe, MoEConfig):
                layer_key = None if key is None else jax.random.fold_in(key, i)
                state, replay_BLK = jax.tree.map(lambda a: a[len(reports)], own)
                layer_ids = ids._replace(expert_BLK=replay_BLK)
                y_BLD, aux = MoE(cfg.moe, name=f"moe_{i}")(h_BLD, real_BL, layer_key, state, layer_ids)
                reports.append(aux)
            else:
                ffn = cfg.moe if sparse else cfg.ffn
                y_BLD = FeedForward(ffn, cfg.init_scale, name=f"ffn_{i}")(h_BLD)
            x_BLD += y_BLD
        return x_BLD, jax.tree.map(lambda *xs: jnp.stack(xs), *reports) if reports else None


def compare(aux: Aux) -> Aux:
    """Counts the choices that each MoE layer shares with the one before it."""
    if aux.expert_BLK is None:
        return aux
    now, before = aux.expert_BLK[1:, ..., None], aux.expert_BLK[:-1, ..., None, :]
    same = ((now == before) & (now < aux.stats.choices_E.shape[-1])).any(-1)
    shared = shard.here().sum(same.sum((1, 2, 3), dtype=jnp.float32)) if len(same) else jnp.zeros(0)
    agreed = jnp.concatenate([jnp.zeros(1), shared])
    return aux._replace(stats=aux.stats._replace(agreed=agreed))


def apply(
    cfg: LMConfig, params: Any, batch: Any, key: Key[Array, ""] | None = None, router: State | None = None
) -> tuple[Float[Array, "B L V"], Aux | None]:
    """The model of these parameters, and what its routers remember, on a `data.Batch`; domains are tasks."""
    given = (batch.tokens_BL, batch.segment_BL, batch.position_BL, key, router, batch.domain_B)
    return cast(tuple[Array, Aux | None], LM(cfg).apply({"params": params}, *given))


def aux_loss(cfg: LMConfig, aux: Aux | None) -> Float[Array, ""]:
    """The auxiliary loss of the whole model."""
    if aux is None:
        return jnp.zeros(())
    return aux.loss.sum() if cfg.aux_over_layers == "sum" else aux.loss.mean()


def cross_entropy(logits_BLV: Float[Array, "B L V"], target_BL: Int[Array | np.ndarray, "B L"]) -> Float[Array, "B L"]:
    """Nats per token, in float32."""
    right_BL = jnp.take_along_axis(logits_BLV, target_BL[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BLV, axis=-1) - right_BL
