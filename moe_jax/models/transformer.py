"""What transformers of all kinds share: their sizes, and stacks of dense and sparse layers that are scanned."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.core import shard
from moe_jax.core.context import Ids
from moe_jax.core.parameter import parameter
from moe_jax.experts import GLU
from moe_jax.models.blocks import BUCKETS, Attention, FeedForward, LayerNorm, RMSNorm, relative_buckets
from moe_jax.models.layout import sparse_layers, stacks
from moe_jax.moe import Aux, MoE, MoEConfig, State

SAVED = jax.checkpoint_policies.save_only_these_names(shard.EXCHANGED)
REMAT: dict[str, Callable] = {
    "none": lambda block: block,
    "full": partial(nn.remat, prevent_cse=False),
    "exchanged": partial(nn.remat, prevent_cse=False, policy=SAVED),
}
QK_NORMS = ("none", "head", "all")


class StackShape(NamedTuple):
    """A stack of layers, as costs and predictions see it."""

    prefix: str  # of the names of its parameters
    L: int  # tokens of a sequence
    M: int  # tokens of the memory that every layer attends to besides; 0 without
    moe: Any  # the feed-forward part of sparse layers


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """What all models have.

    V, D, N, H, A: vocabulary or classes, width, layers (of each stack), heads, width of a head.
    J: heads of keys and values; None is one for each head of queries.
    ffn: the feed-forward part of dense layers.
    moe: that of the layers which `layout` chooses: a MoEConfig, or an expert alone in a dense twin.
    extra: a dense feed-forward after each MoE layer, with a norm of its own (ST-MoE, arXiv:2202.08906, appendix C).
    position: "rotary" with base `rope`; T5's relative positions, a table for each layer ("relative") or one for each
        stack ("shared"); "sinusoidal", added to the embeddings; or "none".
    qk_norm: of queries and keys, "none", by "head" or over "all" heads.
    window: how many positions back causal self-attention sees, None for all.
    causal: with False, routing that depends on later tokens is allowed (attention stays as it is).
    remat: what the backward pass computes again: nothing ("none"), layers ("full"), or layers but for what came from
        other devices ("exchanged": 4 instead of 6 all-to-alls per MoE layer).
    aux_over_layers: whether the MoE layers' auxiliary losses are averaged ("mean") or added up ("sum").
    """

    V: int
    D: int
    N: int
    H: int
    A: int
    J: int | None = None
    ffn: Any = GLU(F=1024, activation="gelu")
    moe: Any = None
    extra: Any = None
    layout: str = "every 2"
    position: str = "rotary"
    rope: float = 10000.0
    qk_norm: str = "none"
    window: int | None = None
    tied: bool = True
    remat: str = "full"
    dtype: str = "float32"
    init_scale: float = 1.0
    causal: bool = True
    aux_over_layers: str = "mean"
    POSITIONS: ClassVar[tuple[str, ...]] = ("rotary", "relative", "shared", "sinusoidal", "none")
    STACKS: ClassVar = 1
    biases: ClassVar = False  # layer norms, and biases in attention

    def __post_init__(self):
        for name in "VDNHA":
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} of the model must be positive.")
        if self.J is not None and (self.J < 1 or self.H % self.J):
            raise ValueError(f"J={self.J} heads of keys and values do not divide H={self.H}; make H a multiple.")
        choices = {"position": self.POSITIONS, "qk_norm": QK_NORMS, "dtype": ("float32", "bfloat16")}
        choices |= {"remat": tuple(REMAT), "aux_over_layers": ("mean", "sum")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                words = ", ".join(map(repr, known))
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {words}.")
        if self.position == "rotary" and self.A % 2:
            raise ValueError(f"Rotary positions need heads of even width, but A={self.A}.")
        if self.position == "sinusoidal" and self.D % 2:
            raise ValueError(f"Sinusoidal positions need an even width, but D={self.D}.")
        if self.rope <= 1 or (self.window is not None and self.window < 1):
            raise ValueError(f"rope={self.rope} must be above 1, and window={self.window} positive or None.")
        if any(self.sparse) and self.moe is None:
            raise ValueError(f"layout={self.layout!r} has sparse layers, but moe is None; set moe or layout='none'.")
        if self.causal and isinstance(self.moe, MoEConfig) and not self.moe.causal:
            raise ValueError(not_causal(self.moe))

    @property
    def sparse(self) -> tuple[bool, ...]:
        """For each layer of all stacks, whether `moe` stands in it."""
        return sparse_layers(self.layout, self.N) * self.STACKS

    @property
    def moe_layers(self) -> int:
        """How many layers route."""
        return sum(self.sparse) if isinstance(self.moe, MoEConfig) else 0

    def init_router(self) -> State:
        """What the routers of all MoE layers remember before the first step ({} for most)."""
        return self.moe.init_state(self.moe_layers) if isinstance(self.moe, MoEConfig) else {}

    def dropless(self) -> Any:
        """The same model without a limit to what an expert takes."""
        if not isinstance(self.moe, MoEConfig):
            return self
        return dataclasses.replace(self, moe=self.moe.dropless())

    def dense_twin(self) -> Any:
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


def not_causal(moe: MoEConfig) -> str:
    """Why a layer's routing depends on later tokens, and what to do."""
    if not getattr(moe.router, "causal", True):
        return (
            f"{type(moe.router).__name__}() decides about a token by later ones; in a language model use "
            "a router that is causal, or say causal=False."
        )
    if getattr(moe.exchange, "buffer", None):
        return (
            f"{moe.exchange} shares its room with later tokens; in a language model use buffer=None, "
            "or say causal=False."
        )
    return (
        f"Slot priority {moe.dispatch.priority!r} lets later tokens take earlier ones' slots; in a "
        "language model use 'token-major', or say causal=False."
    )


class Around(NamedTuple):
    """What all layers of a stack are given besides their input."""

    mask_BLL: Bool[Array, "B L L"]  # who sees whom
    position_BL: Int[Array, "B L"]
    real_BL: Bool[Array, "B L"]  # what is not padding
    ids: Ids
    bias_1HLL: Float[Array, "1 H L L"] | None = None  # of attention, by relative position
    memory_BMD: Float[Array, "B M D"] | None = None  # what every layer attends to besides
    memory_mask_BLM: Bool[Array, "B L M"] | None = None


def stack(
    cfg: TransformerConfig,
    shape: StackShape,
    x_BLD: Float[Array, "B L D"],
    around: Around,
    key: Key[Array, ""] | None,
    router: State | None = None,
    replay: Int[Array, "N B L K"] | None = None,
    record: tuple[str, ...] = (),
) -> tuple[Float[Array, "B L D"], list[Aux]]:
    """The layers of a stack, as modules of the one that calls this; and what their MoE layers report, in pieces.

    router, replay: of the MoE layers of this stack. record: names of `RECORDED` that these report too.
    """
    reports, layer = [], 0
    for i, (block, n) in enumerate(stacks(sparse_layers(cfg.layout, cfg.N))):
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
        x_BLD, report = Stack(cfg, shape.moe, block, record, name=f"{shape.prefix}stack_{i}")(
            x_BLD, keys_N, own, around
        )
        if report is not None:  # [n, MoE layers in the block, ...] -> [layers, ...]
            reports.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), report))
    return x_BLD, reports


def position_bias(module: nn.Module, cfg: TransformerConfig, prefix: str, L: int, both: bool) -> Array | None:
    """[1, H, L, L]: T5's relative positions, one table for the whole stack; None where the config has none."""
    if cfg.position != "shared":
        return None
    table_PH = parameter(module, f"{prefix}bias_PH", {"P": BUCKETS, "H": cfg.H}, nn.initializers.zeros)
    return table_PH[relative_buckets(L, both)].transpose(2, 0, 1)[None]


class Block(nn.Module):
    """The layers that a stack repeats: attention, to a memory too, then a dense or a sparse feed-forward, in each."""

    cfg: TransformerConfig
    moe: Any
    sparse: tuple[bool, ...]
    record: tuple[str, ...] = ()

    @nn.compact
    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        key: Key[Array, ""] | None,
        own: tuple[State, Int[Array, "M B L K"] | None],
        around: Around,
    ) -> tuple[Float[Array, "B L D"], Aux | None]:
        cfg, reports = self.cfg, list[Aux]()
        for i, sparse in enumerate(self.sparse):
            x_BLD = self._attend(i, x_BLD, around)
            h_BLD = self._norm(f"ffn_{i}", x_BLD)
            if sparse and isinstance(self.moe, MoEConfig):
                layer_key = None if key is None else jax.random.fold_in(key, i)
                state, replay_BLK = jax.tree.map(lambda a: a[len(reports)], own)
                ids = around.ids._replace(expert_BLK=replay_BLK)
                given = (around.real_BL, layer_key, state, ids, self.record)
                y_BLD, aux = MoE(self.moe, name=f"moe_{i}")(h_BLD, *given)
                reports.append(aux)
            else:
                ffn = self.moe if sparse else cfg.ffn
                y_BLD = FeedForward(ffn, cfg.init_scale, name=f"ffn_{i}")(h_BLD)
            x_BLD += y_BLD
            if sparse and cfg.extra is not None:
                x_BLD += FeedForward(cfg.extra, cfg.init_scale, name=f"extra_{i}")(self._norm(f"extra_{i}", x_BLD))
        return x_BLD, jax.tree.map(lambda *xs: jnp.stack(xs), *reports) if reports else None

    def _norm(self, what: str, x_BLD: Array) -> Array:
        Norm = LayerNorm if self.cfg.biases else RMSNorm
        return Norm(name=f"norm_{what}")(x_BLD)

    def _attend(self, i: int, x_BLD: Array, around: Around) -> Array:
        cfg = self.cfg
        rope = cfg.rope if cfg.position == "rotary" else None
        forms: dict[str, Any] = {"qk_norm": cfg.qk_norm, "bias": cfg.biases, "init_scale": cfg.init_scale}
        kind = partial(Attention, cfg.H, cfg.A, cfg.J or cfg.H, **forms)
        own = kind(rope=rope, relative=cfg.position == "relative", name=f"attention_{i}")
        h_BLD = self._norm(f"attention_{i}", x_BLD)
        x_BLD += own(h_BLD, around.mask_BLL, around.position_BL, around.bias_1HLL)
        if around.memory_BMD is None or around.memory_mask_BLM is None:
            return x_BLD
        cross = kind(rope=None, name=f"cross_{i}")
        h_BLD = self._norm(f"cross_{i}", x_BLD)
        return x_BLD + cross(h_BLD, around.memory_mask_BLM, around.position_BL, memory_BMD=around.memory_BMD)


def joined(reports: list[Aux]) -> Aux | None:
    """What MoE layers report, stacked over them in order; None without any."""
    return compare(jax.tree.map(lambda *xs: jnp.concatenate(xs), *reports)) if reports else None


def compare(aux: Aux) -> Aux:
    """Counts the choices that each MoE layer shares with the one before it."""
    if aux.expert_BLK is None:
        return aux
    now, before = aux.expert_BLK[1:, ..., None], aux.expert_BLK[:-1, ..., None, :]
    same = ((now == before) & (now < aux.stats.choices_E.shape[-1])).any(-1)
    shared = shard.here().sum(same.sum((1, 2, 3), dtype=jnp.float32)) if len(same) else jnp.zeros(0)
    agreed = jnp.concatenate([jnp.zeros(1), shared])
    return aux._replace(stats=aux.stats._replace(agreed=agreed))


def aux_loss(cfg: TransformerConfig, aux: Aux | None) -> Float[Array, ""]:
    """The auxiliary loss of the whole model."""
    if aux is None:
        return jnp.zeros(())
    return aux.loss.sum() if cfg.aux_over_layers == "sum" else aux.loss.mean()


def cross_entropy(logits_BLV: Float[Array, "B L V"], target_BL: Int[Array | np.ndarray, "B L"]) -> Float[Array, "B L"]:
    """Nats per token, in float32."""
    right_BL = jnp.take_along_axis(logits_BLV, target_BL[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BLV, axis=-1) - right_BL
