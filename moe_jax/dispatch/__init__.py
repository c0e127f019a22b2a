"""Dispatchers: (x_GSD, routing, experts, params, shard) -> (y_GSO, kept). One line here registers one.

`experts` is a function (params, x, groups) -> y, whose width O may differ from D. `shard.apply_experts` brings rows to
experts on any shard. `accepts` names the kinds of routing that a dispatcher takes, `layout` its layout of the rows of
experts. `kept` tells for every choice (or slot) whether it reached its expert. slots(S, K, E) is the number of slots of
an expert for a group of S tokens with K choices each. Weights pass through `shard.tensor_enter` before they are
multiplied with outputs.
"""

from moe_jax.dispatch.einsum import Einsum
from moe_jax.dispatch.gather import Gather
from moe_jax.dispatch.scatter import Scatter
from moe_jax.dispatch.sort import Sort

DISPATCHERS = (Einsum, Scatter, Sort, Gather)

__all__ = ["DISPATCHERS", "Einsum", "Gather", "Scatter", "Sort"]
