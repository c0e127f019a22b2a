"""Exchanges: they bring rows and experts on different shards together. One line here registers one.

`(shard, experts, params, x, groups) -> (y, reached)`: x holds this shard's rows in groups of all E experts, params only
the experts of this shard. y is in the order of x, and as wide as the experts make it; `reached` tells for every row (or
for all) whether it reached an expert. Rows of y that did not, or that belong to no expert, are unspecified.
`over` names the mesh axes that experts are sharded over, `layouts` the layouts of rows that the exchange carries.
`traffic(part, rows, experts)` predicts what a call and its gradient send, to the byte (`moe_jax/core/traffic.py`).
"""

from moe_jax.exchanges.all_gather import AllGather
from moe_jax.exchanges.all_to_all import AllToAll
from moe_jax.exchanges.ragged import RaggedAllToAll
from moe_jax.exchanges.two_level import TwoLevel

EXCHANGES = (AllToAll, TwoLevel, RaggedAllToAll, AllGather)

__all__ = ["EXCHANGES", "AllGather", "AllToAll", "RaggedAllToAll", "TwoLevel"]
