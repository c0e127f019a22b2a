"""The pattern of a stack: the parts of each layer, the repeated layers, and the paths of their parameters."""

import functools
import itertools
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from moe_jax.attention import Order

DEEP = 3000  # layers that are counted one by one
Layer = TypeVar("Layer", bound=Hashable)


class Sublayer(NamedTuple):
    """One part of a layer: x + part(norm(x)).

    name: the module's, and its norm's. kind: "attention", "dense" (an expert for every token) or "moe" (a MoEConfig);
    it decides what is computed, counted and predicted. memory: whether the part attends to a memory.
    """

    name: str
    kind: str
    part: Any
    memory: bool = False


class StackShape(NamedTuple):
    """A stack of layers on sequences of one length."""

    prefix: str  # of the names of its parameters
    L: int  # tokens of a sequence
    M: int  # tokens of the memory that every layer also attends to; 0 without
    moe: Any  # the feed-forward part of sparse layers
    order: Order = Order.CAUSAL


class RepeatedLayers(NamedTuple):
    """Consecutive layers, repeated n times and compiled once."""

    layers: tuple[tuple[Sublayer, ...], ...]
    n: int

    def parts(self) -> Iterator[tuple[str, Sublayer]]:
        """Every part of the repeated layers, in order, by the name of its module."""
        for i, layer in enumerate(self.layers):
            for sub in layer:
                yield f"{sub.name}_{i}", sub

    @property
    def n_moe_layers(self) -> int:
        """Number of MoE layers among the repeated ones."""
        return sum(sub.kind == "moe" for _, sub in self.parts())


class ParamPath(NamedTuple):
    """Path of a module's parameters: params[stack][module][name][repeat]."""

    stack: str
    module: str
    repeat: int


class PlacedSublayer(NamedTuple):
    """A part of a model with the paths of its parameters and its norm's. layer: counted over all stacks."""

    layer: int
    sub: Sublayer
    path: ParamPath
    norm: ParamPath


@functools.cache  # asked for by every layer
def sparse_layers(moe_layers: str, N: int) -> Collection[int]:
    """The numbers of the sparse ones of N layers, found without going through all of them.

    moe_layers: "every 2" (the last of each two, GLaM's), "all", "none", "first 3", "last 3", or indices "0,4,5".
    """
    word, _, number = moe_layers.partition(" ")
    try:
        if moe_layers in ("all", "none"):
            return range(N if moe_layers == "all" else 0)
        if word in ("every", "first", "last"):
            if not 1 <= (n := int(number)) <= N:
                raise ValueError
            return {"every": range(n - 1, N, n), "first": range(n), "last": range(N - n, N)}[word]
        chosen = frozenset(int(i) for i in moe_layers.strip("()[], ").split(","))
    except ValueError:
        raise ValueError(
            f"moe_layers={moe_layers!r} is not a choice of layers; use 'every n', 'first n', 'last n' (n <= N={N}), "
            "'all', 'none', or indices like '0,4'."
        ) from None
    if outside := sorted(i for i in chosen if not 0 <= i < N):
        raise ValueError(f"moe_layers={moe_layers!r} names layers {outside}, but there are N={N}, counted from 0.")
    return chosen


def layer_counts(cfg: Any, stack: StackShape) -> dict[tuple[Sublayer, ...], int]:
    """The kinds of layers of a stack, in order, and how many there are of each.

    Of more than `DEEP` layers, those of the two ends and of the middle are looked at and stand for all.
    """
    third = DEEP // 3
    middle = (cfg.N - third) // 2
    seen: Sequence[int] = range(cfg.N)
    if cfg.N > DEEP:
        seen = [*range(third), *range(middle, middle + third), *range(cfg.N - third, cfg.N)]
    counts = Counter(cfg.sublayers(stack, i) for i in seen)
    return {layer: n * cfg.N // len(seen) for layer, n in counts.items()}


def repeats(layers: tuple[Layer, ...]) -> list[tuple[tuple[Layer, ...], int]]:
    """Splits layers into (block, how often it repeats), so that scanning compiles as few layers as possible.

    Either the shortest period, as one stack, or every run of equal layers as a stack of its own.
    """
    N = len(layers)
    period = next(p for p in range(1, N + 1) if N % p == 0 and layers == layers[:p] * (N // p))
    runs: list[tuple[tuple[Layer, ...], int]] = [((kind,), len(list(run))) for kind, run in itertools.groupby(layers)]
    return [(layers[:period], N // period)] if period <= len(runs) else runs


def blocks(cfg: Any, stack: StackShape) -> list[RepeatedLayers]:
    """The layers of a model's stack, as they are scanned; `cfg.sublayers` gives the parts of each."""
    return [RepeatedLayers(*block) for block in repeats(tuple(cfg.sublayers(stack, i) for i in range(cfg.N)))]


def placed_sublayers(cfg: Any) -> list[PlacedSublayer]:
    """Every part of every layer of a model, in order."""
    found, layer = [], 0
    for stack in cfg.stacks():
        for i, block in enumerate(blocks(cfg, stack)):
            scope = f"{stack.prefix}stack_{i}"
            for repeat in range(block.n):
                for j, subs in enumerate(block.layers):
                    for sub in subs:
                        paths = (ParamPath(scope, f"{module}_{j}", repeat) for module in (sub.name, f"norm_{sub.name}"))
                        found.append(PlacedSublayer(layer + repeat * len(block.layers) + j, sub, *paths))
            layer += block.n * len(block.layers)
    return found


def moe_paths(cfg: Any) -> list[ParamPath]:
    """Paths of all MoE layers, in order."""
    return [part.path for part in placed_sublayers(cfg) if part.sub.kind == "moe"]


def moe_path(cfg: Any, n: int) -> ParamPath:
    """The path of MoE layer number n; ValueError where there is none."""
    found = moe_paths(cfg)
    if not 0 <= n < len(found):
        raise ValueError(f"There is no MoE layer {n}; the model has {len(found)}, counted from 0 among themselves.")
    return found[n]


def params_at(params: Mapping[str, Any], path: ParamPath) -> dict[str, Any]:
    """The parameters of one part of one layer, by name."""
    return {name: w[path.repeat] for name, w in params[path.stack][path.module].items()}


def layer_params(cfg: Any, params: Mapping[str, Any], n: int) -> dict[str, Any]:
    """The parameters of MoE layer number n, by name."""
    return params_at(params, moe_path(cfg, n))


def check_expert(cfg: Any, layer: int, expert: int) -> None:
    """Refuses an expert that is not in the model's MoE layer of this number."""
    moe_path(cfg, layer)
    if not 0 <= expert < cfg.moe.E:
        raise ValueError(f"There is no expert {expert} in layer {layer}; it has {cfg.moe.E}, counted from 0.")
