"""Ratios of sums over sequences, by group and metric, and their bootstrap over sequences."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

CHUNK = 4_000_000  # numbers held at once


class Drawn(NamedTuple):
    """Metrics of R samples, and the standard errors of their differences between groups, each from its own sample."""

    value_RAM: Float[np.ndarray, "R A M"]
    error_RMAA: Float[np.ndarray, "R M A A"]


def ratios(sums: Float[np.ndarray, "*R A M 2"]) -> Float[np.ndarray, "*R A M"]:
    """The first of the last axis over the second; NaN where there is nothing to divide by."""
    return np.divide(sums[..., 0], sums[..., 1], where=sums[..., 1] > 0, out=np.full(sums.shape[:-1], np.nan))


def as_it_is(sums_QAM2: Float[np.ndarray, "Q A M 2"]) -> Drawn:
    """The sample itself."""
    return _drawn(np.ones((1, len(sums_QAM2))), sums_QAM2)


def bootstrap(sums_QAM2: Float[np.ndarray, "Q A M 2"], resamples: int, seed: int) -> Drawn:
    """Samples of as many sequences, drawn with replacement."""
    parts = [_drawn(count_RQ, sums_QAM2) for count_RQ in _counts(sums_QAM2, resamples, seed)]
    return Drawn(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _counts(sums_QAM2: np.ndarray, resamples: int, seed: int) -> Iterator[Float[np.ndarray, "R Q"]]:
    """Counts of each sequence in each resample, some resamples at a time."""
    (Q, A), rng = sums_QAM2.shape[:2], np.random.default_rng(seed)
    for start in range(0, resamples, step := max(1, CHUNK // (Q + 16 * A * A))):
        yield rng.multinomial(Q, np.full(Q, 1 / Q), size=min(step, resamples - start)).astype(float)


def _drawn(count_RQ: Float[np.ndarray, "R Q"], sums_QAM2: Float[np.ndarray, "Q A M 2"]) -> Drawn:
    """Ratios and standard errors of resamples.

    A ratio r = n / d has the error of the sum of (n_q - r d_q) / d over sequences q (linearisation).
    The error of a difference includes the covariance, as a sequence may have tokens of both groups.
    """
    (R, Q), (_, A, M, _) = count_RQ.shape, sums_QAM2.shape
    total_RAM2 = (count_RQ @ sums_QAM2.reshape(Q, -1)).reshape(R, A, M, 2)
    value_RAM, error_RMAA = ratios(total_RAM2), np.zeros((R, M, A, A))
    for m in range(M):
        n_QA, d_QA = sums_QAM2[:, :, m, 0], sums_QAM2[:, :, m, 1]
        r_RA1, d_RA1 = value_RAM[:, :, m, None], np.maximum(total_RAM2[:, :, m, 1, None], 1e-30)
        r_R1A = r_RA1.swapaxes(1, 2)
        nn, nd, dd = (
            (count_RQ @ (a[:, :, None] * b[:, None]).reshape(Q, -1)).reshape(R, A, A)
            for a, b in ((n_QA, n_QA), (n_QA, d_QA), (d_QA, d_QA))
        )
        cross_RAA = nn - r_R1A * nd - r_RA1 * nd.swapaxes(1, 2) + r_RA1 * r_R1A * dd
        cov_RAA = cross_RAA / (d_RA1 * d_RA1.swapaxes(1, 2))
        own_RA = np.diagonal(cov_RAA, axis1=1, axis2=2)
        variance_RAA = own_RA[:, :, None] + own_RA[:, None] - 2 * cov_RAA
        error_RMAA[:, m] = np.sqrt(np.maximum(variance_RAA, 0))
    return Drawn(value_RAM, error_RMAA)
