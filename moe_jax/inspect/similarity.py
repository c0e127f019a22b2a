"""Similarity of experts by weights, outputs and tokens, and of two routings of the same tokens."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from moe_jax.core.groups import Dense
from moe_jax.inspect.balance import check_same_tokens
from moe_jax.inspect.paths import coactivation
from moe_jax.inspect.recording import Recording
from moe_jax.models.pattern import layer_params


def weight_similarity(model: Any, params: Any, layer: int) -> Float[np.ndarray, "E E"]:
    """Cosine of experts' weights, of all matrices as one vector; 0 for weights of zeros."""
    own = layer_params(model, params, layer)
    flat_EX = np.concatenate(
        [np.asarray(own[n], float).reshape(model.moe.E, -1) for n in sorted(model.moe.experts.params)], 1
    )
    unit_EX = _unit(flat_EX)
    return unit_EX @ unit_EX.T


def output_similarity(model: Any, params: Any, layer: int, x_TD: Float[np.ndarray, "T D"]) -> Float[np.ndarray, "E E"]:
    """Mean over tokens of the cosine between outputs of two experts for the same input; `trace_layers` gives inputs."""
    own, kind = layer_params(model, params, layer), model.moe.experts

    def written(e: int) -> np.ndarray:
        return np.asarray(kind({n: jnp.asarray(own[n][e]) for n in kind.params}, jnp.asarray(x_TD), Dense()), float)

    unit_ETD = np.stack([_unit(written(e)) for e in range(model.moe.E)])
    return np.einsum("etd,ftd->ef", unit_ETD, unit_ETD) / len(x_TD)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-30)


def chosen_together(rec: Recording) -> Float[np.ndarray, "N E E"]:
    """min(n_ij / n_i, n_ij / n_j): 1 where two experts are always chosen together; 0 where one never is."""
    share_NEE = np.nan_to_num(coactivation(rec))
    return np.minimum(share_NEE, share_NEE.swapaxes(1, 2))


def duplicates(similarity_EE: Float[np.ndarray, "E E"], above: float = 0.99) -> list[tuple[int, ...]]:
    """Groups of two and more experts, linked by a similarity of at least `above`, of any of these measures."""
    E, group_E = len(similarity_EE), np.arange(len(similarity_EE))
    for i in range(E):
        linked_E = similarity_EE[i] >= above
        linked_E[i] = True
        group_E[np.isin(group_E, group_E[linked_E])] = group_E[linked_E].min()
    groups = (tuple(int(e) for e in np.flatnonzero(group_E == g)) for g in np.unique(group_E))
    return [g for g in groups if len(g) > 1]


def router_saturation(rec: Recording, final: Recording) -> Float[np.ndarray, "N"]:
    """OLMoE's router saturation (arXiv:2409.02060, sec. 5.1): the mean over tokens of |A_t ∩ A_T| / K.

    A_t are a token's experts in an earlier checkpoint, A_T in the last one; K counts those that were taken in the
    last. ValueError where the recordings are not of the same tokens.
    """
    check_same_tokens(rec, final)
    shared_TN = ((final.expert_TNK[..., None] == rec.expert_TNK[:, :, None]).any(-1) & final.taken_TNK).sum(-1)
    taken_TN = final.taken_TNK.sum(-1)
    return np.nanmean(np.where(taken_TN > 0, shared_TN / np.maximum(taken_TN, 1), np.nan), axis=0)
