"""Held-out losses over several batches with unequal numbers of targets: sums first, one division at the end."""

from functools import partial

import jax
import numpy as np
import pytest

from moe_jax import MLP, LMConfig, MoEConfig, Scatter, TopK
from moe_jax.attention import MHA
from moe_jax.data import Batch, NextToken
from moe_jax.evaluate import EvaluationSums, evaluate, evaluation_step

B, L, V = 4, 8, 19
MOE = MoEConfig(E=4, router=TopK(K=2), experts=MLP(F=4), dispatch=Scatter(1.0))
MODEL = LMConfig(V=V, D=8, N=1, attention=MHA(1, 4), moe=MOE, moe_layers="all", remat="none")
DOMAINS = ("news", "code", "unseen")
ENDS = ((8, 8, 8, 8), (8, 2, 0, 0), (1, 0, 0, 0))  # tokens of each row of three batches: 32, 10 and 1 targets
OF_ROWS = ((0, 1, 1, 0), (1, 0, 0, 0), (1, 0, 0, 0))  # their domains


def held_out(i: int) -> Batch:
    """The i-th batch: counting sequences that differ from row to row."""
    row_BL = (np.arange(L + 1)[None] * (3 + i) + np.arange(B)[:, None] * 5 + i).astype(np.int32) % V
    segment_BL = (np.arange(L)[None] < np.array(ENDS[i])[:, None]).astype(np.int32)
    position_BL = np.broadcast_to(np.arange(L, dtype=np.int32), (B, L))
    return Batch(row_BL[:, :-1], row_BL[:, 1:], segment_BL, position_BL, segment_BL > 0, np.array(OF_ROWS[i], np.int32))


@pytest.fixture(scope="module")
def step():
    """The sums of a batch, of a model whose parameters are a formula."""
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), held_out(0))
    params = jax.tree.map(lambda s: np.sin(np.arange(s.size, dtype=np.float32) * 1.7).reshape(s.shape), shapes)
    run = jax.jit(partial(evaluation_step, NextToken(), MODEL, len(DOMAINS)))
    return lambda batch: run(params, {}, batch)


def test_losses_are_means_over_targets_not_over_batches(step):
    """Every target counts alike, in whatever batch: as each row evaluated alone says, weighted by its targets."""
    batches = [held_out(i) for i in range(3)]
    found = evaluate(step, batches, DOMAINS)
    rows = []  # domain, targets, record
    for i, batch in enumerate(batches):
        for b, n in enumerate(ENDS[i]):
            if n:
                alone = {
                    name: getattr(batch, name) * (np.arange(B) == b)[:, None] for name in ("segment_BL", "loss_mask_BL")
                }
                rows.append((OF_ROWS[i][b], n, evaluate(step, [batch._replace(**alone)], DOMAINS)))

    def mean(what, domain=None):
        values = [(n, record[what]) for of_row, n, record in rows if domain in (None, of_row)]
        return sum(n * value for n, value in values) / sum(n for n, _ in values)

    for what in ("loss", "accuracy", "loss_capacity"):
        np.testing.assert_allclose(found[what], mean(what), rtol=1e-5, err_msg=what)
    by_domain = {name: mean("loss", i) for i, name in enumerate(DOMAINS[:2])}  # no row is of the third
    assert found["loss_by_domain"] == pytest.approx(by_domain, rel=1e-5)
    of_batches = [evaluate(step, [batch], DOMAINS)["loss"] for batch in batches]
    assert abs(np.mean(of_batches) - found["loss"]) > 0.01 * found["loss"], "a mean of the batches' means is another"


def test_sums_are_divided_once():
    """Told: 6 nats of 2 targets and 1 of 1 are 7 / 3, not the mean of 3 and 1; so are further terms and hits."""

    def of(*batches):
        sums = iter(
            EvaluationSums(np.array([nats, 0]), np.array([n, 0]), np.ones(()), nats, {"z": np.array(2.0)}, None, None)
            for nats, n in batches
        )
        return evaluate(lambda _: next(sums), [held_out(0)] * len(batches), ("a", "b"))

    expected = {"loss": 7 / 3, "accuracy": 2 / 3, "terms": {"z": 4 / 3}, "loss_by_domain": {"a": 7 / 3}}
    assert of((6.0, 2.0), (1.0, 1.0)) == expected
    with pytest.raises(ValueError, match="no sequences to evaluate on"):
        of((0.0, 0.0))
