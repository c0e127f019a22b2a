"""Norms and the dense feed-forward of a layer."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from moe_jax.attention.heads import rms_norm
from moe_jax.core import shard
from moe_jax.core.groups import Dense
from moe_jax.core.parameter import parameter
from moe_jax.moe import dense_params, gather_params


class RMSNorm(nn.Module):
    """x / rms(x) * scale, in float32 (arXiv:1910.07467)."""

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        scale_D = parameter(self, "scale_D", {"D": x_BLD.shape[-1]}, nn.initializers.ones)
        return rms_norm(x_BLD, (-1,), scale_D)


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * scale + bias, in float32 (arXiv:1607.06450)."""

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        sizes = {"D": x_BLD.shape[-1]}
        scale_D = parameter(self, "scale_D", sizes, nn.initializers.ones)
        bias_D = parameter(self, "bias_D", sizes, nn.initializers.zeros)
        x = x_BLD.astype(jnp.float32)
        x = rms_norm(x - jnp.mean(x, axis=-1, keepdims=True), (-1,), scale_D)
        return (x + bias_D[None, None]).astype(x_BLD.dtype)


NORMS: dict[str, type[nn.Module]] = {"rms": RMSNorm, "layer": LayerNorm}
NORM_VECTORS = {"rms": 1, "layer": 2}  # vectors of width D that a norm has


class FeedForward(nn.Module):
    """A dense layer: one expert for every token."""

    expert: Any
    init_scale: float = 1.0

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        here = shard.local()
        params = dense_params(self, self.expert, "{}", x_BLD.shape[-1], self.init_scale)
        params = gather_params(here, params, x_BLD.dtype)
        return here.tensor_exit(self.expert(params, here.tensor_enter(x_BLD), Dense()))
