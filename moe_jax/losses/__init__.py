"""Auxiliary losses: (stats, state, router) -> value, of global sums, so equal on every mesh. One line registers one.

`weight` is the coefficient of the value; `state` and `update` are as a router's; check(router) refuses a router.
"""

from typing import Any

from moe_jax.losses.adaptive import Adaptive
from moe_jax.losses.entropies import LoadEntropy, TokenEntropy, UniformKL
from moe_jax.losses.load_balance import LoadBalance, convert
from moe_jax.losses.router_z import RouterZ
from moe_jax.losses.variation import Importance, Load

LOSSES = (LoadBalance, RouterZ, Importance, Load, TokenEntropy, LoadEntropy, UniformKL, Adaptive)
# Losses logged in every run, with any losses of its own, so that runs can be compared.
LOGGED: dict[str, Any] = {
    "load_balance": LoadBalance(),
    "router_z": RouterZ(),
    "importance": Importance(),
    "uniform_kl": UniformKL(),
}

__all__ = [
    "LOGGED",
    "LOSSES",
    "Adaptive",
    "Importance",
    "Load",
    "LoadBalance",
    "LoadEntropy",
    "RouterZ",
    "TokenEntropy",
    "UniformKL",
    "convert",
]
