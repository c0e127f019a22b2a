"""Experts: (params, x, groups) -> y, written once for every layout of rows. One line here registers one."""

from moe_jax.experts.glu import GLU
from moe_jax.experts.mlp import MLP

EXPERTS = (MLP, GLU)

__all__ = ["EXPERTS", "GLU", "MLP"]
