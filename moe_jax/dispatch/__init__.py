"""Dispatchers: (x_GSD, routing, experts, params, shard) -> (y_GSD, kept). One line here registers one.

`experts` is a function (params, x, groups) -> y. A dispatcher with `parallel` works with experts spread over
shards; `accepts` names the routings it takes; `kept` says of every choice (or slot) whether it reached its expert.
"""

from moe_jax.dispatch.einsum import Einsum
from moe_jax.dispatch.gather import Gather
from moe_jax.dispatch.scatter import Scatter
from moe_jax.dispatch.sort import Sort

DISPATCHERS = (Einsum, Scatter, Sort, Gather)

__all__ = ["DISPATCHERS", "Einsum", "Gather", "Scatter", "Sort"]
