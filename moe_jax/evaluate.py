"""Evaluation on the held-out split: dropless, with the capacity-limited loss for comparison."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moe_jax.core import shard
from moe_jax.core.stats import Stats, describe
from moe_jax.data import AnyBatch, Terms
from moe_jax.models import Call, Model


class EvaluationSums(NamedTuple):
    """Sums of an evaluation over batches; divided only at the end."""

    nats_Z: Float[Array, "Z"]  # by domain
    targets_Z: Float[Array, "Z"]
    right: Float[Array, ""]  # targets that were predicted
    nats_capacity: Float[Array, ""]
    others: dict[str, Float[Array, ""]]  # further sums of the objective, see `data.Terms`
    stats: Stats | None
    stats_capacity: Stats | None


def evaluation_step(
    objective: Any, cfg: Model, domains: int, params: Any, router: Any, batch: AnyBatch
) -> EvaluationSums:
    """The sums of one batch, over all shards."""
    here = shard.local()

    def run(cfg: Model) -> tuple[Terms, Stats | None]:
        output, aux = cfg.apply(params, batch, Call(router=router))
        return objective.terms(output, batch, here), None if aux is None else aux.stats

    terms, stats = run(cfg.dropless())
    limited, stats_capacity = (terms, None) if cfg.dropless() == cfg else run(cfg)
    by_domain = jax.nn.one_hot(batch.domain_B, domains)
    targets_Z = objective.targets(batch).sum(1).astype(jnp.float32) @ by_domain
    right = terms.right_BL.sum(dtype=jnp.float32)
    others = {name: a.sum(dtype=jnp.float32) for name, a in terms.others.items()}
    sums = here.sum((terms.nats_BL.sum(1) @ by_domain, targets_Z, right, limited.nats_BL.sum(), others))
    return EvaluationSums(*sums, stats, stats_capacity)


def evaluate(
    step: Callable[[AnyBatch], EvaluationSums], batches: Iterable[AnyBatch], domains: tuple[str, ...]
) -> dict[str, Any]:
    """Held-out losses in nats per token, by domain too, and the routing of the dropless pass."""
    total: EvaluationSums | None = None
    for batch in batches:
        sums = jax.device_get(step(batch))
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    if total is None or not (targets := float(total.targets_Z.sum())):
        raise ValueError("The held-out split has no sequences to evaluate on; give it more text.")
    record: dict[str, Any] = {"loss": float(total.nats_Z.sum()) / targets, "accuracy": float(total.right) / targets}
    if total.others:
        record["terms"] = {name: float(sum_) / targets for name, sum_ in total.others.items()}
    if total.stats_capacity is not None:
        record["loss_capacity"] = float(total.nats_capacity) / targets
        record["drop_rate_capacity"] = drop_rate(total.stats_capacity)
    record["loss_by_domain"] = {
        name: float(nats / n) for name, nats, n in zip(domains, total.nats_Z, total.targets_Z, strict=True) if n
    }
    if total.stats is not None:
        record["moe"] = per_layer(describe(total.stats))
    return record


def per_layer(metrics: Mapping[str, Any]) -> dict[str, list]:
    """Metrics as lists over MoE layers, without those that no layer has measured; None where a layer has not."""
    lists = {name: np.asarray(value).tolist() for name, value in metrics.items()}
    if "agreement" in lists:
        lists["agreement"] = with_first_layers(lists["agreement"], len(lists["load"]))
    return lists


def with_first_layers(values_P: Sequence[float], N: int) -> list[float | None]:
    """Lists P values over all N layers of equal stacks, None for the first layer of each, which has no value."""
    per_stack = np.reshape(values_P, (N - len(values_P), -1)).tolist()
    return [value for stack in per_stack for value in (None, *stack)]


def drop_rate(stats: Stats) -> float:
    """Dropped assignments as a fraction of all, over all layers; NaN where there are none."""
    assignments = float(np.sum(stats.choices_E))
    return 1 - float(np.sum(stats.kept)) / assignments if assignments else math.nan


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Bits per byte that a loss amounts to."""
    return nats_per_token / bytes_per_token / math.log(2)
