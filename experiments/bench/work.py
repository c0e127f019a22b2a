"""Work of a layer: FLOPs and bytes, computed and useful."""

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
    """Slots of an expert per group of S tokens; count_GE: choices."""
    d, K = cfg.dispatch, cfg.router.K
    if d.capacity_factor is not None or isinstance(d, Einsum):
        return d.slots(S, K, cfg.E)
    return next(C for C in capacities(S, K, cfg.E) if count_GE.max() <= C)


def kept(cfg: MoEConfig, count_GE: Int[np.ndarray, "G E"], S: int) -> Int[np.ndarray, "G E"]:
    """Number of choices that reach their expert."""
    if cfg.dispatch.capacity_factor is None:
        return count_GE
    return np.minimum(count_GE, slots(cfg, count_GE, S))


def by_rows(cfg: MoEConfig, platform: str, sharded: bool = False) -> bool:
    """Tells whether rows are contiguous, rather than in slots, some of them empty.

    A CPU computes any number of rows per expert, so capacity costs nothing there; exchanged rows are in slots.
    """
    occupied = platform == "cpu" and not sharded and not isinstance(cfg.dispatch, Einsum)
    return cfg.dispatch.layout is Ragged or occupied


def rows_done(
    cfg: MoEConfig,
    count_GE: Int[np.ndarray, "G E"],
    S: int,
    D: int,
    platform: str,
    sharded: bool = False,
    shards: int = 1,
) -> int:
    """Rows of width D that experts compute for groups of S tokens with these choices, padding included."""
    if not by_rows(cfg, platform, sharded):
        return cfg.E * len(count_GE) * slots(cfg, count_GE, S)
    kept_GE = kept(cfg, count_GE, S)
    if platform != "cpu" or sharded:  # grouped matmuls; rows by shard are not modelled
        return int(kept_GE.sum())
    buckets = np.array(size_buckets(len(count_GE) * S * cfg.router.K // shards, cfg.E, D))
    full, partial = np.divmod(np.concatenate([part.sum(0) for part in np.split(kept_GE, shards)]), buckets[-1])
    return int(full.sum() * buckets[-1] + buckets[np.searchsorted(buckets, partial[partial > 0])].sum())


def flops_per_row(shape: Shape) -> int:
    """FLOPs of an expert's matmuls for one row, forward."""
    return 2 * shape.D * shape.experts.F * matrices(shape)


def matrices(shape: Shape) -> int:
    return sum(len(name.rpartition("_")[2]) == 3 for name in shape.experts.params)


def weight_bytes(cfg: MoEConfig, shape: Shape, count_GE: Int[np.ndarray, "G E"], all_read: bool) -> int:
    """Bytes of float32 weights that experts read at least once, forward: by experts with rows, or by all."""
    experts = cfg.E if all_read else int((count_GE.sum(0) > 0).sum())
    return 4 * experts * math.prod((shape.D, shape.experts.F, matrices(shape)))


def work(
    cfg: MoEConfig,
    shape: Shape,
    count_GE: Int[np.ndarray, "G E"],
    platform: str,
    sharded: bool = False,
    shards: int = 1,
) -> dict[str, Any]:
    """Forward pass of experts: FLOPs done, useful, and of the dense baseline; choices kept; bytes of weights."""
    useful, each = int(kept(cfg, count_GE, shape.L).sum()), flops_per_row(shape)
    done = rows_done(cfg, count_GE, shape.L, shape.D, platform, sharded, shards)
    return {
        "flops": {"done": done * each, "useful": useful * each, "baseline": shape.T * shape.K * each},
        "kept": useful / (shape.T * shape.K),
        "weight_bytes": weight_bytes(cfg, shape, count_GE, not by_rows(cfg, platform, sharded)),
    }
