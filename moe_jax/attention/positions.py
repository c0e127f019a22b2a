"""Positions in attention: rotations of queries and keys, or a bias of scores. `POSITIONS` registers them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_jax.attention.scaling import SCALINGS
from moe_jax.attention.sees import Order, Sees
from moe_jax.core.quoted import quoted
from moe_jax.core.ranges import Range, check_ranges

BUCKETS = 32  # of relative positions
FURTHEST = 128  # distance beyond which T5 has one bucket


def any_width(self, width: int) -> None:
    """Accepts heads of any width."""


def unturned(self, x_BLHA: Float[Array, "B L H A"], position_BL: Int[Array, "B L"]) -> Float[Array, "B L H A"]:
    """Queries or keys as they are."""
    return x_BLHA


def no_bias(self, params: Mapping[str, Array], sees: Sees, cached: bool = False) -> None:
    """Adds nothing to scores."""


@dataclasses.dataclass(frozen=True)
class NoPE:
    """No positions: order comes from the mask only, or from what a model adds to its embeddings."""

    params: ClassVar[tuple[str, ...]] = ()
    stack_params: ClassVar[tuple[str, ...]] = ()
    check, rotate, bias = any_width, unturned, no_bias


@dataclasses.dataclass(frozen=True)
class Sinusoidal:
    """Sines and cosines of positions added to the embeddings of a model (arXiv:1706.03762, sec. 3.5)."""

    params: ClassVar[tuple[str, ...]] = ()
    stack_params: ClassVar[tuple[str, ...]] = ()
    check, rotate, bias = any_width, unturned, no_bias


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary positions (RoFormer, arXiv:2104.09864): pairs (a, a + A/2) of a head turn by position / base^(2a/A).

    fraction: part of each head that turns, from its start; the other part has no position (GPT-NeoX, arXiv:2204.06745).
    scaling: slows rotations down for contexts longer than those trained on: Linear, Llama3 or YaRN; None leaves them.
    """

    base: Annotated[float, Range(1, math.inf, "()")] = 10000.0
    fraction: Annotated[float, Range(0, 1, "(]")] = 1.0
    scaling: Any = None
    params: ClassVar[tuple[str, ...]] = ()
    stack_params: ClassVar[tuple[str, ...]] = ()
    bias = no_bias

    def __post_init__(self):
        check_ranges(self)
        if self.scaling is not None and not isinstance(self.scaling, SCALINGS):
            names = ", ".join(f"{c.__name__}(...)" for c in SCALINGS)
            raise ValueError(f"Rotary(scaling={quoted(self.scaling)}) is no scaling; use one of {names}, or None.")

    def turned(self, width: int) -> int:
        """Numbers of a head of this width that turn."""
        return int(width * self.fraction)

    def check(self, width: int) -> None:
        """Refuses heads that cannot be cut into pairs."""
        if (n := self.turned(width)) % 2 or not n:
            raise ValueError(f"Rotary positions turn pairs, but {n} of a head's {width} numbers; make them even.")

    def frequencies(self, width: int) -> np.ndarray:
        """Radians per position of every pair, for heads of this width."""
        half = self.turned(width) // 2
        plain = self.base ** (-np.arange(half) / half)
        return plain if self.scaling is None else self.scaling.frequencies(plain, self.base)

    def rotate(self, x_BLHA: Float[Array, "B L H A"], position_BL: Int[Array, "B L"]) -> Float[Array, "B L H A"]:
        """Queries or keys turned by their positions, in float32."""
        width = x_BLHA.shape[-1]
        frequency = jnp.asarray(self.frequencies(width), jnp.float32)
        angle = position_BL[:, :, None, None].astype(jnp.float32) * frequency[None, None, None]
        turned, passed = jnp.split(x_BLHA, [self.turned(width)], axis=-1) if self.fraction < 1 else (x_BLHA, None)
        x1, x2 = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        if self.scaling is not None:
            cos, sin = cos * self.scaling.magnitude, sin * self.scaling.magnitude
        y = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x_BLHA.dtype)
        return y if passed is None else jnp.concatenate([y, passed], axis=-1)


@dataclasses.dataclass(frozen=True)
class Relative:
    """T5's relative positions (arXiv:1910.10683, sec. 2.1): a learned bias of every head for buckets of distances.

    shared: one table for all layers of a stack, as T5 has it, instead of one for each.
    """

    shared: bool = False
    check, rotate = any_width, unturned

    @property
    def params(self) -> tuple[str, ...]:
        return () if self.shared else ("bias_PH",)

    @property
    def stack_params(self) -> tuple[str, ...]:
        return ("bias_PH",) if self.shared else ()

    def bias(self, params: Mapping[str, Array], sees: Sees, cached: bool = False) -> Float[Array, "_ H L M"] | None:
        """The bias of scores: [1, H, L, L] by indices in a row; with a cache [B, H, L, M] by positions."""
        if not cached:
            if self.shared and sees.bias_1HLM is not None:  # computed once for the stack
                return sees.bias_1HLM
            return table_bias(self.table(params, sees), sees.segment_BL.shape[1], sees.order)
        _, position_BM = sees.keys
        M = position_BM.shape[1]
        bucket_R = jnp.asarray(buckets(np.arange(-M, M + 1), sees.order is Order.BOTH))
        distance_BLM = sees.position_BL[:, :, None] - position_BM[:, None, :]
        bucket_BLM = bucket_R[jnp.clip(distance_BLM, -M, M) + M]
        return jnp.moveaxis(self.table(params, sees)[bucket_BLM], -1, 1)

    def table(self, params: Mapping[str, Array], sees: Sees) -> Float[Array, "P H"]:
        """The layer's table, or its stack's."""
        if self.shared and "bias_PH" not in sees.shared:
            raise ValueError(
                "Relative(shared=True) finds no table in sees.shared, which a stack fills; without one use Relative()."
            )
        return sees.shared["bias_PH"] if self.shared else params["bias_PH"]


def table_bias(table_PH: Float[Array, "P H"], L: int, order: Order) -> Float[Array, "1 H L L"]:
    """The bias of all pairs of L positions in a row."""
    place_L = np.arange(L)
    bucket_LL = buckets(place_L[:, None] - place_L[None, :], order is Order.BOTH)
    return table_PH[bucket_LL].transpose(2, 0, 1)[None]


def buckets(distance: np.ndarray, both: bool = False) -> np.ndarray:
    """T5's buckets of distances from query back to key: exact at first, then logarithmic.

    both: keys after the query have buckets of their own, half of them (an encoder's).
    """
    n = BUCKETS // 2 if both else BUCKETS
    after = n * (distance < 0) if both else 0
    distance = abs(distance) if both else np.maximum(distance, 0)
    exact = n // 2
    scale = (n - exact) / math.log(FURTHEST / exact)
    far = exact + (np.log(np.maximum(distance, 1) / exact) * scale).astype(int)
    return after + np.where(distance < exact, distance, np.minimum(far, n - 1))


def sinusoids(position_BL: Int[Array, "B L"], D: int) -> Float[Array, "B L D"]:
    """Sines, then cosines, of position / 10000^(2d/D) (arXiv:1706.03762, sec. 3.5)."""
    half = D // 2
    frequency = jnp.asarray(10000.0 ** (-np.arange(half) / half), jnp.float32)
    angle = position_BL[:, :, None].astype(jnp.float32) * frequency[None, None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


POSITIONS = (Rotary, Relative, Sinusoidal, NoPE)
