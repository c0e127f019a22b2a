"""Differences between groups of tokens in drop rate, compute, entropy and loss, with bootstrap intervals."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from moe_jax.inspect.look import LayerTrace
from moe_jax.inspect.resample import Drawn, as_it_is, bootstrap

METRICS = ("drop_rate", "active_compute", "entropy", "loss")
LEAST = 20  # sequences of a group that is compared with others
NOTHING = 1e-9  # a difference this small, relative to the values, is rounding


class Columns(NamedTuple):
    """Columns of a recording that are needed here, under the same names: a row for each token."""

    expert_TNK: Int[np.ndarray, "T N K"]  # E is the padding id
    kept_TNK: Bool[np.ndarray, "T N K"]
    entropy_TN: Float[np.ndarray, "T N"]
    sequence_T: Int[np.ndarray, "T"]
    loss_T: Float[np.ndarray, "T"]  # NaN where nothing is predicted
    E: int


def columns_of_trace(trace: LayerTrace) -> Columns:
    """Columns from a trace of a model."""
    entropy_NT = -(trace.probs_NTE * np.log(np.maximum(trace.probs_NTE, 1e-30))).sum(-1)
    expert_TNK, kept_TNK = (a.swapaxes(0, 1) for a in (trace.expert_NTK, trace.kept_NTK))
    return Columns(expert_TNK, kept_TNK, entropy_NT.T, trace.sequence_T, trace.loss_T, trace.probs_NTE.shape[-1])


class Gap(NamedTuple):
    """The difference of a metric between two groups, first less second, and whether chance would hardly give it."""

    metric: str
    groups: tuple[int, int]
    difference: float
    low: float
    high: float
    found: bool


class Fairness(NamedTuple):
    """Metrics by group, each with its interval [2], and the differences of all pairs of groups."""

    groups: tuple[int, ...]
    sequences: tuple[int, ...]  # that each group has tokens in
    value: Mapping[str, Float[np.ndarray, "A"]]
    interval: Mapping[str, Float[np.ndarray, "2 A"]]
    gaps: tuple[Gap, ...]
    left_out: tuple[int, ...]  # groups in too few sequences

    def largest(self, metric: str) -> Gap:
        """The pair of groups that is furthest apart; ValueError where the metric was not measured."""
        own = [gap for gap in self.gaps if gap.metric == metric]
        if not own:
            names = ", ".join(self.value)
            raise ValueError(f"There is no metric {metric!r} of several groups; there are {names}.")
        return max(own, key=lambda gap: abs(gap.difference))

    @property
    def unfair(self) -> tuple[Gap, ...]:
        """The differences that are found."""
        return tuple(gap for gap in self.gaps if gap.found)


def fairness(
    rec: Any,
    group_T: np.ndarray,
    level: float = 0.05,
    resamples: int = 2000,
    seed: int = 0,
    least: int = LEAST,
) -> Fairness:
    """Differences between groups of a recording's tokens; negative numbers are no group.

    drop_rate: choices that did not reach their expert / choices. active_compute: choices that did, per token and layer.
    entropy: of the router, nats, mean over layers. loss: nats per target.

    Tokens of a sequence are not independent: sequences are drawn with replacement, intervals are percentiles at
    `level` (Efron and Tibshirani 1993, ch. 13; Cameron, Gelbach and Miller 2008 for clusters). Each interval holds for
    itself. A difference is `found` where its distance from zero, in standard errors, exceeds the 1 - level quantile of
    the largest deviation over pairs and metrics in the bootstrap, each in its own standard error (the bootstrap-t,
    with the maximum of Romano and Wolf 2005), so that groups without differences yield any finding with
    probability of about `level`.

    least: groups in fewer sequences are left out. ValueError where not two groups are left.
    """
    check_groups(rec, group_T, level, resamples)
    names, groups, sums_QAM2 = sums(rec, group_T)
    here_A = (sums_QAM2[..., 1] > 0).any(-1).sum(0)
    kept_A = here_A >= least
    if kept_A.sum() < 2:
        counts = ", ".join(f"{g} in {n}" for g, n in zip(groups, here_A, strict=True))
        raise ValueError(
            f"Of the groups ({counts} sequences), fewer than two are in {least} sequences; record more, or lower least."
        )
    sums_QAM2, used = sums_QAM2[:, kept_A], groups[kept_A]
    sample, draws = as_it_is(sums_QAM2), bootstrap(sums_QAM2, resamples, seed)
    value_AM = sample.value_RAM[0]
    measured = [m for m in range(len(names)) if np.isfinite(value_AM[:, m]).all()]
    low, high = 100 * level / 2, 100 * (1 - level / 2)
    return Fairness(
        tuple(int(g) for g in used),
        tuple(int(n) for n in here_A[kept_A]),
        {names[m]: value_AM[:, m] for m in measured},
        {names[m]: np.nanpercentile(draws.value_RAM[..., m], [low, high], axis=0) for m in measured},
        all_gaps(sample, draws, [int(g) for g in used], {m: names[m] for m in measured}, level),
        tuple(int(g) for g in groups[~kept_A]),
    )


def between_domains(rec: Any, domain_T: np.ndarray, sequence_T: np.ndarray) -> Fairness | None:
    """Differences between domains; None where there are not two with enough sequences."""
    sequences = [len(np.unique(sequence_T[domain_T == z])) for z in np.unique(domain_T[domain_T >= 0])]
    return fairness(rec, domain_T, least=LEAST) if sum(n >= LEAST for n in sequences) > 1 else None


def check_groups(rec: Any, group_T: np.ndarray, level: float, resamples: int) -> None:
    """Refuses groups and options that cannot be compared."""
    if len(group_T) != len(rec.sequence_T):
        raise ValueError(f"There are {len(group_T)} groups for {len(rec.sequence_T)} tokens; give one for each.")
    if not np.issubdtype(np.asarray(group_T).dtype, np.integer):
        raise ValueError(f"Groups are {np.asarray(group_T).dtype}; give whole numbers, the negative ones for no group.")
    if not 0 < level < 1 or resamples < 2 / level:
        raise ValueError(f"level={level} and resamples={resamples}: give 0 < level < 1, and at least 2 / level draws.")


def sums(rec: Any, group_T: np.ndarray) -> tuple[tuple[str, ...], np.ndarray, Float[np.ndarray, "Q A M 2"]]:
    """Metrics, groups, and numerators and denominators by sequence, group and metric."""
    real_T = np.asarray(group_T) >= 0
    groups, group_of_T = np.unique(np.asarray(group_T)[real_T], return_inverse=True)
    sequences, sequence_of_T = np.unique(rec.sequence_T[real_T], return_inverse=True)
    taken_TNK, kept_TNK = rec.expert_TNK[real_T] < rec.E, rec.kept_TNK[real_T]
    layers, ones_T = taken_TNK.shape[1], np.ones(real_T.sum())
    taken_T, kept_T = taken_TNK.sum((1, 2)), (taken_TNK & kept_TNK).sum((1, 2))
    target_T = np.isfinite(rec.loss_T[real_T])
    columns = {
        "drop_rate": (taken_T - kept_T, taken_T),
        "active_compute": (kept_T, layers * ones_T),
        "entropy": (rec.entropy_TN[real_T].sum(1), layers * ones_T),
        "loss": (np.where(target_T, rec.loss_T[real_T], 0), target_T),
    }
    sums_QAM2 = np.zeros((len(sequences), len(groups), len(METRICS), 2))
    for m, name in enumerate(METRICS):
        for i, column_T in enumerate(columns[name]):
            np.add.at(sums_QAM2[..., m, i], (sequence_of_T, group_of_T), column_T)
    return METRICS, groups, sums_QAM2


def all_gaps(sample: Drawn, draws: Drawn, groups: list[int], names: Mapping[int, str], level: float) -> tuple[Gap, ...]:
    """The differences of all pairs of groups in these metrics, tested together."""
    pairs = [(m, a, b) for m in names for a in range(len(groups)) for b in range(a + 1, len(groups))]
    if not pairs:
        return ()
    m_P, a_P, b_P = np.array(pairs).T
    gap_P = sample.value_RAM[0, a_P, m_P] - sample.value_RAM[0, b_P, m_P]
    least_P = NOTHING * np.maximum(np.abs(sample.value_RAM[0, a_P, m_P]), np.abs(sample.value_RAM[0, b_P, m_P]))
    draw_RP = draws.value_RAM[:, a_P, m_P] - draws.value_RAM[:, b_P, m_P]
    found_P = found(
        gap_P, sample.error_RMAA[0, m_P, a_P, b_P], draw_RP, draws.error_RMAA[:, m_P, a_P, b_P], least_P, level
    )
    low_P, high_P = np.nanpercentile(draw_RP, [100 * level / 2, 100 * (1 - level / 2)], axis=0)
    return tuple(
        Gap(names[m], (groups[a], groups[b]), float(gap_P[p]), float(low_P[p]), float(high_P[p]), bool(found_P[p]))
        for p, (m, a, b) in enumerate(pairs)
    )


def found(
    gap_P: Float[np.ndarray, "P"],
    error_P: Float[np.ndarray, "P"],
    draw_RP: Float[np.ndarray, "R P"],
    error_RP: Float[np.ndarray, "R P"],
    least_P: Float[np.ndarray, "P"],
    level: float,
) -> Bool[np.ndarray, "P"]:
    """Tells which differences are further from zero, in standard errors, than the largest deviation of a resample.

    A difference that is equal in all sequences is found if it exceeds rounding (`least_P`). One whose resamples
    too often have zero standard error, since almost all sequences agree, is not found.
    """
    sure_P, usable_RP = error_P <= least_P, error_RP > least_P
    judged_P = ~sure_P & (usable_RP.mean(0) >= 1 - level / 10)
    away_RP = np.where(usable_RP, np.abs(draw_RP - gap_P) / np.where(usable_RP, error_RP, 1), 0)
    bound = np.quantile(away_RP[:, judged_P].max(1), 1 - level) if judged_P.any() else np.inf
    return np.where(sure_P, np.abs(gap_P) > least_P, judged_P & (np.abs(gap_P) > bound * error_P))
