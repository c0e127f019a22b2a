"""The NNX shell of any attention: it holds the parameters. Nothing else here needs flax.nnx."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from moe_jax.attention.layer import attention_initializer, over_mesh
from moe_jax.attention.sees import Sees
from moe_jax.core import shard
from moe_jax.core.parameter import draw
from moe_jax.core.tokens import check_tokens


class Attention(nnx.Module):
    """An attention for any NNX model: `Attention(MHA(H=8, A=64), D=512, rngs=nnx.Rngs(0))`.

    Parameters have the names they have in the Linen shell (`layer.Attention`), and are sharded by the same rules: under
    a mesh tokens over its batch axes and heads over `tensor`.
    D: width of tokens. init_scale: of the variance of matrices.
    """

    def __init__(self, part: Any, D: int, *, rngs: nnx.Rngs, init_scale: float = 1.0):
        self.part = part
        sizes = {**part.sizes, "D": D}
        for name in part.params:
            setattr(self, name, nnx.Param(draw(rngs.params(), name, sizes, attention_initializer(name, init_scale))))

    def __call__(
        self, x_BLD: Float[Array, "B L D"], sees: Sees | None = None, memory_BMD: Float[Array, "B M D"] | None = None
    ) -> Float[Array, "B L D"]:
        """sees: None is one causal sequence in every row. memory_BMD: tokens attended to instead of x."""
        check_tokens(x_BLD)
        params = {name: getattr(self, name)[...] for name in self.part.params}
        return over_mesh(self.part, shard.from_mesh(), params, x_BLD, sees, memory_BMD)
