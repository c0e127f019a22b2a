"""Dependence of choices: of one token within a layer, and from layer to layer."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from moe_jax.inspect.balance import divide
from moe_jax.inspect.recording import Recording

CHUNK = 1 << 16  # tokens at once


def assignments(rec: Recording) -> Iterator[Float[np.ndarray, "N T E"]]:
    """Yields masks of the experts that tokens chose, some tokens at a time."""
    for start in range(0, rec.tokens, CHUNK):
        expert_NTK = np.moveaxis(rec.expert_TNK[start : start + CHUNK], 0, 1).astype(int)
        visit_NTE = np.zeros((*expert_NTK.shape[:2], rec.E + 1), np.float32)
        np.put_along_axis(visit_NTE, expert_NTK, 1, -1)
        yield visit_NTE[..., : rec.E]


def coactivation(rec: Recording) -> Float[np.ndarray, "N E E"]:
    """OLMoE's co-activation (arXiv:2409.02060, sec. 5.2), [i, j] = n_ij / n_i: of the tokens of i, those of j too.

    The diagonal is 1; NaN for an expert that is never chosen.
    """
    both_NEE = np.zeros((rec.layers, rec.E, rec.E))
    for visit_NTE in assignments(rec):
        both_NEE += visit_NTE.swapaxes(1, 2) @ visit_NTE
    return divide(both_NEE, np.diagonal(both_NEE, axis1=1, axis2=2)[..., None])


def transitions(rec: Recording) -> Float[np.ndarray, "M E E"]:
    """[n, i, j] = n_ij / n_i: of the tokens of expert i in layer n, those of expert j in layer n + 1; M = N - 1."""
    both_MEE, own_ME = np.zeros((rec.layers - 1, rec.E, rec.E)), np.zeros((rec.layers - 1, rec.E))
    for visit_NTE in assignments(rec):
        both_MEE += visit_NTE[:-1].swapaxes(1, 2) @ visit_NTE[1:]
        own_ME += visit_NTE[:-1].sum(1)
    return divide(both_MEE, own_ME[..., None])


class Paths(NamedTuple):
    """The first choices of tokens through all layers."""

    distinct: int
    effective: float  # exp of their entropy: number of equally frequent paths with that entropy
    top: tuple[tuple[tuple[int, ...], int], ...]  # the most frequent, with their tokens; E is the padding id


def path_statistics(rec: Recording, top: int = 10) -> Paths:
    """Number of distinct paths through the layers, and the most frequent ones."""
    path_AN, count_A = np.unique(rec.expert_TNK[:, :, 0], axis=0, return_counts=True)
    order_A = np.argsort(-count_A, kind="stable")[:top]
    most = tuple((tuple(int(e) for e in path_AN[a]), int(count_A[a])) for a in order_A)
    return Paths(len(count_A), float(np.exp(_entropy(count_A))), most)


class Dependence(NamedTuple):
    """First choices of consecutive layers, M = N - 1 pairs; tokens without a choice in either left out."""

    agreement_M: Float[np.ndarray, "M"]  # share of tokens with the same expert number in both
    chance_M: Float[np.ndarray, "M"]  # its value under independence: sum_e p_e q_e
    conditional_M: Float[np.ndarray, "M"]  # H(next | this), nats
    entropy_M: Float[np.ndarray, "M"]  # H(next), the value under independence


def layer_dependence(rec: Recording) -> Dependence:
    """Agreement and H(next | this) = H(this, next) - H(this), against independence."""
    found, E = [], rec.E
    for a_T, b_T in zip(rec.expert_TNK[:, :-1, 0].T, rec.expert_TNK[:, 1:, 0].T, strict=True):
        real_T = (a_T < E) & (b_T < E)
        joint_EE = np.bincount(a_T[real_T].astype(int) * E + b_T[real_T], minlength=E * E).reshape(E, E)
        p_EE = divide(joint_EE, joint_EE.sum())
        chance = (p_EE.sum(1) * p_EE.sum(0)).sum()
        conditional = _entropy(joint_EE) - _entropy(joint_EE.sum(1))
        found.append((np.trace(p_EE), chance, conditional, _entropy(joint_EE.sum(0))))
    return Dependence(*np.array(found, float).reshape(-1, 4).T)


def _entropy(count: Int[np.ndarray, "..."]) -> float:
    """Entropy of a table of counts, in nats."""
    p = count[count > 0] / max(count.sum(), 1)
    return float(-(p * np.log(p)).sum())
