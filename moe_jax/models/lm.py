"""A decoder-only language model with GLaM's interleaved dense and sparse layers (arXiv:2112.06905)."""

import dataclasses
from typing import Any, ClassVar, cast

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.attention import Sees
from moe_jax.attention.positions import sinusoids
from moe_jax.core import dims
from moe_jax.core.context import Ids
from moe_jax.core.groups import Dense
from moe_jax.core.parameter import weight
from moe_jax.models.blocks import RMSNorm
from moe_jax.models.pattern import StackShape
from moe_jax.models.transformer import Call, StackInputs, TransformerConfig, share_params, stack, stack_aux
from moe_jax.moe import Aux


@dataclasses.dataclass(frozen=True)
class LMConfig(TransformerConfig):
    """A language model."""

    batch_kind: ClassVar = "tokens"  # the kind of batch

    def init(self, key: Key[Array, ""], batch: Any) -> Any:
        """Parameters, for batches like this one."""
        return LM(self).init(key, batch.tokens_BL)["params"]

    def apply(self, params: Any, batch: Any, call: Call = Call()) -> tuple[Float[Array, "B L V"], Aux | None]:
        """Logits on a `data.Batch`, and the reports of the MoE layers; domains are tasks."""
        given = (batch.tokens_BL, batch.segment_BL, batch.position_BL, batch.domain_B, call)
        return cast(tuple[Array, Aux | None], LM(self).apply({"params": params}, *given))

    def stacks(self, batch: Any = None) -> tuple[StackShape, ...]:
        """The stack of layers, on batches like this one; without a batch, lengths mean nothing."""
        return (StackShape("", 1 if batch is None else batch.tokens_BL.shape[1], 0, self.moe),)

    def real_tokens(self, batch: Any) -> tuple[Bool[Array | np.ndarray, "B L"], ...]:
        """The mask of the tokens that are no padding."""
        return (batch.segment_BL > 0,)


class LM(nn.Module):
    """Logits, and reports of the MoE layers, stacked over them in order (None without MoE layers)."""

    cfg: LMConfig

    @nn.compact
    def __call__(
        self,
        tokens_BL: Int[Array, "B L"],
        segment_BL: Int[Array, "B L"] | None = None,
        position_BL: Int[Array, "B L"] | None = None,
        task_B: Int[Array, "B"] | None = None,
        call: Call = Call(),
    ) -> tuple[Float[Array, "B L V"], Aux | None]:
        """segment_BL: documents packed into a row, 0 is padding. task_B: a task or domain for each row."""
        cfg, (B, L) = self.cfg, tokens_BL.shape
        if segment_BL is None:
            segment_BL = jnp.ones_like(tokens_BL)
        if position_BL is None:
            position_BL = jnp.broadcast_to(jnp.arange(L), (B, L))
        if self.is_initializing():
            call = call._replace(router=cfg.init_router())
        task_BL = None if task_B is None else jnp.broadcast_to(task_B[:, None], (B, L))
        embed_VD = weight(self, "embed_VD", vars(cfg), nn.initializers.normal(cfg.D**-0.5))
        x_BLD = embed(cfg, embed_VD, tokens_BL, position_BL)
        sees = share_params(self, cfg, "", Sees(segment_BL, position_BL))
        inputs = StackInputs(sees, Ids(tokens_BL, task_BL))
        x_BLD, reports = stack(cfg, StackShape("", L, 0, cfg.moe), x_BLD, inputs, call)
        return logits(self, cfg, RMSNorm(name="norm")(x_BLD), embed_VD), stack_aux(reports)


def embed(
    cfg: TransformerConfig, embed_VD: Float[Array, "V D"], tokens_BL: Int[Array, "B L"], position_BL: Int[Array, "B L"]
) -> Float[Array, "B L D"]:
    """Embeddings of tokens at unit variance, plus those of positions where the model adds them."""
    x_BLD = embed_VD[tokens_BL].astype(cfg.dtype) * cfg.D**0.5
    return x_BLD + sinusoids(position_BL, cfg.D).astype(cfg.dtype) if cfg.embeds_positions else x_BLD


def logits(
    module: nn.Module, cfg: TransformerConfig, x_BLD: Float[Array, "B L D"], embed_VD: Float[Array, "V D"]
) -> Float[Array, "B L V"]:
    """Logits over the vocabulary, in float32, by the tied embedding or by a separate matrix."""
    if cfg.tied:
        head_DV = embed_VD.T
    else:
        head_DV = weight(module, "head_DV", vars(cfg), dims.kernel_init("DV"), cfg.dtype)
    return Dense().matmul(x_BLD, head_DV).astype(jnp.float32)
