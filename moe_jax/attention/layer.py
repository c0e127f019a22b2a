"""The Linen shell of any attention: it holds the parameters."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from moe_jax.attention.sees import Order, Sees
from moe_jax.core import dims, shard
from moe_jax.core.parameter import parameter
from moe_jax.core.shard import Shard
from moe_jax.core.tokens import check_tokens


class Attention(nn.Module):
    """An attention for any Linen model: `Attention(MHA(H=8, A=64))`.

    Under a mesh (`jax.set_mesh`, `make_mesh`) tokens are sharded over its batch axes and heads over `tensor`;
    without one it is an ordinary function, and inside a `shard_map` of the whole model a function of one shard.
    """

    part: Any
    init_scale: float = 1.0

    @nn.compact
    def __call__(
        self, x_BLD: Float[Array, "B L D"], sees: Sees | None = None, memory_BMD: Float[Array, "B M D"] | None = None
    ) -> Float[Array, "B L D"]:
        """sees: None is one causal sequence in every row. memory_BMD: tokens attended to instead of x."""
        check_tokens(x_BLD)
        part, here = self.part, Shard() if self.is_initializing() else shard.from_mesh()
        sizes = {**part.sizes, "D": x_BLD.shape[-1]}
        params = {
            name: parameter(self, name, sizes, attention_initializer(name, self.init_scale)) for name in part.params
        }
        return over_mesh(part, here, params, x_BLD, sees, memory_BMD)


def attention_initializer(name: str, scale: float) -> Any:
    """Returns how a parameter is drawn: matrices from a truncated normal, scales are one, all else is zero."""
    if is_attention_matrix(name):
        return dims.kernel_init(dims.dims_of(name), scale)
    return nn.initializers.ones if name.startswith("scale") else nn.initializers.zeros


def over_mesh(
    part: Any, here: Shard, params: Any, x_BLD: Array, sees: Sees | None, memory_BMD: Array | None
) -> Float[Array, "B L D"]:
    """An attention on every shard of the current mesh; a plain call where there is none. Of no tokens it is empty."""
    if 0 in x_BLD.shape[:2]:
        return x_BLD
    if here.tensor and not shard.in_shard_map():
        part.check_tensor(jax.sharding.get_abstract_mesh().shape["tensor"])
    sees = causal_rows(*x_BLD.shape[:2]) if sees is None else sees
    tokens = shard.token_spec(here)
    heads = P(None, here.tensor or None)
    given: Any = sees
    sees_specs = given._replace(
        segment_BL=tokens,
        position_BL=tokens,
        key_segment_BM=tokens,
        key_position_BM=tokens,
        bias_1HLM=heads,
        shared=dims.specs(sees.shared, here.rules),
    )
    specs = (dims.specs(params, here.rules), tokens, sees_specs, tokens)
    run = shard.per_shard(partial(attend_on_shard, part, here), here, specs, tokens)
    return run(params, x_BLD, sees, memory_BMD)


NO_MATRICES = ("HA", "JA", "PH")  # biases and scales of heads, tables of positions


def attend_on_shard(part: Any, here: Shard, params: Any, x_BLD: Array, sees: Sees, memory_BMD: Array | None) -> Array:
    """An attention on one shard's tokens, its matrices gathered over fsdp."""
    ready = {name: gather_param(here, name, w, x_BLD.dtype) for name, w in here.pvary(params).items()}
    return part(ready, x_BLD, sees, here, memory_BMD=memory_BMD)[0]


def gather_param(here: Shard, name: str, w: Array, dtype: Any) -> Array:
    """A parameter as it is computed with: a matrix is gathered over fsdp and has the type of its input."""
    return here.unshard(name, w, dtype).astype(dtype) if is_attention_matrix(name) else w


def is_attention_matrix(name: str) -> bool:
    """Tells whether tokens are multiplied with this parameter."""
    letters = dims.dims_of(name)
    return len(letters) > 1 and letters not in NO_MATRICES


def causal_rows(B: int, L: int) -> Sees:
    """One causal sequence of L tokens in each of B rows."""
    position_BL = jnp.broadcast_to(jnp.arange(L), (B, L))
    return Sees(jnp.ones((B, L), int), position_BL, Order.CAUSAL)
