"""Visibility in attention, as data: a back-end makes a mask from it, or needs none."""

import enum
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_static
class Order(enum.Enum):
    """CAUSAL: a query sees no key after it. BOTH: it sees keys on both sides."""

    CAUSAL = "causal"
    BOTH = "both"


class Sees(NamedTuple):
    """Queries and keys by document and by position in it; a query sees keys of its own document.

    segment: number of the document, 0 is padding, which sees padding only. position: from 0 in each document.
    Keys are the queries' own where they are not given: self-attention.
    bias_1HLM: added to all scores, from parameters that a stack shares. shared: these parameters, by name.
    """

    segment_BL: Int[Array, "B L"]
    position_BL: Int[Array, "B L"]
    order: Order = Order.CAUSAL
    key_segment_BM: Int[Array, "B M"] | None = None
    key_position_BM: Int[Array, "B M"] | None = None
    bias_1HLM: Float[Array, "1 H L M"] | None = None
    shared: Mapping[str, Array] = {}

    @property
    def keys(self) -> tuple[Int[Array, "B M"], Int[Array, "B M"]]:
        """Segment and position of every key."""
        segment_BM = self.segment_BL if self.key_segment_BM is None else self.key_segment_BM
        return segment_BM, self.position_BL if self.key_position_BM is None else self.key_position_BM


def mask(sees: Sees, window: int | None = None) -> Bool[Array, "B L M"]:
    """Tells which keys a query sees.

    window: number of positions that a query of a causal stack sees, its own and those before (arXiv:2004.05150).
    """
    segment_BM, position_BM = sees.keys
    seen_BLM = sees.segment_BL[:, :, None] == segment_BM[:, None, :]
    if sees.order is Order.BOTH:
        return seen_BLM
    distance_BLM = sees.position_BL[:, :, None] - position_BM[:, None, :]
    seen_BLM &= distance_BLM >= 0
    return seen_BLM if window is None else seen_BLM & (distance_BLM < window)
