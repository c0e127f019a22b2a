"""Rotary positions for contexts longer than those trained on. `SCALINGS` registers what `Rotary(scaling=)` takes.

Each gives `frequencies`, `magnitude` (factor of cosines and sines) and `sharpness` (factor of the scores of `MLA`).
"""

import dataclasses
import math
from typing import Annotated, Any, ClassVar

import numpy as np

from moe_jax.core.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, Range, check_ranges

Factor = Annotated[float, Range(1, math.inf, "[)")]


@dataclasses.dataclass(frozen=True)
class Linear:
    """Position interpolation (arXiv:2306.15595): all pairs turn `factor` times more slowly."""

    factor: Factor
    magnitude: ClassVar[float] = 1.0
    sharpness: ClassVar[float] = 1.0

    def __post_init__(self):
        check_ranges(self)

    def frequencies(self, plain: np.ndarray, base: float) -> np.ndarray:
        """Radians per position of every pair, from those without scaling."""
        return plain / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Llama 3.1's scaling (arXiv:2407.21783): slow pairs are interpolated, fast ones kept, linearly between.

    original: length of the contexts trained on. low, high: a pair which turns fewer than `low` times over this length
        is `factor` times slower, one which turns more than `high` times is unchanged.
    """

    factor: Factor  # how many times longer contexts become
    low: PositiveFloat = 1.0
    high: PositiveFloat = 4.0
    original: PositiveInt = 0
    magnitude: ClassVar[float] = 1.0
    sharpness: ClassVar[float] = 1.0

    def __post_init__(self):
        check_original(self)
        check_ranges(self)
        if self.low >= self.high:
            raise ValueError(f"Llama3(low={self.low}, high={self.high}): turns must satisfy 0 < low < high.")

    def frequencies(self, plain: np.ndarray, base: float) -> np.ndarray:
        """Radians per position of every pair, from those without scaling."""
        turns = self.original * plain / (2 * math.pi)
        kept = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return plain * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True)
class YaRN:
    """YaRN (arXiv:2309.00071, sec. 3.2, 3.4): "NTK-by-parts" interpolation, and queries and keys that are longer.

    original: length of the contexts trained on. beta_fast, beta_slow: pairs which turn more than `beta_fast` times
        over this length are unchanged, fewer than `beta_slow` times `factor` times slower, linearly by their index
        between (as in the authors' code; by their turns in the paper), rounded to integers where `truncate`.
    attention: factor of cosines and sines; None is 0.1 ln(factor) + 1.
    mscale, mscale_all_dim: DeepSeek's; m(s) = 0.1 s ln(factor) + 1. Where both are given, cosines and sines are
        multiplied with m(mscale) / m(mscale_all_dim); with the latter, the scores of `MLA` with m(mscale_all_dim)^2.
    """

    factor: Factor  # how many times longer contexts become
    original: PositiveInt = 0
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    truncate: bool = True  # whether slowing begins and ends at whole pairs
    attention: PositiveFloat | None = None
    mscale: NonNegativeFloat | None = None
    mscale_all_dim: NonNegativeFloat | None = None

    def __post_init__(self):
        check_original(self)
        check_ranges(self)
        if self.beta_slow >= self.beta_fast:
            raise ValueError(
                f"YaRN(beta_fast={self.beta_fast}, beta_slow={self.beta_slow}): turns must satisfy "
                "0 < beta_slow < beta_fast."
            )

    @property
    def magnitude(self) -> float:
        """Factor of cosines and sines."""
        if self.attention is not None:
            return self.attention
        if self.mscale and self.mscale_all_dim:
            return self._m(self.mscale) / self._m(self.mscale_all_dim)
        return self._m(1.0)

    @property
    def sharpness(self) -> float:
        """Factor of the scores of `MLA` (DeepSeek-V3)."""
        return self._m(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def frequencies(self, plain: np.ndarray, base: float) -> np.ndarray:
        """Radians per position of every pair, from those without scaling."""
        n = len(plain)
        first, last = (n * math.log(self.original / (2 * math.pi * b), base) for b in (self.beta_fast, self.beta_slow))
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * n - 1)
        slowed = np.clip((np.arange(n) - first) / max(last - first, 1e-3), 0, 1)
        return plain * (1 - slowed) + plain / self.factor * slowed

    def _m(self, s: float) -> float:
        return 0.1 * s * math.log(self.factor) + 1


def check_original(scaling: Any) -> None:
    """Refuses a scaling without an original length."""
    if not scaling.original:
        name = type(scaling).__name__
        raise ValueError(
            f"{name}(original={scaling.original}) needs the length of the contexts the model was trained on, "
            "a whole number in [1, 2**31); "
            f"give it, as {name}(factor={scaling.factor}, original=4096)."
        )


SCALINGS = (Linear, Llama3, YaRN)
