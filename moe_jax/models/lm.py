"""A decoder-only language model with GLaM's interleaved dense and sparse layers (arXiv:2112.06905)."""

import dataclasses
from typing import Any, ClassVar, cast

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from moe_jax.core import dims
from moe_jax.core.context import Ids
from moe_jax.core.groups import Dense
from moe_jax.core.parameter import weight
from moe_jax.models.blocks import RMSNorm, attention_mask, sinusoids
from moe_jax.models.transformer import Around, StackShape, TransformerConfig, joined, position_bias, stack
from moe_jax.moe import Aux, State


@dataclasses.dataclass(frozen=True)
class LMConfig(TransformerConfig):
    """A language model."""

    takes: ClassVar = "tokens"  # the kind of batch

    def init(self, key: Key[Array, ""], batch: Any) -> Any:
        """Parameters, for batches like this one."""
        return LM(self).init(key, batch.tokens_BL)["params"]

    def apply(
        self,
        params: Any,
        batch: Any,
        key: Key[Array, ""] | None = None,
        router: State | None = None,
        replay: Int[Array, "N B L K"] | None = None,
        record: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "B L V"], Aux | None]:
        """The model of these parameters, and what its routers remember, on a `data.Batch`; domains are tasks."""
        given = (batch.tokens_BL, batch.segment_BL, batch.position_BL, key, router, batch.domain_B, replay, record)
        return cast(tuple[Array, Aux | None], LM(self).apply({"params": params}, *given))

    def stacks(self, batch: Any) -> tuple[StackShape, ...]:
        """Its stacks of layers, on batches like this one."""
        return (StackShape("", batch.tokens_BL.shape[1], 0, self.moe),)


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
        record: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "B L V"], Aux | None]:
        """segment_BL: documents packed into a row, 0 is padding. Without a key nothing is random.

        router: what the MoE layers remember (`LMConfig.init_router`). task_B: a task or domain for each row.
        replay: choices of the MoE layers, as `Aux.expert_BLK` has them, to be made again. record: names of `RECORDED`.
        """
        cfg, L = self.cfg, tokens_BL.shape[1]
        if segment_BL is None:
            segment_BL = jnp.ones_like(tokens_BL)
        if position_BL is None:
            position_BL = jnp.broadcast_to(jnp.arange(L), tokens_BL.shape)
        if self.is_initializing():
            router = cfg.init_router()
        task_BL = None if task_B is None else jnp.broadcast_to(task_B[:, None], tokens_BL.shape)
        embed_VD = weight(self, "embed_VD", vars(cfg), nn.initializers.normal(cfg.D**-0.5))
        x_BLD = embedded(cfg, embed_VD, tokens_BL, position_BL)
        mask_BLL = attention_mask(segment_BL, cfg.window)
        bias_1HLL = position_bias(self, cfg, "", L, both=False)
        around = Around(mask_BLL, position_BL, segment_BL > 0, Ids(tokens_BL, task_BL), bias_1HLL)
        x_BLD, reports = stack(cfg, StackShape("", L, 0, cfg.moe), x_BLD, around, key, router, replay, record)
        return logits(self, cfg, RMSNorm(name="norm")(x_BLD), embed_VD), joined(reports)


def embedded(
    cfg: TransformerConfig, embed_VD: Float[Array, "V D"], tokens_BL: Int[Array, "B L"], position_BL: Int[Array, "B L"]
) -> Float[Array, "B L D"]:
    """Embeddings of tokens at unit variance, and of their positions where these are added."""
    x_BLD = embed_VD[tokens_BL].astype(cfg.dtype) * cfg.D**0.5
    return x_BLD + sinusoids(position_BL, cfg.D).astype(cfg.dtype) if cfg.position == "sinusoidal" else x_BLD


def logits(
    module: nn.Module, cfg: TransformerConfig, x_BLD: Float[Array, "B L D"], embed_VD: Float[Array, "V D"]
) -> Float[Array, "B L V"]:
    """Over the vocabulary, in float32: by the embedding, or by a matrix of its own."""
    if cfg.tied:
        head_DV = embed_VD.T
    else:
        head_DV = weight(module, "head_DV", vars(cfg), dims.kernel_init("DV"), cfg.dtype)
    return Dense().matmul(x_BLD, head_DV).astype(jnp.float32)
