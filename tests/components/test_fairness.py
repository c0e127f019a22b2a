"""Differences between groups: by plain loops, planted ones are found, and chance alone hardly ever is."""

from typing import NamedTuple

import numpy as np
import pytest

from moe_jax.inspect.fairness import METRICS, Columns, fairness
from moe_jax.inspect.resample import as_it_is, bootstrap

E, N, K = 8, 2, 2


class Planted(NamedTuple):
    """Advantage of one group (the last) over the others."""

    drop: float = 0.0
    nowhere: float = 0.0
    entropy: float = 0.0
    loss: float = 0.0


FAIR = Planted()


def recorded(seed: int, planted: Planted = FAIR, sequences=60, length=12, groups=3, mixed=False):
    """A recording of random routing; sequences differ among themselves. Groups are whole sequences unless mixed."""
    rng = np.random.default_rng(seed)
    sequence_T = np.arange(sequences).repeat(length)
    group_T = rng.integers(groups, size=len(sequence_T)) if mixed else sequence_T % groups
    last_T = (group_T == groups - 1).astype(float)
    own_T = rng.normal(size=sequences)[sequence_T]  # tokens of a sequence are alike
    T = len(sequence_T)
    rate_T = np.clip(0.1 + 0.05 * own_T + planted.drop * last_T, 0, 1)
    kept_TNK = rng.uniform(size=(T, N, K)) >= rate_T[:, None, None]
    expert_TNK = rng.integers(E, size=(T, N, K)).astype(np.int16)
    expert_TNK[rng.uniform(size=(T, N, K)) < 0.1 + planted.nowhere * last_T[:, None, None]] = E
    entropy_TN = 1 + 0.2 * own_T[:, None] + planted.entropy * last_T[:, None] + 0.1 * rng.normal(size=(T, N))
    loss_T = 2 + own_T + planted.loss * last_T + rng.normal(size=T)
    loss_T[rng.uniform(size=T) < 0.1] = np.nan
    return Columns(expert_TNK, kept_TNK & (expert_TNK < E), entropy_TN, sequence_T, loss_T, E), group_T


def by_hand(rec, group_T, g):
    """The four metrics of a group."""
    asked = reached = tokens = nats = targets = 0
    entropy = 0.0
    for t in np.flatnonzero(group_T == g):
        for n, k in np.ndindex(N, K):
            asked += rec.expert_TNK[t, n, k] < E
            reached += rec.expert_TNK[t, n, k] < E and rec.kept_TNK[t, n, k]
        tokens += N
        entropy += rec.entropy_TN[t].sum()
        if not np.isnan(rec.loss_T[t]):
            nats, targets = nats + rec.loss_T[t], targets + 1
    return [(asked - reached) / asked, reached / tokens, entropy / tokens, nats / targets]


@pytest.mark.parametrize("mixed", [False, True])
def test_differences_equal_plain_loops(mixed):
    """Values, and the bootstrap itself, drawn sequence by sequence with the same counts."""
    rec, group_T = recorded(0, mixed=mixed)
    found = fairness(rec, group_T, resamples=50)
    assert found.groups == (0, 1, 2)
    assert found.sequences == tuple(len(set(rec.sequence_T[group_T == g])) for g in range(3))
    for i, g in enumerate(found.groups):
        np.testing.assert_allclose([found.value[m][i] for m in METRICS], by_hand(rec, group_T, g), rtol=1e-12)
    counts_RQ = np.random.default_rng(0).multinomial(60, np.full(60, 1 / 60), size=50)
    draws = []
    for count_Q in counts_RQ:
        rows = np.concatenate([np.flatnonzero(rec.sequence_T == q) for q in range(60) for _ in range(count_Q[q])])
        again = Columns(*(a[rows] for a in rec[:5]), E)
        draws.append([by_hand(again, group_T[rows], g) for g in range(3)])
    low_AM, high_AM = np.percentile(draws, [2.5, 97.5], axis=0)
    for m, metric in enumerate(METRICS):
        np.testing.assert_allclose(found.interval[metric], [low_AM[:, m], high_AM[:, m]], rtol=1e-9)
    gap = found.largest("loss")
    a, b = gap.groups
    assert gap.difference == pytest.approx(found.value["loss"][a] - found.value["loss"][b])
    ends = np.percentile(np.array(draws)[:, a, 3] - np.array(draws)[:, b, 3], [2.5, 97.5])
    np.testing.assert_allclose([gap.low, gap.high], ends, rtol=1e-9)
    values = found.value["loss"]
    assert abs(gap.difference) == pytest.approx(values.max() - values.min())
    assert len(found.gaps) == 3 * len(METRICS)


@pytest.mark.parametrize(
    ("metric", "planted"),
    [
        ("drop_rate", Planted(drop=0.2)),
        ("active_compute", Planted(nowhere=0.3)),
        ("entropy", Planted(entropy=0.5)),
        ("loss", Planted(loss=2.5)),
    ],
)
def test_planted_unfairness_is_found(metric, planted):
    """Against the last group alone, in its metric, and the interval holds the truth."""
    rec, group_T = recorded(1, planted)
    found = fairness(rec, group_T, resamples=500)
    pairs = {gap.groups for gap in found.unfair if gap.metric == metric}
    assert pairs == {(0, 2), (1, 2)}
    assert {gap.metric for gap in found.unfair} <= {metric, "active_compute" if planted.drop else metric}
    truth = {"drop_rate": -planted.drop, "entropy": -planted.entropy, "loss": -planted.loss}.get(metric)
    if truth is not None:
        gap = next(g for g in found.gaps if g.metric == metric and g.groups == (0, 2))
        assert gap.low < truth < gap.high
        assert gap.high < 0


def test_chance_is_hardly_ever_found():
    """On groups without a difference anything at all is found at most at the stated rate, beyond sampling error."""
    simulations, level, false = 200, 0.1, 0
    for seed in range(simulations):
        rec, group_T = recorded(100 + seed, sequences=90, length=3)
        false += bool(fairness(rec, group_T, level, resamples=200).unfair)
    assert false / simulations <= level + np.sqrt(level * (1 - level) / simulations)
    assert false > 0  # or the level would mean nothing


def test_errors_of_differences():
    """The standard error of a difference of ratios, sequence by sequence, of groups that share sequences."""
    rng = np.random.default_rng(7)
    sums_QAM2 = rng.uniform(0.5, 1.5, size=(40, 3, 2, 2))
    found = as_it_is(sums_QAM2)
    for m in range(2):
        for a, b in ((0, 1), (1, 2), (2, 2)):
            parts = np.zeros(40)
            for g, sign in ((a, 1), (b, -1)):
                n_Q, d_Q = sums_QAM2[:, g, m].T
                parts += sign * (n_Q - n_Q.sum() / d_Q.sum() * d_Q) / d_Q.sum()
            assert found.error_RMAA[0, m, a, b] == pytest.approx(np.sqrt((parts**2).sum()), abs=1e-7)
    draws = bootstrap(sums_QAM2, 1000, 0)
    spread = (draws.value_RAM[:, 0] - draws.value_RAM[:, 1]).std(0)
    np.testing.assert_allclose(found.error_RMAA[0, :, 0, 1], spread, rtol=0.1)


def test_tokens_of_a_sequence_are_not_independent():
    """Where they are all alike, the interval is as wide as sequences differ, not tokens."""
    rec, group_T = recorded(2, sequences=60, length=50)
    loss_T = np.random.default_rng(3).normal(size=60)[rec.sequence_T]
    found = fairness(rec._replace(loss_T=loss_T), group_T)
    width = np.diff(found.interval["loss"], axis=0).mean()
    assert width == pytest.approx(2 * 1.96 / np.sqrt(20), rel=0.25)


def test_a_certain_difference():
    """Constants that differ between groups are found for sure; equal constants are not."""
    rec, group_T = recorded(4, groups=2)
    rec = rec._replace(expert_TNK=np.zeros_like(rec.expert_TNK), kept_TNK=np.ones_like(rec.kept_TNK))
    assert not fairness(rec, group_T, resamples=100).largest("active_compute").found
    rec.kept_TNK[group_T == 1, :, 1] = False
    found = fairness(rec, group_T, resamples=100)
    assert found.largest("active_compute").found
    assert found.largest("active_compute").difference == 1
    assert found.largest("drop_rate").difference == -0.5


def test_who_is_compared():
    """Negative groups are nobody's, rare groups are left out and named, a metric that nobody has is not there."""
    rec, group_T = recorded(5)
    group_T = np.where(rec.sequence_T == 0, 7, np.where(rec.sequence_T == 1, -1, group_T))
    found = fairness(rec._replace(loss_T=np.full_like(rec.loss_T, np.nan)), group_T, resamples=50, least=10)
    assert (found.groups, found.left_out) == ((0, 1, 2), (7,))
    assert set(found.value) == set(METRICS) - {"loss"}
    with pytest.raises(ValueError, match="no metric 'loss'"):
        found.largest("loss")


def test_what_cannot_be_compared():
    rec, group_T = recorded(6)
    for call, words in (
        (lambda: fairness(rec, group_T[1:]), "719 groups for 720 tokens"),
        (lambda: fairness(rec, group_T.astype(float)), "Groups are float64"),
        (lambda: fairness(rec, group_T, level=0.05, resamples=20), "at least 2 / level"),
        (lambda: fairness(rec, group_T * 0), "fewer than two are in 20 sequences"),
        (lambda: fairness(rec, group_T, least=21), "0 in 20, 1 in 20, 2 in 20"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
