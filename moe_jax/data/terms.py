"""The loss of an objective, target by target, as training and evaluation add it up."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moe_jax.core.shard import Shard


class Terms(NamedTuple):
    """The loss of one shard's rows. The loss of a step is the sum of `nats_BL` over all shards by their targets.

    others: further numbers to report, by name, [B, L] or [B]; their sums are divided by the targets too.
    """

    nats_BL: Float[Array, "B L"]  # 0 where there is no target
    right_BL: Bool[Array, "B L"]  # the target had the largest probability
    others: Mapping[str, Array] = {}


def predictions(logits_BLV: Float[Array, "B L V"], batch: Any, here: Shard = Shard()) -> Terms:
    """Cross-entropy of a batch's targets where its loss mask has any.

    here: the shard, for objectives whose rows are compared with those of other shards; not needed for this one.
    """
    mask_BL = batch.loss_mask_BL
    nats_BL = jnp.where(mask_BL, cross_entropy(logits_BLV, batch.target_BL), 0)
    return Terms(nats_BL, mask_BL & (logits_BLV.argmax(-1) == batch.target_BL))


def loss_mask(batch: Any) -> Bool[Array, "B L"]:
    """Says which positions of a batch are targets."""
    return batch.loss_mask_BL


def cross_entropy(logits_BLV: Float[Array, "B L V"], target_BL: Int[Array | np.ndarray, "B L"]) -> Float[Array, "B L"]:
    """Nats per token, in float32."""
    right_BL = jnp.take_along_axis(logits_BLV, target_BL[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BLV, axis=-1) - right_BL
