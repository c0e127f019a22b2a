"""An encoder and a decoder with sparse layers in both: T5, GShard, Switch and ST-MoE (arXiv:1910.10683, 2006.16668)."""

import dataclasses
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from moe_jax.core.context import Ids
from moe_jax.core.parameter import weight
from moe_jax.models.blocks import RMSNorm, attention_mask, same_segment
from moe_jax.models.lm import embedded, logits
from moe_jax.models.transformer import Around, StackShape, TransformerConfig, joined, position_bias, stack
from moe_jax.moe import Aux, State


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig(TransformerConfig):
    """An encoder of N layers that sees everything, and a decoder of N layers that attends to its outputs.

    V_source: the vocabulary of the source, with an embedding of its own; None shares V and its embedding.
    """

    V_source: int | None = None
    position: str = "shared"
    takes: ClassVar = "pairs"
    STACKS: ClassVar = 2
    POSITIONS: ClassVar[tuple[str, ...]] = ("shared", "rotary", "sinusoidal", "none")

    def __post_init__(self):
        super().__post_init__()
        if self.V_source is not None and self.V_source < 1:
            raise ValueError(f"V_source={self.V_source} must be positive, or None for one vocabulary.")

    def init(self, key: Key[Array, ""], batch: Any) -> Any:
        """Parameters, for batches like this one."""
        return EncoderDecoder(self).init(key, batch.source_BM, batch.tokens_BL)["params"]

    def apply(
        self,
        params: Any,
        batch: Any,
        key: Key[Array, ""] | None = None,
        router: State | None = None,
        replay: Int[Array, "N B _ K"] | None = None,
        record: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "B L V"], Aux | None]:
        """The model of these parameters, and what its routers remember, on a `data.Pairs`; domains are tasks."""
        segments = (batch.source_segment_BM, batch.segment_BL)
        given = (batch.source_BM, batch.tokens_BL, *segments, key, router, batch.domain_B, replay, record)
        return cast(tuple[Array, Aux | None], EncoderDecoder(self).apply({"params": params}, *given))

    def stacks(self, batch: Any) -> tuple[StackShape, ...]:
        """Its stacks of layers, on batches like this one."""
        return self.shapes(batch.source_BM.shape[1], batch.tokens_BL.shape[1])

    def shapes(self, M: int, L: int) -> tuple[StackShape, ...]:
        """Its stacks of layers for sources of M and targets of L tokens.

        A routing group of S tokens is of so many sources; the decoder's is of their targets.
        """
        moe = self.moe
        if (S := getattr(moe, "S", None)) is not None:
            if S % M:
                raise ValueError(
                    f"Groups of S={S} tokens are not whole sources of {M}; use a multiple, or None for one."
                )
            moe = dataclasses.replace(moe, S=S // M * L)
        return (StackShape("encoder_", M, 0, self.moe), StackShape("decoder_", L, M, moe))


class EncoderDecoder(nn.Module):
    """Logits of the target, and what the MoE layers report, the encoder's first (None without MoE layers)."""

    cfg: EncoderDecoderConfig

    @nn.compact
    def __call__(
        self,
        source_BM: Int[Array, "B M"],
        tokens_BL: Int[Array, "B L"],
        source_segment_BM: Int[Array, "B M"] | None = None,
        segment_BL: Int[Array, "B L"] | None = None,
        key: Key[Array, ""] | None = None,
        router: State | None = None,
        task_B: Int[Array, "B"] | None = None,
        replay: Int[Array, "N B _ K"] | None = None,
        record: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "B L V"], Aux | None]:
        """tokens_BL: the target so far, one behind. Segments: pairs packed into a row, 0 is padding.

        Without a key nothing is random. router: what the MoE layers remember (`init_router`), the encoder's first.
        replay: choices of the MoE layers, as `Aux.expert_BLK` has them, to be made again. record: names of `RECORDED`.
        """
        cfg, N = self.cfg, self.cfg.moe_layers // 2
        if source_segment_BM is None:
            source_segment_BM = jnp.ones_like(source_BM)
        if segment_BL is None:
            segment_BL = jnp.ones_like(tokens_BL)
        if self.is_initializing():
            router = cfg.init_router()
        states = [jax.tree.map(lambda a, i=i: a[i * N : (i + 1) * N], router or {}) for i in range(2)]
        lengths = (source_BM.shape[1], tokens_BL.shape[1])
        replays = [None if replay is None else replay[i * N : (i + 1) * N, :, :n] for i, n in enumerate(lengths)]
        keys = [None if key is None else jax.random.fold_in(key, i) for i in range(2)]
        embed_VD = weight(self, "embed_VD", vars(cfg), nn.initializers.normal(cfg.D**-0.5))
        source_VD = embed_VD
        if cfg.V_source is not None:
            sizes = {"V": cfg.V_source, "D": cfg.D}
            source_VD = weight(self, "source_VD", sizes, nn.initializers.normal(cfg.D**-0.5))
        encoder_shape, decoder_shape = cfg.shapes(*lengths)
        source = self._around("encoder_", source_BM, source_segment_BM, task_B)
        m_BMD = embedded(cfg, source_VD, source_BM, source.position_BL)
        m_BMD, encoder = stack(cfg, encoder_shape, m_BMD, source, keys[0], states[0], replays[0], record)
        m_BMD = RMSNorm(name="encoder_norm")(m_BMD)
        target = self._around("decoder_", tokens_BL, segment_BL, task_B)
        mask_BLM = same_segment(segment_BL, source_segment_BM)
        target = target._replace(memory_BMD=m_BMD, memory_mask_BLM=mask_BLM)
        x_BLD = embedded(cfg, embed_VD, tokens_BL, target.position_BL)
        x_BLD, decoder = stack(cfg, decoder_shape, x_BLD, target, keys[1], states[1], replays[1], record)
        x_BLD = RMSNorm(name="decoder_norm")(x_BLD)
        return logits(self, cfg, x_BLD, embed_VD), after(joined(encoder), joined(decoder))

    def _around(self, prefix: str, tokens_BL: Array, segment_BL: Array, task_B: Array | None) -> Around:
        """What the layers of a stack are given: the encoder sees both ways."""
        both, L = prefix == "encoder_", tokens_BL.shape[1]
        task_BL = None if task_B is None else jnp.broadcast_to(task_B[:, None], tokens_BL.shape)
        mask_BLL = same_segment(segment_BL, segment_BL) if both else attention_mask(segment_BL, self.cfg.window)
        bias_1HLL = position_bias(self, self.cfg, prefix, L, both)
        ids = Ids(tokens_BL, task_BL)
        return Around(mask_BLL, positions(segment_BL), segment_BL > 0, ids, bias_1HLL)


def positions(segment_BL: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """How far each token is from the start of its segment."""
    place_BL = jnp.broadcast_to(jnp.arange(segment_BL.shape[1]), segment_BL.shape)
    same_BL = jnp.pad(segment_BL[:, 1:] == segment_BL[:, :-1], ((0, 0), (1, 0)))
    return place_BL - jax.lax.cummax(jnp.where(same_BL, 0, place_BL), axis=1)


def after(encoder: Aux | None, decoder: Aux | None) -> Aux | None:
    """The reports of both stacks as one; choices of the shorter sequence are padded with E, nowhere, without a slot."""
    if encoder is None or decoder is None:
        return None
    E, both = encoder.stats.choices_E.shape[-1], (encoder, decoder)
    longest = max((x.shape[2] for x in jax.tree.leaves([(a.expert_BLK, a.recorded) for a in both])), default=0)

    def pad(tree: Any, value: int = 0) -> Any:
        widths = lambda x: ((0, 0), (0, 0), (0, longest - x.shape[2]), (0, 0))  # noqa: E731
        return jax.tree.map(lambda x: jnp.pad(x, widths(x), constant_values=value), tree)

    def long(a: Aux) -> Aux:
        recorded = a.recorded and pad(a.recorded)._replace(slot_BLK=pad(a.recorded.slot_BLK, -1))
        return a._replace(expert_BLK=pad(a.expert_BLK, E), recorded=recorded)

    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *map(long, both))
