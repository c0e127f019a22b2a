"""Sparse Mixture-of-Experts research in JAX and Flax, proved on simulated device meshes.

    core/routing   what a router decides, as data      routers/   who goes where, with what weight
    core/groups    rows grouped by expert              gating/    what any router can be given
    core/shard     the mesh, and all collectives       experts/   what an expert computes
    core/stats     what is counted of a routing        dispatch/  how rows reach experts and return
    moe            the layer                           exchanges/ how rows reach experts on other shards
    attention/     attentions and positions            losses/    auxiliary losses

Training is in `moe_jax.train`, configs in `moe_jax.config`; they are not imported here, so that a layer alone is quick.
"""

from moe_jax import attention, dispatch, exchanges, experts, gating, losses, routers
from moe_jax.attention import *
from moe_jax.core.context import Ids
from moe_jax.core.shard import make_mesh
from moe_jax.core.shardings import batch_sharding, shardings
from moe_jax.dispatch import *
from moe_jax.exchanges import *
from moe_jax.experts import *
from moe_jax.gating import *
from moe_jax.losses import *
from moe_jax.models import LM, EncoderDecoder, EncoderDecoderConfig, LMConfig, ViT, ViTConfig
from moe_jax.moe import Aux, MoE, MoEConfig
from moe_jax.routers import *

__all__ = ["LM", "Aux", "EncoderDecoder", "EncoderDecoderConfig", "Ids", "LMConfig", "MoE", "MoEConfig"]
__all__ += ["ViT", "ViTConfig", "batch_sharding", "make_mesh", "shardings"]
for _package in (attention, routers, gating, experts, dispatch, exchanges, losses):
    __all__ += _package.__all__
