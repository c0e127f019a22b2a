"""Capacity conventions of papers and code bases, by name: the number of slots of an expert."""

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction

from moe_jax.core.ranges import check_ranges

PRIORITIES = ("token-major", "choice-major", "probability")


@dataclasses.dataclass(frozen=True)
class CapacityConvention:
    """Slots per expert and group: factor * K * S / E, or without K; rounded, up to a multiple, at least a minimum."""

    per_choice: bool = True  # whether K is in the formula
    rounding: Callable[[Fraction], int] = math.ceil
    multiple: int = 1
    minimum: int = 1


# The same factor means twice the slots where K=2 is in the formula.
CAPACITY_CONVENTIONS = {
    "exact": CapacityConvention(),  # ours; MaxText's up to rounding
    "switch": CapacityConvention(per_choice=False, rounding=math.floor, minimum=4),  # Switch's paper, Mesh TensorFlow
    "flaxformer": CapacityConvention(per_choice=False, rounding=round, minimum=4),  # Switch's and ST-MoE's release
    "flaxformer-large": CapacityConvention(per_choice=False, rounding=round, minimum=2),  # its Switch-XXL and Switch-C
    "gshard": CapacityConvention(per_choice=False, multiple=4),  # GShard, praxis: its factor is 2 for top-2
    "vmoe": CapacityConvention(multiple=4),  # V-MoE
}


def capacity(S: int, K: int, E: int, factor: float | None, convention: str = "exact") -> int:
    """Slots per expert for a group of S tokens with K choices each, never more than S; S where factor is None.

    Exact: the factor is read as the decimal it is written as (int(100 * 1.15 / 5) would be 22).
    """
    if factor is None:
        return S
    c = CAPACITY_CONVENTIONS[convention]
    slots = c.rounding(Fraction(str(factor)) * (K if c.per_choice else 1) * S / E)
    return min(S, max(c.minimum, -(-slots // c.multiple) * c.multiple))


def check_capacity(dispatch) -> None:
    """Refuses a dispatcher whose capacity factor, convention or slot priority makes no sense."""
    check_ranges(dispatch)
    name = type(dispatch).__name__
    if dispatch.priority not in PRIORITIES:
        raise ValueError(f"{name}(priority={dispatch.priority!r}) is unknown; use one of {', '.join(PRIORITIES)}.")
    if dispatch.convention not in CAPACITY_CONVENTIONS:
        raise ValueError(
            f"{name}(convention={dispatch.convention!r}) is unknown; use one of {', '.join(CAPACITY_CONVENTIONS)}."
        )
