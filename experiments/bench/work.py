"""Work of a layer: FLOPs and bytes computed, and the part that is of use."""

import math
from typing import Any

import numpy as np
from jaxtyping import Int

from experiments.bench.shapes import Shape
from moe_jax.core.groups import Ragged
from moe_jax.core.kernels.by_expert import size_buckets
from moe_jax.dispatch import Einsum
from moe_jax.dispatch.scatter import capacities
from moe_jax.moe import MoEConfig


def slots(cfg: MoEConfig, count_GE: Int[np.ndarray, "G E"], S: int) -> int:
    """Slots that an expert has for each group of S tokens, whose choices are counted here."""
    d, K = cfg.dispatch, cfg.router.K
    if d.capacity_factor is not None or isinstance(d, Einsum):
        return d.slots(S, K, cfg.E)
    return next(C for C in capacities(S, K, cfg.E) if count_GE.max() <= C)


def kept(cfg: MoEConfig, count_GE: Int[np.ndarray, "G E"], S: int) -> Int[np.ndarray, "G E"]:
    """The choices that reach their expert."""
    if cfg.dispatch.capacity_factor is None:
        return count_GE
    return np.minimum(count_GE, slots(cfg, count_GE, S))


def by_rows(cfg: MoEConfig, platform: str, spread: bool = False) -> bool:
    """Tells whether rows are contiguous, rather than in slots of which some may be empty.

    A CPU is as fast with any number of rows per expert, so that capacity costs nothing there; what travels has slots.
    """
    occupied = platform == "cpu" and not spread and not isinstance(cfg.dispatch, Einsum)
    return cfg.dispatch.layout is Ragged or occupied


def rows_done(
    cfg: MoEConfig,
    count_GE: Int[np.ndarray, "G E"],
    S: int,
    D: int,
    platform: str,
    spread: bool = False,
    shards: int = 1,
) -> int:
    """Rows of width D that experts compute for groups of S tokens whose choices are counted here, padding included."""
    if not by_rows(cfg, platform, spread):
        return cfg.E * len(count_GE) * slots(cfg, count_GE, S)
    kept_GE = kept(cfg, count_GE, S)
    if platform != "cpu" or spread:  # grouped matmuls; which rows meet on a shard is not followed here
        return int(kept_GE.sum())
    rungs = np.array(size_buckets(len(count_GE) * S * cfg.router.K // shards, cfg.E, D))
    pieces, rest = np.divmod(np.concatenate([part.sum(0) for part in np.split(kept_GE, shards)]), rungs[-1])
    return int(pieces.sum() * rungs[-1] + rungs[np.searchsorted(rungs, rest[rest > 0])].sum())


def flops_per_row(shape: Shape) -> int:
    """FLOPs of an expert's matmuls for one row, forward."""
    return 2 * shape.D * shape.experts.F * matrices(shape)


def matrices(shape: Shape) -> int:
    return sum(len(name.rpartition("_")[2]) == 3 for name in shape.experts.params)


def weight_bytes(cfg: MoEConfig, shape: Shape, count_GE: Int[np.ndarray, "G E"], all_read: bool) -> int:
    """Bytes of float32 weights that experts read at least once, forward: of those that have rows, or of all."""
    experts = cfg.E if all_read else int((count_GE.sum(0) > 0).sum())
    return 4 * experts * math.prod((shape.D, shape.experts.F, matrices(shape)))


def work(
    cfg: MoEConfig, shape: Shape, count_GE: Int[np.ndarray, "G E"], platform: str, spread: bool = False, shards: int = 1
) -> dict[str, Any]:
    """A forward pass of the experts: FLOPs done and of use, the twin's, the part of choices kept, bytes of weights."""
    useful, each = int(kept(cfg, count_GE, shape.L).sum()), flops_per_row(shape)
    done = rows_done(cfg, count_GE, shape.L, shape.D, platform, spread, shards)
    return {
        "flops": {"done": done * each, "useful": useful * each, "twin": shape.T * shape.K * each},
        "kept": useful / (shape.T * shape.K),
        "weight_bytes": weight_bytes(cfg, shape, count_GE, not by_rows(cfg, platform, spread)),
    }
