"""Optimizers and learning-rate schedules, as components around optax."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from moe_jax.core import dims
from moe_jax.core.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range, check_ranges

Decay = Annotated[float, Range(0, 1, "[)")]


@dataclasses.dataclass(frozen=True)
class Constant:
    """Linear warm-up over `warmup` steps to `peak`, then constant."""

    peak: PositiveFloat  # largest learning rate
    warmup: NonNegativeInt = 0  # steps in which the rate rises to its peak

    def __post_init__(self):
        check_ranges(self)

    def __call__(self, steps: int) -> optax.Schedule:
        return _warm(self, optax.constant_schedule(self.peak))


@dataclasses.dataclass(frozen=True)
class InverseSqrt:
    """Linear warm-up to `peak`, then peak * sqrt(warmup / step) (T5's schedule)."""

    peak: PositiveFloat
    warmup: PositiveInt = 100

    def __post_init__(self):
        check_ranges(self)

    def __call__(self, steps: int) -> optax.Schedule:
        return _warm(self, lambda step: self.peak * (self.warmup / (step + self.warmup)) ** 0.5)


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Linear warm-up to `peak`, then half a cosine down to floor * peak at the last step (arXiv:1608.03983)."""

    peak: PositiveFloat
    warmup: NonNegativeInt = 0
    floor: Annotated[float, Range(0, 1)] = 0.1

    def __post_init__(self):
        check_ranges(self)

    def __call__(self, steps: int) -> optax.Schedule:
        return _warm(self, optax.cosine_decay_schedule(self.peak, max(steps - self.warmup, 1), self.floor))


@dataclasses.dataclass(frozen=True)
class WSD:
    """Warm-up, stable, decay: linearly down to floor * peak over the last `decay` steps (arXiv:2404.06395)."""

    peak: PositiveFloat
    warmup: NonNegativeInt = 0
    decay: NonNegativeInt = 0
    floor: Annotated[float, Range(0, 1)] = 0.0

    def __post_init__(self):
        check_ranges(self)

    def __call__(self, steps: int) -> optax.Schedule:
        stable = steps - self.warmup - self.decay
        down = optax.linear_schedule(self.peak, self.peak * self.floor, self.decay, stable)
        return _warm(self, down if self.decay else optax.constant_schedule(self.peak))


def _check(schedule: Any, steps: int) -> None:
    """Refuses a schedule that does not fit into a run of this many steps."""
    if isinstance(schedule, WSD) and schedule.decay and schedule.warmup + schedule.decay > steps:
        raise ValueError(f"{schedule} does not fit into {steps} steps; shorten its warm-up or decay.")


def _warm(schedule: Any, after: optax.Schedule) -> optax.Schedule:
    """Linear warm-up from peak / warmup at step 0 to peak, then `after`, counted from there."""
    if schedule.warmup < 1:
        return after
    rise = optax.linear_schedule(schedule.peak / schedule.warmup, schedule.peak, schedule.warmup - 1)
    return optax.join_schedules([rise, after], [schedule.warmup])


@dataclasses.dataclass(frozen=True)
class AdamW:
    """arXiv:1711.05101."""

    b1: Decay = 0.9  # decay of the mean of gradients
    b2: Decay = 0.95  # decay of the mean of their squares
    eps: PositiveFloat = 1e-8  # added to the root of that mean
    weight_decay: NonNegativeFloat = 0.1  # of matrices, in multiples of the learning rate

    def __post_init__(self):
        check_ranges(self)

    def __call__(self, rate: optax.Schedule, decayed: Any) -> optax.GradientTransformation:
        return optax.adamw(rate, self.b1, self.b2, self.eps, weight_decay=self.weight_decay, mask=decayed)


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """arXiv:1804.04235: second moments of matrices are kept as row and column sums.

    Updates are scaled by their parameter's size where `relative`; decay is the exponent of 1 - t^-decay.
    """

    decay: Annotated[float, Range(0, 1, "(]")] = 0.8  # exponent of the decay of second moments, 1 - t^-decay
    momentum: Decay | None = None  # decay of the mean of updates; None keeps none
    relative: bool = True  # whether updates are scaled by their parameter's size
    weight_decay: Decay = 0.0  # of matrices, in each step
    smallest: PositiveInt = 128  # matrices with a smaller side are not factored

    def __post_init__(self):
        check_ranges(self)

    def __call__(self, rate: optax.Schedule, decayed: Any) -> optax.GradientTransformation:
        return optax.adafactor(
            rate,
            min_dim_size_to_factor=self.smallest,
            decay_rate=self.decay,
            momentum=self.momentum,
            multiply_by_parameter_scale=self.relative,
            weight_decay_rate=self.weight_decay or None,
            weight_decay_mask=decayed,
        )


SCHEDULES = (Constant, InverseSqrt, Cosine, WSD)
OPTIMIZERS = (AdamW, Adafactor)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Updates of parameters: optimizer, learning rate, limits.

    optimizer: computes updates from gradients. schedule: the learning rate, by step.
    clip: largest norm of all gradients together, None for no limit.
    zero1: every shard of `data` and `expert` keeps state for its part and updates it (ZeRO stage 1, arXiv:1910.02054).
    no_decay: parameters whose name ends in one of these dimensions are not decayed: norms, biases, positions,
        sinks. Nor is any scalar (`router_scale_`): decay would pull a temperature to a value that means nothing.
    """

    optimizer: Any = AdamW()
    schedule: Any = Cosine(peak=1e-3, warmup=100)
    clip: PositiveFloat | None = 1.0
    no_decay: tuple[str, ...] = (
        *("D", "F", "EF", "ED", "PH", "V", "A", "HA", "JA", "Q", "W", "H"),
        *("E", "M", "O", "EO", "LD"),
    )
    zero1: bool = False

    def __post_init__(self):
        object.__setattr__(self, "no_decay", tuple(self.no_decay))
        check_ranges(self)

    def build(self, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
        """The gradient transformation for a run of this many steps, and its learning rate by step."""
        _check(self.schedule, steps)
        rate = self.schedule(steps)
        clip = optax.clip_by_global_norm(self.clip) if self.clip else optax.identity()  # of one state, empty
        return optax.chain(clip, self.optimizer(rate, self.decayed)), rate

    def sharded(self, params: Any, specs: Any, sizes: Mapping[str, int]) -> Any:
        """PartitionSpecs of gradients and optimizer state: the parameters' own; with zero1, sharded further."""
        return dims.add_axes(params, specs, ("data", "expert"), sizes) if self.zero1 else specs

    def decayed(self, params: Any) -> Any:
        """A tree of booleans: which parameters weight decay acts on."""
        kept = ("", *self.no_decay)  # "" are the dimensions of a scalar
        return jax.tree.map_with_path(lambda path, _: str(path[-1].key).rpartition("_")[2] not in kept, params)


def opt_state_specs(state: Any, params: Any, specs: Any) -> Any:
    """PartitionSpecs of the optimizer state: those of its parameters.

    Sums over rows and columns (Adafactor) lack the longest and the second longest axis.
    """
    shape_of = {names_of(path): x.shape for path, x in jax.tree.leaves_with_path(params)}
    spec_of = {names_of(path): spec for path, spec in jax.tree.leaves_with_path(specs)}

    def leaf(path, x):
        names = names_of(path)
        shape = shape_of.get(names)
        if shape is None or x.shape == shape:
            return spec_of.get(names, P())
        missing = np.argsort(shape)[-1 if jax.tree_util.GetAttrKey("v_row") in path else -2] if len(shape) > 1 else 0
        if x.shape != shape[:missing] + shape[missing + 1 :]:
            return P()  # a placeholder
        return P(*(axes or None for i, axes in enumerate(dims.axes(spec_of[names], len(shape))) if i != missing))

    return jax.tree.map_with_path(leaf, state)


def names_of(path: tuple) -> tuple[str, ...]:
    """The dict keys on the path to a leaf; other kinds of keys are left out."""
    return tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
