import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.core.groups import Groups, Padded, Ragged
from moe_jax.core.shard import Shard, check_over


@dataclasses.dataclass(frozen=True)
class AllGather:
    """Tokens stay where they are, and the weights of all experts travel to them (Janus, SIGCOMM 2023).

    Cheaper than an all-to-all where a shard's rows are more bytes than the experts; gradients are reduce-scattered.
    """

    over: tuple[str, ...] = ("expert",)
    takes: ClassVar = (Padded, Ragged)

    def __post_init__(self):
        check_over(self)

    def __call__(
        self, shard: Shard, experts: Callable, params: Any, x: Float[Array, "... D"], groups: Groups
    ) -> tuple[Float[Array, "... O"], Bool[Array, ""]]:
        travelling = jax.tree.map(lambda w: w.astype(x.dtype), params)
        everything = jax.tree.map(partial(shard.gather, axes=shard.experts), travelling)
        return experts(everything, x, groups), jnp.ones((), bool)
