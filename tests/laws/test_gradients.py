"""Gradients are slopes of the reported losses, and an update takes all of them: what no mesh would tell."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import step
from moe_jax.attention import MHA
from moe_jax.config import DataConfig, Experiment, OptimConfig
from moe_jax.data import Batch, Bytes
from moe_jax.dispatch import Scatter
from moe_jax.experts import GLU, MLP
from moe_jax.losses import LoadBalance, RouterZ
from moe_jax.models import LMConfig
from moe_jax.moe import MoEConfig
from moe_jax.optim import AdamW, Constant
from moe_jax.routers import TopK
from tests import oracle_lm

MOE = MoEConfig(
    E=4,
    router=TopK(K=2),
    experts=GLU(F=4),
    shared=MLP(F=4),
    dispatch=Scatter(None),
    losses=(LoadBalance(0.5), RouterZ(0.5)),
)
MODEL = LMConfig(V=257, D=8, N=2, attention=MHA(2, 4), ffn=GLU(F=8), moe=MOE, remat="none")
EXP = Experiment(MODEL, DataConfig(tokenizer=Bytes(), L=8, B=4), OptimConfig(schedule=Constant(0.01)))
STEP = 0.01  # along a direction of length 1
ROUNDING = 4e-4  # of a slope: of losses of about 6 in float32, by STEP


def rows(B: int = 4, L: int = 8) -> Batch:
    """Counting sequences, of which the last has two tokens of padding."""
    tokens = (np.arange(L + 1)[None] * 3 + np.arange(B)[:, None] * 11).astype(np.int32)
    segment = np.ones((B, L), np.int32)
    segment[-1, -2:] = 0
    position = np.broadcast_to(np.arange(L, dtype=np.int32), (B, L))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], segment, position, segment > 0, np.zeros(B, np.int32))
    return jax.tree.map(jnp.asarray, batch)


@pytest.mark.law(3)
def test_gradients_are_slopes_of_the_losses():
    """Law 3, for every parameter: the gradient of task and auxiliary loss is their slope, by central differences."""
    state = step.init(EXP, EXP.optim.build(10)[0])
    specs = step.state_specs(EXP, state, {})
    run = jax.jit(lambda params: step.gradients(EXP, specs, state._replace(params=params), rows()))
    grads, at = jax.device_get(run(state.params))
    rng, tried = np.random.default_rng(0), 0
    for path, grad in jax.tree.leaves_with_path(grads):
        direction = rng.normal(size=grad.shape) + np.sign(grad)
        direction = (direction / np.linalg.norm(direction)).astype(np.float32)

        def moved(size, path=path, direction=direction):
            there = lambda p, w: w + size * direction if p == path else w  # noqa: E731
            _, losses = jax.device_get(run(jax.tree.map_with_path(there, state.params)))
            np.testing.assert_array_equal(losses.stats.choices_E, at.stats.choices_E, "no choice may change")
            return float(losses.loss + losses.aux_loss)

        slope, expected = (moved(STEP) - moved(-STEP)) / (2 * STEP), float((grad * direction).sum())
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        np.testing.assert_allclose(expected, slope, rtol=0.02, atol=ROUNDING, err_msg=name)
        tried += abs(slope) > 10 * ROUNDING
    assert tried > 0.8 * len(jax.tree.leaves(grads)), "most slopes are more than rounding"


def test_an_update_takes_all_gradients():
    """Norm and clip are of all gradients together; an expert without tokens decays as AdamW says."""
    optim = OptimConfig(AdamW(weight_decay=0.5), Constant(0.01), clip=1.0)
    exp = dataclasses.replace(EXP, optim=optim)
    tx, rate = optim.build(10)
    params = {"moe": {"up_EDF": np.arange(12.0).reshape(3, 2, 2) - 5, "router_gate_DE": np.ones((2, 3))}}
    params |= {"norm": {"scale_D": np.ones(2)}}
    grads = {"moe": {"up_EDF": np.full((3, 2, 2), 3.0), "router_gate_DE": np.full((2, 3), -0.1)}}
    grads |= {"norm": {"scale_D": np.array([0.5, 0.0])}}
    grads["moe"]["up_EDF"][1] = 0  # no token went to expert 1
    norm = np.sqrt(8 * 3.0**2 + 6 * 0.1**2 + 0.5**2)
    zero, one = jnp.zeros((), jnp.int32), jnp.ones(())
    as_given = partial(jax.tree.map, lambda a: jnp.asarray(a, jnp.float32))
    state = step.State(zero, as_given(params), tx.init(as_given(params)), {}, zero, zero)
    losses = step.Losses(one, one, one, {}, None)
    after, metrics = step.update(exp, tx, rate, state, as_given(grads), losses)
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-6)
    named = [{jax.tree_util.keystr(p): w for p, w in jax.tree.leaves_with_path(t)} for t in (params, grads)]
    expected = oracle_lm.first_adamw_step(*named, 0.01, 1.0, 0.9, 0.95, 1e-8, 0.5, lambda name: "_D'" not in name)
    for path, value in jax.tree.leaves_with_path(after.params):
        np.testing.assert_allclose(value, expected[jax.tree_util.keystr(path)], rtol=1e-5, err_msg=str(path))
    moments = after.opt_state[1][0]
    np.testing.assert_allclose(moments.mu["moe"]["up_EDF"][0], 0.1 * 3 / norm, rtol=1e-5)
