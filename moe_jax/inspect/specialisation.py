"""Specialisation of experts by domain and token, with permutation tests."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from moe_jax.inspect.balance import divide
from moe_jax.inspect.recording import Recording


class Specialisation(NamedTuple):
    """Experts by class of token."""

    class_A: Int[np.ndarray, "A"]
    tokens_A: Int[np.ndarray, "A"]
    share_NEA: Float[np.ndarray, "N E A"]  # fraction of the class's tokens that chose the expert
    lift_NEA: Float[np.ndarray, "N E A"]  # share_NEA over the share of all tokens; 1: no preference; NaN: never chosen


def specialisation_by(rec: Recording, class_T: Int[np.ndarray, "T"], least: int = 1) -> Specialisation:
    """OLMoE's specialisation (arXiv:2409.02060, sec. 5.3, 5.4): share(e, a) = n_ea / n_a.

    Of classes with >= `least` tokens; n_ea are those of class a with e among their K choices.
    lift(e, a) = (n_ea / n_a) / (n_e / T).
    """
    class_A, at_T, tokens_A = np.unique(np.asarray(class_T), return_inverse=True, return_counts=True)
    count_NEA = np.moveaxis(counts(rec, at_T, len(class_A)), 1, 2)
    of_all_NE1 = count_NEA.sum(2, keepdims=True) / max(rec.tokens, 1)
    often = tokens_A >= least
    share_NEA = count_NEA[..., often] / tokens_A[often]
    return Specialisation(class_A[often], tokens_A[often], share_NEA, divide(share_NEA, of_all_NE1))


def domain_specialisation(rec: Recording) -> Specialisation:
    """Specialisation by domain, for domains whose name is known."""
    known = rec.where(rec.domain_T >= 0)
    return specialisation_by(known, known.domain_T)


def vocabulary_specialisation(rec: Recording, least: int = 8) -> Specialisation:
    """Specialisation by token id, for ids that occur at least `least` times."""
    known = rec.where(rec.token_T >= 0)
    return specialisation_by(known, known.token_T, least)


def counts(rec: Recording, class_T: Int[np.ndarray, "T"], classes: int) -> Int[np.ndarray, "N classes E"]:
    """Tokens of each class that chose each expert, counted once if they chose it twice."""
    E, found = rec.E, []
    for n in range(rec.layers):
        ids_TK = np.sort(rec.expert_TNK[:, n].astype(np.int64), 1)
        fresh_TK = np.diff(ids_TK, axis=1, prepend=-1) != 0
        cell_TK = class_T[:, None] * (E + 1) + ids_TK
        found.append(np.bincount(cell_TK[fresh_TK], minlength=classes * (E + 1)).reshape(classes, E + 1)[:, :E])
    return np.stack(found)


class Information(NamedTuple):
    """Mutual information of domain and expert, by layer, and its probability by chance."""

    nats_N: Float[np.ndarray, "N"]
    chance_N: Float[np.ndarray, "N"]  # mean over permutations: the bias of a finite sample
    p_N: Float[np.ndarray, "N"]


def mutual_information(count_ZE: np.ndarray) -> np.ndarray:
    """I = sum_ze p_ze log(p_ze / (p_z p_e)), nats, of a table of counts; tables may be stacked in front."""
    p_ZE = divide(count_ZE, count_ZE.sum((-2, -1), keepdims=True))
    by_chance_ZE = p_ZE.sum(-1, keepdims=True) * p_ZE.sum(-2, keepdims=True)
    ratio_ZE = np.divide(p_ZE, by_chance_ZE, out=np.ones_like(p_ZE), where=p_ZE > 0)
    return (p_ZE * np.log(ratio_ZE)).sum((-2, -1))


def domain_information(rec: Recording, permutations: int = 199, seed: int = 0) -> Information:
    """I(domain; expert) over choices, and a permutation test against chance.

    Whole sequences exchange their domains, as tokens of one sequence are not independent of each other.
    p = (b + 1) / (m + 1), where b of m permutations reach the measured value (Phipson and Smyth, arXiv:1603.05766).
    """
    known = rec.where(rec.domain_T >= 0)
    _, first_Q, at_T = np.unique(known.sequence_T, return_index=True, return_inverse=True)
    domain_Q = known.domain_T[first_Q].astype(int)
    check_recorded(known, domain_Q, at_T, permutations)
    count_NQE, rng = counts(known, at_T, len(domain_Q)).astype(float), np.random.default_rng(seed)
    seen_N = _information(domain_Q, count_NQE)
    drawn_MN = np.stack([_information(rng.permutation(domain_Q), count_NQE) for _ in range(permutations)])
    reached_N = (drawn_MN >= seen_N - 1e-12).sum(0)  # tolerates another order of summation
    return Information(seen_N, drawn_MN.mean(0), (reached_N + 1) / (permutations + 1))


def _information(domain_Q: np.ndarray, count_NQE: np.ndarray) -> np.ndarray:
    hot_ZQ = (np.arange(domain_Q.max() + 1)[:, None] == domain_Q).astype(float)
    return mutual_information(hot_ZQ @ count_NQE)


def check_recorded(rec: Recording, domain_Q: np.ndarray, at_T: np.ndarray, permutations: int) -> None:
    """Refuses recordings that the permutation test does not apply to."""
    if permutations < 1:
        raise ValueError(f"permutations={permutations} must be at least 1; 199 can show p < 0.01.")
    if (domain_Q[at_T] != rec.domain_T).any():
        raise ValueError("Sequences of this recording hold several domains each; give each sequence one domain.")
    if len(np.unique(domain_Q)) < 2:
        raise ValueError("The recording has tokens of fewer than two known domains; record data of two or more.")
