"""Balance of a recording: load, dead experts, drops by group of tokens, margins."""

import itertools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from moe_jax.inspect.recording import Recording


class By(NamedTuple):
    """A statistic of each layer by group of tokens, groups in their order."""

    group_A: Int[np.ndarray, "A"]
    tokens_A: Int[np.ndarray, "A"]
    value_AN: Float[np.ndarray, "A N"]  # NaN where there is nothing to count


def divide(a: Any, b: Any) -> np.ndarray:
    """a / b in float64; NaN where b is 0."""
    a, b = np.broadcast_arrays(np.asarray(a, float), np.asarray(b, float))
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b != 0)


def expert_choices(rec: Recording) -> Int[np.ndarray, "N E"]:
    """Number of times each expert was chosen, drops included."""
    each = (np.bincount(rec.expert_TNK[:, n].ravel(), minlength=rec.E + 1)[: rec.E] for n in range(rec.layers))
    return np.stack(list(each))


def expert_load(rec: Recording) -> Float[np.ndarray, "N E"]:
    """Each expert's share of its layer's choices, f_e = n_e / sum_e' n_e'; 1 / E in perfect balance."""
    count_NE = expert_choices(rec)
    return divide(count_NE, count_NE.sum(1, keepdims=True))


def load_percentiles(
    rec: Recording, percent: tuple[int | float, ...] = (0, 10, 25, 50, 75, 90, 100)
) -> Float[np.ndarray, "N _"]:
    """Percentiles over experts of E * load, which is 1 in perfect balance."""
    return np.percentile(rec.E * expert_load(rec), percent, axis=1).T


def load_over_time(rec: Recording, bins: int) -> Float[np.ndarray, "bins N E"]:
    """The load in each of `bins` equal parts of the data, in order."""
    if not 1 <= bins <= rec.tokens:
        raise ValueError(f"bins={bins} must be between 1 and the {rec.tokens} tokens of the recording.")
    edges = np.arange(bins + 1) * rec.tokens // bins
    return np.stack([expert_load(rec.where(slice(a, b))) for a, b in itertools.pairwise(edges)])


def dead_experts(rec: Recording, below: float = 0.0) -> Bool[np.ndarray, "N E"]:
    """Experts whose load is at most `below` of a fair share: E * load <= below; by default those never chosen."""
    return rec.E * expert_load(rec) <= below


def drop_rate_by(rec: Recording, group_T: Int[np.ndarray, "T"]) -> By:
    """Dropped choices as a share of those made, by group: `rec.position_T`, `rec.domain_T`, `rec.sequence_T`, ..."""
    return _by(rec.dropped_TNK.sum(2), rec.taken_TNK.sum(2), group_T)


def entropy_by(rec: Recording, group_T: Int[np.ndarray, "T"]) -> By:
    """Mean entropy of the router's probabilities, nats, by group: `rec.position_T`, `rec.token_T`, ..."""
    return _by(rec.entropy_TN, np.ones_like(rec.entropy_TN), group_T)


def _by(above_TN: np.ndarray, below_TN: np.ndarray, group_T: np.ndarray) -> By:
    """Sums over each group, divided."""
    group_A, at_T, tokens_A = np.unique(np.asarray(group_T), return_inverse=True, return_counts=True)
    above_AN, below_AN = (
        np.stack([np.bincount(at_T, column_T, len(group_A)) for column_T in a_TN.T], 1) for a_TN in (above_TN, below_TN)
    )
    return By(group_A, tokens_A, divide(above_AN, below_AN))


class RepeatedDrops(NamedTuple):
    """Overlap of the tokens that lose a choice in different layers or recordings."""

    share_NN: Float[np.ndarray, "N N"]  # P(other drops in layer j | this drops in layer i); NaN without drops
    chance_N: Float[np.ndarray, "N"]  # P(other drops in layer j), its value under independence


def repeated_drops(rec: Recording, other: Recording | None = None) -> RepeatedDrops:
    """Measures whether the same tokens are dropped, in different layers or in two recordings of the same tokens.

    A token is dropped in a layer that drops any of its choices. For two recordings, the diagonal of `share_NN` compares
    the same layer in both.
    """
    if other is not None:
        check_same_tokens(rec, other)
    a_TN, b_TN = ((r.dropped_TNK.any(2)).astype(float) for r in (rec, rec if other is None else other))
    return RepeatedDrops(divide(a_TN.T @ b_TN, a_TN.sum(0)[:, None]), b_TN.mean(0))


def router_margin(rec: Recording) -> Float[np.ndarray, "T N"]:
    """The K-th largest probability of the router minus the next: how far each choice is from being another one.

    It holds for routers that choose the largest probabilities; with a bias or noise the choices may differ.
    """
    if rec.K >= rec.E:
        raise ValueError(f"All {rec.E} experts are chosen with K={rec.K}, so that none is next; record a K below E.")
    return (rec.top_TNP[..., rec.K - 1] - rec.top_TNP[..., rec.K]).astype(float)


def check_same_tokens(rec: Recording, other: Recording) -> None:
    """Refuses recordings that cannot be compared token by token."""
    shapes = [(r.tokens, r.layers, r.E) for r in (rec, other)]
    names = ("token_T", "position_T", "sequence_T")
    if shapes[0] != shapes[1] or any(not np.array_equal(getattr(rec, n), getattr(other, n)) for n in names):
        raise ValueError(
            f"The recordings are not of the same tokens, layers and experts (these are {shapes[0]} and {shapes[1]}); "
            "record the same batches with both."
        )
