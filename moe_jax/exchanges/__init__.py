"""Exchanges: how rows and experts that lie on different shards meet. One line here registers one.

`(shard, experts, params, x, groups) -> (y, reached)`: x holds this shard's rows in groups of all E experts, params only
the experts of this shard. y is in the order of x, and as wide as the experts make it; `reached` says of every row (or
of all) whether it saw an expert. `over` names the mesh axes that experts are spread over, `layouts` the layouts of rows
that it carries.
`traffic(part, rows, experts)` predicts what a call and its gradient send, to the byte (`moe_jax/core/traffic.py`).
"""

from moe_jax.exchanges.all_gather import AllGather
from moe_jax.exchanges.all_to_all import AllToAll
from moe_jax.exchanges.ragged import RaggedAllToAll
from moe_jax.exchanges.two_level import TwoLevel

EXCHANGES = (AllToAll, TwoLevel, RaggedAllToAll, AllGather)

__all__ = ["EXCHANGES", *(exchange.__name__ for exchange in EXCHANGES)]
