"""Auxiliary losses: (stats, state, router) -> value, of global sums, so equal on every mesh. One line registers one.

`weight` is the coefficient of the value; `state` and `update` are as a router's; check(router) refuses a router.
`additive` tells whether the value is a mean over tokens, so that it is the same in any microbatches; default: no.
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


def is_additive(loss: Any) -> bool:
    """Tells whether a loss is a mean over tokens: averaged over microbatches by tokens, it is that of the batch."""
    return getattr(loss, "additive", False)


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
    "is_additive",
]
