"""Routers: (params, x_GSD, mask_GS, keys_G or None) -> Routing. One line here registers one.

A router declares its `params` (the suffix is the shape), the number K of choices per token, and whether it
is `random`: needs keys while training.
"""

from moe_jax.routers.switch import Switch
from moe_jax.routers.top2 import Top2
from moe_jax.routers.top_k import TopK

ROUTERS = (Switch, TopK, Top2)

__all__ = ["ROUTERS", "Switch", "Top2", "TopK"]
