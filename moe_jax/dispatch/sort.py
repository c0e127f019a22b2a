import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

from jaxtyping import Array, Bool, Float

from moe_jax.core import rows
from moe_jax.core.groups import Ragged
from moe_jax.core.routing import TokenChoice, position_in_expert
from moe_jax.core.shard import Shard


@dataclasses.dataclass(frozen=True)
class Sort:
    """Dropless: rows sorted by expert, grouped matmuls, rows back (MegaBlocks, arXiv:2211.15841).

    Experts that are sharded are reached by the exchange RaggedAllToAll(), or AllGather().
    """

    capacity_factor: ClassVar[None] = None
    accepts: ClassVar = (TokenChoice,)
    layout: ClassVar = Ragged

    def slots(self, S: int, K: int, E: int) -> int:
        """The most rows that an expert may have of a group of S tokens; rows are contiguous, without empty slots."""
        return S

    def __call__(
        self,
        x_GSD: Float[Array, "G S D"],
        routing: TokenChoice,
        experts: Callable,
        params: Mapping[str, Array],
        shard: Shard = Shard(),
    ) -> tuple[Float[Array, "G S O"], Bool[Array, "G S K"]]:
        kept_GSK = routing.expert_GSK < routing.E
        row_GSK, sizes_E = rows.ragged_rows(routing, position_in_expert(routing), kept_GSK)
        row_map = rows.row_map(row_GSK, row_GSK.size)
        y_RO, reached = shard.apply_experts(experts, params, rows.send(x_GSD, row_map), Ragged(sizes_E))
        if reached.ndim:
            kept_GSK &= reached.at[row_GSK].get(mode="fill", fill_value=False)
        y_GSO = rows.weighted_sum(y_RO, shard.tensor_enter(routing.weight_GSK), row_map.restrict(kept_GSK))
        return y_GSO, kept_GSK
