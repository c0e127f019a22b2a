"""Sparse Mixture-of-Experts research in JAX and Flax, proved on simulated device meshes.

    core/routing   what a router decides, as data      routers/   who goes where, with what weight
    core/groups    rows grouped by expert              experts/   what an expert computes
    core/shard     the mesh, and all collectives       dispatch/  how rows reach experts and return
    moe            the layer                           losses/    auxiliary losses

Training is in `moe_jax.train`, configs in `moe_jax.config`; they are not imported here, so that a layer alone is quick.
"""

from moe_jax.core.shard import make_mesh
from moe_jax.dispatch import Einsum, Scatter, Sort
from moe_jax.experts import GLU, MLP
from moe_jax.models import LM, LMConfig
from moe_jax.moe import Aux, MoE, MoEConfig
from moe_jax.routers import Switch, Top2, TopK

__all__ = [
    "GLU",
    "LM",
    "MLP",
    "Aux",
    "Einsum",
    "LMConfig",
    "MoE",
    "MoEConfig",
    "Scatter",
    "Sort",
    "Switch",
    "Top2",
    "TopK",
    "make_mesh",
]
