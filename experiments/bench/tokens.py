"""Tokens and a gate that give a learned router a chosen distribution: it still computes logits and chooses.

balanced   every expert has equally many rows
real       a gate at initialisation, and tokens in clusters of very different sizes
skewed     the first expert has half of all rows, or all tokens where each visits more than two experts
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from experiments.bench.shapes import Shape

PULLS = (4, 8, 16, 32, 64)  # strength of a token's direction to its experts, against noise of unit variance
CLUSTERS = 64
TOGETHER = 0.3  # fraction of a token's variance that its cluster explains
SEED = 0


class Tokens(NamedTuple):
    """Tokens of a batch, and their routing by TopK."""

    x_TD: Float[np.ndarray, "T D"]
    gate_DE: Float[np.ndarray, "D E"]
    expert_TK: Int[np.ndarray, "T K"]  # unordered

    def count_GE(self, S: int) -> Int[np.ndarray, "G E"]:
        """Counts choices of each expert, by groups of S tokens."""
        E = self.gate_DE.shape[1]
        return np.stack([np.bincount(group.ravel(), minlength=E) for group in self.expert_TK.reshape(-1, S, self.K)])

    @property
    def K(self) -> int:
        return self.expert_TK.shape[1]

    @property
    def load(self) -> float:
        """Rows of the busiest expert over the mean."""
        rows_E = self.count_GE(len(self.expert_TK))[0]
        return float(rows_E.max() / rows_E.mean())


def balanced(shape: Shape) -> Tokens:
    """Tokens that choose experts in turn."""
    token_T1 = np.arange(shape.T)[:, None]
    return drawn(shape, (token_T1 * shape.K + np.arange(shape.K)) % shape.E)


def skewed(shape: Shape) -> Tokens:
    """Tokens that all choose the first expert (every second one for K=1), and the others in turn."""
    token_T1, others = np.arange(shape.T)[:, None], shape.E - 1
    if shape.K == 1:
        return drawn(shape, np.where(token_T1 % 2, 1 + token_T1 // 2 % others, 0))
    rest_Tk = 1 + (token_T1 * (shape.K - 1) + np.arange(shape.K - 1)) % others
    return drawn(shape, np.concatenate([np.zeros_like(token_T1), rest_Tk], axis=1))


def real(shape: Shape) -> Tokens:
    """Tokens in clusters of Zipfian sizes; a sequence has tokens of a few clusters."""
    rng = np.random.default_rng(SEED)
    center_CD = normal(rng, CLUSTERS, shape.D)
    popular_C = 1 / np.arange(1, CLUSTERS + 1)
    some_Gc = rng.choice(CLUSTERS, (shape.T // shape.L, 8), p=popular_C / popular_C.sum())
    cluster_GS = np.take_along_axis(some_Gc, rng.integers(0, 8, (len(some_Gc), shape.L)), axis=1)
    own, shared = (1 - TOGETHER) ** 0.5, TOGETHER**0.5
    x_TD = own * normal(rng, shape.T, shape.D) + shared * center_CD[cluster_GS.ravel()]
    gate_DE = normal(rng, shape.D, shape.E) * np.float32(shape.D**-0.5)
    return Tokens(x_TD, gate_DE, chosen(x_TD, gate_DE, shape))


ROUTINGS: dict[str, Callable[[Shape], Tokens]] = {"balanced": balanced, "real": real, "skewed": skewed}


def drawn(shape: Shape, expert_TK: Int[np.ndarray, "T K"]) -> Tokens:
    """Tokens in the direction of the gate's columns of their experts, far enough that exactly these are chosen."""
    rng = np.random.default_rng(SEED)
    gate_DE, noise_TD = directions(rng, shape.D, shape.E), normal(rng, shape.T, shape.D)
    toward_TD = sum(gate_DE.T[expert_TK[:, k]] for k in range(shape.K))
    wanted_TK = np.sort(expert_TK, axis=1)
    for pull in PULLS:
        x_TD = noise_TD + np.float32(pull) * toward_TD
        if (np.sort(chosen(x_TD, gate_DE, shape), axis=1) == wanted_TK).all():
            return Tokens(x_TD, gate_DE, expert_TK)
    raise ValueError(f"{shape.name}: no tokens of width D={shape.D} choose just these of E={shape.E} experts.")


def directions(rng: np.random.Generator, D: int, E: int) -> Float[np.ndarray, "D E"]:
    """E unit vectors, orthogonal where E <= D."""
    gate_DE = normal(rng, D, E)
    if E <= D:
        return np.ascontiguousarray(np.linalg.qr(gate_DE)[0])
    return gate_DE / np.linalg.norm(gate_DE, axis=0)


def chosen(x_TD: Float[np.ndarray, "T D"], gate_DE: Float[np.ndarray, "D E"], shape: Shape) -> Int[np.ndarray, "T K"]:
    """The experts of the K largest logits of the tokens in their type."""
    logits_TE = x_TD.astype(jnp.dtype(shape.dtype)).astype(np.float32) @ gate_DE
    return np.argpartition(-logits_TE, shape.K - 1, axis=1)[:, : shape.K]


def normal(rng: np.random.Generator, *size: int) -> Float[np.ndarray, "..."]:
    return rng.standard_normal(size, np.float32)
