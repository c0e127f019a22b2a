"""Attentions: (params, x, sees) -> y, written once for every mesh. One line here registers one."""

from moe_jax.attention.mha import MHA
from moe_jax.attention.mla import MLA
from moe_jax.attention.positions import POSITIONS, NoPE, Relative, Rotary, Sinusoidal
from moe_jax.attention.scaling import SCALINGS, Linear, Llama3, YaRN
from moe_jax.attention.sees import Order, Sees

ATTENTION = (MHA, MLA)

__all__ = [
    "ATTENTION",
    "MHA",
    "MLA",
    "POSITIONS",
    "SCALINGS",
    "Linear",
    "Llama3",
    "NoPE",
    "Order",
    "Relative",
    "Rotary",
    "Sees",
    "Sinusoidal",
    "YaRN",
]
