"""Knock-out, isolation and substitution of experts, measured by the held-out loss per domain."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from moe_jax.data import NextToken
from moe_jax.evaluate import evaluation_step
from moe_jax.gating.masked import Masked
from moe_jax.models.pattern import check_expert, moe_path

MASK = "masked_E"  # key in the state of a layer, see `Masked`


class DomainLosses(NamedTuple):
    """Losses of a model on held-out data, by domain."""

    nats_Z: Float[np.ndarray, "Z"]
    targets_Z: Float[np.ndarray, "Z"]

    @property
    def by_domain_Z(self) -> Float[np.ndarray, "Z"]:
        """Nats per target; NaN for a domain without any."""
        return np.where(self.targets_Z > 0, self.nats_Z / np.maximum(self.targets_Z, 1), np.nan)

    @property
    def mean(self) -> float:
        return float(self.nats_Z.sum() / self.targets_Z.sum())


class Effects(NamedTuple):
    """Loss of a model, and its rise without each of P experts, in nats per target."""

    expert_P: tuple[tuple[int, int], ...]  # (layer, expert)
    base: DomainLosses
    rise_P: Float[np.ndarray, "P"]
    rise_PZ: Float[np.ndarray, "P Z"]

    @property
    def worst(self) -> tuple[tuple[int, int], float]:
        """The expert that is missed most, and the rise without it."""
        p = int(self.rise_P.argmax())
        return self.expert_P[p], float(self.rise_P[p])


def mask_experts(model: Any, experts: Iterable[tuple[int, int]]) -> Bool[np.ndarray, "N E"]:
    """Mask that removes these experts (layer, expert) from every choice."""
    masked_NE = np.zeros((model.n_moe_layers, model.moe.E if model.n_moe_layers else 0), bool)
    for layer, expert in experts:
        check_expert(model, layer, expert)
        masked_NE[layer, expert] = True
    return masked_NE


def isolate_experts(model: Any, layer: int, experts: Iterable[int]) -> Bool[np.ndarray, "N E"]:
    """Mask that isolates experts: in this layer no other expert may be chosen; other layers are unchanged."""
    moe_path(model, layer)
    masked_NE = mask_experts(model, [(layer, e) for e in experts])
    masked_NE[layer] = ~masked_NE[layer]
    return masked_NE


def masked(model: Any) -> Any:
    """The model, whose routers never choose the experts in the state's `masked_E` [N, E], with nothing dropped."""
    if model.routed is None:
        raise ValueError(f"{type(model).__name__} has no MoE layers to take experts from; give a model that has some.")
    free = model.dropless()
    return dataclasses.replace(free, moe=dataclasses.replace(free.moe, gating=(*free.moe.gating, Masked())))


@partial(jax.jit, static_argnums=(0, 1))
def _sums(model: Any, domains: int, params: Any, router: Any, batch: Any) -> tuple[Array, Array]:
    sums = evaluation_step(NextToken, model, domains, params, router, batch)
    return sums.nats_Z, sums.targets_Z


def masked_losses(
    model: Any,
    params: Any,
    batches: Sequence[Any],
    router: Mapping[str, Any] | None = None,
    masked_NE: Bool[np.ndarray, "N E"] | None = None,
    domains: int | None = None,
) -> DomainLosses:
    """Held-out losses with these experts masked (`mask_experts`, `isolate_experts`), nothing dropped, on one device.

    A token chooses among the other experts, with their weights (of a softmax: renormalised over them); choices beyond
    their number get the padding id. router: state of the routers. domains: number of domains in the data; None infers
    it from the batches. ValueError without a target, or for a batch of other domains.
    """
    Z = count_domains(batches, domains)
    mask_NE = mask_experts(model, []) if masked_NE is None else masked_NE
    state = {**(router or {}), MASK: jnp.asarray(mask_NE)}
    total = DomainLosses(np.zeros(Z), np.zeros(Z))
    for batch in batches:
        nats_Z, targets_Z = jax.device_get(_sums(masked(model), Z, params, state, batch))
        total = DomainLosses(total.nats_Z + nats_Z, total.targets_Z + targets_Z)
    if not total.targets_Z.sum():
        raise ValueError("The batches hold no target to predict; give some held-out text.")
    return total


def count_domains(batches: Sequence[Any], domains: int | None) -> int:
    """Number of domains: as given, or as found in the batches."""
    named = 1 + max((int(np.max(batch.domain_B)) for batch in batches), default=0)
    if domains is not None and named > domains:
        raise ValueError(f"A batch is of domain {named - 1}, but there are domains={domains}; give {named}, or None.")
    return named if domains is None else domains


def knock_out(
    model: Any,
    params: Any,
    batches: Sequence[Any],
    router: Mapping[str, Any] | None = None,
    domains: int | None = None,
    experts: Iterable[tuple[int, int]] | None = None,
) -> Effects:
    """The rise of the loss without each expert, one at a time; by default of all experts."""
    every = [(n, e) for n in range(model.n_moe_layers) for e in range(model.moe.E)] if experts is None else [*experts]
    Z = count_domains(batches, domains)
    measure = partial(masked_losses, model, params, batches, router, domains=Z)
    base, without = measure(), [measure(mask_experts(model, [one])) for one in every]
    rise_PZ = np.reshape([one.by_domain_Z - base.by_domain_Z for one in without], (len(every), Z))
    return Effects(tuple(every), base, np.array([one.mean - base.mean for one in without]), rise_PZ)


def substitute(model: Any, params: Any, layer: int, old: int, new: int) -> Any:
    """The parameters with which every choice of expert `old` is computed by expert `new`, at the same weight.

    Replaces the weights of `old` by those of `new`; without drops this equals sending the rows to `new`.
    """
    check_expert(model, layer, old)
    check_expert(model, layer, new)
    at = moe_path(model, layer)
    module = dict(params[at.stack][at.module])
    for name in model.moe.experts.params:
        module[name] = jnp.asarray(module[name]).at[at.repeat, old].set(module[name][at.repeat, new])
    return {**params, at.stack: {**params[at.stack], at.module: module}}
