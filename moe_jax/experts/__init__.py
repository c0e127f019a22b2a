"""Experts: (params, x, groups) -> y, written once for every layout of rows. One line here registers one.

y is as wide as x, or O where an expert has a field or property O; its parameters are then named by it (`down_EFO`).
"""

from moe_jax.experts.glu import GLU
from moe_jax.experts.mlp import MLP

EXPERTS = (MLP, GLU)

__all__ = ["EXPERTS", "GLU", "MLP"]
