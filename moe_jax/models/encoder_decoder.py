"""An encoder and a decoder with sparse layers in both: T5, GShard, Switch and ST-MoE (arXiv:1910.10683, 2006.16668)."""

import dataclasses
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.attention import Order, Sees
from moe_jax.core.context import Ids
from moe_jax.core.parameter import weight
from moe_jax.core.ranges import PositiveInt
from moe_jax.models.blocks import RMSNorm
from moe_jax.models.lm import embed, logits
from moe_jax.models.pattern import StackShape
from moe_jax.models.transformer import Call, StackInputs, TransformerConfig, share_params, stack, stack_aux
from moe_jax.moe import Aux


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig(TransformerConfig):
    """An encoder of N layers that sees everything, and a decoder of N layers that attends to its outputs.

    V_source: the vocabulary of the source, with an embedding of its own; None shares V and its embedding.
    """

    V_source: PositiveInt | None = None
    batch_kind: ClassVar = "pairs"
    STACKS: ClassVar = 2

    def __post_init__(self):
        super().__post_init__()
        for part in self.attention:
            part.for_memory()  # raises where it cannot
            if "bias_PH" in part.params:
                raise ValueError(
                    "A relative position table of every layer is for causal stacks; in an encoder and a decoder use "
                    "Relative(shared=True)."
                )

    def init(self, key: Key[Array, ""], batch: Any) -> Any:
        """Parameters, for batches like this one."""
        return EncoderDecoder(self).init(key, batch.source_BM, batch.tokens_BL)["params"]

    def apply(self, params: Any, batch: Any, call: Call = Call()) -> tuple[Float[Array, "B L V"], Aux | None]:
        """Logits on a `data.Pairs`, and the reports of the MoE layers, the encoder's first; domains are tasks."""
        given = (batch.source_BM, batch.tokens_BL, batch.source_segment_BM, batch.segment_BL, batch.domain_B, call)
        return cast(tuple[Array, Aux | None], EncoderDecoder(self).apply({"params": params}, *given))

    def stacks(self, batch: Any = None) -> tuple[StackShape, ...]:
        """Both stacks of layers, on batches like this one; without a batch, lengths mean nothing."""
        if batch is None:
            return (StackShape("encoder_", 1, 0, self.moe, Order.BOTH), StackShape("decoder_", 1, 1, self.moe))
        return self.shapes(batch.source_BM.shape[1], batch.tokens_BL.shape[1])

    def real_tokens(self, batch: Any) -> tuple[Bool[Array | np.ndarray, "B _"], ...]:
        """Masks of the tokens of sources and targets that are no padding."""
        return batch.source_segment_BM > 0, batch.segment_BL > 0

    def shapes(self, M: int, L: int) -> tuple[StackShape, ...]:
        """Both stacks of layers, for sources of M and targets of L tokens.

        A routing group of S tokens holds S / M sources; the decoder's group holds their targets.
        """
        moe = self.moe
        if (S := getattr(moe, "S", None)) is not None:
            if S % M:
                raise ValueError(
                    f"Groups of S={S} tokens are not whole sources of {M}; use a multiple, or None for one."
                )
            moe = dataclasses.replace(moe, S=S // M * L)
        return (StackShape("encoder_", M, 0, self.moe, Order.BOTH), StackShape("decoder_", L, M, moe))


class EncoderDecoder(nn.Module):
    """Logits of the target, and reports of the MoE layers, the encoder's first (None without MoE layers)."""

    cfg: EncoderDecoderConfig

    @nn.compact
    def __call__(
        self,
        source_BM: Int[Array, "B M"],
        tokens_BL: Int[Array, "B L"],
        source_segment_BM: Int[Array, "B M"] | None = None,
        segment_BL: Int[Array, "B L"] | None = None,
        task_B: Int[Array, "B"] | None = None,
        call: Call = Call(),
    ) -> tuple[Float[Array, "B L V"], Aux | None]:
        """tokens_BL: the target so far, one behind. Segments: pairs packed into a row, 0 is padding.

        call: router state and replay of the encoder's MoE layers come first.
        """
        cfg, N, lengths = self.cfg, self.cfg.n_moe_layers // 2, (source_BM.shape[1], tokens_BL.shape[1])
        if source_segment_BM is None:
            source_segment_BM = jnp.ones_like(source_BM)
        if segment_BL is None:
            segment_BL = jnp.ones_like(tokens_BL)
        if self.is_initializing():
            call = call._replace(router=cfg.init_router())
        calls = [call.part(i, slice(i * N, (i + 1) * N), n) for i, n in enumerate(lengths)]
        embed_VD = weight(self, "embed_VD", vars(cfg), nn.initializers.normal(cfg.D**-0.5))
        source_VD = embed_VD
        if cfg.V_source is not None:
            sizes = {"V": cfg.V_source, "D": cfg.D}
            source_VD = weight(self, "source_VD", sizes, nn.initializers.normal(cfg.D**-0.5))
        encoder_shape, decoder_shape = cfg.shapes(*lengths)
        source = self._inputs(encoder_shape, source_BM, source_segment_BM, task_B)
        m_BMD = embed(cfg, source_VD, source_BM, source.sees.position_BL)
        m_BMD, encoder = stack(cfg, encoder_shape, m_BMD, source, calls[0])
        m_BMD = RMSNorm(name="encoder_norm")(m_BMD)
        target = self._inputs(decoder_shape, tokens_BL, segment_BL, task_B)
        sees = Sees(*target.sees[:2], Order.BOTH, *source.sees[:2])
        target = target._replace(memory_BMD=m_BMD, memory_sees=sees)
        x_BLD = embed(cfg, embed_VD, tokens_BL, target.sees.position_BL)
        x_BLD, decoder = stack(cfg, decoder_shape, x_BLD, target, calls[1])
        x_BLD = RMSNorm(name="decoder_norm")(x_BLD)
        return logits(self, cfg, x_BLD, embed_VD), concat_stacks(stack_aux(encoder), stack_aux(decoder))

    def _inputs(self, shape: StackShape, tokens_BL: Array, segment_BL: Array, task_B: Array | None) -> StackInputs:
        """The inputs of a stack: the encoder sees both ways."""
        task_BL = None if task_B is None else jnp.broadcast_to(task_B[:, None], tokens_BL.shape)
        sees = share_params(self, self.cfg, shape.prefix, Sees(segment_BL, positions(segment_BL), shape.order))
        return StackInputs(sees, Ids(tokens_BL, task_BL))


def positions(segment_BL: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """Distance of each token from the start of its segment."""
    place_BL = jnp.broadcast_to(jnp.arange(segment_BL.shape[1]), segment_BL.shape)
    same_BL = jnp.pad(segment_BL[:, 1:] == segment_BL[:, :-1], ((0, 0), (1, 0)))
    return place_BL - jax.lax.cummax(jnp.where(same_BL, 0, place_BL), axis=1)


def concat_stacks(encoder: Aux | None, decoder: Aux | None) -> Aux | None:
    """The reports of both stacks as one; choices of the shorter sequence are padded with E, without a slot."""
    if encoder is None or decoder is None:
        return None
    E, both = encoder.stats.choices_E.shape[-1], (encoder, decoder)
    longest = max((x.shape[2] for x in jax.tree.leaves([(a.expert_BLK, a.recorded) for a in both])), default=0)

    def pad(tree: Any, value: int = 0) -> Any:
        pad_widths = lambda x: ((0, 0), (0, 0), (0, longest - x.shape[2]), (0, 0))  # noqa: E731
        return jax.tree.map(lambda x: jnp.pad(x, pad_widths(x), constant_values=value), tree)

    def long(a: Aux) -> Aux:
        recorded = a.recorded and pad(a.recorded)._replace(slot_BLK=pad(a.recorded.slot_BLK, -1))
        return a._replace(expert_BLK=pad(a.expert_BLK, E), recorded=recorded)

    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *map(long, both))
